"""The run folder: checkpoints that are whole or do not count, and members rebuilt for inference.

A checkpoint is a folder that is written under a temporary name, synced and renamed; its `manifest.json` (every file's
size and SHA-256) is written last. `epoch_<EE>` is what inference reads, `step_<N>` all that resuming needs. A frozen
backbone is named by file and hash, not stored.
"""

import errno
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from torch import Tensor, nn

from cxrdist import models, recipes
from cxrdist.errors import CheckpointError, UserError
from cxrdist.files import write_atomically
from cxrdist.models import weights as weight_files
from cxrdist.models.chexfound import CheXFound
from cxrdist.recipes import Recipe

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
BACKBONE_FILE = "backbone.safetensors"  # of a run that began with --init random


@dataclass(frozen=True)
class FrozenBackbone:
    """The file that holds a frozen backbone, relative to the run folder where it lies in it, and its SHA-256 (hex)."""

    file: str
    sha256: str


def write_checkpoint(folder: Path, tensors: dict[str, dict[str, Tensor]], documents: dict[str, Any]) -> None:
    """Write `<name>.safetensors` and `<name>.json` files as one checkpoint that is there as a whole or not at all.

    An existing checkpoint of that name is replaced. When the disk is full, a UserError names path and free bytes, and
    what was there before stays.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, group in tensors.items():
            weight_files.write_safetensors(temporary / f"{name}.safetensors", group, {})
        for name, document in documents.items():
            write_atomically(temporary / f"{name}.json", json.dumps(document, indent=1))
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": weight_files.file_sha256(path)}
            for path in sorted(temporary.iterdir())
        }
        write_atomically(temporary / MANIFEST, json.dumps({"format_version": FORMAT_VERSION, "files": files}, indent=1))
        _sync_folder(temporary)
        replaced = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(replaced, ignore_errors=True)
        if folder.exists():
            folder.rename(replaced)
        temporary.rename(folder)
        _sync_folder(folder.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise _disk_error(folder, error) from error
    except UserError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check(folder: Path) -> None:
    """Raise CheckpointError, naming file and fault, unless every file of the manifest is there with its hash."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version, files = manifest["format_version"], dict(manifest["files"])
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no {MANIFEST}: it was not finished") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / MANIFEST} is damaged ({error})") from None
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{folder}: format version {version}, this cxrdist reads {FORMAT_VERSION}")
    for name, expected in files.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise CheckpointError(f"{path} is missing")
        size = path.stat().st_size
        if size != expected["bytes"] or weight_files.file_sha256(path) != expected["sha256"]:
            raise CheckpointError(f"{path} is damaged ({size:,} bytes, {expected['bytes']:,} were written)")


def step_folders(run: Path) -> list[Path]:
    """The `step_<N>` checkpoints of a run, newest first; they may be damaged."""
    return _numbered(run, "step")


def epoch_folders(run: Path) -> list[Path]:
    """The `epoch_<EE>` checkpoints of a run, newest first; they may be damaged."""
    return _numbered(run, "epoch")


def newest_step(run: Path) -> tuple[Path | None, list[str]]:
    """The newest step checkpoint that is whole, or None, and a warning for each newer one that is not."""
    warnings = []
    for replaced in (run / "checkpoints").glob(".*.old"):  # killed between two renames of write_checkpoint
        name = replaced.with_name(replaced.name.removeprefix(".").removesuffix(".old"))
        if not name.exists():
            replaced.rename(name)
    for folder in step_folders(run):
        try:
            check(folder)
        except CheckpointError as error:
            warnings.append(f"{error}; going back to the checkpoint before it")
            continue
        return folder, warnings
    return None, warnings


def keep_newest_steps(run: Path, count: int) -> None:
    """Delete all but the `count` newest step checkpoints, and what an interrupted save left."""
    for folder in step_folders(run)[count:]:
        shutil.rmtree(folder, ignore_errors=True)
    remove_unfinished(run)


def remove_unfinished(run: Path) -> None:
    """Delete temporary folders of interrupted saves."""
    for ending in ("tmp", "old"):
        for folder in (run / "checkpoints").glob(f".*.{ending}"):
            shutil.rmtree(folder, ignore_errors=True)


