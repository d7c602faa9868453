"""Sections on calibrated probabilities and what the thresholds do: of `calibrate` and of `evaluate --calibration`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cxrdist.report.page import Cell, Section, figure_html, grid, html_table, interval_text, number_text
from cxrdist.scoring.calibration import reliability
from cxrdist.scoring.operating import Calibration, OperatingPoint
from cxrdist.scoring.tables import Probs

BEFORE_COLOUR, AFTER_COLOUR, GREY = "#d1762a", "#1f3a5f", "#c5ccd5"


def reliability_section(
    targets: NDArray[Any], before: Probs, after: Probs, labels: Sequence[str], notes: Sequence[str] = ()
) -> Section:
    """Probabilities (N, K) before and after, against targets (N, K), nan where masked: a diagram and the errors."""
    figure, ((diagram, histogram),) = grid(1, 2, 11, 4.2)
    diagram.plot([0, 1], [0, 1], color=GREY, lw=0.8)
    for name, probs, colour in (("before", before, BEFORE_COLOUR), ("after", after, AFTER_COLOUR)):
        curve = reliability(targets, probs)
        diagram.plot(curve.mean_prob, curve.positive_share, "o-", ms=4, lw=1.5, color=colour, label=name)
        histogram.hist(probs.ravel(), bins=np.linspace(0, 1, 41).tolist(), histtype="step", color=colour, label=name)
    diagram.set(xlabel="mean probability in the bin", ylabel="share of positives", xlim=(0, 1), ylim=(0, 1))
    histogram.set(xlabel="probability", ylabel="image-label pairs", yscale="log", xlim=(0, 1))
    for axis in (diagram, histogram):
        axis.legend(fontsize=9, edgecolor="none")
    rows: list[tuple[str, ...]] = []
    for place, label in enumerate(labels):
        one, two = (reliability(targets[:, place], probs[:, place]).expected_error for probs in (before, after))
        rows.append((label, f"{one:.3f}", f"{two:.3f}"))
    errors = [reliability(targets, probs).expected_error for probs in (before, after)]
    rows.append(("all labels together", *(f"{error:.3f}" for error in errors)))
    about = "Share of positives among images that got about the same probability, in ten bins, and the expected "
    about += "calibration error: the mean gap between both. On images whose patients the lines were not fitted on."
    table = html_table(("label", "error before", "error after"), rows, total=True)
    return Section("Calibration", " ".join([about, *notes]), figure_html(figure, "reliability diagram") + table)


def points_section(calibration: Calibration, points: Sequence[OperatingPoint]) -> Section:
    """The threshold of each label and its rates on a set of images."""
    rows: list[list[Cell]] = []
    for each, point in zip(calibration.labels, points, strict=True):
        threshold = "-" if point.threshold is None else f"{point.threshold:.3f}"
        rates = (point.sensitivity, point.specificity, point.ppv, point.npv)
        cells: list[Cell] = [(number_text(value), "" if ends is None else interval_text(ends)) for value, ends in rates]
        marks = f"{each.label}{' *' if each.shared else ''}"
        spread = "" if each.threshold_interval is None else interval_text(each.threshold_interval)
        rows.append([marks, (threshold, spread), *cells])
    head = ("label", "threshold", "sensitivity", "specificity", "PPV", "NPV")
    about = (
        f"Thresholds ({calibration.rule}) are of calibrated probabilities; below each number its 95 % interval from "
    )
    about += "resampled patients. PPV and NPV depend on how common a finding is among these images."
    if any(each.shared for each in calibration.labels):
        about += " * too few cases: calibrated by the line of all labels together."
    return Section("Operating points", about, html_table(head, rows))
