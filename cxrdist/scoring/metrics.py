"""How good a table of probabilities is: AUROC, average precision, and their bootstrap intervals.

All functions take targets (N, K) in [0, 1], nan where masked, and probs (N, K). A masked cell counts nowhere; a soft
one, t, counts as t of a positive and 1 - t of a negative. AUROC comes from rank sums with ties counted half, for
targets of 0 and 1 in exact integer arithmetic on float64, so the order of the rows does not matter. A label that lacks
positives or negatives has no AUROC: it is nan and not in the macro (torchmetrics scores it 0 and drags the macro down).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
_CELLS_AT_ONCE = 4_000_000  # float64 cells of one bootstrap block: 32 MB per temporary


class _Ranking:
    """One label's observed rows in ascending order of prob, with the start of every group of equal probs."""

    def __init__(self, targets: Floats, probs: NDArray[np.floating]) -> None:
        observed = np.flatnonzero(~np.isnan(targets))
        self.order = observed[np.argsort(probs[observed], kind="stable")]
        ordered = probs[self.order]
        self.starts = np.concatenate(([0], np.flatnonzero(ordered[1:] != ordered[:-1]) + 1))
        self.positive = targets[self.order]

    def auroc(self, weights: Floats) -> Floats:
        """(B,) weighted AUROC for weights (B, N) in the rows' original order; nan where a class has no weight."""
        weights = weights[:, self.order]
        positive = np.add.reduceat(weights * self.positive, self.starts, axis=1)
        negative = np.add.reduceat(weights * (1.0 - self.positive), self.starts, axis=1)
        below = np.cumsum(negative, axis=1) - negative
        num_pairs = positive.sum(axis=1) * negative.sum(axis=1)
        won = (positive * (below + 0.5 * negative)).sum(axis=1)
        values: Floats = np.divide(won, num_pairs, out=np.full(len(weights), np.nan), where=num_pairs > 0)
        return values

    def from_the_top(self) -> tuple[Floats, Floats]:
        """(T + 1,) positives and negatives at or above each of T distinct probs, from the highest down, after a 0."""
        positive = np.add.reduceat(self.positive, self.starts)[::-1]
        sizes = np.diff(np.append(self.starts, len(self.positive)))[::-1]
        return np.cumsum([0.0, *positive]), np.cumsum([0.0, *(sizes - positive)])

    def influence(self, num_images: int) -> Floats:
        """(num_images,) how much each row moves the AUROC: a positive's share of the negatives below it, and a
        negative's share of the positives above, less the AUROC, over the number of its class; nan without a class.
        """
        positive, weight = np.add.reduceat(self.positive, self.starts), self.positive
        sizes = np.diff(np.append(self.starts, len(weight)))
        below = np.cumsum(sizes - positive) - 0.5 * (sizes - positive)
        above = positive.sum() - np.cumsum(positive) + 0.5 * positive
        num_positive, num_negative = positive.sum(), (sizes - positive).sum()
        values = np.zeros(num_images)
        with np.errstate(invalid="ignore"):
            area = (positive * below).sum() / (num_positive * num_negative)
            won, lost = np.repeat(below / num_negative, sizes), np.repeat(above / num_positive, sizes)
            values[self.order] = weight * (won - area) / num_positive + (1.0 - weight) * (lost - area) / num_negative
        return values

    def average_precision(self) -> float:
        positive, negative = self.from_the_top()
        precision = positive[1:] / (positive[1:] + negative[1:])
        return float((precision * np.diff(positive)).sum() / positive[-1]) if positive[-1] > 0 else float("nan")


def auroc_per_label(targets: ArrayLike, probs: ArrayLike) -> Floats:
    """(K,) AUROC of each label, in [0, 1]; nan where a label has no positives, no negatives, or a prob that is nan.

    Args: targets (N, K) in [0, 1] or nan; probs (N, K), any monotone score (logits give the same).
    Raises ValueError when the shapes differ or a target is outside [0, 1].
    """
    weights = np.ones((1, len(np.asarray(targets))))
    return _per_label(targets, probs, lambda ranking: float(ranking.auroc(weights)[0]))


def macro_auroc(targets: ArrayLike, probs: ArrayLike) -> tuple[float, int]:
    """`macro` of the AUROCs: their mean over the labels that have one, and how many those are."""
    return macro(auroc_per_label(targets, probs))


def macro(per_label: Floats) -> tuple[float, int]:
    """The mean of the values that are not nan, and their number; (nan, 0) when all are."""
    defined = per_label[~np.isnan(per_label)]
    return (float(defined.mean()), len(defined)) if len(defined) else (float("nan"), 0)


def average_precision_per_label(targets: ArrayLike, probs: ArrayLike) -> Floats:
    """(K,) average precision: precision at each distinct threshold, weighted by the recall gained there.

    nan without positives. Source: scikit-learn's definition (no interpolation).
    """
    return _per_label(targets, probs, _Ranking.average_precision)


def roc_curve(targets: ArrayLike, probs: ArrayLike) -> tuple[Floats, Floats]:
    """One label's ROC: false and true positive rates (T,), from (0, 0) to (1, 1), one point per distinct prob."""
    positive, negative = _Ranking(np.asarray(targets, dtype=np.float64), np.asarray(probs)).from_the_top()
    return negative / max(negative[-1], 1), positive / max(positive[-1], 1)


