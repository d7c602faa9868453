"""Any image classifier of timm as an Architecture, by the name `timm:NAME`, and as the frozen encoder of a GLoRI head.

Everything is read off the model itself, made once on the meta device: the sizes that its constructor takes, the images
that it wants, its layers, and whether its features make a saliency map. Weights are timm's files or our own.
"""

import difflib
import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import timm
import torch
from timm.models import is_model, load_state_dict_from_hf, model_entrypoint, split_model_name_tag
from torch import Tensor, nn

import cxrdist.models.architecture as base
from cxrdist.errors import UserError
from cxrdist.models.architecture import Architecture, Size, Tensors

NOT_SIZES = frozenset({"self", "img_size", "in_chans", "num_classes", "drop_rate", "device", "dtype", "kwargs", "args"})
FILTERS = ("checkpoint_filter_fn", "_filter_fn")  # what timm's modules call what turns a file's names into theirs


@functools.cache
def timm_architecture(name: str) -> Architecture:
    """The architecture `timm:NAME`; UserError for a name that timm does not have, or a model that cannot be trained."""
    shown = f"timm:{name}"
    known_or_named(name)
    model = made(shown, name, {})
    config, takes = model.pretrained_cfg, _keywords(type(model))
    head = config.get("classifier") or ()
    heads = tuple(f"{part}." for part in ((head,) if isinstance(head, str) else head))
    size = int(config["input_size"][-1])
    return Architecture(
        name=shown,
        create=functools.partial(_create, name, takes),
        sizes=tuple(sorted(takes - NOT_SIZES)),
        multiple_of=_patch(model),
        head=heads,
        image_size=size,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        fit=functools.partial(fit, heads),
        download=functools.partial(_download, shown, config),
        layers=base.timm_layers if hasattr(model, "group_matcher") else None,
        saliency=base.grad_cam if _has_map(model, size) else None,
        saliency_title="Grad-CAM",
        saliency_about="Places that raise the finding's score, on the last features.",
    )


def known_or_named(name: str) -> None:
    """UserError, with the nearest names, unless timm has a model of that name and those weights."""
    kind, tag = split_model_name_tag(name)
    if not is_model(kind):
        near = ", ".join(f"timm:{each}" for each in difflib.get_close_matches(kind, timm.list_models(), n=3))
        raise UserError(f"timm:{name}: timm {timm.__version__} has no such model; {near and f'did you mean {near}?'}")
    tags = [each.partition(".")[2] for each in timm.list_pretrained(f"{kind}.*")]
    if tag and tag not in tags:
        raise UserError(f"timm:{name}: {kind} has no weights {tag!r}; it has {', '.join(tags) or 'none'}")


def made(shown: str, name: str, options: dict[str, Any]) -> Any:
    """The model on the meta device. UserError where its constructor refuses."""
    try:
        with torch.device("meta"):
            return timm.create_model(name, pretrained=False, **options)
    except Exception as error:  # whatever the layers say of sizes that do not go together
        raise UserError(f"{shown} cannot be made: {_reason(error)}") from None


def check_forward(shown: str, model: nn.Module, image_size: Size, num_classes: int) -> None:
    """UserError unless a model on the meta device turns images in training into one logit a label."""
    height, width = image_size if isinstance(image_size, tuple) else (image_size, image_size)
    try:
        found = model.train()(torch.empty(2, 3, height, width, device="meta"))
    except Exception as error:
        raise UserError(f"{shown} does not take images of {height} x {width} px: {_reason(error)}") from None
    if not isinstance(found, Tensor) or tuple(found.shape) != (2, num_classes):
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise UserError(f"{shown} is no classifier: for 2 images and {num_classes} labels it gives {shape}")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _keywords(kind: type) -> set[str]:
    """What a class and those it passes keywords on to are called with."""
    classes = [each for each in kind.__mro__ if "__init__" in vars(each) and each not in (nn.Module, object)]
    return {name for each in classes for name in inspect.signature(vars(each)["__init__"]).parameters}


