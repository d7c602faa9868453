"""What a model offers: one frozen `Architecture` per model, and what follows from it for each of its modules.

A new model is one module that makes an `Architecture` and puts it into `cxrdist.models.ARCHITECTURES`; `name` and
`create` are enough for one that is trained from random weights. Nothing else in cxrdist knows a model.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from cxrdist.errors import UserError
from cxrdist.recipes import Group

Tensors = dict[str, Tensor]
Size = int | tuple[int, int]
Maps = NDArray[np.float32]


@dataclass(frozen=True)
class Recognised:
    """A file's tensors in our names and the file's order, its layout, and notes on what was chosen and left out."""

    layout: str
    tensors: Tensors
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class OfficialFiles:
    """The published files that training starts from; the first holds the backbone.

    source: where to get them, and on which terms. beside: another file that one of them needs in its folder.
    """

    names: tuple[str, ...]
    source: str
    beside: dict[str, str] = field(default_factory=dict)


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
        sizes: keywords of `create` that make a smaller variant.
        multiple_of: px; image sizes are multiples of it.
        frozen: prefix of the frozen backbone's names ('': none); one module of that name. It is not trained, has no EMA
            copy and is not stored with the head.
        head: prefix of the part that may start from random weights where a file has none.
        official: files to start from.
        recognise: (path, tensors of a file) -> the tensors in our names, or None when they are not of this model.
            Sizes of one model share the function. Without it a file must have the module's own names.
        fit: (model, tensors, source) -> notes; adapts tensors in place to the model's input size and classes.
        position: name of the position embedding, whose shape depends on the input size.
        not_in_optimizer: trained names that the published optimizers left out; the others they number in order.
        saliency: (model, images (B, 3, S, S), labels (B,)) -> maps (B, h, w) >= 0. saliency_title names the maps,
            saliency_about says in a sentence what they show.
        features, head_logits: the two halves of the forward pass of a model with a frozen backbone, so that several
            heads share one pass of it.
        idle: counts the trained values of a model that only ever receive a zero gradient.
    """

    name: str
    create: Callable[..., nn.Module]
    sizes: tuple[str, ...] = ()
    multiple_of: int = 1
    frozen: str = ""
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
        """The model with random weights, in training mode, on the CPU.

        Args:
            image_size: px, or (height, width).
            drop_rate: dropout of the head, for models that have it.
            sizes: of a smaller variant, by the names in `self.sizes`.
        Raises UserError for sizes that it does not have.
        """
        if unknown := set(sizes) - set(self.sizes):
            known = f"may be {', '.join(sorted(self.sizes))}" if self.sizes else "must be empty"
            raise UserError(f"{self.name} has no {', '.join(sorted(unknown))}; model_kwargs {known}")
        for px in image_size if isinstance(image_size, tuple) else (image_size,):
            if px < 1 or px % self.multiple_of:
                raise UserError(f"{self.name}: image_size={px} is not valid (a multiple of {self.multiple_of} px)")
        return self.create(image_size, num_classes, drop_rate, **sizes)

    def frozen_names(self, model: nn.Module) -> list[str]:
        """State-dict names of the frozen backbone."""
        return [name for name in model.state_dict() if self.frozen and name.startswith(self.frozen)]

    def trainable_names(self, model: nn.Module) -> list[str]:
        """Names of the parameters outside the frozen backbone, in the order the published optimizers number them."""
        frozen = set(self.frozen_names(model))
        return [name for name, _ in model.named_parameters() if name not in frozen]

    def trained_state_dict(self, model: nn.Module) -> Tensors:
        """The state dict without the frozen backbone: what checkpoints and EMA hold. Tensors are the model's own."""
        frozen = set(self.frozen_names(model))
        return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}

    def load_trained_state_dict(self, model: nn.Module, tensors: Tensors, source: str) -> None:
        """Copy what `trained_state_dict` gave into `model`; UserError names `source` and every name that is off."""
        own = self.trained_state_dict(model)
        missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
        shapes = [name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape]
        if missing or unexpected or shapes:
            raise UserError(
                f"{source} does not fit the model: missing {missing or 'nothing'}, unexpected "
                f"{unexpected or 'nothing'}, other shape {sorted(shapes) or 'nothing'}; it was written by another "
                "recipe or version"
            )
        model.load_state_dict(tensors, strict=False)

    def share_frozen(self, model: nn.Module, other: nn.Module) -> None:
        """Let `model` use the frozen backbone module of `other`, which is equal, instead of its own copy."""
        name = self.frozen.removesuffix(".")
        model.set_submodule(name, other.get_submodule(name))

    def count_parameters(self, model: nn.Module, groups: Sequence[Group]) -> ParameterCounts:
        """Counts of `model` under a recipe's groups (first match wins). UserError names a parameter without a group."""
        frozen = set(self.frozen_names(model))
        counts = {"trained": 0, "frozen": 0, "never_updated": 0}
        for name, parameter in model.named_parameters():
            group = next((group for group in groups if re.search(group.pattern, name)), None)
            if group is None and name not in frozen:
                raise UserError(
                    f"parameter {name} matches no group of the recipe; add a row for it (lr None: never updated)"
                )
            kind = "frozen" if name in frozen else "trained" if group and group.lr is not None else "never_updated"
            counts[kind] += parameter.numel()
        return ParameterCounts(**counts, idle=self.idle(model) if self.idle else 0)


def fit_position(
    tensors: Tensors,
    name: str,
    grid: tuple[int, ...],
    resize: Callable[[Tensor, tuple[int, int]], Tensor],
    source: str,
    num_prefix: int = 0,
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
