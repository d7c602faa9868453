"""The two models by the names recipes use, and which of their parameters are trained. Importing it registers with timm.

`timm.create_model("eva_x_base_patch16", img_size=448, num_classes=14)` works after `import cxrdist.models`.
"""

from typing import Any

import timm
from torch import Tensor, nn

from cxrdist.errors import UserError
from cxrdist.models import eva_x as _eva_x  # noqa: F401  registers with timm
from cxrdist.models.chexfound import CheXFound

__all__ = [
    "TIMM_NAMES",
    "CheXFound",
    "build_model",
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
