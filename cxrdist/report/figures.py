"""The sections of a report: figures and tables of an evaluation. The functions take plain numbers and arrays."""

import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from cxrdist.report.page import Section, duration_text, figure_html, grid, html_table, interval_text, number_text, plain
from cxrdist.scoring import metrics
from cxrdist.scoring.calibration import reliability
from cxrdist.scoring.evaluation import Evaluation
from cxrdist.scoring.tables import ScoreTable

matplotlib.use("Agg")

MAX_SHOWN = 48  # labels in a picture: 12 rows of panels
COLOURS = ("#1f3a5f", "#d1762a", "#3b8c6e", "#8a5a9e", "#a33b4a", "#7a7a7a")
GREY = "#c5ccd5"


@dataclass(frozen=True)
class Curves:
    """A kind of curve with a panel for each label. values: the field of a `TableScore` that sums it up."""

    title: str
    about: str
    x: str
    y: str
    curve: Callable[..., tuple[NDArray[Any], NDArray[Any]]]
    values: str


ROC = Curves(
    "ROC curves",
    "True against false positive rate. In brackets: positives and their share; in the legends: AUROC.",
    *("false positive rate", "true positive rate", metrics.roc_curve, "auroc"),
)
PRECISION = Curves(
    "Precision and recall",
    "The grey line is the share of positives: what a random score reaches. In the legends: average precision.",
    *("recall", "precision", metrics.precision_recall_curve, "average_precision"),
)


def summary_section(result: Evaluation, notes: Sequence[str]) -> Section:
    about = "AUROC: the chance that an image with the finding scores above one without. Intervals from "
    about += f"{result.num_resamples:,} resamples of the patients."
    cards = []
    for score, colour in zip(result.scores, cycle(COLOURS)):
        counted = f"{interval_text(score.macro_interval)}, {score.num_labels} of {len(result.labels)} labels"
        text = f"macro AUROC, {html.escape(score.name)}<br>95 % {counted}"
        cards.append((colour, number_text(score.macro_auroc), text))
    cards.append(("#aab4c0", f"{result.num_images:,}", f"images of {result.num_patients:,} patients"))
    body = "".join(
        f'<div class="card" style="border-left-color:{colour}"><b>{number}</b><span>{text}</span></div>'
        for colour, number, text in cards
    )
    listed = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    return Section("Summary", about, f'<div class="cards">{body}</div>' + (f"<ul>{listed}</ul>" if listed else ""))


def label_section(result: Evaluation) -> Section:
    """The AUROC of each label and table as a picture, and as a table with average precision."""
    return Section(
        "AUROC per label",
        "Dots with 95 % intervals (patients resampled; on a handful of positives they say little). A label without "
        "positives or negatives has no AUROC and is left out of the macro. AP: average precision of the first table; a "
        "random score has the positives' share." + _note(result, "The picture shows only"),
        figure_html(_forest(result), "AUROC per label with intervals") + _label_table(result),
    )


def curves_section(kind: Curves, tables: Sequence[ScoreTable], targets: NDArray[Any], result: Evaluation) -> Section:
    """Curves of all tables in one panel for each label."""
    labels = shown_labels(result)
    figure, axes = _panels(len(labels))
    for label, axis in zip(labels, axes, strict=True):
        share = result.positives[label] / max(result.observed[label], 1)
        axis.plot([0, 1], [0, 1] if kind is ROC else [share, share], color=GREY, lw=0.8)
        for table, score, colour in zip(tables, result.scores, cycle(COLOURS)):
            value = getattr(score, kind.values)[label]
            if not math.isnan(value):
                points = kind.curve(targets[:, label], table.probs[:, label])
                axis.plot(*points, color=colour, lw=1.4, label=plain(f"{score.name} {value:.2f}"))
        axis.set_title(
            f"{short_label(result.labels[label], 26)} ({result.positives[label]:,.5g}, {share:.1%})", fontsize=8.5
        )
        ends, ticks = (-0.02, 1.02), (0, 0.5, 1)
        axis.set(xlim=ends, ylim=ends, aspect="equal", xticks=ticks, yticks=ticks)
        axis.tick_params(labelsize=7)
        if not _legend(axis, fontsize=7, loc="lower right" if kind is ROC else "best", handlelength=1.2):
            axis.text(0.5, 0.5, "undefined", ha="center", color="#8893a0", fontsize=8)
    figure.supxlabel(kind.x, fontsize=9)
    figure.supylabel(kind.y, fontsize=9)
    return Section(kind.title, kind.about + _note(result, "Only"), figure_html(figure, kind.title))


