"""The sections of a report: figures and tables of an evaluation. The functions take plain numbers and arrays."""

import html
import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from cxrdist.report.page import Section, duration_text, figure_html, html_table, interval_text, number_text
from cxrdist.scoring import metrics
from cxrdist.scoring.calibration import reliability
from cxrdist.scoring.evaluation import Evaluation
from cxrdist.scoring.tables import ScoreTable

matplotlib.use("Agg")

MAX_SHOWN = 48  # labels in a picture: 12 rows of panels
COLOURS = ("#1f3a5f", "#d1762a", "#3b8c6e", "#8a5a9e", "#a33b4a", "#7a7a7a")


def summary_section(result: Evaluation, notes: Sequence[str]) -> Section:
    cards = []
    for score, colour in zip(result.scores, cycle(COLOURS)):
        cards.append(
            f'<div class="card" style="border-left-color:{colour}"><b>{number_text(score.macro_auroc)}</b>'
            f"<span>macro AUROC, {html.escape(score.name)}<br>95 % {interval_text(score.macro_interval)}, "
            f"{score.num_labels} of {len(result.labels)} labels</span></div>"
        )
    cards.append(
        f'<div class="card" style="border-left-color:#aab4c0"><b>{result.num_images:,}</b><span>images of '
        f"{result.num_patients:,} patients</span></div>"
    )
    listed = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    about = (
        f"AUROC: the chance that an image with the finding scores above one without. Intervals from "
        f"{result.num_resamples:,} resamples of the patients."
    )
    return Section(
        "Summary", about, f'<div class="cards">{"".join(cards)}</div>' + (f"<ul>{listed}</ul>" if listed else "")
    )


def label_section(result: Evaluation) -> Section:
    """The AUROC of each label and table as a picture, and as a table with average precision."""
    return Section(
        "AUROC per label",
        "Dots with 95 % intervals (patients resampled; on a handful of positives they say little). A label without "
        "positives or negatives has no AUROC and is left out of the macro. AP: average precision of the first table; a "
        "random score has the positives' share." + _note(result),
        figure_html(_forest(result), "AUROC per label with intervals") + _label_table(result),
    )


def roc_section(tables: Sequence[ScoreTable], targets: NDArray[Any], result: Evaluation) -> Section:
    """ROC curves, all tables in one panel for each label."""
    about = "True against false positive rate; the number of positives is in brackets, AUROCs in the legends."
    names = ("ROC curves", about, "false positive rate", "true positive rate")
    return _curves_per_label(names, tables, targets, result, roc=True)


def precision_section(tables: Sequence[ScoreTable], targets: NDArray[Any], result: Evaluation) -> Section:
    about = "The grey line is the share of positives: what a random score reaches. Average precision in the legends."
    return _curves_per_label(("Precision and recall", about, "recall", "precision"), tables, targets, result, roc=False)


def _curves_per_label(
    names: tuple[str, str, str, str],
    tables: Sequence[ScoreTable],
    targets: NDArray[Any],
    result: Evaluation,
    *,
    roc: bool,
) -> Section:
    labels = shown_labels(result)
    figure, axes = _panels(len(labels))
    for label, axis in zip(labels, axes, strict=True):
        positives = result.positives[label]
        share = positives / max(result.num_images, 1)
        axis.plot([0, 1], [0, 1], color="#c5ccd5", lw=0.8) if roc else axis.axhline(share, color="#c5ccd5", lw=0.8)
        for table, score, colour in zip(tables, result.scores, cycle(COLOURS)):
            value = (score.auroc if roc else score.average_precision)[label]
            if not math.isnan(value):
                curve = metrics.roc_curve if roc else metrics.precision_recall_curve
                x, y = curve(targets[:, label], table.probs[:, label])
                axis.plot(x, y, color=colour, lw=1.4, label=f"{score.name} {value:.2f}")
        _panel(axis, f"{_plain(result.labels[label])} ({positives if roc else f'{share:.1%}'})")
        if axis.get_legend_handles_labels()[0]:
            place = "lower right" if roc else "best"
            axis.legend(fontsize=7, loc=place, handlelength=1.2, framealpha=0.8, edgecolor="none")
        elif roc:
            axis.text(0.5, 0.5, "undefined", ha="center", color="#8893a0", fontsize=8)
    figure.supxlabel(names[2], fontsize=9)
    figure.supylabel(names[3], fontsize=9)
    return Section(names[0], names[1] + _note(result), figure_html(figure, names[0]))