def _patch(model: Any) -> int:
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", 1)
    return int(max(patch) if isinstance(patch, tuple | list) else patch)


def _has_map(model: Any, size: int) -> bool:
    """Whether the features of a model on the meta device have places, and logits follow from them."""
    try:
        features = model.eval().forward_features(torch.empty(2, 3, size, size, device="meta"))
        base.feature_map(model, features)
        return model.forward_head(features).ndim == 2  # type: ignore[no-any-return]
    except Exception:  # a model without these halves
        return False


@functools.cache
def _check(name: str, image_size: Size, sizes: tuple[tuple[str, Any], ...]) -> None:
    check_forward(f"timm:{name}", made(f"timm:{name}", name, {"num_classes": 2} | dict(sizes)), image_size, 2)


def _create(
    name: str, takes: set[str], image_size: Size, num_classes: int, drop_rate: float, **sizes: Any
) -> nn.Module:
    given = {"drop_path_rate": 0.0} | sizes | {"img_size": image_size}  # some models drop paths unless they are told
    sizes = {key: value for key, value in given.items() if key in takes or key in sizes}
    _check(name, image_size, tuple(sorted(sizes.items())))
    if "drop_rate" in takes:
        sizes["drop_rate"] = drop_rate
    return timm.create_model(name, pretrained=False, num_classes=num_classes, **sizes)


def timm_filter(model: Any) -> Callable[..., Tensors] | None:
    """What timm turns a file's tensors by into those of `model`, from the module that its entry point is in."""
    module = sys.modules[model_entrypoint(model.pretrained_cfg["architecture"]).__module__]
    return next((getattr(module, name) for name in FILTERS if hasattr(module, name)), None)


def fit(heads: tuple[str, ...], model: Any, tensors: Tensors, source: str) -> list[str]:
    """timm's own names and sizes; a classifier of other labels is left out."""
    notes = []
    if (convert := timm_filter(model)) is not None:
        before = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        try:
            takes_model = len(inspect.signature(convert).parameters) > 1
            found = convert(dict(tensors), model) if takes_model else convert(dict(tensors))
        except Exception as error:
            kind = model.pretrained_cfg["architecture"]
            raise UserError(f"{source}: timm cannot read it as {kind}: {_reason(error)}") from None
        tensors.clear()
        tensors.update(found)
        if resized := [name for name in found if name in before and before[name] != tuple(found[name].shape)]:
            notes.append(f"resized {base.listed(resized, 3)}")
    own = model.state_dict()
    other = [name for name in tensors if name.startswith(heads) and name in own]
    if any(tensors[name].shape != own[name].shape for name in other):
        for name in other:
            del tensors[name]
        notes.append(f"left out {base.listed(other)} (labels of another data set)")
    return notes


def _download(shown: str, config: Mapping[str, Any]) -> tuple[str, Tensors]:
    """Where timm has the weights that its configuration names, and their tensors, read without pickles' code."""
    hub, url = config.get("hf_hub_id"), config.get("url")
    if config.get("custom_load") or not (hub or url):
        tags = ", ".join(timm.list_pretrained(f"{config['architecture']}.*")) or "none"
        raise UserError(f"--init timm: timm has no such weights for {shown}; it has {tags}; or --init FILE, or random")
    try:
        if hub:
            more = {"filename": config["hf_hub_filename"]} if config.get("hf_hub_filename") else {}
            return str(hub), load_state_dict_from_hf(hub, weights_only=True, **more)
        return str(url), torch.hub.load_state_dict_from_url(str(url), map_location="cpu", weights_only=True)
    except Exception as error:
        remedy = "is there a network? Else get the file elsewhere and give it as --init FILE"
        raise UserError(f"--init timm: {hub or url} cannot be loaded ({_reason(error)}): {remedy}") from None