def calibration_section(tables: Sequence[ScoreTable], targets: NDArray[Any], result: Evaluation) -> Section:
    figure, ((diagram, histogram),) = grid(1, 2, 11, 3.9)
    diagram.plot([0, 1], [0, 1], color=GREY, lw=0.8)
    for table, colour in zip(tables, cycle(COLOURS)):
        curve, style = reliability(targets, table.probs), {"color": colour, "label": plain(table.name)}
        diagram.plot(curve.mean_prob, curve.positive_share, "o-", ms=4, lw=1.3, **style)
        histogram.hist(table.probs.ravel(), bins=np.linspace(0, 1, 41).tolist(), histtype="step", **style)
    diagram.set(xlabel="mean probability in the bin", ylabel="share of positives", xlim=(0, 1), ylim=(0, 1))
    histogram.set(xlabel="probability", ylabel="image-label pairs", yscale="log", xlim=(0, 1))
    for axis in (diagram, histogram):
        _legend(axis)
    head = ("table", "calibration error", "temperature", "error after scaling (fitted on other patients)")
    numbers = [(s.name, s.calibration_error, s.temperature, s.calibration_error_after) for s in result.scores]
    rows = [(name, f"{error:.3f}", f"{value:.2f}", f"{after:.3f}") for name, error, value, after in numbers]
    return Section(
        "Calibration",
        "Over all labels together, in ten bins. A temperature above 1 means overconfident, below 1 too cautious. The "
        "training loss (focal, with class weights) is not made for calibrated probabilities; AUROC does not need them.",
        figure_html(figure, "reliability diagram") + html_table(head, rows),
    )


def comparison_section(result: Evaluation) -> Section:
    """Paired differences, study averaging, and the subgroups of the first table."""
    differences = [
        (f"{c.one} minus {c.other}", f"{c.difference:+.4f}", interval_text(c.interval, "+.4f"), f"{c.share_above:.0%}")
        for c in result.comparisons
    ]
    effects = [
        (s.name, number_text(s.macro_auroc, 4), number_text(study.macro_auroc, 4),
         number_text(study.macro_gain, 4, "+"), interval_text(study.macro_gain_interval, "+.4f"),
         number_text(study.by_study_macro_auroc, 4))
        for s in result.scores if (study := s.study_averaged) is not None
    ]  # fmt: skip
    by_label = []
    if study := result.scores[0].study_averaged:
        columns = study.gain, study.gain_interval, study.by_study_auroc, study.by_study_interval
        for label, gain, gain_ends, auroc, ends in zip(result.labels, *columns, strict=True):
            texts = number_text(gain, 4, "+"), interval_text(gain_ends, "+.4f"), number_text(auroc), interval_text(ends)
            by_label.append((label, *texts))
    groups = []
    for item in result.subgroups:
        scores = number_text(item.macro_auroc), interval_text(item.interval)
        labels = f"{item.num_labels} of {len(result.labels)}"
        groups.append((f"{item.kind}: {item.value}", f"{item.num_images:,}", *scores, labels))
    first = result.scores[0].name
    tables = (
        (("macro AUROC", "difference", "95 % interval", "resamples in which it is above 0"), differences),
        (("table", "by image", "images of a study averaged", "gain", "95 % interval", "a study once"), effects),
        ((f"study average ({first})", "gain", "95 % interval", "AUROC, a study once", "95 % interval"), by_label),
        ((f"subgroup ({first})", "images", "macro AUROC", "95 % interval", "labels"), groups),
    )
    return Section(
        "Comparisons and subgroups",
        "Differences are paired: both tables are scored on the same resamples of the patients. Macros of subgroups "
        "may hold fewer labels; compare them with care.",
        "<br>".join(html_table(head, rows) for head, rows in tables if rows),
    )


