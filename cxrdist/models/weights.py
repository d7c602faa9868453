"""Weight files: the one place that reads them, whatever their layout, and that writes safetensors.

A file is recognised by its content, not its name, and turned into the names of our modules (see `eva_x`, `chexfound`):

| layout | file | what is in it |
|---|---|---|
| eva_x_mim | official `eva_x_*_mim.pt` | backbone in EVA-02 names; `norm` becomes `fc_norm`; the head is new |
| eva_x_finetuned | official fine-tuned EVA-X | as above, with a head for another data set's labels, left out |
| chexfound_teacher | `teacher_checkpoint.pth` | backbone in block chunks; the self-supervision heads are left out |
| glori | `glori.pth` + `results_eval_linear.json` | one head per learning rate; the JSON names the best |
| published_eva_x, published_chexfound | the competition solution's epochs | weights, EMA, optimizer state |
| cxrdist | our safetensors | anything `write_safetensors` wrote |

Nothing is unpickled but tensors, containers, numbers and the few data classes in `_SAFE_GLOBALS`.
"""

import argparse
import hashlib
import json
import math
import os
import pathlib
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.models.eva import Eva
from torch import Tensor, nn

from cxrdist.errors import UserError
from cxrdist.models import chexfound, eva_x
from cxrdist.models.chexfound import CheXFound

Tensors = dict[str, Tensor]
WEIGHTS_FOLDER = Path("weights")
EVA_X_FILES = {
    "eva_x": "eva_x_base_patch16_merged520k_mim.pt",
    "eva_x_small": "eva_x_small_patch16_merged520k_mim.pt",
    "eva_x_tiny": "eva_x_tiny_patch16_merged520k_mim.pt",
}
TEACHER_FILE, GLORI_FILE, RESULTS_FILE = "teacher_checkpoint.pth", "glori.pth", "results_eval_linear.json"
EVA_X_SOURCE = "https://huggingface.co/MapleF/eva_x (linked from https://github.com/hustvl/EVA-X)"
CHEXFOUND_SOURCE = "the Google Drive folder linked from https://github.com/RPIDIAL/CheXFound"
_WIDTHS = {192: "eva_x_tiny", 384: "eva_x_small", 768: "eva_x"}

