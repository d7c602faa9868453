"""Weight files of any layout, recognised by their content, not their name, and turned into our modules' names.

What a layout is and how its names become ours is said by the architectures (`recognise`); theirs are tried in turn.

| layout | file | what is in it |
|---|---|---|
| eva_x_mim | official `eva_x_*_mim.pt` | backbone in EVA-02 names; `norm` becomes `fc_norm`; the head is new |
| eva_x_finetuned | official fine-tuned EVA-X | as above, with a head for another data set's labels, left out |
| chexfound_teacher | `teacher_checkpoint.pth` | backbone in block chunks; the self-supervision heads are left out |
| glori | `glori.pth` + `results_eval_linear.json` | one head per learning rate; the JSON names the best |
| published_eva_x, published_chexfound | the competition solution's epochs | weights, EMA, optimizer state |
| cxrdist | our safetensors | anything `write_safetensors` wrote |

Nothing is unpickled but tensors, containers, numbers and the few data classes in `_SAFE_GLOBALS`, and nothing that
declares more bytes than the file has (`_check_declared`): torch would allocate them first.
"""

import argparse
import functools
import mmap
import pathlib
import pickle
import pickletools
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from cxrdist.errors import UserError
from cxrdist.models import ARCHITECTURES
from cxrdist.models.architecture import Architecture, Recognised, Tensors, listed
from cxrdist.models.weights.safetensors import check_readable, is_safetensors, read_safetensors

# What official files hold beside tensors, all of it data: the run's arguments, and numbers that numpy wrote.
_SAFE_GLOBALS: list[Any] = [
    argparse.Namespace,
    *((pathlib.PosixPath, f"{module}.PosixPath") for module in ("pathlib", "pathlib._local")),  # the second: of 3.13
    np.dtype,
    *(type(np.dtype(name)) for name in ("float64", "float32", "int64", "int32", "bool")),
    *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]
# All that weights need of what torch's reader would call; it knows more, some of which take a size and allocate it.
_CALLED = re.compile(
    r"collections (OrderedDict|Counter)|torch\._utils _rebuild_(tensor|tensor_v2|parameter)|torch\.nn\.parameter \w+|"
    r"torch (\w+Storage|Size|device|[a-z]+[0-9]*|bool)|torch\.storage \w+Storage|torch\.serialization _get_layout|"
    r"_codecs encode|(__builtin__|builtins) (set|complex)|argparse Namespace|pathlib(\._local)? PosixPath|"
    r"numpy(\.dtypes)? \w*[dD][tT]ype|numpy\._?core\.multiarray scalar"
)
_LEGACY_PICKLES = 5  # magic number, protocol, system, the object, keys of its storages
MAX_PICKLE = 2**28  # bytes of the pickle in a zip file, of which the largest official one has 200 kB


def safe_torch_load(path: Path) -> Any:
    """What `torch.save` wrote, without running code from the file: tensors, containers, numbers, argparse.Namespace.

    Raises UserError for anything else (named), for a file cut short, and for a file that is no torch file.
    """
    check_readable(path)
    try:
        _check_declared(path)
        with torch.serialization.safe_globals(_SAFE_GLOBALS), path.open("rb") as file:
            # Mapped into memory where torch can: ranks share the pages, and what is not used is not read.
            # torch would choose a reader by the suffix .safetensors; we go by content.
            mapped = zipfile.is_zipfile(path) and path.suffix != ".safetensors"
            return torch.load(path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)
    except UserError:
        raise
    except Exception as error:  # whatever a damaged or foreign pickle provokes inside torch's reader
        reason = str(error)[:80].split("\n")[0] or type(error).__name__
        problem = f"cut short, altered, or not a torch file ({reason}); get it again"
        if isinstance(error, pickle.UnpicklingError):
            problem = "cut short, altered, or no pickle of tensors; get it again"
            if code := re.search(r"(?:GLOBAL|unrecognized function|class) `?([\w.]+)", str(error)):
                problem = f"refused, reading it could run code ({code[1]}); use the file from its official source"
        raise UserError(f"{path}: {problem}") from None


def _check_declared(path: Path) -> None:
    """UserError for a file that declares more bytes than it has, or calls for what weights do not need.

    Raises what zipfile and pickletools raise for a damaged file.
    """
    size = path.stat().st_size
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content[:4] == b"PK\x03\x04":  # by which torch knows a zip file
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
                if sum(member.file_size for member in members) > size:  # torch compresses nothing
                    raise UserError(f"{path}: refused, it unpacks to more than its {size:,} bytes; get it again")
                pickles = [member for member in members if member.filename.endswith("/data.pkl")]
                if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE:
                    raise UserError(f"{path}: a zip file, but not one that torch wrote; get it again")
                _check_pickle(path, archive.read(pickles[0]), size=None)
        else:
            for _ in range(_LEGACY_PICKLES):
                _check_pickle(path, content, size)


