"""RAD-DINO: a frozen DINOv2 ViT-B/14 of chest X-rays under a trained GLoRI head.

Its released files have the names of transformers' `Dinov2Model`, or of DINOv2's own code; both become timm's. The mask
token is dropped. Images are grey in three channels, normalised by the mean and deviation of its own training.
Source: Perez-Garcia et al. 2024 (microsoft/rad-dino); Oquab et al. 2023 (DINOv2).
"""

import re
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import cxrdist.models.architecture as base
from cxrdist.models.architecture import Architecture, OfficialFiles, Recognised, Size, Tensors
from cxrdist.models.frozen import FAMILY, FrozenEncoder, hold, resize_pos_embed
from cxrdist.models.lean import LeanBlock, LeanNorm

PUBLISHED: dict[str, Any] = {"embed_dim": 768, "depth": 12, "num_heads": 12}
PATCH = 14  # px
RENAMED = {  # from transformers' names
    r"^embeddings\.cls_token": "cls_token",
    r"^embeddings\.position_embeddings": "pos_embed",
    r"^embeddings\.patch_embeddings\.projection\.": "patch_embed.proj.",
    r"^encoder\.layer\.(\d+)\.attention\.output\.dense\.": r"blocks.\1.attn.proj.",
    r"^encoder\.layer\.(\d+)\.layer_scale(\d)\.lambda1$": r"blocks.\1.ls\2.gamma",
    r"^encoder\.layer\.": "blocks.",
    r"^layernorm\.": "norm.",
}


def _create(image_size: Size, num_classes: int, drop_rate: float, **sizes: Any) -> FrozenEncoder:
    head = {name: sizes.pop(name) for name in ("num_blocks", "decoder_dim") if name in sizes}
    backbone = VisionTransformer(
        img_size=image_size,
        patch_size=PATCH,
        init_values=1e-5,
        num_classes=0,
        norm_layer=LeanNorm,
        block_fn=LeanBlock,
        **(PUBLISHED | sizes),
    )
    return FrozenEncoder(backbone, num_classes, drop_rate, **head)


def recognise(path: Path, state: Tensors) -> Recognised | None:
    """RAD-DINO's tensors in our names, from the layouts rad_dino (of either code) and cxrdist."""
    if any(name.startswith(("backbone.", "glori.")) for name in state):
        ours = "backbone.blocks.0.ls1.gamma" in state and "backbone.reg_token" not in state
        return Recognised("cxrdist", dict(state)) if ours else None
    if "embeddings.cls_token" in state:
        tensors = _from_transformers(state)
    elif {"cls_token", "mask_token", "blocks.0.ls1.gamma"} <= state.keys() and "register_tokens" not in state:
        tensors = dict(state)
    else:
        return None
    dropped = [name for name in tensors if "mask_token" in name]
    kept = {f"backbone.{name}": tensor for name, tensor in tensors.items() if name not in dropped}
    return Recognised("rad_dino", kept, base.left_out(dropped))


def _from_transformers(state: Tensors) -> Tensors:
    tensors: Tensors = {}
    for name, tensor in state.items():
        for theirs, ours in RENAMED.items():
            name = re.sub(theirs, ours, name)
        tensors[name] = tensor
    for name in [name for name in tensors if name.endswith(".attention.attention.query.weight")]:
        block = name.removesuffix(".attention.attention.query.weight")
        for kind in ("weight", "bias"):  # timm has them in one matrix
            parts = [
                tensors.pop(f"{block}.attention.attention.{part}.{kind}", None) for part in ("query", "key", "value")
            ]
            if all(part is not None for part in parts):
                tensors[f"{block}.attn.qkv.{kind}"] = torch.cat(parts)  # type: ignore[arg-type]
    return tensors


def _resize(pos_embed_1ND: Tensor, grid: tuple[int, int]) -> Tensor:
    """DINOv2's rule; the first row is the class token's."""
    return torch.cat([pos_embed_1ND[:, :1], resize_pos_embed(pos_embed_1ND[:, 1:], grid)], dim=1)


def _fit(model: FrozenEncoder, tensors: Tensors, source: str) -> list[str]:
    grid = model.backbone.patch_embed.grid_size
    return base.fit_position(tensors, "backbone.pos_embed", grid, _resize, source, num_prefix=1)


ARCHITECTURE = Architecture(
    name="rad_dino",
    create=_create,
    sizes=(*PUBLISHED, "init_values", "num_blocks", "decoder_dim"),
    multiple_of=PATCH,
    image_size=518,
    mean=(0.5307, 0.5307, 0.5307),
    std=(0.2583, 0.2583, 0.2583),
    hold=hold,
    official=OfficialFiles(
        ("rad_dino.safetensors",),
        "model.safetensors of https://huggingface.co/microsoft/rad-dino, saved under that name",
        "https://huggingface.co/microsoft/rad-dino has its licence, MSRLA at first and MIT later: read it before you "
        "pass weights on",
    ),
    recognise=recognise,
    fit=_fit,
    **FAMILY,
)