# What official files hold beside tensors, all of it data: the run's arguments, and numbers that numpy wrote.
_SAFE_GLOBALS: list[Any] = [
    argparse.Namespace,
    pathlib.PosixPath,
    np.dtype,
    *(type(np.dtype(name)) for name in ("float64", "float32", "int64", "int32", "bool")),
    (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),
    (np.float64(0).__reduce__()[0], "numpy._core.multiarray.scalar"),
]


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes; UserError when it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors atomically: to a temporary file beside `path`, synced, then renamed over it.

    UserError names the path and the free bytes when the disk is full; what was there before is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode  # the user's own; save_file leaves files that only their owner can read
        # safetensors refuses tensors that share memory, and writes nothing but contiguous ones
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, temporary, metadata or {})
        temporary.chmod(mode)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, SafetensorError) as error:
        disk = os.statvfs(path.parent) if path.parent.is_dir() else None
        free = f"; {disk.f_bavail * disk.f_frsize:,} bytes are free there" if disk else ""
        raise UserError(f"{path}: cannot be written ({error}){free}") from None
    finally:
        temporary.unlink(missing_ok=True)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (CPU) and metadata of a safetensors file; UserError when it is missing, cut short or another format."""
    _check_readable(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}); get it again or make it again") from None


def safe_torch_load(path: Path) -> Any:
    """What `torch.save` wrote, without running code from the file: tensors, containers, numbers, argparse.Namespace.

    Raises UserError for anything else (named), for a file cut short, and for a file that is no torch file.
    """
    _check_readable(path)
    try:
        with torch.serialization.safe_globals(_SAFE_GLOBALS), path.open("rb") as file:
            # Mapped into memory where torch can: ranks share the pages, and what is not used is not read.
            # torch would choose a reader by the suffix .safetensors; we go by content.
            mapped = zipfile.is_zipfile(path) and path.suffix != ".safetensors"
            return torch.load(path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # whatever a damaged or foreign pickle provokes inside torch's reader
        code = re.search(r"(?:GLOBAL|unrecognized function|class) `?([\w.]+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and code:
            raise UserError(
                f"{path}: refused, reading it could run code ({code[1]}); use the file from its official source"
            ) from None
        reason = "no pickle of tensors" if isinstance(error, pickle.UnpicklingError) else str(error)[:80].split("\n")[0]
        raise UserError(
            f"{path}: cut short, altered, or not a torch file ({reason or type(error).__name__}); get it again"
        ) from None


def _check_readable(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    with path.open("rb") as file:
        start = file.read(64).lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise UserError(f"{path}: is a web page, not weights; download the file itself")
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: is a Git LFS pointer, not weights; fetch the file itself (git lfs pull)")
    if not start:
        raise UserError(f"{path}: is empty; get it again")


def _is_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") <= path.stat().st_size


@dataclass(frozen=True)
class WeightFile:
    """What one weight file, or several that belong together, holds, in our names. Tensors are on the CPU, as stored.

    Attributes:
        tensors: the weights; where a file holds nothing but an EMA, the EMA's.
        ema: the EMA's weights, None where there are none.
        optimizer: AdamW's state by parameter name (`step`, `exp_avg`, `exp_avg_sq`), None where there is none.
        epoch: the published run's epoch, from 1.
        report: one line that says what was found, chosen and left out.
    """

    paths: tuple[Path, ...]
    layout: str
    model: Literal["eva_x", "chexfound"]
    tensors: Tensors
    report: str
    ema: Tensors | None = None
    optimizer: dict[str, Tensors] | None = None
    epoch: int | None = None


def init_files(model: str, init: Path | None) -> tuple[Path, ...]:
    """The files that `--init` stands for: FILE, several as FILE,FILE, a folder with the official files, or None.

    None looks into `weights/`. Raises UserError that says which file to get, from where, when one is missing.
    """
    if init is not None and not init.is_dir():
        files = (init,) if init.is_file() else tuple(Path(part) for part in str(init).split(","))
        for path in files:
            if not path.is_file():
                raise UserError(f"--init {path}: there is no such file")
        return files
    folder = WEIGHTS_FOLDER if init is None else init
    names: tuple[str, ...] = (TEACHER_FILE, GLORI_FILE)
    if model == "chexfound":
        source = CHEXFOUND_SOURCE
        hint = (
            f" (--init {folder / TEACHER_FILE} starts with a fresh head)" if (folder / TEACHER_FILE).is_file() else ""
        )
    else:
        names, source, hint = (EVA_X_FILES[model],), EVA_X_SOURCE, ""
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        beside = f", with {RESULTS_FILE} beside it" if GLORI_FILE in missing else ""
        raise UserError(
            f"{model} needs {' and '.join(missing)} in {folder}/{beside}: get it from {source}; "
            f"neither repository states a licence in a file of its own, so ask its authors before you pass weights on"
            f"{hint}; --init FILE takes other weights, --init random none"
        )
    return tuple(folder / name for name in names)


def default_init_path(model: str) -> Path:
    """What `load_init` takes when `--init` is not given: EVA-X's file, or the folder with CheXFound's two files.

    Raises UserError that says which file to get and from where.
    """
    files = init_files(model, None)
    return files[0] if len(files) == 1 else files[0].parent


def read_weights(path: Path, *more: Path) -> WeightFile:
    """Read a weight file of any layout the module's table lists, or several that complete each other.

    Several: a backbone and a head, or the weights and the EMA of one published epoch.
    Raises UserError when a file is missing, cut short, hostile, of no known layout, or does not belong to the others.
    """
    found = _read_one(path)
    for other in more:
        found = _together(found, _read_one(other))
    return found


def load_init(
    model: nn.Module, path: Path, *, weights: Literal["model", "ema"] = "model", complete: bool = False
) -> str:
    """Copy a weight file into `model` and return a line that says what was found, adapted and left fresh.

    Position embeddings are brought to the model's input size by the model's own rule; a head of 40 classes is adapted
    to fewer as published (all queries and outputs stay, the first are used, a fresh zero bias).

    Args:
        path: FILE, FILE,FILE, or a folder with the official files (see `init_files`).
        weights: "ema" takes the EMA's weights where the file holds both.
        complete: refuse a file without a head; otherwise backbones alone leave the model's head as it is.
    Raises UserError, before anything is copied, that lists what is missing, unexpected or of another shape.
    """
    kind = "chexfound" if isinstance(model, CheXFound) else _eva_x_name(model)
    files = init_files(kind, path)
    found = read_weights(*files)
    tensors = found.ema if weights == "ema" and found.ema is not None else found.tensors
    chosen = ", EMA weights" if weights == "ema" and found.ema is not None else ""
    fitted, notes = _fit(model, replace(found, tensors=tensors), complete)
    model.load_state_dict(fitted, strict=False)
    return "; ".join([found.report + chosen, *notes])


def load_backbone(model: CheXFound, path: Path) -> str:
    """Copy only the frozen backbone of a file (any layout that holds one) into `model`; as `load_init` otherwise."""
    found = read_weights(path)
    tensors = {name: tensor for name, tensor in found.tensors.items() if name.startswith("backbone.")}
    fitted, notes = _fit(model, replace(found, tensors=tensors), complete=False)
    model.load_state_dict(fitted, strict=False)
    return "; ".join([found.report, "backbone alone", *(note for note in notes if "head" not in note)])


def _read_one(path: Path) -> WeightFile:
    _check_readable(path)
    if _is_safetensors(path):
        tensors, metadata = read_safetensors(path)
        return _from_tensors(path, tensors, f"made from {metadata['layout']}, " if "layout" in metadata else "")
    raw = safe_torch_load(path)
    if not isinstance(raw, Mapping):
        raise UserError(f"{path}: holds a {type(raw).__name__}, not weights; give a file of weights")
    if "model_state_dict" in raw or "ema_state_dict" in raw:
        return _published_epoch(path, raw)
    where, state = "", raw
    for container in ("teacher", "model_ema", "model", "module", "state_dict"):
        if isinstance(state.get(container), Mapping):
            where, state = f"{where}{container} ", state[container]
    return _from_tensors(path, _flat(path, state), f"under {where.strip()}, " if where else "")


def _from_tensors(path: Path, state: Tensors, where: str) -> WeightFile:
    layout, model, tensors, notes = _our_names(path, state)
    return WeightFile((path,), layout, model, tensors, _report(path, layout, model, where, tensors, notes))


def _published_epoch(path: Path, raw: Mapping[str, Any]) -> WeightFile:
    states = {key: _flat(path, raw[key]) for key in ("model_state_dict", "ema_state_dict") if key in raw}
    ours = {key: _our_names(path, state) for key, state in states.items()}
    _, model, tensors, notes = next(iter(ours.values()))
    epoch = int(raw["epoch"]) if isinstance(raw.get("epoch"), int) else None
    parts = [key.removesuffix("_state_dict") for key in states]
    optimizer = None
    if "optimizer_state_dict" in raw and "model_state_dict" in ours:
        optimizer = _named_optimizer(path, model, ours["model_state_dict"][2], raw["optimizer_state_dict"])
        parts.append("optimizer")
    return WeightFile(
        paths=(path,),
        layout=f"published_{model}",
        model=model,
        tensors=tensors,
        report=_report(path, f"published_{model}", model, f"epoch {epoch}, {' + '.join(parts)}, ", tensors, notes),
        ema=ours["ema_state_dict"][2] if "ema_state_dict" in ours else None,
        optimizer=optimizer,
        epoch=epoch,
    )


def _together(first: WeightFile, second: WeightFile) -> WeightFile:
    names = ", ".join(str(path) for path in (*first.paths, *second.paths))
    if first.model != second.model:
        raise UserError(f"{names}: hold two different models ({first.model}, {second.model}); give files of one")
    report = f"{first.report}; {second.report}"
    paths = (*first.paths, *second.paths)
    layouts = f"{first.layout} + {second.layout}"
    if first.layout == second.layout and first.epoch is not None:
        if first.epoch != second.epoch:
            raise UserError(f"{names}: are of epochs {first.epoch} and {second.epoch}; give files of one epoch")
        weights, ema = (second, first) if first.ema is first.tensors else (first, second)
        if ema.ema is None or weights.ema is not None:
            raise UserError(f"{names}: do not complete each other; give the weights and the EMA of one epoch")
        return replace(weights, paths=paths, report=report, ema=ema.ema)
    both = first.tensors.keys() & second.tensors.keys()
    if both:
        raise UserError(f"{names}: all hold {_listed(both)}; give one file for each part")
    return WeightFile(paths, layouts, first.model, first.tensors | second.tensors, report)


def _flat(path: Path, state: Mapping[Any, Any]) -> Tensors:
    tensors = {name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{path}: holds no tensors under {_listed(map(str, state))}; it is not a file of weights")
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors


def _our_names(path: Path, state: Tensors) -> tuple[str, Literal["eva_x", "chexfound"], Tensors, list[str]]:
    """Layout, model, tensors in our names and order of the file, and notes on what was chosen and left out."""
    heads = [name for name in state if re.match(r"(glori\.)?classifiers_dict\.", name)]
    registers = state.keys() & {"backbone.register_tokens", "backbone.reg_token"}
    if heads or registers or any(name.startswith("glori.") for name in state):
        tensors, notes = _chexfound_names(state)
        layout = "cxrdist"
        if "backbone.register_tokens" in state:
            layout = "published_chexfound" if heads else "chexfound_teacher"
        if heads:
            layout = "glori" if layout == "cxrdist" else layout
            head, name = _choose_classifier(path, state)
            tensors |= head
            notes.append(f"classifier {name}")
        return layout, "chexfound", tensors, notes
    prefixed = all(name.startswith("backbone.") for name in state)
    state = {name.removeprefix("backbone."): tensor for name, tensor in state.items()} if prefixed else state
    if "cls_token" in state and any(name.startswith("blocks.") for name in state):
        tensors, notes = _eva_x_names(state)
        layout = "published_eva_x" if prefixed else "cxrdist"
        if "mask_token" in state:
            layout = "eva_x_mim"
        elif any(re.search(r"\.mlp\.(w1|w12)\.", name) for name in state):
            layout = "eva_x_finetuned"
            for name in ("head.weight", "head.bias"):
                if tensors.pop(name, None) is not None:
                    notes.append(f"left out {name} (labels of another data set)")
        return layout, "eva_x", tensors, notes
    raise UserError(
        f"{path}: holds no weights of EVA-X or CheXFound; its tensors are {_listed(state)}; "
        f"official files: {EVA_X_SOURCE}; {CHEXFOUND_SOURCE}"
    )


def _eva_x_names(state: Tensors) -> tuple[Tensors, list[str]]:
    pretraining = "mask_token" in state
    separate = "blocks.0.attn.q_proj.weight" in state
    tensors: Tensors = {}
    dropped = []
    for name, tensor in state.items():
        if re.search(r"(^|\.)rope\.freqs_(cos|sin)$", name) or name in ("mask_token", "lm_head.weight", "lm_head.bias"):
            dropped.append(name)
            continue
        if pretraining:
            name = re.sub(r"^norm\.", "fc_norm.", name)
        name = name.replace(".mlp.ffn_ln.", ".mlp.norm.").replace(".mlp.w12.", ".mlp.fc1.")
        name = (
            name.replace(".mlp.w1.", ".mlp.fc1_g.").replace(".mlp.w2.", ".mlp.fc1_x.").replace(".mlp.w3.", ".mlp.fc2.")
        )
        if separate:
            name = re.sub(r"\.attn\.([qv])_bias$", r".attn.\1_proj.bias", name)
        tensors[name] = tensor
    return tensors, _left_out(dropped)


def _left_out(names: list[str]) -> list[str]:
    families = ("rope" if "rope." in name else name.removeprefix("backbone.").split(".")[0] for name in names)
    return [f"left out {', '.join(dict.fromkeys(families))}"] if names else []


def _chexfound_names(state: Tensors) -> tuple[Tensors, list[str]]:
    """The backbone and our own head; classifiers of other names are left to `_choose_classifier`."""
    official = "backbone.register_tokens" in state
    tensors: Tensors = {}
    dropped = []
    for name, tensor in state.items():
        if re.match(r"(glori\.)?classifiers_dict\.", name):
            continue
        if official and (name == "backbone.mask_token" or re.match(r"(dino|ibot)_head\.", name)):
            dropped.append(name)
            continue
        if official and name.startswith("backbone."):
            # blocks.<chunk>.<index over all chunks>: the chunk only says how the official code sharded it
            name = re.sub(r"^backbone\.blocks\.\d+\.(\d+)\.", r"backbone.blocks.\1.", name)
            name = name.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")
            name = name.replace("backbone.register_tokens", "backbone.reg_token")
        tensors[name] = tensor
    if official and {"backbone.cls_token", "backbone.pos_embed"} <= tensors.keys():
        # timm's module has no position row for the class token: added to the token itself, once
        position = tensors["backbone.pos_embed"]
        tensors["backbone.cls_token"] = tensors["backbone.cls_token"] + position[:, :1]
        tensors["backbone.pos_embed"] = position[:, 1:]
    return tensors, _left_out(dropped)


def _choose_classifier(path: Path, state: Tensors) -> tuple[Tensors, str]:
    """The best classifier's tensors as `glori.*`, and its name."""
    classifiers: dict[str, Tensors] = {}
    for name, tensor in state.items():
        if match := re.fullmatch(r"(?:glori\.)?classifiers_dict\.(.+?)\.decoder\.(.+)", name):
            classifiers.setdefault(match[1], {})[f"glori.{match[2]}"] = tensor
    if len(classifiers) == 1:
        name, head = next(iter(classifiers.items()))
        return head, name
    best = _best_classifier(path, path.with_name(RESULTS_FILE))
    if best not in classifiers:
        raise UserError(
            f"{path}: has no classifier {best}, which {path.with_name(RESULTS_FILE)} names best, only "
            f"{_listed(classifiers)}; get both files from the same place"
        )
    return classifiers[best], best


