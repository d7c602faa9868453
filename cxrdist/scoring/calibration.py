"""Whether probabilities mean what they say: reliability, and the temperature that would correct them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cxrdist.scoring.metrics import Floats
from cxrdist.scoring.tables import Probs, logit, sigmoid

BEFORE = np.array([1.0, 0.0])  # a line that changes nothing


@dataclass(frozen=True)
class Reliability:
    """A reliability diagram: mean prob and share of positives in bins of equal width; empty bins are left out."""

    mean_prob: Floats
    positive_share: Floats
    count: NDArray[np.int64]
    expected_error: float  # expected calibration error: the gap's mean, weighted by count


def reliability(targets: ArrayLike, probs: ArrayLike, num_bins: int = 10) -> Reliability:
    """Reliability of probs in [0, 1] against targets, both of any equal shape (flattened, without masked cells)."""
    truth, prob = _observed(targets, probs)
    bins = np.minimum((prob * num_bins).astype(np.int64), num_bins - 1)
    count = np.bincount(bins, minlength=num_bins)
    used = count > 0
    mean_prob, share = (np.bincount(bins, values, num_bins)[used] / count[used] for values in (prob, truth))
    error = float((np.abs(mean_prob - share) * count[used]).sum() / max(len(prob), 1))
    return Reliability(mean_prob, share, count[used], error)


def temperature(targets: ArrayLike, probs: ArrayLike) -> float:
    """The T > 0 that makes sigmoid(logit(prob) / T) fit the targets best (log loss); above 1 means overconfident.

    T stays in [1e-2, 1e2]. Fit it on images that are not then scored. AUROC does not change. Source: Guo et al. 2017
    (temperature scaling).
    """
    truth, prob = _observed(targets, probs)
    slope, _ = fitted_line(logit(prob), truth, with_intercept=False)
    return 1 / min(max(slope, 1e-2), 1e2)


def fitted_line(
    logits: Floats,
    targets: Floats,
    weights: Floats | None = None,
    *,
    with_intercept: bool = True,
    start: tuple[float, float] = (1.0, 0.0),
) -> tuple[float, float]:
    """The slope and intercept that make sigmoid(slope * logit + intercept) fit the targets best (log loss).

    Args: logits, targets in [0, 1], weights: (n,). with_intercept: False fits a temperature, 1 / slope.
    Newton steps from `start`, with a prior worth a hundredth of an image against separable data.
    Source: Platt 1999, with his targets: a positive is (P + 1) / (P + 2), a negative 1 / (N + 2).
    """
    weight = np.ones(len(logits)) if weights is None else weights
    if with_intercept:
        positives, negatives = float((weight * targets).sum()), float((weight * (1 - targets)).sum())
        high, low = (positives + 1) / (positives + 2), 1 / (negatives + 2)
        targets = low + (high - low) * targets
    features = np.stack([logits, np.ones(len(logits))] if with_intercept else [logits])
    prior = 0.01 * np.eye(len(features))
    line = np.array(start[: len(features)], dtype=np.float64)

    def loss(line: Floats) -> float:
        scaled = line @ features
        fit = np.logaddexp(0.0, scaled) - targets * scaled
        return float((weight * fit).sum() + 0.005 * ((line - BEFORE[: len(line)]) ** 2).sum())

    best = loss(line)
    for _ in range(50):
        probs = 1 / (1 + np.exp(-np.clip(line @ features, -700, 700)))
        slope = features @ (weight * (probs - targets)) + prior @ (line - BEFORE[: len(line)])
        curve = (features * (weight * probs * (1 - probs))) @ features.T + prior
        step = np.linalg.solve(curve, slope)
        while (value := loss(line - step)) > best and np.abs(step).max() > 1e-12:
            step = step / 2
        if value > best:
            break
        line, gain, best = line - step, best - value, value
        if gain < 1e-9 * max(best, 1e-9) and np.abs(step).max() < 1e-7:
            break
    return float(line[0]), float(line[1]) if with_intercept else 0.0


def _observed(targets: ArrayLike, probs: ArrayLike) -> tuple[Floats, Floats]:
    """Both flattened to the cells whose target is not masked."""
    truth, prob = (np.asarray(values, dtype=np.float64).ravel() for values in (targets, probs))
    seen = ~np.isnan(truth)
    return truth[seen], prob[seen]


def calibrated_by_halves(probs: Probs, targets: Floats, patients: NDArray[Any]) -> Probs:
    """(N, K) float32 probs divided by a temperature that was fitted on the other half of the patients."""
    _, ids = np.unique(patients.astype(str), return_inverse=True)
    logits, out = logit(probs), probs.copy()
    for half in (0, 1):
        here, there = ids % 2 == half, ids % 2 != half
        if here.any() and there.any():
            out[here] = sigmoid(logits[here] / temperature(targets[there], probs[there]))
    return out