def calibration_section(tables: Sequence[ScoreTable], targets: NDArray[Any], result: Evaluation) -> Section:
    figure = Figure(figsize=(11, 3.9), layout="constrained")
    axes = figure.subplots(1, 2)
    axes[0].plot([0, 1], [0, 1], color="#c5ccd5", lw=0.8)
    for table, colour in zip(tables, cycle(COLOURS)):
        curve = reliability(targets, table.probs)
        axes[0].plot(curve.mean_prob, curve.positive_share, "o-", ms=4, lw=1.3, color=colour, label=table.name)
        axes[1].hist(
            table.probs.ravel(), bins=np.linspace(0, 1, 41).tolist(), histtype="step", color=colour, label=table.name
        )
    axes[0].set(xlabel="mean probability in the bin", ylabel="share of positives", xlim=(0, 1), ylim=(0, 1))
    axes[1].set(xlabel="probability", ylabel="image-label pairs", yscale="log", xlim=(0, 1))
    for axis in axes:
        axis.legend(fontsize=8, frameon=False)
        _clean(axis)
    rows = [
        (
            html.escape(score.name),
            f"{score.calibration_error:.3f}",
            f"{score.temperature:.2f}",
            f"{score.calibration_error_after:.3f}",
        )
        for score in result.scores
    ]
    head = ("table", "calibration error", "temperature", "error after scaling (fitted on other patients)")
    return Section(
        "Calibration",
        "Over all labels together, in ten bins. A temperature above 1 means overconfident, below 1 too cautious. The "
        "training loss (focal, with class weights) is not made for calibrated probabilities; AUROC does not need them.",
        figure_html(figure, "reliability diagram") + html_table(head, rows),
    )


def comparison_section(result: Evaluation) -> Section:
    """Paired differences, study averaging, and the subgroups of the first table."""
    body = ""
    if result.comparisons:
        rows = [
            (
                f"{html.escape(item.one)} minus {html.escape(item.other)}",
                f"{item.difference:+.4f}",
                interval_text(item.interval, "+.4f"),
                f"{item.share_above:.0%}",
            )
            for item in result.comparisons
        ]
        body += html_table(("macro AUROC", "difference", "95 % interval", "resamples in which it is above 0"), rows)
    effects = [
        (
            html.escape(s.name),
            number_text(s.macro_auroc, 4),
            number_text(s.study_averaged_auroc, 4),
            number_text(s.study_averaged_auroc - s.macro_auroc, 4, "+"),
        )
        for s in result.scores
    ]
    body += "<br>" + html_table(("table", "per image", "images of a study averaged", "effect"), effects)
    if result.subgroups:
        groups = [
            (
                f"{item.kind}: {html.escape(item.value)}",
                f"{item.num_images:,}",
                number_text(item.macro_auroc),
                interval_text(item.interval),
                f"{item.num_labels} of {len(result.labels)}",
            )
            for item in result.subgroups
        ]
        head = (f"subgroup ({html.escape(result.scores[0].name)})", "images", "macro AUROC", "95 % interval", "labels")
        body += "<br>" + html_table(head, groups)
    return Section(
        "Comparisons and subgroups",
        "Differences are paired: both tables are scored on the same resamples of the patients. Macros of subgroups "
        "may hold fewer labels; compare them with care.",
        body,
    )


def curves_section(runs: Mapping[str, Sequence[Mapping[str, Any]]], colours: Mapping[str, str]) -> Section:
    """Training loss (and validation AUROC where there is one) of each run, from the rows of its metrics.jsonl."""
    validated = any(row["kind"] == "validation" for rows in runs.values() for row in rows)
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    axes = list(np.ravel(np.array(figure.subplots(1, 2 if validated else 1), dtype=object)))
    axes[0].set(xlabel="epoch", ylabel="training loss")
    for name, rows in runs.items():
        colour = colours[name]
        per_epoch = next((row["step"] / row["epoch"] for row in reversed(rows)), 1)
        points = [(row["step"] / per_epoch, row["loss"]) for row in rows if row.get("loss") is not None]
        if points:
            x, y = np.array(points, dtype=float).T
            window = max(1, len(y) // 25)
            smooth = np.convolve(y, np.ones(window) / window, mode="valid")
            axes[0].plot(x, y, color=colour, lw=0.7, alpha=0.35)
            axes[0].plot(x[window - 1 :], smooth, color=colour, lw=1.8, label=name)
        points = [(row["epoch"], row["validation/auroc_macro"]) for row in rows if row["kind"] == "validation"]
        points = [point for point in points if point[1] is not None]
        if points:
            axes[1].plot(*np.array(points, dtype=float).T, "o-", ms=4, color=colour, label=name)
            axes[1].set(xlabel="epoch", ylabel="validation macro AUROC")
    for axis in axes:
        _clean(axis)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8, frameon=False)
    return Section(
        "Training",
        "Loss of each run per logged step (thin) and its moving average.",
        figure_html(figure, "loss curves"),
    )


