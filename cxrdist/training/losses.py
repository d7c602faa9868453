"""The training loss: focal plus class-weighted binary cross-entropy over the 14 findings, and its class weights.

Source: the published run (RECIPE numbers are arguments, their defaults live in `cxrdist.recipes`).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Loss(NamedTuple):
    """Scalars, float32: `total` is what is minimised, the others are its parts before weighting."""

    total: Tensor
    focal: Tensor
    bce: Tensor


def focal_bce(
    logits: Tensor,
    targets: Tensor,
    pos_weight: Tensor | None,
    *,
    focal_weight: float,
    focal_alpha: float,
    focal_gamma: float,
    bce_weight: float,
) -> Loss:
    """focal_weight * focal + bce_weight * BCE, both means over batch and labels, computed in float32.

    Args:
        logits, targets: (B, K); targets in [0, 1].
        pos_weight: (K,) factor on the positive term of the BCE part only, or None.
        focal_alpha: a plain factor, the same for positives and negatives.
    Source: Lin et al. 2017 (focal loss), with the alpha of the published run.
    """
    logits, targets = logits.float(), targets.float()
    plain = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    focal = (focal_alpha * (1.0 - torch.exp(-plain)) ** focal_gamma * plain).mean()
    bce = F.binary_cross_entropy_with_logits(logits, targets, pos_weight=pos_weight)
    return Loss(focal_weight * focal + bce_weight * bce, focal, bce)


def effective_pos_weight(num_pos: Tensor, num_total: int, beta: float = 0.9999, cap: float = 10.0) -> Tensor:
    """Class weights from the effective number of samples: E(neg) / E(pos), E(n) = (1 - beta^n) / (1 - beta).

    Args:
        num_pos: (K,) images with the finding; zero gives weight `cap`.
        num_total: images that are trained on.
        beta: in [0, 1); 0 weights every class alike.
    Returns: (K,) float32 in [0, cap], for `pos_weight` of BCE-with-logits.
    Raises ValueError if a count exceeds `num_total`.
    Source: Cui et al. 2019 (class-balanced loss); the cap is the published run's.
    """
    if bool((num_pos > num_total).any()) or bool((num_pos < 0).any()):
        raise ValueError(f"positive counts {num_pos.tolist()} do not lie in 0..{num_total}")
    positives = num_pos.double()
    effective = (1.0 - beta**positives) / (1.0 - beta)
    effective_negatives = (1.0 - beta ** (num_total - positives)) / (1.0 - beta)
    return (effective_negatives / (effective + 1e-8)).clamp(max=cap).float()