def _best_classifier(path: Path, results: Path) -> str:
    """The name in the last record of the official log; a record is a prefix line, a JSON line and an empty one."""
    if not results.is_file():
        raise UserError(f"{path}: holds several classifiers; put {RESULTS_FILE} beside it, which names the best one")
    names = []
    for line in results.read_text(encoding="utf-8").splitlines():
        if line.startswith("{"):
            try:
                names.append(str(json.loads(line)["best_classifier"]["name"]))
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{results}: has a record without best_classifier; get it again") from None
    if not names:
        raise UserError(f"{results}: names no best_classifier; get it again")
    return names[-1]


def _named_optimizer(path: Path, model: str, tensors: Tensors, raw: Mapping[str, Any]) -> dict[str, Tensors]:
    """AdamW state by our names: the published optimizers number the trained parameters in the state dict's order.

    Trained are GLoRI's parameters; of EVA-X all but `cls_token` and `pos_embed`, which its groups left out.
    """
    if model == "chexfound":
        names = [name for name in tensors if name.startswith("glori.")]
    else:
        names = [name for name in tensors if name not in ("cls_token", "pos_embed")]
    try:
        numbers = [number for group in raw["param_groups"] for number in group["params"]]
        state = {
            number: {key: torch.as_tensor(value) for key, value in raw["state"][number].items()} for number in numbers
        }
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: its optimizer state is not AdamW's; start from the weights alone") from None
    fits = len(numbers) == len(names) and all(
        state[number].keys() == {"step", "exp_avg", "exp_avg_sq"}
        and state[number]["exp_avg"].shape == tensors[name].shape
        for number, name in zip(numbers, names, strict=True)
    )
    if not fits:
        raise UserError(
            f"{path}: its optimizer state is for {len(numbers)} parameters that do not match the {len(names)} trained "
            "ones in shape and order; start from the weights alone"
        )
    return {name: state[number] for number, name in zip(numbers, names, strict=True)}


