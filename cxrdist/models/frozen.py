"""A frozen vision transformer under a trained GLoRI head: the family of CheXFound, RAD-DINO and `glori:NAME`.

The encoder really is frozen: no gradient, always in eval mode, run without a graph, stored nowhere with the head. Its
patches, registers and width are read off it. `glori:NAME` takes any vision transformer of timm.

Shapes: B batch, N patches, F = width times blocks read, C classes, H heads.
"""

import functools
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

import cxrdist.models.architecture as base
import cxrdist.models.backbones as backbones
from cxrdist.errors import UserError
from cxrdist.models.architecture import Architecture, Recognised, Size, Tensors
from cxrdist.models.glori import GLoRI
from cxrdist.models.lean import LeanBlock, LeanNorm

NUM_BLOCKS_READ = 4  # the features are the patch tokens of the last four blocks
POS_EMBED_OFFSET = 0.1  # DINOv2's guard against rounding, part of the sampling positions
HEAD_SIZES = ("num_blocks", "decoder_dim", "num_queries")
E = TypeVar("E", bound="FrozenEncoder")


class FrozenEncoder(nn.Module):
    """(B, 3, S, S) float32 images to (B, C) logits.

    backbone: a vision transformer of timm without a classifier; its last `num_blocks` blocks are read.
    num_queries: `num_classes`, where not given. drop_rate: of the head.
    """

    def __init__(
        self,
        backbone: Any,
        num_classes: int,
        drop_rate: float = 0.1,
        decoder_dim: int = 768,
        num_queries: int | None = None,
        num_blocks: int = NUM_BLOCKS_READ,
    ) -> None:
        super().__init__()
        self.num_classes, self.num_blocks = num_classes, num_blocks
        self.backbone = backbone
        self.backbone.requires_grad_(False)
        self.backbone.eval()
        self.glori = GLoRI(
            in_dim=num_blocks * backbone.embed_dim,
            num_classes=num_classes,
            num_queries=num_classes if num_queries is None else num_queries,
            dim=decoder_dim,
            drop_rate=drop_rate,
        )

    def train(self: E, mode: bool = True) -> E:
        """As `nn.Module.train`, for the head only: the backbone stays in eval mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(B, N, F): patch tokens of the blocks read, each through the final norm, side by side.

        float32, or under autocast its dtype.
        """
        tokens: Any = self.backbone.forward_intermediates(
            images, indices=self.num_blocks, norm=True, output_fmt="NLC", intermediates_only=True
        )
        return torch.cat(tokens, dim=-1)

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


def resize_pos_embed(pos_embed_1ND: Tensor, grid: tuple[int, int]) -> Tensor:
    """DINOv2's rule for another input size: bicubic without antialias, by the factor (new + 0.1) / old.

    torch samples by that very factor; asking for the output size instead moves values by up to 0.39 (512 to 448 px).

    pos_embed_1ND: (1, n * n, D) float32 of a square grid, without a row for the class token. Returns (1, rows *
    columns, D), the same tensor where the grid (rows, columns of patches) is the same already.
    """
    side = round(pos_embed_1ND.shape[1] ** 0.5)
    if (side, side) == grid:
        return pos_embed_1ND
    old_1DHW = pos_embed_1ND.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    factors = ((grid[0] + POS_EMBED_OFFSET) / side, (grid[1] + POS_EMBED_OFFSET) / side)
    new_1DHW = F.interpolate(old_1DHW, scale_factor=factors, mode="bicubic", antialias=False)
    assert new_1DHW.shape[-2:] == grid
    return new_1DHW.permute(0, 2, 3, 1).reshape(1, grid[0] * grid[1], -1)


def hold(model: FrozenEncoder, dtype: torch.dtype) -> None:
    """Hold the backbone's blocks in `dtype`, where they can; see `LeanBlock.hold`."""
    for module in model.backbone.modules():
        if isinstance(module, LeanBlock) and module.held is None:
            module.hold(dtype)
    model.backbone.patch_embed.to(dtype)


def idle(model: FrozenEncoder) -> int:
    """Queries and outputs of the head beyond the classes: values that never get a gradient."""
    queries = model.glori.query_embed.weight
    return 2 * (len(queries) - model.num_classes) * queries.shape[1]


FAMILY: dict[str, Any] = {  # what all of the family have
    "frozen": "backbone.",
    "head": "glori.",
    "position": "backbone.pos_embed",
    "saliency": base.attention_maps,
    "saliency_title": "GLoRI attention",
    "saliency_about": "Where the finding's own query looks (mean over heads).",
    "features": FrozenEncoder.features,
    "head_logits": FrozenEncoder.head_logits,
    "idle": idle,
}


@functools.cache
def glori_architecture(name: str) -> Architecture:
    """The architecture `glori:NAME` of a vision transformer of timm; UserError for another kind of model."""
    shown = f"glori:{name}"
    encoder = backbones.timm_architecture(name)
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False, num_classes=0)
    blocks = getattr(model, "blocks", None)
    if not hasattr(model, "embed_dim") or not hasattr(model, "num_prefix_tokens") or blocks is None:
        raise UserError(f"{shown}: the head reads a vision transformer's patch tokens, and {name} is none: timm:{name}")
    lean = type(model) is VisionTransformer and all(type(block) is Block for block in blocks)
    return Architecture(
        name=shown,
        create=functools.partial(_create, name, {"block_fn": LeanBlock, "norm_layer": LeanNorm} if lean else {}),
        sizes=(*HEAD_SIZES, *encoder.sizes),
        multiple_of=encoder.multiple_of,
        image_size=encoder.image_size,
        mean=encoder.mean,
        std=encoder.std,
        hold=hold if lean else None,
        recognise=functools.partial(_recognise, shown),
        fit=_fit,
        download=None if encoder.download is None else functools.partial(_download, encoder),
        **FAMILY,
    )


def _create(
    name: str, options: dict[str, Any], image_size: Size, num_classes: int, drop_rate: float, **sizes: Any
) -> FrozenEncoder:
    head = {each: sizes.pop(each) for each in HEAD_SIZES if each in sizes}
    made = functools.partial(timm.create_model, name, pretrained=False, num_classes=0, img_size=image_size)
    return FrozenEncoder(made(**options, **sizes), num_classes, drop_rate, **head)


def _recognise(layout: str, path: Path, state: Tensors) -> Recognised:
    """A file of ours, or of the encoder alone in timm's names or those that timm's filter knows."""
    ours = any(name.startswith(("backbone.", "glori.")) for name in state)
    return Recognised(layout, dict(state) if ours else {f"backbone.{name}": each for name, each in state.items()})


def _fit(model: FrozenEncoder, tensors: Tensors, source: str) -> list[str]:
    encoder = {name.removeprefix("backbone."): tensors.pop(name) for name in list(tensors) if "backbone." in name[:9]}
    notes = backbones.fit((), model.backbone, encoder, source) if encoder else []
    own = model.backbone.state_dict()
    left = [name for name in encoder if name not in own]
    tensors |= {f"backbone.{name}": tensor for name, tensor in encoder.items() if name in own}
    return notes + base.left_out(left)


def _download(encoder: Architecture) -> tuple[str, Tensors]:
    assert encoder.download is not None
    source, tensors = encoder.download()
    return source, {f"backbone.{name}": tensor for name, tensor in tensors.items()}