def _check_pickle(path: Path, content: bytes | mmap.mmap, size: int | None) -> None:
    """One pickle of the file, opcode by opcode, without making anything of it.

    size: of the file, where its storages are allocated by the number that the pickle declares; None: where not.
    """
    numbers: list[int] = []
    declared = 0
    for opcode, argument, _ in pickletools.genops(content):  # type: ignore[arg-type]  # a mmap reads as a file does
        if opcode.name == "GLOBAL" and _CALLED.fullmatch(str(argument)) is None:
            raise pickle.UnpicklingError(f"GLOBAL {str(argument).replace(' ', '.')}")
        if isinstance(argument, int):
            if "PUT" not in opcode.name and "GET" not in opcode.name:
                numbers.append(argument)
        elif opcode.name == "BINPERSID":
            declared += max(numbers, default=0)  # of the storage's type, key, device, number of values
            numbers = []
        elif opcode.name in ("MARK", "REDUCE"):
            numbers = []
        if size is not None and declared > size:
            raise UserError(f"{path}: refused, it declares {declared:,} values, but has {size:,} bytes; get it again")


@dataclass(frozen=True)
class WeightFile:
    """What one weight file, or several that belong together, holds, in our names. Tensors are on the CPU, as stored."""

    paths: tuple[Path, ...]
    layout: str
    architecture: Architecture  # the first that reads such files; its other sizes read them too
    tensors: Tensors  # where a file holds nothing but an EMA, the EMA's
    report: str  # one line that says what was found, chosen and left out
    ema: Tensors | None = None
    optimizer: dict[str, Tensors] | None = None  # AdamW's step, exp_avg, exp_avg_sq by parameter name
    epoch: int | None = None  # of the published run, from 1
    stored: str = ""  # which of a run's weights the file says `tensors` are: ema, raw, or ''

    @property
    def kind(self) -> Literal["", "ema", "raw"]:
        """Which of a run's weights are to be scored: the EMA where there is one; '' where the file does not say."""
        if self.ema is not None or self.stored == "ema":
            return "ema"
        return "raw" if self.stored == "raw" or self.layout.startswith("published_") else ""


def read_weights(path: Path, *more: Path, architecture: Architecture | None = None) -> WeightFile:
    """Read a weight file of any layout the module's table lists, or several that complete each other.

    Several: a backbone and a head, or the weights and the EMA of one published epoch.
    architecture: the model the file should be of; one that recognises no layouts takes the tensors as they are named.
    Raises UserError when a file is missing, cut short, hostile, of no known layout, or does not belong to the others.
    """
    return functools.reduce(_together, [_read_one(file, architecture) for file in (path, *more)])


def architecture_of_file(found: WeightFile) -> str:
    """Name of the architecture whose names and shapes a file has; the first of its family where no size fits."""
    return size_of_file(found) or found.architecture.name


def size_of_file(found: WeightFile) -> str | None:
    """Name of the architecture in whose own sizes every tensor of a file fits, head and position embedding aside."""
    for architecture in ARCHITECTURES.values():
        if architecture.recognise is not None and architecture.recognise is found.architecture.recognise:
            with torch.device("meta"):
                own = architecture.build(architecture.multiple_of, num_classes=1).state_dict()
            inside = {
                name: tensor
                for name, tensor in found.tensors.items()
                if not name.startswith(architecture.head) and name != architecture.position
            }
            if all(name in own and own[name].shape == tensor.shape for name, tensor in inside.items()):
                return architecture.name
    return None


def _read_one(path: Path, asked: Architecture | None) -> WeightFile:
    check_readable(path)
    if is_safetensors(path):
        tensors, metadata = read_safetensors(path)
        where = f"made from {metadata['layout']}, " if "layout" in metadata else ""
        kind = metadata.get("weights") if metadata.get("layout", "").startswith("published_") else None
        stored = {"ema": "ema", "model": "raw"}.get(kind or "", "")
        return replace(_weight_file(path, {"model": tensors}, where, asked), stored=stored)
    raw = safe_torch_load(path)
    if not isinstance(raw, Mapping):
        raise UserError(f"{path}: holds a {type(raw).__name__}, not weights; give a file of weights")
    published = {"model": raw.get("model_state_dict"), "ema": raw.get("ema_state_dict")}
    if states := {kind: _flat(path, state) for kind, state in published.items() if state is not None}:
        return _weight_file(path, states, "", asked, raw)
    where, state = "", raw
    for container in ("teacher", "model_ema", "model", "module", "state_dict"):
        if isinstance(state.get(container), Mapping):
            where, state = f"{where}{container} ", state[container]
    found = _weight_file(path, {"model": _flat(path, state)}, f"under {where.strip()}, " if where else "", asked)
    return replace(found, stored="ema" if "model_ema" in where else "")


