"""The curves of a report, as small pictures: ROC, precision and recall, reliability, and how many get which prob."""

import html
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cxrdist.report.plots import Series, count_axis, key, plot, unit_axis
from cxrdist.scoring import metrics
from cxrdist.scoring.calibration import reliability
from cxrdist.scoring.tables import Probs

Columns = Sequence[tuple[str, Probs]]  # names and probabilities of the same images, in the order of the palette
Targets = NDArray[Any]


def roc(label: str, targets: Targets, columns: Columns, values: Sequence[float], point: tuple[float, float]) -> str:
    """True against false positive rate of (N,) probs. values: AUROCs. point: sensitivity and specificity, or nan."""
    series = [Series((0, 1), (0, 1), None, ("thin",)), *_curves(metrics.roc_curve, targets, columns, values)]
    series += _ring(1 - point[1], point[0])
    axes = unit_axis("false positive rate"), unit_axis("true positive rate")
    return plot(*axes, series, f"ROC curves of {label}", caption("AUROC", columns, values))


def precision_recall(
    label: str, targets: Targets, columns: Columns, values: Sequence[float], point: tuple[float, float]
) -> str:
    """Precision against recall of (N,) probs, and the share of positives. values: average precisions.

    point: sensitivity and positive predictive value, or nan.
    """
    share = float(np.nanmean(targets)) if (~np.isnan(targets)).any() else 0.0
    series = [Series((0, 1), (share, share), None, ("thin",))]
    series += [*_curves(metrics.precision_recall_curve, targets, columns, values), *_ring(*point)]
    axes = unit_axis("recall"), unit_axis("precision")
    return plot(*axes, series, f"Precision and recall of {label}", caption("Average precision", columns, values))


def calibration(label: str, targets: Targets, columns: Columns) -> str:
    """Share of positives against mean prob in ten bins, of probs of any shape."""
    found = [reliability(targets, probs) for _, probs in columns]
    series = [Series((0, 1), (0, 1), None, ("thin",))]
    series += [Series(one.mean_prob, one.positive_share, n, ("line", "dot")) for n, one in enumerate(found)]
    axes = unit_axis("mean probability in the bin"), unit_axis("share of positives")
    errors = [one.expected_error for one in found]
    return plot(*axes, series, f"Calibration of {label}", caption("Calibration error", columns, errors))


def histogram(label: str, columns: Columns) -> str:
    """How many probs lie in each fortieth of [0, 1], on a logarithmic axis."""
    edges = np.linspace(0, 1, 41)
    counts = [np.histogram(probs.ravel(), edges)[0] for _, probs in columns]
    y = count_axis("image-label pairs", max((int(count.max()) for count in counts), default=1))
    series = [
        Series(np.repeat(edges, 2)[1:-1], np.repeat(np.log10(np.maximum(count, 10 ** y.ends[0])), 2), n)
        for n, count in enumerate(counts)
    ]
    return plot(unit_axis("probability"), y, series, f"Probabilities of {label}", caption("Probabilities", columns))


def caption(title: str, columns: Columns, values: Sequence[float] = ()) -> str:
    """HTML: a title and, for each line, its key with its value, or with its name where there is none."""
    texts = ["-" if math.isnan(value) else f"{value:.3f}" for value in values] or [name for name, _ in columns]
    spans = (
        f'<span title="{html.escape(name)}">{key(place)}{html.escape(text)}</span>'
        for place, ((name, _), text) in enumerate(zip(columns, texts, strict=True))
    )
    return f"<b>{title}</b>{' '.join(spans)}"


def _curves(
    curve: Callable[..., tuple[ArrayLike, ArrayLike]], targets: Targets, columns: Columns, values: Sequence[float]
) -> list[Series]:
    """A line of each column whose value is known, the first above the others."""
    lines = [
        Series(*curve(targets, probs), place)
        for place, ((_, probs), value) in enumerate(zip(columns, values, strict=True))
        if not math.isnan(value)
    ]
    return lines[::-1]


def _ring(x: float, y: float) -> list[Series]:
    return [] if math.isnan(x) or math.isnan(y) else [Series([x], [y], 0, ("ring",))]
