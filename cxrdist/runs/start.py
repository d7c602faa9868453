"""How a run begins: on which rows, in which folder, from which weights, or from where it is resumed."""

import contextlib
import datetime
import importlib.metadata
import platform
import secrets
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import cxrdist
from cxrdist import files, recipes
from cxrdist.errors import UserError
from cxrdist.files import warn_once, write_atomically
from cxrdist.models import architecture_of
from cxrdist.models.weights import fit, layouts
from cxrdist.models.weights.safetensors import file_sha256
from cxrdist.recipe_file import RecipeFile
from cxrdist.recipes import Recipe
from cxrdist.runs import checkpoint, member
from cxrdist.runs.documents import (
    Environment,
    Facts,
    Frozen,
    OwnRecipe,
    RunDocument,
    Sessions,
    StepState,
    read_versioned,
)
from cxrdist.task import Task

RECIPE_FILE = "recipe.py"  # a copy of the user's file that the recipe was made by
RUN_FILES = (
    *("run.json", "recipe.json", RECIPE_FILE, "task.json", "environment.json", "split.csv", member.BACKBONE_FILE),
    *("checkpoints", "metrics.jsonl", "timings.jsonl", "wandb", "wandb_id", "trackio_id", files.LOCK_FILE),
)
SHOWN_PACKAGES = ("torch", "timm", "accelerate", "kornia", "numpy", "safetensors", "simplejpeg")


@dataclass(frozen=True)
class Start:
    """What a run folder offers to begin with: a step checkpoint to restore and its state, or nothing."""

    folder: Path | None = None
    state: StepState | None = None
    finished: bool = False


def read_facts(run: Path) -> Facts:
    """What the run in a folder is trained on; UserError when it cannot be read."""
    try:
        if (run / "run.json").exists():
            return RunDocument.read(run / "run.json").data
        return read_versioned(Facts, run / "data.json")  # version 1
    except UserError as error:
        raise UserError(f"{error}: {run} is not a complete run folder; give another --out") from None


def facts_before(run: Path) -> Facts | None:
    """`read_facts`, or None where they cannot be read, which `find_start` names."""
    with contextlib.suppress(UserError):
        return read_facts(run)
    return None


def check_folder(run: Path, shards: Path) -> None:
    """UserError, before anything is written, where `run` is no place for a run: it is among the shards, holds a link
    under a name that a run uses, or such a file that is of no run.
    """
    with files.disk_errors_named(run):
        if shards.is_dir():
            files.refuse_input(run, shards)
        for name in RUN_FILES:
            files.refuse_links(run / name)
        if (run / "recipe.json").exists():
            return
        if (run / "run.json").exists():  # a start that was interrupted
            RunDocument.read(run / "run.json")
        elif foreign := [name for name in RUN_FILES if name != files.LOCK_FILE and (run / name).exists()]:
            raise UserError(
                f"{run / foreign[0]}: is there and of no run of cxrdist; move it away, or give another --out"
            )


def find_start(
    run: Path,
    recipe: Recipe,
    facts: Facts,
    *,
    resume: bool,
    say: Callable[[str], None],
    own: RecipeFile | None = None,
) -> Start:
    """What to begin with. Raises UserError when the folder is taken, or holds a run that differs in any way.

    own: the user's file that the recipe was made by; one of other bytes makes no difference while the recipe is equal.
    """
    if not (run / "recipe.json").exists():
        if any((run / "checkpoints").glob("*")):
            raise UserError(f"{run} has checkpoints but no recipe.json: not a complete run folder; give another --out")
        if resume:
            say(f"there is no run in {run} to resume: starting from the beginning")
        return Start()
    last_epoch = checkpoint.epoch_folder(run, recipe.epochs)
    if not resume:
        last = checkpoint.epoch_folder(run, member.read_recipe(run).epochs)
        state = "holds a finished run" if last.exists() else "holds an unfinished run: --resume continues it"
        raise UserError(f"{run} {state}; give another --out for a new one")
    changed = recipes.differences(member.read_recipe(run), recipe)
    if changed:
        raise UserError(f"{run} was started with another recipe: {'; '.join(changed)}; undo it, or give another --out")
    compare_facts(run, read_facts(run), facts)
    if own is not None and (run / RECIPE_FILE).exists():
        before = RunDocument.read(run / "run.json").own_recipe
        if before is None or before.sha256 != own.sha256:
            say(f"{own.path} is not as {run} was begun with it (see {run / RECIPE_FILE}), but makes the same recipe")
    with contextlib.suppress(UserError):
        checkpoint.check(last_epoch)
        return Start(finished=True)
    folder, warnings = checkpoint.newest_step(run)
    for warning in warnings:
        say(f"warning: {warning}")
    if folder is None:
        say(f"{run} has no complete checkpoint yet: starting from the beginning")
        return Start()
    say(f"resuming from {folder}")
    if recipes.was_composed((run / "recipe.json").read_bytes()):
        say(f"warning: {run} was begun by a cxrdist that composed the augmentation's steps into one, sharper, warp")
    return Start(folder, read_versioned(StepState, folder / "state.json"))


