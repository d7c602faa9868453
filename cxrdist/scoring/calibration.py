"""Whether probabilities mean what they say: reliability, and the temperature that would correct them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cxrdist.scoring.metrics import Floats
from cxrdist.scoring.tables import Probs, logit, sigmoid


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

    Bisection on 1 / T, in which the log loss is convex; T stays in [1e-2, 1e2]. Fit it on images that are not
    then scored. AUROC does not change. Source: Guo et al. 2017 (temperature scaling).
    """
    truth, prob = _observed(targets, probs)
    logits = logit(prob)
    low, high = 1e-2, 1e2
    for _ in range(60):  # 60 halvings exhaust float64; separable data end at the bound
        inverse = float(np.sqrt(low * high))
        fitted = 1 / (1 + np.exp(-np.clip(inverse * logits, -700, 700)))
        low, high = (low, inverse) if ((fitted - truth) * logits).sum() > 0 else (inverse, high)
    return 1 / float(np.sqrt(low * high))


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
