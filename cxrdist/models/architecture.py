"""What a model offers: one frozen `Architecture` per model, and what follows from it for each of its modules.

A new model is one module that makes an `Architecture` and puts it into `cxrdist.models.ARCHITECTURES`; `name` and
`create` are enough for one that is trained from random weights. Nothing else in cxrdist knows a model.
"""

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from cxrdist.errors import UserError
from cxrdist.recipes import Group

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
    source: str  # where to get them, and on which terms
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
        head: prefix of the part that may start from random weights where a file has none.
        recognise: (path, tensors of a file) -> the tensors in our names, or None when they are not of this model.
            Sizes of one model share the function. Without it a file must have the module's own names.
        fit: (model, tensors, source) -> notes; adapts tensors in place to the model's input size and classes.
        position: name of the position embedding, whose shape depends on the input size.
        not_in_optimizer: trained names that the published optimizers left out; the others they number in order.
        saliency: (model, images (B, 3, S, S), labels (B,)) -> maps (B, h, w) >= 0; with their title, and a sentence. A
            map shows what moved the score, not where the disease is; it is no localisation of a finding.
        features, head_logits: the two halves of the forward pass, so that several heads share a frozen backbone's.
        idle: counts the trained values of a model that only ever receive a zero gradient.
    """

    name: str
    create: Callable[..., nn.Module]
    sizes: tuple[str, ...] = ()
    multiple_of: int = 1
    frozen: str = ""
    hold: Callable[[Any, torch.dtype], None] | None = None
    head: str = "head."
    official: OfficialFiles | None = None
    recognise: Callable[[Path, Tensors], Recognised | None] | None = None
    fit: Callable[[Any, Tensors, str], list[str]] | None = None
    position: str = ""
    not_in_optimizer: tuple[str, ...] = ()
    saliency: Callable[[Any, Tensor, NDArray[np.int64]], Maps] | None = None
    saliency_title: str = ""
    saliency_about: str = ""
    features: Callable[[Any, Tensor], Tensor] | None = None
    head_logits: Callable[[Any, Tensor], Tensor] | None = None
    idle: Callable[[Any], int] | None = None

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

    def count_parameters(self, model: nn.Module, groups: Sequence[Group]) -> ParameterCounts:
        """Counts of `model` under a recipe's groups (first match wins). UserError names a parameter without a group."""
        counts = {"trained": 0, "frozen": 0, "never_updated": 0}
        for name, parameter in model.named_parameters():
            group = next((group for group in groups if re.search(group.pattern, name)), None)
            if group is None and not self.is_frozen(name):
                raise UserError(f"parameter {name} matches no group of the recipe; add one (lr None: never updated)")
            kind = "trained" if group is not None and group.lr is not None else "never_updated"
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


def listed(names: Iterable[str], limit: int = 8) -> str:
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
    """(B, h, w) Grad-CAM >= 0 of label `labels[b]` on the last block's patch tokens, for a timm vision transformer.

    Source: Selvaraju et al. 2017, with tokens as channels: the gradient's mean over the patches weighs each channel.
    """
    with torch.no_grad():
        tokens = model.forward_features(images)
    tokens = tokens.detach().requires_grad_()
    logits = model.forward_head(tokens)
    (gradient,) = torch.autograd.grad(logits[torch.arange(len(images)), torch.as_tensor(labels)].sum(), tokens)
    num_prefix = int(model.num_prefix_tokens)
    weights = gradient[:, num_prefix:].mean(dim=1, keepdim=True)
    return _grids((weights * tokens[:, num_prefix:].detach()).sum(dim=-1).relu())


def _grids(values: Tensor) -> Maps:
    side = round(values.shape[1] ** 0.5)
    return values.reshape(-1, side, side).cpu().numpy().astype(np.float32)