def precision_recall_curve(targets: ArrayLike, probs: ArrayLike) -> tuple[Floats, Floats]:
    """One label's recall and precision (T,), one point per distinct prob, from the highest down."""
    positive, negative = _Ranking(np.asarray(targets, dtype=np.float64), np.asarray(probs)).from_the_top()
    return positive[1:] / max(positive[-1], 1), positive[1:] / (positive[1:] + negative[1:])


def bootstrap_auroc(
    targets: ArrayLike, tables: Sequence[ArrayLike], patients: ArrayLike, *, num_resamples: int = 1000, seed: int = 0
) -> Floats:
    """(T, num_resamples, K) AUROCs on resamples of the patients, drawn with replacement with all their images.

    All T tables are scored on the same resamples: differences are paired. A label is nan in a resample that left it
    without positives or negatives. Resampling images, which are alike within a patient, gives too narrow intervals.
    """
    rankings = [list(_rankings(targets, table)) for table in tables]
    distinct, patient_ids = np.unique(np.asarray(patients, dtype=str), return_inverse=True)
    rng = np.random.default_rng(seed)
    values = np.full((len(tables), num_resamples, np.shape(targets)[1]), np.nan)
    block = max(1, _CELLS_AT_ONCE // max(1, len(patient_ids)))
    for start in range(0, num_resamples, block):
        rows = slice(start, min(start + block, num_resamples))
        draws = rng.multinomial(len(distinct), np.full(len(distinct), 1 / len(distinct)), size=rows.stop - rows.start)
        weights = draws[:, patient_ids].astype(np.float64)
        for table, labels in enumerate(rankings):
            for label, ranking in enumerate(labels):
                if ranking is not None:
                    values[table, rows, label] = ranking.auroc(weights)
    return values


def quick_intervals(
    targets: ArrayLike, probs: ArrayLike, patients: NDArray[np.integer[Any]]
) -> tuple[list[tuple[float, float]], tuple[float, float]]:
    """95 % intervals of each label's AUROC and of the macro, without resampling; (nan, nan) where there is none.

    patients: (N,) a number for each image's patient, from 0. As wide as `bootstrap_auroc`'s where patients are many,
    and a thousand times as fast. Source: DeLong et al. 1988, summed over patients as in Obuchowski 1997; on the scale
    of the logit, so that an interval stays within 0 and 1.
    """
    aurocs = auroc_per_label(targets, probs)
    moved = np.full((int(patients.max(initial=-1)) + 1, len(aurocs)), np.nan)
    for label, ranking in enumerate(_rankings(targets, probs)):
        if ranking is not None:
            moved[:, label] = np.bincount(patients, ranking.influence(len(patients)), len(moved))
    defined = ~np.isnan(aurocs)
    whole = moved[:, defined].mean(axis=1) if defined.any() else np.full(len(moved), np.nan)
    several = [_logit_interval(value, moves) for value, moves in zip(aurocs, moved.T, strict=True)]
    return several, _logit_interval(macro(aurocs)[0], whole)


def _logit_interval(value: float, moves: Floats) -> tuple[float, float]:
    """Around an AUROC of which each patient's influence is known."""
    if not 0.0 < value < 1.0:
        return value, value
    deviation = np.sqrt((moves**2).sum() * len(moves) / max(len(moves) - 1, 1))
    middle, half = np.log(value / (1.0 - value)), 1.959964 * deviation / (value * (1.0 - value))
    low, high = (1.0 / (1.0 + np.exp(-end)) for end in (middle - half, middle + half))
    return float(low), float(high)


def interval(samples: ArrayLike, confidence: float = 0.95) -> tuple[float, float]:
    """The central `confidence` interval of bootstrap samples without the nan ones; (nan, nan) if none is left."""
    values = np.asarray(samples, dtype=np.float64)
    values = values[~np.isnan(values)]
    ends = [(1 - confidence) / 2, (1 + confidence) / 2]
    low, high = np.quantile(values, ends).tolist() if len(values) else (float("nan"), float("nan"))
    return low, high


def macro_samples(samples: Floats) -> Floats:
    """(..., B) macro AUROC of bootstrap samples (..., B, K), over the labels that each resample kept; nan if none.

    Without the resamples that lost a rare label almost none would be left; paired tables lose the same labels in each.
    """
    defined = ~np.isnan(samples)
    count = defined.sum(axis=-1)
    total = np.where(defined, samples, 0.0).sum(axis=-1)
    values: Floats = np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0)
    return values


def _per_label(targets: ArrayLike, probs: ArrayLike, measure: Callable[[_Ranking], float]) -> Floats:
    values = [np.nan if ranking is None else measure(ranking) for ranking in _rankings(targets, probs)]
    return np.array(values, dtype=np.float64)


def _rankings(targets: ArrayLike, probs: ArrayLike) -> Iterator[_Ranking | None]:
    """One per label; None for a label that cannot be ranked. Made one after another: each takes 24 bytes an image."""
    target_table, prob_table = np.asarray(targets), np.asarray(probs)
    if target_table.ndim != 2 or target_table.shape != prob_table.shape:
        raise ValueError(f"targets {target_table.shape} and probs {prob_table.shape} must be equal (images, labels)")
    if ((target_table < 0) | (target_table > 1)).any():
        raise ValueError("targets must lie in [0, 1]")
    for place in range(target_table.shape[1]):
        truth, prob = target_table[:, place].astype(np.float64), prob_table[:, place]
        yield None if np.isnan(truth).all() or np.isnan(prob).any() else _Ranking(truth, prob)
