"""Training losses by name, each with named parts, and the class weights they use.

Source of focal + BCE: the published run (its numbers are fields of the recipe).
"""

import functools
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from cxrdist.errors import UserError
from cxrdist.recipes import Recipe

Loss = dict[str, Tensor]  # float32 scalars: `total`, which is minimised, first, then its parts before weighting
Criterion = Callable[[Tensor, Tensor], Loss]  # of logits and targets, both (B, K)


def focal_bce(
    logits: Tensor,
    targets: Tensor,
    pos_weight: Tensor | None,
    *,
    focal_weight: float,
    focal_alpha: float,
    focal_gamma: float,
    bce_weight: float,
    masked: bool = False,
) -> Loss:
    """focal_weight * focal + bce_weight * BCE, both means over batch and labels, computed in float32.

    Args:
        logits, targets: (B, K); targets in [0, 1], nan where masked if `masked`: means are then over observed cells,
            0 where none is, and a masked cell has no gradient.
        pos_weight: (K,) factor on the positive term of the BCE part only, or None.
        focal_alpha: a plain factor, the same for positives and negatives.
    Returns: total, focal, bce.
    Source: Lin et al. 2017 (focal loss), with the alpha of the published run.
    """
    logits, targets = logits.float(), targets.float()
    observed = ~torch.isnan(targets) if masked else None
    if observed is not None:  # not multiplied away: an infinite logit times 0 would be nan
        logits, targets = torch.where(observed, logits, 0.0), torch.where(observed, targets, 0.0)
    plain = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    focal_cells = focal_alpha * (1.0 - torch.exp(-plain)) ** focal_gamma * plain
    if observed is None:
        focal = focal_cells.mean()
        bce = F.binary_cross_entropy_with_logits(logits, targets, pos_weight=pos_weight)
    else:
        bce_cells = F.binary_cross_entropy_with_logits(logits, targets, pos_weight=pos_weight, reduction="none")
        focal, bce = mean_observed(focal_cells, observed), mean_observed(bce_cells, observed)
    return {"total": focal_weight * focal + bce_weight * bce, "focal": focal, "bce": bce}


def mean_observed(cells: Tensor, observed: Tensor) -> Tensor:
    """The mean of the observed cells (0-dim); 0 where there is none. No host sync."""
    return torch.where(observed, cells, 0.0).sum() / observed.sum().clamp(min=1)


def published(recipe: Recipe, pos_weight: Tensor, masked: bool) -> Criterion:
    """`focal_bce` with a recipe's numbers."""
    names = ("focal_weight", "focal_alpha", "focal_gamma", "bce_weight")
    return functools.partial(
        focal_bce, pos_weight=pos_weight, masked=masked, **{name: getattr(recipe, name) for name in names}
    )


# From a recipe, class weights (K,), and whether targets may hold nan for masked cells.
LOSSES: dict[str, Callable[[Recipe, Tensor, bool], Criterion]] = {"focal_bce": published}


def make_criterion(
    recipe: Recipe, targets: NDArray[np.float32], device: torch.device, *, masked: bool | None = None
) -> Criterion:
    """The recipe's loss with class weights from the targets (N, K) of all images that are trained on, nan where masked.

    masked: whether other targets, as those of validation, have masked cells; None: if these have.
    Raises UserError for an unknown loss.
    """
    if recipe.loss not in LOSSES:
        raise UserError(f"loss={recipe.loss!r} is unknown; one of {', '.join(LOSSES)}")
    observed = torch.from_numpy((~np.isnan(targets)).sum(axis=0))
    positives = torch.from_numpy(np.nansum(targets, axis=0))
    pos_weight = effective_pos_weight(positives, observed, recipe.pos_weight_beta, recipe.pos_weight_cap)
    some_masked = bool((observed < len(targets)).any())
    return LOSSES[recipe.loss](recipe, pos_weight.to(device), some_masked if masked is None else masked)


def part_names(criterion: Criterion, num_labels: int) -> tuple[str, ...]:
    """The names of a loss's parts in their order, `total` first."""
    names = tuple(criterion(torch.zeros(1, num_labels), torch.zeros(1, num_labels)))
    if names[:1] != ("total",):
        raise ValueError(f"a loss names its total first, not {names}")
    return names


def effective_pos_weight(num_pos: Tensor, num_total: Tensor | int, beta: float = 0.9999, cap: float = 10.0) -> Tensor:
    """Class weights from the effective number of samples: E(neg) / E(pos), E(n) = (1 - beta^n) / (1 - beta).

    Args:
        num_pos: (K,) images with the finding; zero gives weight `cap`.
        num_total: images that are trained on and whose label is observed, for all labels or (K,).
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
