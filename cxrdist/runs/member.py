"""A run's model, rebuilt from its folder: recipe, task, weights and the frozen backbone, found by its content."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from cxrdist import recipes
from cxrdist.documents import read_bounded
from cxrdist.errors import CheckpointError, UserError
from cxrdist.models import Architecture, architecture_of
from cxrdist.models.weights.fit import WEIGHTS_FOLDER, load_backbone
from cxrdist.models.weights.safetensors import file_sha256, is_safetensors, read_safetensors, write_safetensors
from cxrdist.recipes import Recipe
from cxrdist.runs import checkpoint
from cxrdist.runs.documents import EpochMeta, Frozen, RunDocument, read_versioned
from cxrdist.task import Task

BACKBONE_FILE = "backbone.safetensors"  # of a run that began with --init random
Weights = Literal["ema", "model"]
_T = torch.Tensor
FILLS = {_T.uniform_, _T.normal_, _T.erfinv_, _T.mul_, _T.add_, _T.clamp_, _T.div_, _T.fill_, _T.zero_}


@dataclass(frozen=True, eq=False)
class LoadedMember:
    """A run's model after one epoch, in eval mode on the CPU, and what it was trained as.

    from_random: the run is known to have begun from random weights.
    """

    recipe: Recipe
    task: Task
    architecture: Architecture
    model: nn.Module
    meta: EpochMeta
    from_random: bool = False


def read_recipe(run: Path) -> Recipe:
    """The recipe that a run folder was trained with; UserError when there is none."""
    return recipes.from_json(_read(run, "recipe.json"), run / "recipe.json")


def read_task(run: Path) -> Task:
    """The task that a run folder was trained for; UserError when it does not say."""
    if (run / "task.json").exists():
        return Task.read(run / "task.json")
    _, task = recipes.from_json_with_task(_read(run, "recipe.json"), run / "recipe.json")
    if task is None:
        raise UserError(f"{run / 'task.json'}: no such file; {run} is not a complete run folder")
    return task


def _read(run: Path, name: str) -> bytes:
    if not run.is_dir():
        what = "is a file" if run.exists() else "no such folder"
        raise UserError(f"{run}: {what}; give the folder of a run, as `cxrdist train` writes it")
    if not (run / name).is_file():
        raise UserError(f"{run}: holds no {name}, so it is no run folder; give one, as `cxrdist train` writes it")
    return read_bounded(run / name)


def build_model(recipe: Recipe, task: Task, *, to_load: bool = False) -> nn.Module:
    """The model of a recipe for a task's labels with random weights, on the CPU.

    to_load: every tensor is loaded next, so none is drawn: most of the time that a model takes to build.
    """
    with _Undrawn() if to_load else contextlib.nullcontext():
        return architecture_of(recipe.model).build_for(recipe, task.num_labels)


class _Undrawn(TorchFunctionMode):
    """Parameters keep what is in their memory, where they would be filled; buffers are made as usual."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        drawn = func in FILLS and isinstance(args[0], nn.Parameter)
        return args[0] if drawn else func(*args, **(kwargs or {}))


def load_member(run: Path, epoch: int, weights: Weights = "ema", backbone: Path | None = None) -> LoadedMember:
    """A run's model after `epoch` (from 1), checked file by file.

    backbone: where to look first for a frozen backbone. Raises UserError when the epoch is not there (naming those
    that are) and CheckpointError when it is damaged.
    """
    recipe, task = read_recipe(run), read_task(run)
    folder = checkpoint.epoch_folder(run, epoch)
    if not folder.is_dir():
        there = ", ".join(map(str, checkpoint.epochs_of(run)))
        remedy = "name one of these, or train on" if there else "finish it: train"
        raise UserError(f"{folder} is not there; {run} has epochs: {there or 'none yet'}; {remedy} with --resume")
    try:
        checkpoint.check(folder)
        meta = read_versioned(EpochMeta, folder / "meta.json")
    except CheckpointError as error:
        raise CheckpointError(f"{error}; copy it again, or train again from an earlier checkpoint") from None
    if changed := task.differences(meta.task):
        raise UserError(f"{folder} is of another task than {run}: {'; '.join(changed)}")
    architecture, tensors = architecture_of(recipe.model), checkpoint.read_tensors(folder, weights)
    with torch.device("meta"):  # compared before memory is used
        architecture.check_trained(build_model(recipe, task, to_load=True), tensors, str(folder))
    model = build_model(recipe, task, to_load=True)
    if meta.frozen is not None:
        load_frozen(architecture, model, run, meta.frozen, backbone)
    architecture.load_trained_state_dict(model, tensors, str(folder))
    return LoadedMember(recipe, task, architecture, model.eval(), meta, began_random(run, meta))


def began_random(run: Path, meta: EpochMeta) -> bool:
    """Whether the run says that it began from random weights; a version that did not say it wrote their backbone."""
    with contextlib.suppress(UserError):
        if (run / "run.json").exists() and (init := RunDocument.read(run / "run.json").init):
            return init == "random"
    return meta.frozen is not None and Path(meta.frozen.file).name == BACKBONE_FILE


def write_frozen(architecture: Architecture, model: nn.Module, run: Path) -> Frozen:
    """Write the frozen backbone of a model that began at random into the run folder and name it."""
    own = model.state_dict()
    write_safetensors(run / BACKBONE_FILE, {name: own[name] for name in architecture.frozen_names(model)}, {})
    return Frozen(file=BACKBONE_FILE, sha256=file_sha256(run / BACKBONE_FILE))


def load_frozen(architecture: Architecture, model: nn.Module, run: Path, frozen: Frozen, *places: Path | None) -> None:
    """Load the frozen backbone that a run names from wherever its bytes are.

    Looked at in turn: `places` (files, or folders of files), where the run saw it last, the run folder, `weights/`.
    UserError when none is it.
    """
    given = [file for place in places if place is not None for file in (sorted(place.glob("*")) or [place])]
    beside = [run / frozen.file, run / Path(frozen.file).name, run / BACKBONE_FILE]
    candidates = [*given, *beside, *sorted(WEIGHTS_FOLDER.glob("*"))]
    there = [path for path in dict.fromkeys(candidates) if path.is_file()]
    path = next((path for path in there if file_sha256(path) == frozen.sha256), None)
    if path is None:
        looked = ", ".join(map(str, there)) or "no file"
        raise UserError(
            f"{run / frozen.file}: the frozen backbone that {run} was trained on is not there, and {looked} is another "
            f"(SHA-256 {frozen.sha256[:12]}...); put it back, name it with --backbone FILE, or train again"
        )
    tensors = read_safetensors(path)[0] if is_safetensors(path) else {}
    if tensors.keys() == set(architecture.frozen_names(model)):
        model.load_state_dict(tensors, strict=False)
    else:
        load_backbone(architecture, model, path)