def files_section(paths: Mapping[str, str], timings: Mapping[str, float]) -> Section:
    body = html_table(
        ("what", "where"), [(html.escape(k), f"<code>{html.escape(v)}</code>") for k, v in paths.items()], text=True
    )
    if timings:
        rows = [(html.escape(name), duration_text(seconds)) for name, seconds in timings.items()]
        rows.append(("<b>total</b>", f"<b>{duration_text(sum(timings.values()))}</b>"))
        body += "<br>" + html_table(("step", "time"), rows)
    return Section("Files and times", "Where everything lies, as the commands were given.", body)


def shown_labels(result: Evaluation) -> list[int]:
    """The labels that get a place in pictures: all, or where there are too many those with the most positives."""
    most = sorted(range(len(result.labels)), key=lambda label: -result.positives[label])
    return sorted(most[:MAX_SHOWN])


def _note(result: Evaluation) -> str:
    return f" Only the {MAX_SHOWN} labels with the most positives." if len(result.labels) > MAX_SHOWN else ""


def _forest(result: Evaluation) -> Figure:
    labels, count = shown_labels(result), len(result.scores)
    num = len(labels)
    height = max(2.2, 1 + 0.32 * (num + 1))
    figure = Figure(figsize=(11, height), layout="constrained")
    axis = figure.subplots()
    for place, (score, colour) in enumerate(zip(result.scores, cycle(COLOURS))):
        y = np.arange(num + 1) + (place - (count - 1) / 2) * 0.7 / max(count, 2)
        values = np.array([*(score.auroc[label] for label in labels), score.macro_auroc])
        low_high = np.array([*(score.auroc_interval[label] for label in labels), score.macro_interval])
        axis.hlines(y, low_high[:, 0], low_high[:, 1], color=colour, lw=1.6, alpha=0.75)
        axis.plot(values, y, "o", color=colour, ms=5, label=score.name)
    names = [f"{_plain(result.labels[label])} ({result.positives[label]})" for label in labels]
    axis.set_yticks(range(num + 1), [*names, "macro"])
    axis.axhline(num - 0.5, color="#1d2733", lw=0.8)
    axis.axvline(0.5, color="#c5ccd5", lw=1)
    axis.set(ylim=(num + 0.5, -0.6), xlabel="AUROC (positives in brackets)", xlim=(None, 1.005))
    axis.grid(axis="x", color="#e8ecf1", lw=0.8)
    axis.set_axisbelow(True)
    _clean(axis)
    above = 1 + 0.464 / height  # the legend's place: half an inch above the axes at any height
    axis.legend(fontsize=9, frameon=False, loc="upper center", ncols=count, bbox_to_anchor=(0.5, above))
    return figure


def _label_table(result: Evaluation) -> str:
    head = ["label", "positives", *(html.escape(score.name) for score in result.scores), "AP"]
    rows = []
    first = result.scores[0]
    for label, name in enumerate(result.labels):
        cells = [
            f"{number_text(s.auroc[label])}<br><small>{interval_text(s.auroc_interval[label])}</small>"
            for s in result.scores
        ]
        precision = number_text(first.average_precision[label])
        rows.append((html.escape(name), f"{result.positives[label]:,}", *cells, precision))
    cells = [f"{number_text(s.macro_auroc)}<br><small>{interval_text(s.macro_interval)}</small>" for s in result.scores]
    mean_precision = metrics.macro(np.array(first.average_precision))[0]
    rows.append((f"macro ({first.num_labels} of {len(result.labels)})", "", *cells, number_text(mean_precision)))
    return html_table(head, rows, total=True)


def _panels(count: int) -> tuple[Figure, list[Any]]:
    """A figure with `count` panels, at most four in a row."""
    per_row = min(4, count)
    num_rows = -(-count // per_row)
    figure = Figure(figsize=(2.75 * per_row, 2.35 * num_rows), layout="constrained")
    axes = list(figure.subplots(num_rows, per_row, squeeze=False).ravel())
    for axis in axes[count:]:
        axis.axis("off")
    return figure, axes[:count]


def _panel(axis: Any, title: str) -> None:
    axis.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1), aspect="equal")
    axis.set_title(title, fontsize=8.5)
    axis.tick_params(labelsize=7)
    _clean(axis)


def _clean(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)


def _smooth(heat: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.sqrt(heat)


def _plain(text: str) -> str:
    """Text that matplotlib draws as it is: dollar signs would begin a formula."""
    return text.replace("$", r"\$")
