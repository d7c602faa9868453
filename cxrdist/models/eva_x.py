"""EVA-X Ti, S and B: timm's own `Eva` with the published sizes, registered with timm under the official names.

No subclass: timm's module gives the official outputs bit for bit, so its parameter names are ours
(`blocks.0.attn.q_proj.weight`, `fc_norm.weight`, `head.weight`, no prefix).
Source: hustvl/EVA-X `eva_x.py`; competition solution (only a new linear head, with torch's default init).
"""

from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.eva import Eva
from torch import Tensor, nn

SIZES: dict[str, dict[str, Any]] = {
    "eva_x_tiny_patch16": {"embed_dim": 192, "num_heads": 3},
    "eva_x_small_patch16": {"embed_dim": 384, "num_heads": 6},
    "eva_x_base_patch16": {"embed_dim": 768, "num_heads": 12, "qkv_fused": False, "scale_mlp": True},
}
_CFG = {
    "input_size": (3, 224, 224),
    "fixed_input_size": True,
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "num_classes": 14,
    "first_conv": "patch_embed.proj",
    "classifier": "head",
}
default_cfgs = generate_default_cfgs({name: _CFG for name in SIZES})


def _eva_x(variant: str, pretrained: bool, **kwargs: Any) -> Eva:
    published: dict[str, Any] = {
        "patch_size": 16,
        "depth": 12,
        "mlp_ratio": 4 * 2 / 3,
        "swiglu_mlp": True,
        "use_rot_pos_emb": True,
        "ref_feat_shape": (14, 14),  # 224 px / 16: rotary positions are scaled to this grid at every input size
    }
    model = build_model_with_cfg(Eva, variant, pretrained, **(published | SIZES[variant] | kwargs))
    if isinstance(model.head, nn.Linear):
        model.head.reset_parameters()  # timm would shrink it a thousandfold; the published run drew torch's default
    return model


@register_model
def eva_x_tiny_patch16(pretrained: bool = False, **kwargs: Any) -> Eva:
    """EVA-X-Ti, random init: (B, 3, S, S) float32 -> (B, num_classes) logits. `img_size` and sizes by keyword."""
    return _eva_x("eva_x_tiny_patch16", pretrained, **kwargs)


@register_model
def eva_x_small_patch16(pretrained: bool = False, **kwargs: Any) -> Eva:
    """EVA-X-S, random init: (B, 3, S, S) float32 -> (B, num_classes) logits. `img_size` and sizes by keyword."""
    return _eva_x("eva_x_small_patch16", pretrained, **kwargs)


@register_model
def eva_x_base_patch16(pretrained: bool = False, **kwargs: Any) -> Eva:
    """EVA-X-B, random init: (B, 3, S, S) float32 -> (B, num_classes) logits. `img_size` and sizes by keyword."""
    return _eva_x("eva_x_base_patch16", pretrained, **kwargs)


def resize_pos_embed(pos_embed_1ND: Tensor, grid: tuple[int, int]) -> Tensor:
    """EVA-X's rule for another input size: bicubic with antialias, the class token's row (the first) untouched.

    Antialias matters upwards too: with it torch's cubic kernel has a = -0.5 instead of -0.75 (0.03 on the logits).

    Args:
        pos_embed_1ND: (1, 1 + n * n, D) of a square grid.
        grid: rows and columns of patches to come out.
    Returns: (1, 1 + rows * columns, D), the same tensor where the grid is the same already.
    """
    side = round((pos_embed_1ND.shape[1] - 1) ** 0.5)
    if (side, side) == grid:
        return pos_embed_1ND
    resized = resample_abs_pos_embed(
        pos_embed_1ND, new_size=list(grid), old_size=[side, side], interpolation="bicubic", antialias=True
    )
    assert isinstance(resized, torch.Tensor)
    return resized