def _weight_file(
    path: Path, states: dict[str, Tensors], where: str, asked: Architecture | None, raw: Mapping[str, Any] | None = None
) -> WeightFile:
    """`states`, by model and ema, in our names; `raw` is the epoch of a published run that holds them."""
    ours = {kind: _recognised(path, state, asked) for kind, state in states.items()}
    architecture, found = next(iter(ours.values()))
    layout, epoch, optimizer = found.layout, None, None
    if raw is not None:
        layout, parts = f"published_{architecture.name}", list(ours)
        epoch = raw["epoch"] if isinstance(raw.get("epoch"), int) else None
        if "optimizer_state_dict" in raw and "model" in ours:
            optimizer = _named_optimizer(path, architecture, found.tensors, raw["optimizer_state_dict"])
            parts.append("optimizer")
        where = f"epoch {epoch}, {' + '.join(parts)}, "
    count = sum(tensor.numel() for tensor in found.tensors.values())
    summary = f"{path}: {layout} ({architecture.name}), {where}{len(found.tensors)} tensors, {count:,} values"
    report = "; ".join([summary, *found.notes])
    ema = ours["ema"][1].tensors if "ema" in ours else None
    return WeightFile((path,), layout, architecture, found.tensors, report, ema, optimizer, epoch)


def _recognised(path: Path, state: Tensors, asked: Architecture | None) -> tuple[Architecture, Recognised]:
    if asked is not None and asked.recognise is None:
        return asked, Recognised("cxrdist", state)
    known = list(ARCHITECTURES.values())
    own = [] if asked is None else [item for item in known if item.recognise is asked.recognise] or [asked]
    for architecture in [*own, *known]:  # its own kind first
        if architecture.recognise is not None and (found := architecture.recognise(path, state)) is not None:
            return architecture, found
    sources = "; ".join(dict.fromkeys(item.official.source for item in known if item.official))
    names = ", ".join(item.name for item in known)
    raise UserError(f"{path}: holds no weights of {names}; its tensors are {listed(state)}; official files: {sources}")


def _together(first: WeightFile, second: WeightFile) -> WeightFile:
    paths, report = (*first.paths, *second.paths), f"{first.report}; {second.report}"
    names = ", ".join(map(str, paths))
    kinds = (first.architecture.name, second.architecture.name)
    if kinds[0] != kinds[1]:
        raise UserError(f"{names}: hold two different models ({', '.join(kinds)}); give files of one")
    if first.layout == second.layout and first.epoch is not None:
        if first.epoch != second.epoch:
            raise UserError(f"{names}: are of epochs {first.epoch} and {second.epoch}; give files of one epoch")
        weights, ema = (second, first) if first.ema is first.tensors else (first, second)
        if ema.ema is None or weights.ema is not None:
            raise UserError(f"{names}: do not complete each other; give the weights and the EMA of one epoch")
        return replace(weights, paths=paths, report=report, ema=ema.ema)
    if both := first.tensors.keys() & second.tensors.keys():
        raise UserError(f"{names}: all hold {listed(both)}; give one file for each part")
    layout, tensors = f"{first.layout} + {second.layout}", first.tensors | second.tensors
    return WeightFile(paths, layout, first.architecture, tensors, report)


def _flat(path: Path, state: Mapping[Any, Any]) -> Tensors:
    tensors = {name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{path}: holds no tensors under {listed(map(str, state))}; it is not a file of weights")
    for name, tensor in tensors.items():
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
        if not plain or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise UserError(f"{path}: {name[:80]!r} is no tensor of its own values; give a file of plain weights")
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors


def _named_optimizer(
    path: Path, architecture: Architecture, tensors: Tensors, raw: Mapping[str, Any]
) -> dict[str, Tensors]:
    """AdamW state by our names: the published optimizers number the trained parameters in the state dict's order."""
    names = [name for name in tensors if name not in architecture.not_in_optimizer and not architecture.is_frozen(name)]
    try:
        numbers = [number for group in raw["param_groups"] for number in group["params"]]
        state = [{key: torch.as_tensor(value) for key, value in raw["state"][number].items()} for number in numbers]
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: its optimizer state is not AdamW's; start from the weights only") from None
    if len(state) != len(names) or not all(
        moments.keys() == {"step", "exp_avg", "exp_avg_sq"} and moments["exp_avg"].shape == tensors[name].shape
        for name, moments in zip(names, state, strict=True)
    ):
        differ = f"{len(state)} parameters that do not match the {len(names)} trained ones in shape and order"
        raise UserError(f"{path}: its optimizer state is for {differ}; start from the weights only")
    return dict(zip(names, state, strict=True))