def training_section(runs: Mapping[str, Sequence[Mapping[str, Any]]], colours: Mapping[str, str]) -> Section:
    """Training loss (and validation AUROC where there is one) of each run, from the rows of its metrics.jsonl."""
    validated = any(row["kind"] == "validation" for rows in runs.values() for row in rows)
    figure, (axes,) = grid(1, 2 if validated else 1, 11, 3.6)
    for name, rows in runs.items():
        style = {"color": colours[name], "label": plain(name)}
        per_epoch = next((row["step"] / row["epoch"] for row in reversed(rows)), 1)
        if points := [(row["step"] / per_epoch, row["loss"]) for row in rows if row.get("loss") is not None]:
            x, y = np.array(points, dtype=float).T
            window = max(1, len(y) // 25)
            axes[0].plot(x, y, color=colours[name], lw=0.7, alpha=0.35)
            axes[0].plot(x[window - 1 :], np.convolve(y, np.ones(window) / window, mode="valid"), lw=1.8, **style)
        points = [(row["epoch"], row.get("validation/auroc_macro")) for row in rows if row["kind"] == "validation"]
        if points := [point for point in points if point[1] is not None]:
            axes[1].plot(*np.array(points, dtype=float).T, "o-", ms=4, **style)
    for axis, name in zip(axes, ("training loss", "validation macro AUROC"), strict=False):
        axis.set(xlabel="epoch", ylabel=name)
        _legend(axis)
    about = "Loss of each run per logged step (thin) and its moving average."
    return Section("Training", about, figure_html(figure, "loss curves"))


def files_section(paths: Mapping[str, str], timings: Mapping[str, float]) -> Section:
    body = html_table(("what", "where"), list(paths.items()), kind="text")
    if timings:
        rows = [(name, duration_text(value)) for name, value in {**timings, "total": sum(timings.values())}.items()]
        body += "<br>" + html_table(("step", "time"), rows, total=True)
    return Section("Files and times", "Where everything lies, as the commands were given.", body)


def shown_labels(result: Evaluation) -> list[int]:
    """The labels that get a place in pictures: all, or where there are too many those with the most positives."""
    return sorted(sorted(range(len(result.labels)), key=lambda label: -result.positives[label])[:MAX_SHOWN])


def _note(result: Evaluation, start: str) -> str:
    return f" {start} the {MAX_SHOWN} labels with the most positives." if len(result.labels) > MAX_SHOWN else ""


def _forest(result: Evaluation) -> Figure:
    labels = shown_labels(result)
    num, count = len(labels), len(result.scores)
    height = max(2.2, 1 + 0.32 * (num + 1))
    figure, ((axis,),) = grid(1, 1, 11, height)
    for place, (score, colour) in enumerate(zip(result.scores, cycle(COLOURS))):
        y = np.arange(num + 1) + (place - (count - 1) / 2) * 0.7 / max(count, 2)
        values = [*(score.auroc[label] for label in labels), score.macro_auroc]
        low, high = np.array([*(score.auroc_interval[label] for label in labels), score.macro_interval]).T
        axis.hlines(y, low, high, color=colour, lw=1.6, alpha=0.75)
        axis.plot(values, y, "o", color=colour, ms=5, label=plain(score.name))
    names = [f"{short_label(result.labels[label], 48)} ({result.positives[label]:,.5g})" for label in labels]
    axis.set_yticks(range(num + 1), [*names, "macro"])
    axis.axhline(num - 0.5, color="#1d2733", lw=0.8)
    axis.axvline(0.5, color=GREY, lw=1)
    axis.set(ylim=(num + 0.5, -0.6), xlabel="AUROC (positives in brackets)", xlim=(None, 1.005))
    axis.grid(axis="x", color="#e8ecf1", lw=0.8)
    axis.set_axisbelow(True)
    above = 0.5, 1 + 0.464 / height  # half an inch above the axes at any height
    _legend(axis, fontsize=9, loc="upper center", ncols=count, bbox_to_anchor=above)
    return figure


def _label_table(result: Evaluation) -> str:
    first = result.scores[0]
    columns = [zip(map(number_text, s.auroc), map(interval_text, s.auroc_interval), strict=True) for s in result.scores]
    counts = zip(result.positives, result.observed, strict=True)
    some_masked = min(result.observed) < result.num_images
    cases = (f"{some:,.7g} of {seen:,}" if some_masked else f"{some:,.7g}" for some, seen in counts)
    names = zip(result.labels, cases, strict=True)
    precisions = map(number_text, first.average_precision)
    rows = [(*name, *cells, ap) for name, *cells, ap in zip(names, *columns, precisions, strict=True)]
    macros = [(number_text(s.macro_auroc), interval_text(s.macro_interval)) for s in result.scores]
    mean_precision = number_text(metrics.macro(np.array(first.average_precision))[0])
    rows.append((f"macro ({first.num_labels} of {len(result.labels)})", "", *macros, mean_precision))
    cases_title = "positives of observed" if some_masked else "positives"
    return html_table(["label", cases_title, *(score.name for score in result.scores), "AP"], rows, total=True)


def short_label(label: str, most: int) -> str:
    """The label as a picture has room for: of a longer one both ends, since long names often differ in the last."""
    return plain(label if len(label) <= most else f"{label[: most // 2 - 1]}...{label[2 - most // 2 :]}")


def _panels(count: int) -> tuple[Figure, list[Any]]:
    """A figure with `count` panels, at most four in a row."""
    per_row = min(4, count)
    num_rows = -(-count // per_row)
    figure, axes = grid(num_rows, per_row, 2.75 * per_row, 2.35 * num_rows)
    for axis in axes.ravel()[count:]:
        axis.axis("off")
    return figure, list(axes.ravel()[:count])


def _legend(axis: Any, **style: Any) -> bool:
    """A legend of what is drawn; False where nothing is."""
    if drawn := bool(axis.get_legend_handles_labels()[0]):
        axis.legend(**{"fontsize": 8, "edgecolor": "none", "framealpha": 0.8} | style)
    return drawn
