"""timm's layers with less traffic under autocast, which casts each input of each layer for itself.

Parameters, names and float32 results are timm's, bit for bit.
"""

from typing import Any

import torch
from timm.layers.mlp import SwiGLU
from timm.layers.norm import LayerNorm
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """What autocast computes in on the tensor's device; None where it is off."""
    kind = tensor.device.type
    if kind == "meta":  # where shapes are tried, and autocast is not known
        return None
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


class LeanNorm(LayerNorm):
    """A LayerNorm whose output is cast once for all that read it (q, k, v; both gates of SwiGLU)."""

    def forward(self, x: Tensor) -> Tensor:
        """The normalised tensor, in autocast's dtype where it is on."""
        normed: Tensor = super().forward(x)
        dtype = autocast_dtype(x)
        return normed if dtype is None else normed.to(dtype)


class LeanSwiGLU(SwiGLU):
    """A SwiGLU with an inner norm whose weight and bias, under autocast, are multiplied into `fc2`, in float32.

    The norm then reads and writes half precision, with sums in float32: no cast of the widest tensor of a block.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) tokens to (..., D)."""
        dtype = autocast_dtype(x)
        out: Tensor
        if dtype is None:
            out = super().forward(x)  # type: ignore[no-untyped-call]
            return out
        hidden = self.drop1(self.act(self.fc1_g(x)) * self.fc1_x(x))
        norm: Any = self.norm
        fc2 = self.fc2
        with torch.autocast(x.device.type, enabled=False):
            normed = F.layer_norm(hidden, norm.normalized_shape, eps=norm.eps)
            weight, bias = fc2.weight * norm.weight, F.linear(norm.bias, fc2.weight, fc2.bias)
            out = self.drop2(F.linear(normed, weight.to(dtype), bias.to(dtype)))
        return out


def make_lean(model: Any) -> None:
    """Give the SwiGLUs of a timm model that have an inner norm the forward of `LeanSwiGLU`."""
    for module in model.modules():
        if type(module) is SwiGLU and isinstance(module.norm, LayerNorm):
            module.__class__ = LeanSwiGLU


class LeanBlock(Block):
    """A frozen block of a vision transformer. Once `hold` was called, it computes under autocast only, without a graph.

    What it adds to the tokens stays float32; each norm is written in half precision at once.
    """

    held: torch.dtype | None = None

    @torch.no_grad()
    def hold(self, dtype: torch.dtype) -> None:
        """Keep the matrices in `dtype`, as autocast would cast them in every forward.

        What scales their inputs and outputs (norms and LayerScale) is multiplied into them before, in float32.
        """
        own: Any = self
        for norm, reader in ((own.norm1, own.attn.qkv), (own.norm2, own.mlp.fc1)):
            reader.bias += reader.weight @ norm.bias
            reader.weight *= norm.weight
        for scale, writer in ((own.ls1, own.attn.proj), (own.ls2, own.mlp.fc2)):
            if not isinstance(scale, nn.Identity):
                writer.weight *= scale.gamma[:, None]
                writer.bias *= scale.gamma
        for part in (own.norm1, own.norm2, own.ls1, own.ls2):  # what is in the matrices now
            for name, parameter in part.named_parameters():
                parameter.fill_(name != "bias")
        self.to(dtype)
        self.held = dtype

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, N, D) tokens to (B, N, D), float32 also under autocast."""
        if self.held is None:
            out: Tensor = super().forward(x, attn_mask, is_causal)
            return out
        x = x + self.attn(self._normed(x, self.norm1), attn_mask=attn_mask, is_causal=is_causal)
        tokens: Tensor = x + self.mlp(self._normed(x, self.norm2))
        return tokens

    def _normed(self, x: Tensor, norm: Any) -> Tensor:
        variance, mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)
        scale = (variance + norm.eps).rsqrt()
        return torch.addcmul(-mean * scale, x, scale, out=torch.empty_like(x, dtype=self.held))