def read_recipe(run: Path) -> Recipe:
    """The recipe that a run folder was trained with; UserError when there is none."""
    path = run / "recipe.json"
    try:
        return recipes.from_json(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {run} is not a run folder of cxrdist.train") from None


def recipe_model(recipe: Recipe) -> nn.Module:
    """The model of a recipe with random weights, on the CPU."""
    sizes: dict[str, Any] = dict(recipe.model_kwargs)
    return models.build_model(recipe.model, recipe.image_size, drop_rate=recipe.drop_rate, **sizes)


def read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """The tensors of one file of a checkpoint that was checked."""
    return weight_files.read_safetensors(folder / f"{name}.safetensors")[0]


def read_document(folder: Path, name: str) -> dict[str, Any]:
    """The JSON document of a checkpoint that was checked."""
    return dict(json.loads((folder / f"{name}.json").read_text(encoding="utf-8")))


def write_frozen(model: nn.Module, run: Path) -> FrozenBackbone:
    """Write the frozen backbone of a model that began at random into the run folder, once, and name it."""
    path = run / BACKBONE_FILE
    if not path.exists():
        own = model.state_dict()
        weight_files.write_safetensors(path, {name: own[name] for name in models.frozen_names(model)}, {})
    return FrozenBackbone(BACKBONE_FILE, weight_files.file_sha256(path))


def load_frozen(model: nn.Module, run: Path, frozen: FrozenBackbone) -> None:
    """Load a frozen backbone from the file that a run names; UserError when it is missing or another one."""
    path = run / frozen.file
    remedy = f"{run} was trained on it; put the file back or train again"
    if not path.is_file():
        raise UserError(f"{path}: the frozen backbone is not there; {remedy}")
    if weight_files.file_sha256(path) != frozen.sha256:
        raise UserError(f"{path}: is another file than the frozen backbone it should be (SHA-256 differs); {remedy}")
    if path.name != BACKBONE_FILE:
        weight_files.load_backbone(cast(CheXFound, model), path)
        return
    tensors, _ = weight_files.read_safetensors(path)
    names = set(models.frozen_names(model))
    if tensors.keys() != names:
        raise UserError(f"{path}: {len(tensors.keys() ^ names)} tensors differ from this model's backbone; {remedy}")
    model.load_state_dict(tensors, strict=False)


def load_member(run: Path, epoch: int, weights: Literal["ema", "model"] = "ema") -> tuple[Recipe, nn.Module]:
    """The recipe of a run and its model after `epoch` (from 1), in eval mode on the CPU, checked file by file.

    Raises UserError when the epoch is not there (naming those that are) and CheckpointError when it is damaged.
    """
    recipe = read_recipe(run)
    folder = run / "checkpoints" / f"epoch_{epoch:02d}"
    if not folder.is_dir():
        there = ", ".join(str(int(path.name.removeprefix("epoch_"))) for path in reversed(epoch_folders(run)))
        raise UserError(f"{folder} is not there; {run} has epochs: {there or 'none yet'}; train on with --resume")
    try:
        check(folder)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; copy it anew, or train again from an earlier checkpoint") from None
    meta = read_document(folder, "meta")
    model = recipe_model(recipe)
    if meta["frozen"] is not None:
        load_frozen(model, run, FrozenBackbone(**meta["frozen"]))
    models.load_trained_state_dict(model, read_tensors(folder, weights), str(folder))
    return recipe, model.eval()


def _numbered(run: Path, kind: str) -> list[Path]:
    found = (
        (int(match[1]), path)
        for path in (run / "checkpoints").glob(f"{kind}_*")
        if (match := re.fullmatch(rf"{kind}_(\d+)", path.name)) and path.is_dir()
    )
    return [path for _, path in sorted(found, reverse=True)]


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _disk_error(path: Path, error: OSError) -> UserError:
    parent = next((folder for folder in path.parents if folder.exists()), Path("/"))
    free = shutil.disk_usage(parent).free
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"{path}: the disk is full ({free:,} bytes free in {parent}); make room and --resume")
    return UserError(f"{path}: cannot be written ({error.strerror}; {free:,} bytes free in {parent})")
