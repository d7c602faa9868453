"""What a model offers: one frozen `Architecture` per model, and what follows from it for each of its modules.

A new model is one module that makes an `Architecture` and puts it into `cxrdist.models.ARCHITECTURES`; `name` and
`create` are enough for one that is trained from random weights. Nothing else in cxrdist knows a model.
"""

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import group_parameters
from torch import Tensor, nn

from cxrdist.errors import UserError
from cxrdist.recipes import Recipe

Tensors = dict[str, Tensor]
Size = int | tuple[int, int]
Maps = NDArray[np.float32]
Resize = Callable[[Tensor, tuple[int, int]], Tensor]  # a rule for another grid
MAX_IMAGE_PX, MAX_DEPTH = 4096, 256  # of what a recipe may ask for; the published models have 512 and 24


@dataclass(frozen=True)
class Recognised:
    """A file's tensors in our names and the file's order, its layout, and notes on what was chosen and left out."""

    layout: str
    tensors: Tensors
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class OfficialFiles:
    """The published files that training starts from; the first holds the backbone."""

    names: tuple[str, ...]
    source: str  # where to get them
    terms: str  # on which they may be used and passed on
    beside: dict[str, str] = field(default_factory=dict)  # another file that one of them needs in its folder


@dataclass(frozen=True)
class ParameterCounts:
    """How many values of a model a recipe trains. `idle` of the trained ones only ever receive a zero gradient."""

    trained: int  # go to the optimizer
    frozen: int  # the frozen backbone
    never_updated: int  # in a group without learning rate
    idle: int = 0

    def __str__(self) -> str:
        idle = f" ({self.idle:,} of them without gradient)" if self.idle else ""
        return f"{self.trained:,} trained{idle}, {self.frozen:,} frozen, {self.never_updated:,} never updated"


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A model that recipes can name. Everything but `name` and `create` may be left out.

    Attributes:
        create: (image_size, num_classes, drop_rate, **sizes) -> a module with random weights on the CPU, whose forward
            turns normalised float32 images (B, 3, S, S) into logits (B, num_classes). Called through `build`.
        sizes: keywords of `create` that make a smaller variant. multiple_of: px; image sizes are multiples of it.
        frozen: name and '.' of the frozen backbone's module ('': none): not trained, not in the EMA, stored once.
        hold: (model, dtype); see `hold_frozen`.
        head: prefix, or several, of the part that may start from random weights where a file has none.
        image_size: px, of a recipe that says none. mean, std: of RGB in [0, 1], which its images are normalised by.
        recognise: (path, tensors of a file) -> the tensors in our names, or None when they are not of this model.
            Sizes of one model share the function. Without it a file must have the module's own names.
        fit: (model, tensors, source) -> notes; adapts tensors in place to the model's input size and classes.
        download: () -> where the weights of `--init timm` are from, and their tensors.
        position: name of the position embedding, whose shape depends on the input size.
        not_in_optimizer: trained names that the published optimizers left out; the others they number in order.
        saliency: (model, images (B, 3, S, S), labels (B,)) -> maps (B, h, w) >= 0; with their title, and a sentence. A
            map shows what moved the score, not where the disease is; it is no localisation of a finding.
        layers: (model) -> the place of each parameter's layer from the input, 0, to the head, by name.
        features, head_logits: the two halves of the forward pass, so that several heads share a frozen backbone's.
        idle: counts the trained values of a model that only ever receive a zero gradient.
    """

    name: str
    create: Callable[..., nn.Module]
    sizes: tuple[str, ...] = ()
    multiple_of: int = 1
    frozen: str = ""
    hold: Callable[[Any, torch.dtype], None] | None = None
    head: str | tuple[str, ...] = "head."
    image_size: int = 224
    mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, float, float] = IMAGENET_DEFAULT_STD
    official: OfficialFiles | None = None
    recognise: Callable[[Path, Tensors], Recognised | None] | None = None
    fit: Callable[[Any, Tensors, str], list[str]] | None = None
    download: Callable[[], tuple[str, Tensors]] | None = None
    position: str = ""
    not_in_optimizer: tuple[str, ...] = ()
    saliency: Callable[[Any, Tensor, NDArray[np.int64]], Maps] | None = None
    saliency_title: str = ""
    saliency_about: str = ""
    layers: Callable[[Any], dict[str, int]] | None = None
    features: Callable[[Any, Tensor], Tensor] | None = None
    head_logits: Callable[[Any, Tensor], Tensor] | None = None
    idle: Callable[[Any], int] | None = None

    @property
    def stats(self) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        """Mean and deviation that images are normalised by."""
        return self.mean, self.std

    def build_for(self, recipe: Recipe, num_classes: int) -> nn.Module:
        """`build` with a recipe's sizes."""
        sizes = dict(recipe.model_kwargs)
        if recipe.drop_path:
            sizes["drop_path_rate"] = recipe.drop_path
        return self.build(recipe.image_size, num_classes, recipe.drop_rate, **sizes)

    def build(self, image_size: Size, num_classes: int, drop_rate: float = 0.1, **sizes: int | float) -> nn.Module:
        """The model with random weights, in training mode, on the CPU. UserError for sizes that it does not have.

        image_size: px, or (height, width). drop_rate: of the head, if it has dropout. sizes: see the class.
        """
        if unknown := ", ".join(sorted(set(sizes) - set(self.sizes))):
            known = ", ".join(sorted(self.sizes)) or "nothing"
            raise UserError(f"{self.name} has no {unknown}; model_kwargs may be {known}")
        for px in image_size if isinstance(image_size, tuple) else (image_size,):
            if not 1 <= px <= MAX_IMAGE_PX or px % self.multiple_of:
                valid = f"a multiple of {self.multiple_of} px, at most {MAX_IMAGE_PX}"
                raise UserError(f"{self.name}: image_size={px} is not valid ({valid})")
        if sizes:  # of another variant than those that are known to work
            self._check_sizes(image_size, num_classes, drop_rate, sizes)
        return self.create(image_size, num_classes, drop_rate, **sizes)

    def _check_sizes(
        self, image_size: Size, num_classes: int, drop_rate: float, sizes: Mapping[str, int | float]
    ) -> None:
        """UserError for sizes with which the model cannot be made, or not in this machine's memory; none is used."""
        shown = f"model_kwargs={','.join(f'{name}={value}' for name, value in sizes.items())}"
        if sizes.get("depth", 1) > MAX_DEPTH:
            raise UserError(f"{self.name}: {shown}: depth is at most {MAX_DEPTH}")
        try:
            with torch.device("meta"):
                state = self.create(image_size, num_classes, drop_rate, **sizes).state_dict()
        except UserError:
            raise
        except Exception as error:  # whatever the layers say of sizes that do not go together
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"{self.name}: {shown} makes no model ({reason}); num_heads divides embed_dim") from None
        needed = sum(tensor.nbytes for tensor in state.values())
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if needed > there:
            raise UserError(f"{self.name}: {shown}: weights of {needed:,} bytes, this machine has {there:,}")

    def is_frozen(self, name: str) -> bool:
        """Whether a tensor of this name belongs to the frozen backbone."""
        return bool(self.frozen) and name.startswith(self.frozen)

    def frozen_names(self, model: nn.Module) -> list[str]:
        """State-dict names of the frozen backbone."""
        return [name for name in model.state_dict() if self.is_frozen(name)]

    def trainable_names(self, model: nn.Module) -> list[str]:
        """Names of the parameters outside the frozen backbone, in the order the published optimizers number them."""
        return [name for name, _ in model.named_parameters() if not self.is_frozen(name)]

    def trained_state_dict(self, model: nn.Module) -> Tensors:
        """The state dict without the frozen backbone: what checkpoints and EMA hold. Tensors are the model's own."""
        return {name: tensor for name, tensor in model.state_dict().items() if not self.is_frozen(name)}

    def load_trained_state_dict(self, model: nn.Module, tensors: Tensors, source: str) -> None:
        """Copy what `trained_state_dict` gave into `model`; UserError as `check_trained`."""
        self.check_trained(model, tensors, source)
        model.load_state_dict(tensors, strict=False)

    def check_trained(self, model: nn.Module, tensors: Tensors, source: str) -> None:
        """UserError that names `source` and what of `tensors` does not fit `model`, which may be on the meta device."""
        if misfits := named_misfits(found_misfits(self.trained_state_dict(model), tensors)):
            raise UserError(f"{source} does not fit the model: {misfits}; it was written by another recipe or version")

    def share_frozen(self, model: nn.Module, other: nn.Module) -> None:
        """Let `model` use the frozen backbone module of `other`, which is equal, instead of its own copy."""
        name = self.frozen.removesuffix(".")
        model.set_submodule(name, other.get_submodule(name))

    def hold_frozen(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Hold the frozen backbone in the dtype of autocast, under which alone the model then runs.

        Its tensors are no longer those of its file: hash and write them before. float32 changes nothing.
        """
        if self.hold is not None and dtype != torch.float32:
            self.hold(model, dtype)

    def layers_of(self, model: nn.Module, what: str) -> dict[str, int]:
        """`layers`; UserError where the model has none, for `what`."""
        if self.layers is None or not (layers := self.layers(model)):
            raise UserError(f"{what}: {self.name} does not say the order of its layers; leave it out")
        return layers

    def trained_names(self, model: nn.Module, train: str) -> set[str]:
        """Names of the parameters that a recipe's `train` chooses: all, head, or last:N layers and the head."""
        names = {name for name, _ in model.named_parameters()}
        head = {name for name in names if name.startswith(self.head)}
        if train == "all":
            return names
        if not head:
            raise UserError(f"train={train}: {self.name} has no head of its own; train=all")
        if train == "head":
            return head
        layers = self.layers_of(model, f"train={train}")
        last = max((place for name, place in layers.items() if name not in head), default=0)
        return head | {name for name, place in layers.items() if place > last - int(train.partition(":")[2])}

    def set_grad_checkpointing(self, model: Any) -> None:
        """Keep fewer activations, for more compute; UserError where the model cannot, or has none to keep."""
        if self.frozen:
            raise UserError("--grad-checkpointing: a frozen backbone keeps no activations; leave it out")
        try:
            model.set_grad_checkpointing(True)
        except (AttributeError, AssertionError):  # timm's models without it have no such method, or refuse so
            raise UserError(f"--grad-checkpointing: {self.name} has none; leave it out") from None

    def count_parameters(self, model: nn.Module) -> ParameterCounts:
        """Counts of `model`, whose parameters require a gradient where a recipe trains them."""
        counts = {"trained": 0, "frozen": 0, "never_updated": 0}
        for name, parameter in model.named_parameters():
            kind = "trained" if parameter.requires_grad else "never_updated"
            counts["frozen" if self.is_frozen(name) else kind] += parameter.numel()
        return ParameterCounts(**counts, idle=self.idle(model) if self.idle else 0)


def found_misfits(own: Tensors, tensors: Tensors) -> dict[str, list[str]]:
    """Why `tensors` cannot be loaded into a model's `own`: kind of problem -> names, nothing when they fit."""
    both = {name: (tuple(tensors[name].shape), tuple(own[name].shape)) for name in own.keys() & tensors.keys()}
    misfits = {
        "missing": sorted(own.keys() - tensors.keys()),
        "unexpected": sorted(tensors.keys() - own.keys()),
        "of another shape": sorted(f"{name} {its}, model {ours}" for name, (its, ours) in both.items() if its != ours),
    }
    return {kind: names for kind, names in misfits.items() if names}


def named_misfits(misfits: dict[str, list[str]]) -> str:
    """What `found_misfits` found, for a message."""
    return "; ".join(f"{kind}: {listed(names)}" for kind, names in misfits.items())


def listed(names: Iterable[str], limit: int = 3) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def timm_cfg(px: int, **more: Any) -> dict[str, Any]:
    """timm's description of a model for images of `px`, as we feed it."""
    images = {"input_size": (3, px, px), "fixed_input_size": True, "interpolation": "bilinear", "crop_pct": 1.0}
    return images | {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD} | more


def fit_position(
    tensors: Tensors, name: str, grid: tuple[int, ...], resize: Resize, source: str, num_prefix: int = 0
) -> list[str]:
    """Bring the position embedding `name`, where it is there, to `grid` by the rule `resize`; notes on the change.

    `num_prefix` rows stand before those of the patches. UserError when those are no square grid.
    """
    if name not in tensors:
        return []
    num_patches = tensors[name].shape[1] - num_prefix
    side = math.isqrt(max(num_patches, 0))
    if side * side != num_patches:
        raise UserError(f"{source}: {name} is for {num_patches} patches, no square grid; give a model's own file")
    if (side, side) == tuple(grid):
        return []
    tensors[name] = resize(tensors[name], (grid[0], grid[1]))
    return [f"position embedding {side}x{side} -> {grid[0]}x{grid[1]}"]


def left_out(names: list[str]) -> list[str]:
    """The note on tensors of a file that our module does not have."""
    families = ("rope" if "rope." in name else name.removeprefix("backbone.").split(".")[0] for name in names)
    return [f"left out {', '.join(dict.fromkeys(families))}"] if names else []


@torch.no_grad()
def attention_maps(model: Any, images: Tensor, labels: NDArray[np.int64]) -> Maps:
    """(B, h, w) attention of the query of label `labels[b]` over image b, mean over heads; each map sums to 1.

    `model.attention` returns (B, heads, classes, patches) of images (B, 3, S, S).
    """
    maps = model.attention(images).float().mean(dim=1)
    return _grids(maps[torch.arange(len(images)), torch.as_tensor(labels)])


def grad_cam(model: Any, images: Tensor, labels: NDArray[np.int64]) -> Maps:
    """(B, h, w) Grad-CAM >= 0 of label `labels[b]` on the last features of a timm model: feature maps, or patch tokens.

    Source: Selvaraju et al. 2017: the gradient's mean over the places weighs each channel.
    """
    with torch.no_grad():
        features = model.forward_features(images)
    features = features.detach().requires_grad_()
    logits = model.forward_head(features)
    (gradient,) = torch.autograd.grad(logits[torch.arange(len(images)), torch.as_tensor(labels)].sum(), features)
    maps, slopes = (feature_map(model, each) for each in (features.detach(), gradient))
    return (slopes.mean(dim=(1, 2), keepdim=True) * maps).sum(dim=-1).relu().cpu().numpy().astype(np.float32)


def feature_map(model: Any, features: Tensor) -> Tensor:
    """What a timm model's `forward_features` gave, as (B, h, w, D). ValueError where it has no places in an image."""
    if features.ndim == 3:
        tokens = features[:, int(getattr(model, "num_prefix_tokens", 0)) :]
        side = math.isqrt(tokens.shape[1])
        if side * side == tokens.shape[1] and side > 1:
            return tokens.reshape(len(tokens), side, side, -1)
    elif features.ndim == 4 and model.num_features in (features.shape[1], features.shape[3]):
        last = features.shape[1] != model.num_features or getattr(model, "output_fmt", "NCHW") == "NHWC"
        return features if last else features.permute(0, 2, 3, 1)
    raise ValueError(f"features {tuple(features.shape)} are no map")


def timm_layers(model: Any) -> dict[str, int]:
    """The place of each parameter's layer in a timm model, by name, from timm's own `group_matcher`."""
    return dict(group_parameters(model, model.group_matcher(coarse=False), reverse=True))


def _grids(values: Tensor) -> Maps:
    side = round(values.shape[1] ** 0.5)
    return values.reshape(-1, side, side).cpu().numpy().astype(np.float32)
