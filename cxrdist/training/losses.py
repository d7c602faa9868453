"""Training losses by name, each with named parts, and the class weights they use.

Their numbers are fields of the recipe. Source of focal + BCE: the published run.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from cxrdist.errors import UserError
from cxrdist.recipes import Recipe

Loss = dict[str, Tensor]  # float32 scalars: `total`, which is minimised, first, then its parts before weighting
EPS = 1e-8  # of the asymmetric loss, as published: what its logarithms are of is not smaller
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
    logits, targets, observed = _without_masked(logits, targets, masked)
    plain = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    focal_cells = focal_alpha * (1.0 - torch.exp(-plain)) ** focal_gamma * plain
    if observed is None:
        focal = focal_cells.mean()
        bce = F.binary_cross_entropy_with_logits(logits, targets, pos_weight=pos_weight)
    else:
        bce_cells = F.binary_cross_entropy_with_logits(logits, targets, pos_weight=pos_weight, reduction="none")
        focal, bce = mean_observed(focal_cells, observed), mean_observed(bce_cells, observed)
    return {"total": focal_weight * focal + bce_weight * bce, "focal": focal, "bce": bce}


def bce(logits: Tensor, targets: Tensor, pos_weight: Tensor | None, *, masked: bool = False) -> Loss:
    """Binary cross-entropy, the mean over batch and labels, computed in float32.

    Args: as of `focal_bce`.
    Returns: total, and the two terms that it is the sum of: positive (with `pos_weight`) and negative.
    """
    logits, targets, observed = _without_masked(logits, targets, masked)
    positive = -targets * F.logsigmoid(logits)
    return _two_terms(positive, -(1.0 - targets) * F.logsigmoid(-logits), pos_weight, observed)


def asl(
    logits: Tensor,
    targets: Tensor,
    pos_weight: Tensor | None,
    *,
    gamma_neg: float,
    gamma_pos: float,
    clip: float,
    masked: bool = False,
) -> Loss:
    """The asymmetric loss: BCE whose easy cells count less, negatives by another power than positives.

    Args: the others as of `focal_bce`.
        gamma_neg, gamma_pos: powers of what a cell is wrong by; a soft target has its share of both.
        clip: a negative whose probability is below it costs nothing; the others are taken for that much easier.
    Returns: total, and the two terms that it is the sum of, positive (with `pos_weight`) and negative; means in
    float32.
    Source: Ridnik et al. 2021, as timm's AsymmetricLossMultiLabel, whose sum over all cells this is the mean of.
    """
    logits, targets, observed = _without_masked(logits, targets, masked)
    probs = torch.sigmoid(logits)
    absent = (1.0 - probs + clip).clamp(max=1.0)
    wrong = 1.0 - (targets * probs + (1.0 - targets) * absent)
    # at least EPS, too: the slope of 0 to a power below 1 is infinite
    focus = wrong.clamp(min=EPS) ** (gamma_pos * targets + gamma_neg * (1.0 - targets))
    positive = -targets * probs.clamp(min=EPS).log() * focus
    return _two_terms(positive, -(1.0 - targets) * absent.clamp(min=EPS).log() * focus, pos_weight, observed)


def _without_masked(logits: Tensor, targets: Tensor, masked: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Both in float32 with 0 in masked cells, and which cells are observed; None for all of them."""
    logits, targets = logits.float(), targets.float()
    if not masked:
        return logits, targets, None
    observed = ~torch.isnan(targets)  # not multiplied away: an infinite logit times 0 would be nan
    return torch.where(observed, logits, 0.0), torch.where(observed, targets, 0.0), observed


def _two_terms(positive: Tensor, negative: Tensor, pos_weight: Tensor | None, observed: Tensor | None) -> Loss:
    """The means of a loss's two terms (B, K) and their sum, the positive one with class weights."""
    if pos_weight is not None:
        positive = positive * pos_weight
    if observed is None:
        means = positive.mean(), negative.mean()
    else:
        means = mean_observed(positive, observed), mean_observed(negative, observed)
    return {"total": means[0] + means[1], "positive": means[0], "negative": means[1]}