def _fit(model: nn.Module, found: WeightFile, complete: bool) -> tuple[Tensors, list[str]]:
    """The tensors as the model takes them and notes on what was adapted; UserError lists what cannot be."""
    source = ", ".join(str(path) for path in found.paths)
    kind = "chexfound" if isinstance(model, CheXFound) else "eva_x"
    if found.model != kind:
        raise UserError(f"{source}: holds weights of {found.model}, but the model is {kind}; check --model and --init")
    tensors, notes = dict(found.tensors), []
    if isinstance(model, CheXFound):
        head, position, grid, prefix = "glori.", "backbone.pos_embed", model.backbone.patch_embed.grid_size, 0
        resize = chexfound.resize_pos_embed
        if (note := _adapt_classes(model, tensors)) is not None:
            notes.append(note)
    else:
        assert isinstance(model, Eva)
        head, position, grid, prefix = "head.", "pos_embed", model.patch_embed.grid_size, 1
        resize = eva_x.resize_pos_embed
    if position in tensors:
        num_patches = tensors[position].shape[1] - prefix
        side = math.isqrt(num_patches)
        if side * side != num_patches:
            raise UserError(
                f"{source}: {position} is for {num_patches} patches, no square grid; give a model's own file"
            )
        if (side, side) != tuple(grid):
            tensors[position] = resize(tensors[position], tuple(grid))
            notes.append(f"position embedding {side}x{side} -> {grid[0]}x{grid[1]}")
    own = model.state_dict()
    missing = own.keys() - tensors.keys()
    fresh = {name for name in missing if name.startswith(head)}
    if not complete and fresh == {name for name in own if name.startswith(head)}:
        missing -= fresh
        notes.append(f"fresh head ({_listed(sorted(fresh))})")
    _check_fit(source, own, tensors, missing)
    return tensors, notes


