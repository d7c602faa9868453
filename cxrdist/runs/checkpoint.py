"""The run folder's checkpoints: each is complete, or does not count; saved only where the run began.

A checkpoint is a folder that is written under a temporary name, synced and renamed; its `manifest.json` (every file's
size and SHA-256) is written last. `epoch_<EE>` is what inference reads, `step_<N>` all that resume needs. A frozen
backbone is named by its content, not stored with them.
"""

import dataclasses
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cxrdist.documents import Document
from cxrdist.errors import CheckpointError, UserError
from cxrdist.files import LOCK_FILE, disk_errors_named, is_held, sync_folder, write_atomically
from cxrdist.models.weights.safetensors import file_sha256, read_safetensors, write_safetensors
from cxrdist.runs.documents import EpochMeta, FileEntry, Manifest, RunDocument, StepState, read_versioned

MANIFEST = "manifest.json"
Tensors = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """Where a session saves. Methods run on rank 0.

    holder: what the folder's lock file says while no other process took it. state, meta: what every step and epoch
    checkpoint says, but for `changes`, the fields in which one differs.
    """

    path: Path
    id: str
    holder: str = ""
    state: StepState
    meta: EpochMeta
    keep_steps: int

    def require_same(self) -> None:
        """UserError unless the folder is still the one that this run began in, and no other process has taken it."""
        if not (self.path / "recipe.json").exists() or run_id(self.path) != self.id:
            raise UserError(
                f"{self.path} was removed or replaced while the run was at work: nothing more is saved; restore it and "
                "use --resume, or start again"
            )
        if not is_held(self.path, self.holder):
            raise UserError(
                f"{self.path}: another process took the folder, or removed {LOCK_FILE} in it, while the run was at "
                "work: nothing more is saved; end the other, then use --resume"
            )

    def save_step(self, tensors: Tensors, **changes: Any) -> None:
        """Write all that resume needs as `step_<N>`."""
        self.require_same()
        state = dataclasses.replace(self.state, **changes)
        write_checkpoint(step_folder(self.path, state.global_step), tensors, {"state": state})
        self.require_same()
        keep_newest_steps(self.path, self.keep_steps)

    def save_epoch(self, tensors: Tensors, **changes: Any) -> None:
        """Write `epoch_<EE>`, what inference reads."""
        self.require_same()
        meta = dataclasses.replace(self.meta, **changes)
        write_checkpoint(epoch_folder(self.path, meta.epoch), tensors, {"meta": meta})
        self.require_same()


def disk_warning(run: Path, weights: Tensors, num_trained: int, num_epochs: int, num_steps: int, remedy: str) -> str:
    """What to say where the disk of `run` has no room for so many checkpoints of epochs and of steps; '' where it has.

    weights: what `save_epoch` gets. num_trained: numbers of the optimizer's parameters, of two moments each.
    """
    epoch = sum(tensor.nbytes for group in weights.values() for tensor in group.values())
    step = epoch + 8 * num_trained
    need, free = num_epochs * epoch + num_steps * step, shutil.disk_usage(run).free
    if need <= free:
        return ""
    told = f"{num_epochs} of epochs, {epoch:,} bytes each, and {num_steps} of steps, {step:,} bytes each"
    return f"{run}: the checkpoints to come need about {need:,} bytes ({told}), but {free:,} are free: {remedy}"


def run_id(path: Path) -> str:
    """The id in a run folder's run.json; '' of a run of version 1, which has none."""
    return RunDocument.read(path / "run.json").id if (path / "run.json").exists() else ""


