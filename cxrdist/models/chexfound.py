"""CheXFound: a frozen DINOv2-style ViT (timm's `VisionTransformer`) under a trained GLoRI head.

The backbone really is frozen: no gradient, always in eval mode, run without a graph, stored nowhere with the head.
Differences to the official module are settled when weights are read: the class token's position row is added to the
class token, the mask token is dropped. Source: RPIDIAL/CheXFound; 304,630,016 parameters there, 304,627,968 here.

Shapes: B batch, N patches, D backbone width, F = 4 D, C classes, H heads.
"""

from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers.mlp import SwiGLUPacked
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from cxrdist.models.glori import GLoRI

NUM_BLOCKS_READ = 4  # the features are the patch tokens of the last four blocks
RELEASED_QUERIES = 40  # classes of the released head, kept by the published run
POS_EMBED_OFFSET = 0.1  # DINOv2's guard against rounding, part of the sampling positions
_NOT_OURS: Any = ("in_chans", "global_pool")  # timm adds them for every model

default_cfgs = generate_default_cfgs(
    {
        "chexfound_vitl16_glori": {
            "input_size": (3, 512, 512),
            "fixed_input_size": True,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "num_classes": 14,
            "first_conv": "backbone.patch_embed.proj",
            "classifier": "glori",
        }
    }
)


class CheXFound(nn.Module):
    """(B, 3, S, S) float32 images to (B, C) logits; random init. Defaults are the published sizes.

    `num_queries` defaults to `num_classes`; the published structure has 40 (see `glori`). `drop_rate` is the head's.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 512,
        num_classes: int = 14,
        drop_rate: float = 0.1,
        embed_dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        init_values: float = 1e-5,
        decoder_dim: int = 768,
        num_queries: int | None = None,
    ) -> None:
        super().__init__()
        swiglu_hidden = (int(embed_dim * 4 * 2 / 3) + 7) // 8 * 8  # DINOv2 rounds up to a multiple of 8
        self.num_classes = num_classes
        self.backbone = VisionTransformer(
            img_size=img_size,
            patch_size=16,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            init_values=init_values,
            mlp_layer=SwiGLUPacked,  # type: ignore[arg-type]  # a partial, as timm's own models pass it
            mlp_ratio=(2 * swiglu_hidden + 0.5) / embed_dim,  # timm truncates: half a unit keeps it from one too few
            act_layer=nn.SiLU,
            reg_tokens=4,
            no_embed_class=True,
            num_classes=0,
        )
        self.backbone.requires_grad_(False)
        self.backbone.eval()
        self.glori = GLoRI(
            in_dim=NUM_BLOCKS_READ * embed_dim,
            num_classes=num_classes,
            num_queries=num_classes if num_queries is None else num_queries,
            dim=decoder_dim,
            drop_rate=drop_rate,
        )

    def train(self, mode: bool = True) -> "CheXFound":
        """As `nn.Module.train`, for the head alone: the backbone stays in eval mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(B, N, F) float32: patch tokens of the last four blocks, each through the final norm, side by side."""
        tokens: Any = self.backbone.forward_intermediates(
            images, indices=NUM_BLOCKS_READ, norm=True, output_fmt="NLC", intermediates_only=True
        )
        return torch.cat(tokens, dim=-1).float()

    def head_logits(self, features: Tensor) -> Tensor:
        """(B, C) logits of what `features` returned."""
        logits: Tensor = self.glori(features)
        return logits

    def forward(self, images: Tensor) -> Tensor:
        """(B, C) logits of normalised images (B, 3, S, S)."""
        return self.head_logits(self.features(images))

    def attention(self, images: Tensor) -> Tensor:
        """(B, H, C, N) attention of each class's query over the patches (row-major), per head."""
        return self.glori.attention(self.features(images))


@register_model
def chexfound_vitl16_glori(pretrained: bool = False, **kwargs: Any) -> CheXFound:
    """The published structure, random init: ViT-L/16 at `img_size` (512), 40 queries, the first `num_classes` used."""
    kwargs = {"num_queries": max(RELEASED_QUERIES, kwargs.get("num_classes", 0))} | kwargs
    model: CheXFound = build_model_with_cfg(
        CheXFound, "chexfound_vitl16_glori", pretrained, kwargs_filter=_NOT_OURS, **kwargs
    )
    return model


def resize_pos_embed(pos_embed_1ND: Tensor, grid: tuple[int, int]) -> Tensor:
    """DINOv2's rule for another input size: bicubic without antialias, by the factor (new + 0.1) / old.

    torch samples by that very factor; asking for the output size instead moves values by up to 0.39 (512 to 448 px).

    Args:
        pos_embed_1ND: (1, n * n, D) float32 of a square grid, without a row for the class token.
        grid: rows and columns of patches to come out.
    Returns: (1, rows * columns, D), the same tensor where the grid is the same already.
    """
    side = round(pos_embed_1ND.shape[1] ** 0.5)
    if (side, side) == grid:
        return pos_embed_1ND
    old_1DHW = pos_embed_1ND.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    factors = ((grid[0] + POS_EMBED_OFFSET) / side, (grid[1] + POS_EMBED_OFFSET) / side)
    new_1DHW = F.interpolate(old_1DHW, scale_factor=factors, mode="bicubic", antialias=False)
    assert new_1DHW.shape[-2:] == grid
    return new_1DHW.permute(0, 2, 3, 1).reshape(1, grid[0] * grid[1], -1)
