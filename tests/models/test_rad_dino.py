"""RAD-DINO's released files, in both of their layouts, give the tokens of the plain DINOv2 computation."""

import re

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cxrdist.errors import UserError
from cxrdist.models import architecture_of
from cxrdist.models.weights.fit import load_backbone, load_init
from cxrdist.models.weights.safetensors import write_safetensors

PATCH = 14


def official(width: int, depth: int, side: int) -> dict[str, Tensor]:
    """Random weights under DINOv2's names, of a size at which each term counts."""
    draw = torch.Generator().manual_seed(1)

    def normal(*shape: int, std: float = 0.02, mean: float = 0.0) -> Tensor:
        return torch.randn(*shape, generator=draw) * std + mean

    state = {
        "cls_token": normal(1, 1, width, std=1.0),
        "mask_token": normal(1, width),
        "pos_embed": normal(1, 1 + side * side, width, std=0.5),
        "patch_embed.proj.weight": normal(width, 3, PATCH, PATCH),
        "patch_embed.proj.bias": normal(width),
        "norm.weight": normal(width, mean=1.0, std=0.2),
        "norm.bias": normal(width),
    }
    for block in range(depth):
        for name, shape in {
            "attn.qkv": (3 * width, width),
            "attn.proj": (width, width),
            "mlp.fc1": (4 * width, width),
            "mlp.fc2": (width, 4 * width),
        }.items():
            state[f"blocks.{block}.{name}.weight"] = normal(*shape, std=width**-0.5)
            state[f"blocks.{block}.{name}.bias"] = normal(shape[0])
        for norm in ("norm1", "norm2"):
            state[f"blocks.{block}.{norm}.weight"] = normal(width, mean=1.0, std=0.2)
            state[f"blocks.{block}.{norm}.bias"] = normal(width)
        for scale in ("ls1", "ls2"):
            state[f"blocks.{block}.{scale}.gamma"] = normal(width, mean=0.5, std=0.1)
    return state


def in_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under the names of transformers' Dinov2Model."""
    renamed = {
        "cls_token": "embeddings.cls_token",
        "mask_token": "embeddings.mask_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj.": "embeddings.patch_embeddings.projection.",
    }
    out = {}
    for name, tensor in state.items():
        if ".attn.qkv." in name:
            prefix, kind = name.split("attn.qkv.")
            prefix = prefix.replace("blocks.", "encoder.layer.") + "attention.attention."
            for part, values in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                out[f"{prefix}{part}.{kind}"] = values.clone()
            continue
        for ours, theirs in renamed.items():
            name = name.replace(ours, theirs)
        name = re.sub(r"^norm\.", "layernorm.", name).replace("attn.proj.", "attention.output.dense.")
        name = re.sub(r"ls(\d)\.gamma", r"layer_scale\1.lambda1", name)
        out[name.replace("blocks.", "encoder.layer.")] = tensor
    return out


def plain_dinov2(state: dict[str, Tensor], images: Tensor, heads: int, num_blocks: int) -> Tensor:
    """Patch tokens of the last blocks through the final norm, computed step by step as DINOv2's code does."""
    width = state["cls_token"].shape[-1]
    grid = images.shape[-1] // PATCH
    side = round((state["pos_embed"].shape[1] - 1) ** 0.5)
    patches = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=PATCH)
    tokens = torch.cat([state["cls_token"].expand(len(images), -1, -1), patches.flatten(2).transpose(1, 2)], dim=1)
    position = state["pos_embed"]
    if grid != side:
        square = position[:, 1:].reshape(1, side, side, width).permute(0, 3, 1, 2)
        factor = (grid + 0.1) / side
        square = F.interpolate(square, scale_factor=(factor, factor), mode="bicubic", antialias=False)
        position = torch.cat([position[:, :1], square.permute(0, 2, 3, 1).reshape(1, -1, width)], dim=1)
    tokens = tokens + position
    depth = sum(name.endswith("ls1.gamma") for name in state)
    out = []

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (width,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    for number in range(depth):
        block = f"blocks.{number}"
        queries, keys, values = (
            part.unflatten(-1, (heads, -1)).transpose(1, 2)
            for part in linear(norm(tokens, f"{block}.norm1"), f"{block}.attn.qkv").chunk(3, dim=-1)
        )
        weights = (queries @ keys.transpose(-2, -1) * (width // heads) ** -0.5).softmax(-1)
        attended = (weights @ values).transpose(1, 2).flatten(2)
        tokens = tokens + state[f"{block}.ls1.gamma"] * linear(attended, f"{block}.attn.proj")
        hidden = F.gelu(linear(norm(tokens, f"{block}.norm2"), f"{block}.mlp.fc1"))
        tokens = tokens + state[f"{block}.ls2.gamma"] * linear(hidden, f"{block}.mlp.fc2")
        if number >= depth - num_blocks:
            out.append(norm(tokens, "norm")[:, 1:])
    return torch.cat(out, dim=-1)


@pytest.mark.fast
@pytest.mark.parametrize("layout", [dict, in_transformers])
@pytest.mark.parametrize("px", [70, 56, 98])
def test_tokens_are_the_plain_computations(layout, px: int, tmp_path) -> None:
    state = official(32, 5, side=5)
    write_safetensors(tmp_path / "rad_dino.safetensors", layout(state))
    architecture = architecture_of("rad_dino")
    model = architecture.build(px, 3, embed_dim=32, depth=5, num_heads=2, decoder_dim=16).eval()
    report = load_init(architecture, model, tmp_path / "rad_dino.safetensors")
    assert "rad_dino" in report
    assert "fresh head" in report
    images = torch.randn(2, 3, px, px, generator=torch.Generator().manual_seed(2))
    found = architecture.features(model, images)
    assert (found - plain_dinov2(state, images, 2, 4)).abs().max() <= 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("px", [518, 448])
def test_tokens_are_the_plain_computations_at_full_size(px: int, tmp_path) -> None:
    state = official(768, 12, side=37)
    write_safetensors(tmp_path / "model.safetensors", in_transformers(state))
    architecture = architecture_of("rad_dino")
    model = architecture.build(px, 14).eval()
    load_init(architecture, model, tmp_path / "model.safetensors")
    images = torch.randn(1, 3, px, px, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert (model.features(images) - plain_dinov2(state, images, 12, 4)).abs().max() <= 2e-5


@pytest.mark.fast
def test_another_encoders_file_is_refused_and_its_own_backbone_found(tmp_path) -> None:
    architecture = architecture_of("rad_dino")
    sizes = {"embed_dim": 32, "depth": 4, "num_heads": 2, "decoder_dim": 16}
    model, other = architecture.build(56, 3, **sizes), architecture.build(56, 3, **sizes)
    own = {name: model.state_dict()[name] for name in architecture.frozen_names(model)}
    write_safetensors(tmp_path / "backbone.safetensors", own)
    load_backbone(architecture, other, tmp_path / "backbone.safetensors")
    assert all(tensor.equal(other.state_dict()[name]) for name, tensor in own.items())
    chexfound = architecture_of("chexfound").build(64, 3, embed_dim=32, depth=4, num_heads=2, decoder_dim=16)
    write_safetensors(tmp_path / "chexfound.safetensors", chexfound.state_dict())
    with pytest.raises(UserError, match="holds weights of chexfound, but the model is rad_dino"):
        load_init(architecture, model, tmp_path / "chexfound.safetensors")
