"""The two models by the names recipes use, and which of their parameters are trained. Importing it registers with timm.

`timm.create_model("eva_x_base_patch16", img_size=448, num_classes=14)` works after `import cxrdist.models`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import timm
from torch import Tensor, nn

from cxrdist.errors import UserError
from cxrdist.models import eva_x as _eva_x  # noqa: F401  registers with timm
from cxrdist.models.chexfound import CheXFound
from cxrdist.recipes import Group

__all__ = [
    "TIMM_NAMES",
    "CheXFound",
    "ParameterCounts",
    "build_model",
    "count_parameters",
    "frozen_names",
    "load_trained_state_dict",
    "trainable_names",
    "trained_state_dict",
]

TIMM_NAMES = {
    "eva_x": "eva_x_base_patch16",
    "eva_x_small": "eva_x_small_patch16",
    "eva_x_tiny": "eva_x_tiny_patch16",
    "chexfound": "chexfound_vitl16_glori",
}
_SIZE_KWARGS = {
    "eva_x": {"embed_dim", "depth", "num_heads"},
    "chexfound": {"embed_dim", "depth", "num_heads", "init_values", "decoder_dim", "num_queries"},
}


def build_model(
    model: str,
    image_size: int | tuple[int, int],
    num_classes: int = 14,
    drop_rate: float = 0.1,
    **model_kwargs: int | float,
) -> nn.Module:
    """The model `eva_x`, `eva_x_small`, `eva_x_tiny` or `chexfound` with random weights, in training mode, on the CPU.

    Its forward turns images (B, 3, S, S), float32, normalised, into logits (B, num_classes).

    Args:
        image_size: px, a multiple of 16, or (height, width).
        drop_rate: dropout inside the GLoRI decoder; EVA-X has none.
        model_kwargs: sizes of a smaller variant. EVA-X: embed_dim, depth, num_heads. CheXFound: those, init_values,
            decoder_dim and num_queries, which is 40 in the published sizes and `num_classes` in any other.
    Raises UserError for an unknown model or size.
    """
    if model not in TIMM_NAMES:
        raise UserError(f"model {model!r} is unknown; one of {', '.join(TIMM_NAMES)}")
    allowed = _SIZE_KWARGS["chexfound" if model == "chexfound" else "eva_x"]
    if unknown := set(model_kwargs) - allowed:
        raise UserError(
            f"{model} has no {', '.join(sorted(unknown))}; model_kwargs may be {', '.join(sorted(allowed))}"
        )
    kwargs: dict[str, Any] = dict(model_kwargs)
    if model == "chexfound":
        kwargs["drop_rate"] = drop_rate
        if model_kwargs:
            kwargs.setdefault("num_queries", num_classes)
    built = timm.create_model(TIMM_NAMES[model], img_size=image_size, num_classes=num_classes, **kwargs)
    assert isinstance(built, nn.Module)
    return built


def frozen_names(model: nn.Module) -> list[str]:
    """State-dict names of the frozen backbone: not trained, without EMA copy, not stored with the head. EVA-X: none."""
    return [name for name in model.state_dict() if isinstance(model, CheXFound) and name.startswith("backbone.")]


def trainable_names(model: nn.Module) -> list[str]:
    """Names of the parameters outside the frozen backbone, in the order the published optimizers number them."""
    frozen = set(frozen_names(model))
    return [name for name, _ in model.named_parameters() if name not in frozen]


def trained_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without the frozen backbone: what a checkpoint and an EMA hold. Tensors are the model's own."""
    frozen = set(frozen_names(model))
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}


def load_trained_state_dict(model: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Copy what `trained_state_dict` gave into `model`; UserError names `source` and every name that is off."""
    own = trained_state_dict(model)
    missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    shapes = [name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape]
    if missing or unexpected or shapes:
        raise UserError(
            f"{source} does not fit the model: missing {missing or 'nothing'}, unexpected {unexpected or 'nothing'}, "
            f"other shape {sorted(shapes) or 'nothing'}; it was written by another recipe or version"
        )
    model.load_state_dict(tensors, strict=False)


@dataclass(frozen=True)
class ParameterCounts:
    """How many values of a model a recipe trains. `idle` of the trained ones only ever receive a zero gradient."""

    trained: int  # go to the optimizer
    frozen: int  # the frozen backbone
    never_updated: int  # in a group without learning rate
    idle: int = 0  # GLoRI's queries and outputs beyond the classes

    def __str__(self) -> str:
        idle = f" ({self.idle:,} of them without gradient)" if self.idle else ""
        return f"{self.trained:,} trained{idle}, {self.frozen:,} frozen, {self.never_updated:,} never updated"


def count_parameters(model: nn.Module, groups: Sequence[Group]) -> ParameterCounts:
    """Counts of `model` under a recipe's groups (first match wins). UserError names a parameter that matches none."""
    frozen = set(frozen_names(model))
    counts = {"trained": 0, "frozen": 0, "never_updated": 0}
    for name, parameter in model.named_parameters():
        group = next((group for group in groups if re.search(group.pattern, name)), None)
        if group is None and name not in frozen:
            raise UserError(
                f"parameter {name} matches no group of the recipe; add a row for it (lr None: never updated)"
            )
        kind = "frozen" if name in frozen else "trained" if group and group.lr is not None else "never_updated"
        counts[kind] += parameter.numel()
    idle = 0
    if isinstance(model, CheXFound):
        queries = model.glori.query_embed.weight
        idle = 2 * (len(queries) - model.num_classes) * queries.shape[1]
    return ParameterCounts(**counts, idle=idle)
