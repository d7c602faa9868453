"""EVA-X Ti, S and B: timm's own `Eva` with the published sizes, registered with timm under the official names.

No subclass: timm's module gives the official outputs bit for bit, so its parameter names are ours
(`blocks.0.attn.q_proj.weight`, `fc_norm.weight`, `head.weight`, no prefix).
Source: hustvl/EVA-X `eva_x.py`; competition solution (only a new linear head, with torch's default init).
"""

import functools
import re
from pathlib import Path
from typing import Any

from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.eva import Eva
from torch import Tensor, nn

import cxrdist.models.architecture as base
from cxrdist.models.architecture import Architecture, Recognised, Size, Tensors
from cxrdist.models.lean import LeanNorm, make_lean

SIZES: dict[str, dict[str, Any]] = {
    "eva_x_base_patch16": {"embed_dim": 768, "num_heads": 12, "qkv_fused": False, "scale_mlp": True},
    "eva_x_small_patch16": {"embed_dim": 384, "num_heads": 6},
    "eva_x_tiny_patch16": {"embed_dim": 192, "num_heads": 3},
}
SEPARATE_BIAS = re.compile(r"blocks\.\d+\.attn\.(q_bias|q_proj\.)")  # of no plain ViT
LEFT_OUT = re.compile(r"(.*\.)?rope\.freqs_(cos|sin)|mask_token|lm_head\.(weight|bias)")
RENAMED = {"ffn_ln": "norm", "w12": "fc1", "w1": "fc1_g", "w2": "fc1_x", "w3": "fc2"}  # in .mlp.
_CFG = base.timm_cfg(224, first_conv="patch_embed.proj", classifier="head")
default_cfgs = generate_default_cfgs(dict.fromkeys(SIZES, _CFG))


def _eva_x(variant: str, pretrained: bool = False, **kwargs: Any) -> Eva:
    """A variant, random init: (B, 3, S, S) float32 -> (B, num_classes) logits. `img_size` and sizes by keyword."""
    published: dict[str, Any] = {
        "patch_size": 16,
        "depth": 12,
        "mlp_ratio": 4 * 2 / 3,
        "swiglu_mlp": True,
        "use_rot_pos_emb": True,
        "norm_layer": LeanNorm,
        "ref_feat_shape": (14, 14),  # 224 px / 16: rotary positions are scaled to this grid at every input size
    }
    model = build_model_with_cfg(Eva, variant, pretrained, **(published | SIZES[variant] | kwargs))
    make_lean(model)
    if isinstance(model.head, nn.Linear):
        model.head.reset_parameters()  # timm would shrink it a thousandfold; the published run drew torch's default
    return model


for _variant in SIZES:
    _entry: Any = functools.partial(_eva_x, _variant)
    _entry.__name__, _entry.__module__ = _variant, __name__  # what timm registers it under
    register_model(_entry)


def resize_pos_embed(pos_embed_1ND: Tensor, grid: tuple[int, int]) -> Tensor:
    """EVA-X's rule for another input size: bicubic with antialias, the class token's row (the first) untouched.

    Antialias matters upwards too: with it torch's cubic kernel has a = -0.5 instead of -0.75 (0.03 on the logits).

    pos_embed_1ND: (1, 1 + n * n, D) of a square grid. Returns (1, 1 + rows * columns, D), the same tensor where the
    grid (rows, columns of patches) is the same already.
    """
    resized: Tensor = resample_abs_pos_embed(pos_embed_1ND, list(grid), interpolation="bicubic", antialias=True)
    return resized


def recognise(path: Path, state: Tensors) -> Recognised | None:
    """EVA-X's tensors under timm's names, from the layouts eva_x_mim, eva_x_finetuned, published_eva_x and cxrdist."""
    if prefixed := all(name.startswith("backbone.") for name in state):
        state = {name.removeprefix("backbone."): tensor for name, tensor in state.items()}
    if "cls_token" not in state or not any(map(SEPARATE_BIAS.match, state)):
        return None
    dropped = [name for name in state if LEFT_OUT.fullmatch(name)]
    tensors = {_our_name(name, state): tensor for name, tensor in state.items() if name not in dropped}
    notes = base.left_out(dropped)
    layout = "published_eva_x" if prefixed else "cxrdist"
    if "mask_token" in state:
        layout = "eva_x_mim"
    elif any(re.search(r"\.mlp\.(w1|w12)\.", name) for name in state):
        layout = "eva_x_finetuned"
        head = [name for name in ("head.weight", "head.bias") if tensors.pop(name, None) is not None]
        notes += [f"left out {name} (labels of another data set)" for name in head]
    return Recognised(layout, tensors, notes)


def _our_name(name: str, state: Tensors) -> str:
    if "mask_token" in state:
        name = re.sub(r"^norm\.", "fc_norm.", name)
    if "blocks.0.attn.q_proj.weight" in state:
        name = re.sub(r"\.attn\.([qv])_bias$", r".attn.\1_proj.bias", name)
    for theirs, ours in RENAMED.items():
        name = name.replace(f".mlp.{theirs}.", f".mlp.{ours}.")
    return name


def _fit(model: Eva, tensors: Tensors, source: str) -> list[str]:
    grid = model.patch_embed.grid_size
    return base.fit_position(tensors, "pos_embed", grid, resize_pos_embed, source, num_prefix=1)


def _create(variant: str, image_size: Size, num_classes: int, drop_rate: float, **sizes: Any) -> Eva:
    return _eva_x(variant, img_size=image_size, num_classes=num_classes, **sizes)  # EVA-X has no dropout


ARCHITECTURES = tuple(
    Architecture(
        name=name,
        create=functools.partial(_create, variant),
        sizes=("embed_dim", "depth", "num_heads", "drop_path_rate"),
        multiple_of=16,
        official=base.OfficialFiles(
            (f"{variant}_merged520k_mim.pt",),
            "https://huggingface.co/MapleF/eva_x (hustvl/EVA-X has no licence file)",
            "https://github.com/hustvl/EVA-X has no licence file: ask its authors before you pass weights on",
        ),
        recognise=recognise,
        fit=_fit,
        position="pos_embed",
        not_in_optimizer=("cls_token", "pos_embed"),
        layers=base.timm_layers,
        saliency=base.grad_cam,
        saliency_title="Grad-CAM",
        saliency_about="Patches that raise the finding's score, on the tokens of the last block.",
    )
    for name, variant in zip(("eva_x", "eva_x_small", "eva_x_tiny"), SIZES, strict=True)
)