def write_checkpoint(folder: Path, tensors: Tensors, documents: Mapping[str, Document]) -> None:
    """Write `<name>.safetensors` and `<name>.json` files as one checkpoint that is there completely or not at all.

    An existing checkpoint of that name is replaced. When the disk is full, a UserError names path and free bytes, and
    what was there before stays.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    replaced = folder.with_name(f".{folder.name}.old")
    try:
        with disk_errors_named(folder):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            for name, group in tensors.items():
                write_safetensors(temporary / f"{name}.safetensors", dict(group), {})
            for name, document in documents.items():
                write_atomically(temporary / f"{name}.json", document.to_json())
            files = {
                path.name: FileEntry(bytes=path.stat().st_size, sha256=file_sha256(path))
                for path in sorted(temporary.iterdir())
            }
            write_atomically(temporary / MANIFEST, Manifest(files=files).to_json())
            sync_folder(temporary)
            shutil.rmtree(replaced, ignore_errors=True)
            if folder.exists():
                folder.rename(replaced)
            temporary.rename(folder)
            sync_folder(folder.parent)
            shutil.rmtree(replaced, ignore_errors=True)
    except UserError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check(folder: Path) -> None:
    """Raise CheckpointError, naming file and fault, unless every file of the manifest is there with its hash."""
    if not (folder / MANIFEST).exists():
        raise CheckpointError(f"{folder}: no {MANIFEST}: it was not finished")
    try:
        manifest = read_versioned(Manifest, folder / MANIFEST)
    except UserError as error:
        raise CheckpointError(f"{error}: the checkpoint is damaged") from None
    for name, expected in manifest.files.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if (size := path.stat().st_size) != expected.bytes or file_sha256(path) != expected.sha256:
            raise CheckpointError(f"{path} is damaged ({size:,} bytes, {expected.bytes:,} were written)")


def step_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step}"


def epoch_folder(run: Path, epoch: int) -> Path:
    return run / "checkpoints" / f"epoch_{epoch:02d}"


def epoch_of(folder: Path) -> int | None:
    """The epoch whose checkpoint `folder` is by its name and place in a run; None for any other folder."""
    number = folder.name.removeprefix("epoch_")
    is_one = folder.parent.name == "checkpoints" and number.isdecimal() and folder.name != number
    return int(number) if is_one else None


def step_folders(run: Path) -> list[Path]:
    """The `step_<N>` checkpoints of a run, newest first; they may be damaged."""
    return [folder for _, folder in _numbered(run, "step")]


def epochs_of(run: Path) -> list[int]:
    """The epochs of a run that have a checkpoint, oldest first; it may be damaged."""
    return [number for number, _ in reversed(_numbered(run, "epoch"))]


def _numbered(run: Path, kind: str) -> list[tuple[int, Path]]:
    found = [(path.name.removeprefix(f"{kind}_"), path) for path in (run / "checkpoints").glob(f"{kind}_*")]
    return sorted(((int(text), path) for text, path in found if text.isdecimal() and path.is_dir()), reverse=True)


def newest_step(run: Path) -> tuple[Path | None, list[str]]:
    """The newest step checkpoint that is complete, or None, and a warning for each newer one that is not."""
    for replaced in (run / "checkpoints").glob(".*.old"):  # killed between two renames of write_checkpoint
        name = replaced.with_name(replaced.name.removeprefix(".").removesuffix(".old"))
        if not name.exists():
            replaced.rename(name)
    warnings: list[str] = []
    for folder in step_folders(run):
        try:
            check(folder)
            return folder, warnings
        except CheckpointError as error:
            warnings.append(f"{error}; going back to the checkpoint before it")
    return None, warnings


def keep_newest_steps(run: Path, count: int) -> None:
    """Delete all but the `count` newest step checkpoints, and what an interrupted save left."""
    for folder in step_folders(run)[count:]:
        shutil.rmtree(folder, ignore_errors=True)
    remove_unfinished(run)


def remove_unfinished(run: Path) -> None:
    """Delete temporary folders of interrupted saves."""
    for folder in (run / "checkpoints").glob(".*"):
        if folder.suffix in (".tmp", ".old"):
            shutil.rmtree(folder, ignore_errors=True)


def read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """The tensors of one file of a checkpoint that was checked."""
    return read_safetensors(folder / f"{name}.safetensors")[0]