def mean_observed(cells: Tensor, observed: Tensor) -> Tensor:
    """The mean of the observed cells (0-dim); 0 where there is none. No host sync."""
    return torch.where(observed, cells, 0.0).sum() / observed.sum().clamp(min=1)


def smoothed(criterion: Criterion, share: float) -> Criterion:
    """The loss of targets t * (1 - share) + share / 2; masked cells stay masked."""
    return lambda logits, targets: criterion(logits, targets * (1.0 - share) + share / 2.0)


def _with_fields(loss: Callable[..., Loss], **fields: str) -> Callable[[Recipe, Tensor, bool], Criterion]:
    """A loss whose keywords are the recipe's fields of these names."""

    def build(recipe: Recipe, pos_weight: Tensor, masked: bool) -> Criterion:
        numbers = {keyword: getattr(recipe, field) for keyword, field in fields.items()}
        return functools.partial(loss, pos_weight=pos_weight, masked=masked, **numbers)

    return build


# From a recipe, class weights (K,), and whether targets may hold nan for masked cells.
LOSSES: dict[str, Callable[[Recipe, Tensor, bool], Criterion]] = {
    "focal_bce": _with_fields(
        focal_bce,
        focal_weight="focal_weight",
        focal_alpha="focal_alpha",
        focal_gamma="focal_gamma",
        bce_weight="bce_weight",
    ),
    "bce": _with_fields(bce),
    "asl": _with_fields(asl, gamma_neg="asl_gamma_neg", gamma_pos="asl_gamma_pos", clip="asl_clip"),
}


@dataclass(frozen=True, eq=False)
class LabelSums:
    """Of the images that are trained on: their number, and of each label (K,) float32 the sum of its observed cells and
    int64 their number.
    """

    num: int
    positives: NDArray[np.float32]
    observed: NDArray[np.int64]


def label_sums(parts: Iterable[NDArray[np.float32]]) -> LabelSums:
    """The sums of targets (n, K), nan where masked, that come in parts; to the bit those of all in one array."""
    num, observed, positives = 0, np.zeros(1, np.int64), np.empty(0, np.float32)
    alone = []  # a single label's, which numpy adds in another order
    for targets in parts:
        if targets.shape[1] == 1:
            alone.append(targets)
        else:
            before = positives[None] if num else targets[:0]
            positives = np.nansum(np.concatenate([before, targets]), axis=0)
        num, observed = num + len(targets), observed + np.count_nonzero(~np.isnan(targets), axis=0)
    return LabelSums(num, np.nansum(np.concatenate(alone), axis=0) if alone else positives, observed)


def make_criterion(
    recipe: Recipe,
    sums: LabelSums,
    device: torch.device,
    *,
    masked: bool | None = None,
    smooth: bool = False,
) -> Criterion:
    """The recipe's loss with class weights from what is trained on.

    masked: whether other targets, as those of validation, have masked cells; None: if these have.
    smooth: as the recipe's `label_smoothing` says: for training.
    Raises UserError for an unknown loss.
    """
    if recipe.loss not in LOSSES:
        raise UserError(f"loss={recipe.loss!r} is unknown; one of {', '.join(LOSSES)}")
    positives, observed = torch.from_numpy(sums.positives), torch.from_numpy(sums.observed)
    pos_weight = effective_pos_weight(positives, observed, recipe.pos_weight_beta, recipe.pos_weight_cap)
    some_masked = bool((observed < sums.num).any())
    criterion = LOSSES[recipe.loss](recipe, pos_weight.to(device), some_masked if masked is None else masked)
    return smoothed(criterion, recipe.label_smoothing) if smooth and recipe.label_smoothing else criterion


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
