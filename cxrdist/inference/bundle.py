"""A bundle: one folder with all that a trained model needs in use, and nothing of the machine that it was made on.

  config.json         what the members are, how images are prepared and scores averaged
  task.json           labels; calibration.json, where there is one
  model.safetensors   every checkpoint's tensors under its number, every frozen backbone once
  manifest.json       size and SHA-256 of these, written last; README.md, the model card, may be edited

The layout is Hugging Face's, so that a folder can be uploaded as it is.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Literal

import torch
from torch import nn

from cxrdist.documents import BUNDLE, Document
from cxrdist.errors import CheckpointError, UserError
from cxrdist.files import check_outputs, is_recorded, write_output
from cxrdist.inference.members import Ensemble
from cxrdist.inference.passes import Member
from cxrdist.models import architecture_of
from cxrdist.models.architecture import Tensors
from cxrdist.models.weights.fit import load_backbone
from cxrdist.models.weights.safetensors import file_sha256, read_safetensors, tensors_sha256, write_safetensors
from cxrdist.recipes import Recipe
from cxrdist.runs import checkpoint
from cxrdist.runs.documents import FileEntry, Manifest, StoredImages
from cxrdist.runs.member import build_model
from cxrdist.scoring.operating import FILE as CALIBRATION
from cxrdist.scoring.operating import Calibration, identity
from cxrdist.scoring.tables import Average, Checkpoint
from cxrdist.task import Task

TASK, WEIGHTS, CARD = "task.json", "model.safetensors", "README.md"
OFFICIAL = "give the official file with --backbone FILE"


@dataclass(frozen=True, kw_only=True)
class BundledCheckpoint(Document):
    """One set of weights. number: its tensors are named NUMBER.NAME; backbone: the number of its frozen one."""

    number: int
    recipe: Recipe
    checkpoint: Checkpoint
    backbone: int | None = None


@dataclass(frozen=True, kw_only=True)
class BundledMember(Document):
    name: str
    weight: float
    checkpoints: tuple[BundledCheckpoint, ...]


@dataclass(frozen=True, kw_only=True)
class Config(Document):
    """`config.json`. images: how a file becomes pixels. average: of views, checkpoints and members.

    backbones: by number, whether the frozen backbone is in the weights; one that is not is known by its hash.
    """

    library_name: Literal["cxrdist"] = "cxrdist"
    format_version: Literal[1] = 1
    cxrdist: str
    images: StoredImages
    average: Literal["prob", "logit"]
    members: tuple[BundledMember, ...]
    backbones: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        numbers = [item.number for member in self.members for item in member.checkpoints]
        if not numbers or sorted(numbers) != list(range(len(numbers))):
            raise UserError("its checkpoints are not numbered from 0")
        if any(not member.checkpoints for member in self.members):
            raise UserError("it has a member without a checkpoint")
        used = {item.backbone for member in self.members for item in member.checkpoints} - {None}
        if used != set(range(len(self.backbones))):
            raise UserError("its frozen backbones are not those of its checkpoints")


@dataclass(frozen=True, eq=False)
class Bundle:
    """A bundle as it was read, its models on the CPU."""

    task: Task
    ensemble: Ensemble
    stored: StoredImages
    how: Average
    calibration: Calibration | None


def write_bundle(
    out: Path,
    task: Task,
    ensemble: Ensemble,
    stored: StoredImages,
    how: Literal["prob", "logit"],
    *,
    version: str,
    card: str,
    calibration: Calibration | None = None,
    with_backbone: bool = True,
) -> list[str]:
    """Write the files of the folder, but ONNX ones and the manifest, which `write_manifest` writes last; their names.

    with_backbone: False leaves frozen backbones out; they are then named by their hash.
    """
    tensors: Tensors = {}
    backbones: dict[str, int] = {}
    members, number = [], 0
    for member in ensemble.members:
        items = []
        for item in member.checkpoints:
            architecture, model = architecture_of(item.model), ensemble.models[item.sha256]
            trained = architecture.trained_state_dict(model)
            tensors |= {f"{number}.{name}": tensor for name, tensor in trained.items()}
            backbone = None
            if item.backbone_sha256 is not None:
                backbone = backbones.setdefault(item.backbone_sha256, len(backbones))
                if with_backbone:
                    state, names = model.state_dict(), architecture.frozen_names(model)
                    tensors |= {f"backbone{backbone}.{name}": state[name] for name in names}
            known = dataclasses.replace(item, source=PurePath(item.source).name)  # no folder of the machine
            items.append(
                BundledCheckpoint(
                    number=number, recipe=ensemble.recipes[item.sha256], checkpoint=known, backbone=backbone
                )
            )
            number += 1
        members.append(BundledMember(name=member.name, weight=member.weight, checkpoints=tuple(items)))
    config = Config(
        cxrdist=version,
        images=stored,
        average=how,
        members=tuple(members),
        backbones=(with_backbone,) * len(backbones),
    )
    write_safetensors(out / WEIGHTS, tensors, {"format": "pt"}, recorded=True)
    write_output(out / BUNDLE, config.to_json())
    write_output(out / TASK, task.to_json())
    if calibration is not None:
        write_output(out / CALIBRATION, calibration.to_json())
    write_output(out / CARD, card)
    return [WEIGHTS, BUNDLE, TASK, *([] if calibration is None else [CALIBRATION])]


def check_folder(out: Path, inputs: Sequence[Path], more: Sequence[str] = ()) -> None:
    """UserError, before any work, where a bundle must not be written."""
    names = (BUNDLE, TASK, CALIBRATION, WEIGHTS, CARD, *more, checkpoint.MANIFEST)
    check_outputs([out / name for name in names], inputs, folder=out)


def write_manifest(out: Path, names: Sequence[str]) -> str:
    """Name these files with their sizes and hashes, and remove what an earlier export left beside them.

    Returns the manifest's SHA-256 (hex), by which the bundle can be known.
    """
    for path in (*out.glob(CALIBRATION), *out.glob("*.onnx")):
        if path.name not in names and is_recorded(path):
            path.unlink()
    files = {name: FileEntry(bytes=(out / name).stat().st_size, sha256=file_sha256(out / name)) for name in names}
    write_output(out / checkpoint.MANIFEST, Manifest(files=files).to_json())
    return file_sha256(out / checkpoint.MANIFEST)


def load_bundle(folder: Path, backbone: Path | None = None) -> Bundle:
    """The bundle in `folder`, every file checked first. backbone: of a bundle that leaves its frozen one out.

    Raises UserError where a file is missing, changed, or of a form that this cxrdist does not read.
    """
    try:
        checkpoint.check(folder)
    except CheckpointError as error:
        raise UserError(f"{error}; this is not the bundle that was exported: copy or export it again") from None
    listed = Manifest.read(folder / checkpoint.MANIFEST).files
    if missing := [name for name in (BUNDLE, TASK, WEIGHTS) if name not in listed]:
        raise UserError(f"{folder / checkpoint.MANIFEST}: does not list {missing[0]}; export the bundle again")
    config, task = Config.read(folder / BUNDLE), Task.read(folder / TASK)
    calibration = None
    if CALIBRATION in listed:
        calibration = Calibration.read(folder / CALIBRATION)
        if found := task.differences(calibration.task):
            raise UserError(f"{folder / CALIBRATION}: is of another task ({found[0]}); export the bundle again")
    elif (folder / CALIBRATION).exists():
        raise UserError(f"{folder / CALIBRATION}: is not of this bundle; calibrate, then export again")
    tensors = read_safetensors(folder / WEIGHTS)[0]
    ensemble = Ensemble()
    first: dict[int, nn.Module] = {}
    for member in config.members:
        for item in member.checkpoints:
            model = _load(folder, item, task, tensors, first, config, backbone)
            ensemble.models[item.checkpoint.sha256] = model
            ensemble.recipes[item.checkpoint.sha256] = item.recipe
        ensemble.members.append(
            Member(member.name, tuple(item.checkpoint for item in member.checkpoints), member.weight)
        )
    if calibration is not None:
        calibration.require(
            identity([(member.weight, member.checkpoints) for member in ensemble.members], config.average),
            folder / CALIBRATION,
        )
    return Bundle(task, ensemble, config.images, config.average, calibration)


def _load(
    folder: Path,
    item: BundledCheckpoint,
    task: Task,
    tensors: Tensors,
    first: dict[int, nn.Module],
    config: Config,
    backbone: Path | None,
) -> nn.Module:
    """One checkpoint's model. first: the model that holds each frozen backbone, which the others then share."""
    architecture, source = architecture_of(item.recipe.model), f"{folder / WEIGHTS}, checkpoint {item.number}"
    own = {name.partition(".")[2]: tensor for name, tensor in tensors.items() if _number(name) == str(item.number)}
    with torch.device("meta"):  # compared before memory is used
        shape = build_model(item.recipe, task, to_load=True)
        architecture.check_trained(shape, own, source)
        frozen = architecture.frozen_names(shape)
    if bool(frozen) != (item.backbone is not None):
        raise UserError(f"{folder / BUNDLE}: checkpoint {item.number} is of a model with another backbone")
    model = build_model(item.recipe, task, to_load=True)
    architecture.load_trained_state_dict(model, own, source)
    if item.backbone is not None:
        if item.backbone in first:
            architecture.share_frozen(model, first[item.backbone])
        elif config.backbones[item.backbone]:
            prefix = f"backbone{item.backbone}"
            given = {name.partition(".")[2]: tensor for name, tensor in tensors.items() if _number(name) == prefix}
            if given.keys() != set(frozen):
                raise UserError(f"{folder / WEIGHTS}: its {prefix} does not fit {item.recipe.model}; export again")
            model.load_state_dict(given, strict=False)
        else:
            if backbone is None:
                official = architecture.official
                file = official.names[0] if official is not None else "its file"
                raise UserError(f"{folder}: leaves out the frozen backbone of {item.recipe.model} ({file}); {OFFICIAL}")
            load_backbone(architecture, model, backbone)
            if tensors_sha256(model.state_dict(), frozen) != item.checkpoint.backbone_sha256:
                raise UserError(f"--backbone {backbone}: is not the frozen backbone of {folder}; {OFFICIAL}")
        first.setdefault(item.backbone, model)
    return model.eval()


def _number(name: str) -> str:
    return name.partition(".")[0]