def _check_fit(source: str, own: Mapping[str, Tensor], tensors: Tensors, missing: Iterable[str]) -> None:
    shared = own.keys() & tensors.keys()
    shapes = [
        f"{name} {tuple(tensors[name].shape)}, model {tuple(own[name].shape)}"
        for name in sorted(shared)
        if own[name].shape != tensors[name].shape
    ]
    problems = {
        "missing": sorted(missing),
        "unexpected": sorted(tensors.keys() - own.keys()),
        "of another shape": shapes,
        "not finite floating point": [
            name
            for name in sorted(shared)
            if not tensors[name].is_floating_point() or not bool(torch.isfinite(tensors[name]).all())
        ],
    }
    found = [f"{what}: {_listed(names)}" for what, names in problems.items() if names]
    if found:
        width = tensors["cls_token"].shape[-1] if "cls_token" in tensors else None
        hint = f"; its width {width} is that of --model {_WIDTHS[width]}" if shapes and width in _WIDTHS else ""
        if problems["missing"] and all(name.startswith("backbone.") for name in problems["missing"]):
            hint += f"; name the backbone's file too: --init FILE,{TEACHER_FILE}"
        raise UserError(f"{source}: does not fit the model; {'; '.join(found)}{hint}")


def _adapt_classes(model: CheXFound, tensors: Tensors) -> str | None:
    """The published 14-class adaptation of a released head, in place: the bias is replaced by zeros, all else stays."""
    bias = tensors.get("glori.duplicate_pooling_bias")
    if bias is None or len(bias) <= model.num_classes or len(bias) != model.glori.query_embed.num_embeddings:
        return None
    tensors["glori.duplicate_pooling_bias"] = torch.zeros(model.num_classes)
    return f"head of {len(bias)} classes: all queries kept, the first {model.num_classes} used, fresh zero bias"


def _eva_x_name(model: nn.Module) -> str:
    return _WIDTHS.get(getattr(model, "embed_dim", 0), "eva_x")


def _report(path: Path, layout: str, model: str, where: str, tensors: Tensors, notes: list[str]) -> str:
    count = sum(tensor.numel() for tensor in tensors.values())
    return "; ".join([f"{path}: {layout} ({model}), {where}{len(tensors)} tensors, {count:,} values", *notes])


def _listed(names: Iterable[str], limit: int = 8) -> str:
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
