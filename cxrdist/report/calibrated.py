"""Sections on calibrated probabilities and what the thresholds do: of `calibrate` and of `evaluate --calibration`."""

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from cxrdist.report import curves
from cxrdist.report.figures import rate_cell, rates_of
from cxrdist.report.page import Cell, Section, html_table, interval_text
from cxrdist.report.plots import legend, plots
from cxrdist.scoring.calibration import reliability
from cxrdist.scoring.operating import Calibration, OperatingPoint
from cxrdist.scoring.tables import Probs
from cxrdist.task import MIN_CASES


def reliability_section(
    targets: NDArray[Any], before: Probs, after: Probs, labels: Sequence[str], notes: Sequence[str] = ()
) -> Section:
    """Probabilities (N, K) before and after, against targets (N, K), nan where masked: a diagram and the errors."""
    columns = [("after", after), ("before", before)]
    pictures = [curves.calibration("all labels", targets, columns), curves.histogram("all labels", columns)]
    rows: list[tuple[str, ...]] = []
    for place, label in enumerate(labels):
        one, two = (reliability(targets[:, place], probs[:, place]).expected_error for probs in (before, after))
        rows.append((label, f"{one:.3f}", f"{two:.3f}"))
    errors = [reliability(targets, probs).expected_error for probs in (before, after)]
    rows.append(("all labels together", *(f"{error:.3f}" for error in errors)))
    about = "Share of positives among images that got about the same probability, in ten bins, and the expected "
    about += "calibration error: the mean gap between both."
    table = html_table(("label", "error before", "error after"), rows, total=True, kind="sortable")
    return Section(
        "Calibrated probabilities", " ".join([about, *notes]), legend(["after", "before"]) + plots(pictures) + table
    )


def points_section(calibration: Calibration, points: Sequence[OperatingPoint]) -> Section:
    """The threshold of each label and its rates on a set of images."""
    rows: list[list[Cell]] = []
    for each, point in zip(calibration.labels, points, strict=True):
        threshold = "-" if point.threshold is None else f"{point.threshold:.3f}"
        cells = [rate_cell(rate) for rate in rates_of(point)]
        marks = f"{each.label}{' *' if each.shared else ''}"
        spread = "" if each.threshold_interval is None else interval_text(each.threshold_interval)
        rows.append([marks, f"{each.positives:,.5g}", (threshold, spread), *cells])
    head = ("label", "positives (fitted on)", "threshold", "sensitivity", "specificity", "PPV", "NPV")
    about = (
        f"Thresholds ({calibration.rule}) are of calibrated probabilities; below each number its 95 % interval from "
    )
    about += "resampled patients. PPV and NPV depend on how common a finding is among these images."
    if any(each.shared for each in calibration.labels):
        about += (
            f" * fewer than {MIN_CASES} positives or negatives: calibrated by the line of all labels together, and "
        )
        about += "with so few cases an interval may be too narrow, even of no width."
    return Section("Operating points", about, html_table(head, rows, kind="scores sortable"))