def compare_facts(run: Path, before: Facts, now: Facts) -> None:
    """UserError that says in what the data of a run and those given now differ."""
    for name in ("task", "split", "folds", "validate_fold", "valid_shards"):
        if (one := getattr(before, name)) != (other := getattr(now, name)):
            shown = f"--{name.replace('_', '-')}" if "fold" in name else name
            raise UserError(f"{run} was started with {shown} {one}, not {other}; give another --out for that")
    if before.shards != now.shards:
        counts = ((label, count, now.positives.get(label)) for label, count in before.positives.items())
        labels = [f"{label} {count} -> {other}" for label, count, other in counts if count != other]
        differs = f"positives differ: {', '.join(labels)}" if labels else "same counts, other images or labels"
        raise UserError(
            f"{run} was started on another shard set ({before.images:,} -> {now.images:,} images; {differs}); "
            "give the same shards, or another --out"
        )


def build(
    recipe: Recipe, task: Task, init: str | None, run: Path, start: Start, backbone: Path | None
) -> tuple[nn.Module, Frozen | None, str]:
    """The model with its starting weights, the file its frozen backbone was read from (None if it was not), and a line
    that says what was read.
    """
    architecture, model = architecture_of(recipe.model), member.build_model(recipe, task)
    if start.state is not None:
        if start.state.frozen is not None:
            named = [Path(part) for part in (init or "").split(",") if part not in ("", "random", "timm")]
            member.load_frozen(architecture, model, run, start.state.frozen, backbone, *named)
        return model, start.state.frozen, f"weights of {start.folder}"
    if init == "random":
        return model, None, "weights: random"
    if init == "timm":
        return model, None, fit.load_download(architecture, model)
    path = Path(init) if init is not None else fit.default_init_path(architecture)
    report = fit.load_init(architecture, model, path)
    if not architecture.frozen_names(model):
        return model, None, report
    for file in fit.init_files(architecture, path):
        names = layouts.read_weights(file, architecture=architecture).tensors
        if any(name.startswith(architecture.frozen) for name in names):
            return model, Frozen(file=str(file.resolve()), sha256=file_sha256(file)), report
    raise UserError(f"--init {path}: holds no backbone for {recipe.model}; give the official backbone's file as well")


def write_id(run: Path, facts: Facts, own: RecipeFile | None = None, init: str | None = None) -> None:
    """Make the folder this run's, before anything else is written in it; a resumed run keeps its id.

    init: as --init says it; of files their names alone are written.
    """
    checkpoint.remove_unfinished(run)
    if (run / "recipe.json").exists():
        return
    made_by = None if own is None else OwnRecipe(file=str(own.path), function=own.name, sha256=own.sha256)
    began = "official" if init is None else ",".join(Path(part).name for part in init.split(","))
    document = RunDocument(id=secrets.token_hex(8), data=facts, init=began, own_recipe=made_by)
    write_atomically(run / "run.json", document.to_json())
    if own is not None:
        write_atomically(run / RECIPE_FILE, own.content)
    else:  # of a start that was interrupted
        (run / RECIPE_FILE).unlink(missing_ok=True)


def write_start(run: Path, recipe: Recipe, task: Task, session: Environment) -> None:
    """What the run is and where it runs; a resumed run adds its session to the list. recipe.json comes last.

    The id, a frozen backbone and the split of a run with folds must be written before.
    """
    path = run / "environment.json"
    sessions: tuple[Environment, ...] = ()
    if path.exists():
        try:
            sessions = read_versioned(Sessions, path).sessions
        except UserError as error:  # where earlier sessions took place changes nothing that is learned
            path.replace(path.with_suffix(".damaged"))
            warn_once(f"{error}; it is kept as {path.with_suffix('.damaged').name}, and a new list begins")
    write_atomically(path, Sessions(sessions=(*sessions, session)).to_json())
    if (run / "recipe.json").exists():
        return
    write_atomically(run / "task.json", task.to_json())
    write_atomically(run / "recipe.json", recipes.to_json(recipe))


def commit_of(project: Path) -> str:
    """The commit of a clone; '' where `project` is none itself: an installed package may lie in somebody's clone."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(project), "rev-parse", "--show-toplevel", "HEAD"]
        told = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()
        if Path(told[0]) == project:
            return told[1]
    return ""


def describe_session(device: torch.device, world_size: int, device_batch_size: int, precision: str) -> Environment:
    """Versions, commit and hardware of this session."""
    return Environment(
        cxrdist=cxrdist.__version__,
        commit=commit_of(Path(__file__).resolve().parents[2]),
        python=platform.python_version(),
        packages={name: importlib.metadata.version(name) for name in SHOWN_PACKAGES},
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {platform.machine()}",
        world_size=world_size,
        device_batch_size=device_batch_size,
        precision=precision,
        started=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
