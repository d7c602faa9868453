"""Where a model looked: GLoRI's own attention per finding, and Grad-CAM for a model without queries.

A map shows what moved the score, not where the disease is; it is no localisation of a finding.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cxrdist.models.architecture import Maps


@torch.no_grad()
def attention_maps(model: Any, images: Tensor, labels: NDArray[np.int64]) -> Maps:
    """(B, h, w) attention of the query of label `labels[b]` over image b, mean over heads; each map sums to 1.

    `model.attention` returns (B, heads, classes, patches) of images (B, 3, S, S).
    """
    maps = model.attention(images).float().mean(dim=1)
    return _grids(maps[torch.arange(len(images)), torch.as_tensor(labels)])


def grad_cam(model: Any, images: Tensor, labels: NDArray[np.int64]) -> Maps:
    """(B, h, w) Grad-CAM >= 0 of label `labels[b]` on the last block's patch tokens, for a timm vision transformer.

    Source: Selvaraju et al. 2017, with tokens as channels: the gradient's mean over the patches weighs each channel.
    """
    with torch.no_grad():
        tokens = model.forward_features(images)
    tokens = tokens.detach().requires_grad_()
    logits = model.forward_head(tokens)
    (gradient,) = torch.autograd.grad(logits[torch.arange(len(images)), torch.as_tensor(labels)].sum(), tokens)
    num_prefix = int(model.num_prefix_tokens)
    weights = gradient[:, num_prefix:].mean(dim=1, keepdim=True)
    return _grids((weights * tokens[:, num_prefix:].detach()).sum(dim=-1).relu())


def _grids(values: Tensor) -> Maps:
    side = round(values.shape[1] ** 0.5)
    return values.reshape(-1, side, side).cpu().numpy().astype(np.float32)
