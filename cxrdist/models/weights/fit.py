"""Weights into a model: the files that a training starts from, adapted to the model's input size and labels."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from torch import nn

from cxrdist.errors import UserError
from cxrdist.models.architecture import Architecture, Tensors, found_misfits, listed, named_misfits
from cxrdist.models.weights.layouts import WeightFile, read_weights, size_of_file

WEIGHTS_FOLDER = Path("weights")
WITHOUT = "and --model demo_eva_x --init random needs none"


def init_files(architecture: Architecture, init: Path | None) -> tuple[Path, ...]:
    """The files that `--init` stands for: FILE, FILE,FILE, or a folder of the official ones (None: weights/).

    UserError says which file to get, from where, when one is missing.
    """
    if init is not None and not init.is_dir():
        files = (init,) if init.is_file() else tuple(map(Path, str(init).split(",")))
        if absent := [path for path in files if not path.is_file()]:
            raise UserError(f"--init {absent[0]}: there is no such file")
        return files
    if init is not None and (init / "recipe.json").is_file():
        epochs = sorted(init.glob("checkpoints/epoch_*/ema.safetensors"))
        remedy = f"name its weights: --init {epochs[-1]}" if epochs else "and has no epoch yet: give another"
        raise UserError(f"--init {init}: is a run folder; {remedy}")
    folder, official = WEIGHTS_FOLDER if init is None else init, architecture.official
    if official is None:
        other = "--init random" if architecture.download is None else "--init timm (downloads them), or --init random"
        raise UserError(f"{architecture.name} has no official weights: use --init FILE, or {other}")
    if missing := [name for name in official.names if not (folder / name).is_file()]:
        beside = "".join(f", with {official.beside[name]} beside it" for name in missing if name in official.beside)
        first = folder / official.names[0]
        hint = f" (--init {first} starts with a fresh head)" if first.is_file() else ""
        needs = f"{architecture.name} needs {' and '.join(missing)} in {folder}/{beside}: get it from"
        raise UserError(f"{needs} {official.source}{hint}; --init FILE takes others, {WITHOUT}")
    return tuple(folder / name for name in official.names)


def default_init_path(architecture: Architecture) -> Path:
    """What `load_init` takes when `--init` is not given: the official file, or the folder of several."""
    files = init_files(architecture, None)
    return files[0] if len(files) == 1 else files[0].parent


def load_init(
    architecture: Architecture,
    model: nn.Module,
    path: Path,
    *,
    weights: Literal["model", "ema"] = "model",
    complete: bool = False,
) -> str:
    """Copy a weight file into `model` and return a line that says what was found, adapted and left fresh.

    path: as in `init_files`. weights: "ema" takes the EMA's where the file holds both.
    complete: refuse a file without a head; otherwise a backbone leaves the model's head as it is.
    Raises UserError, before anything is copied, that lists what is missing, unexpected or of another shape.
    """
    found = read_weights(*init_files(architecture, path), architecture=architecture)
    if weights == "ema" and found.ema is not None:
        found = replace(found, tensors=found.ema, report=f"{found.report}, EMA weights")
    return _load(architecture, model.state_dict(), model, found, complete)


def load_download(architecture: Architecture, model: nn.Module) -> str:
    """Copy the weights that timm has for `model` into it, but for the head; as `load_init` otherwise."""
    if architecture.download is None:
        raise UserError(f"--init timm: {architecture.name} is no model of timm's; use --init FILE, or --init random")
    source, tensors = architecture.download()
    found = WeightFile((Path(source),), "timm", architecture, tensors, f"weights from {source}, {len(tensors)} tensors")
    return _load(architecture, model.state_dict(), model, found, complete=False)


def load_backbone(architecture: Architecture, model: nn.Module, path: Path) -> str:
    """Copy only the frozen backbone of a file (any layout that holds one) into `model`; as `load_init` otherwise."""
    found = read_weights(path, architecture=architecture)
    tensors = {name: tensor for name, tensor in found.tensors.items() if architecture.is_frozen(name)}
    own = {name: tensor for name, tensor in model.state_dict().items() if architecture.is_frozen(name)}
    found = replace(found, tensors=tensors, report=f"{found.report}; backbone only")
    return _load(architecture, own, model, found, complete=True)


def _load(architecture: Architecture, own: Tensors, model: nn.Module, found: WeightFile, complete: bool) -> str:
    """Copy what was found into `own` of the model: a report on that and on what was adapted. UserError: what cannot."""
    source = ", ".join(map(str, found.paths))
    if found.architecture.recognise is not architecture.recognise:
        kinds = f"weights of {found.architecture.name}, but the model is {architecture.name}"
        raise UserError(f"{source}: holds {kinds}; check --model and --init")
    tensors = dict(found.tensors)
    notes = [] if architecture.fit is None else architecture.fit(model, tensors, source)
    head = {name for name in own if name.startswith(architecture.head)}
    if not complete and head and not head & tensors.keys():
        own = {name: tensor for name, tensor in own.items() if name not in head}
        notes.append(f"fresh head ({listed(sorted(head))})")
    misfits = found_misfits(own, tensors)
    floating = [name for name in sorted(own.keys() & tensors.keys()) if own[name].is_floating_point()]
    if bad := [name for name in floating if not (tensors[name].is_floating_point() and tensors[name].isfinite().all())]:
        misfits["not finite floating point"] = bad
    if misfits:
        size = size_of_file(found) if "of another shape" in misfits else None
        hint = f"; its sizes are those of --model {size}" if size not in (None, architecture.name) else ""
        if "missing" in misfits and all(map(architecture.is_frozen, own.keys() - tensors.keys())):
            backbone = architecture.official.names[0] if architecture.official else "BACKBONE"
            hint += f"; name the backbone's file too: --init FILE,{backbone}"
        raise UserError(f"{source}: does not fit the model; {named_misfits(misfits)}{hint}")
    model.load_state_dict(tensors, strict=False)
    return "; ".join([found.report, *notes])
