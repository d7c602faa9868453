"""An evaluation as one HTML page that needs nothing else: styles and pictures (PNG) are inside, no address is fetched.

The functions take plain numbers and arrays; reading runs, shards and models is the caller's work.
"""

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from cxrdist.files import write_atomically
from cxrdist.labels import LABELS
from cxrdist.scoring import metrics
from cxrdist.scoring.evaluation import Evaluation
from cxrdist.scoring.tables import ScoreTable

matplotlib.use("Agg")

COLOURS = ("#1f3a5f", "#d1762a", "#3b8c6e", "#8a5a9e", "#a33b4a", "#7a7a7a")
WARNING = "Research software, not a medical device and not for clinical use: no diagnosis may rest on this page."
STYLE = """
:root { color-scheme: light; --ink: #1d2733; --soft: #5b6776; --line: #dfe4ea; --accent: #1f3a5f; }
* { box-sizing: border-box; }
body { margin: 0; background: #f3f5f8; color: var(--ink); line-height: 1.5;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
header { background: var(--accent); color: #fff; padding: 28px 0 22px; }
header h1 { margin: 0 0 4px; font-size: 27px; font-weight: 650; letter-spacing: -.01em; }
header p { margin: 0; color: #cfdae8; }
.wrap { max-width: 1120px; margin: 0 auto; padding: 0 28px; }
nav { background: #fff; border-bottom: 1px solid var(--line); position: sticky; top: 0; z-index: 1; }
nav .wrap { display: flex; flex-wrap: wrap; gap: 4px 22px; padding-top: 10px; padding-bottom: 10px; }
nav a { color: var(--accent); text-decoration: none; font-size: 14px; }
nav a:hover { text-decoration: underline; }
section { background: #fff; border: 1px solid var(--line); border-radius: 10px; margin: 22px 0; padding: 22px 26px; }
section h2 { margin: 0 0 4px; font-size: 20px; font-weight: 650; }
section > p.about { margin: 0 0 16px; color: var(--soft); max-width: 86ch; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 14px; margin: 16px 0 4px; }
.card { border: 1px solid var(--line); border-left: 5px solid var(--accent); border-radius: 8px; padding: 12px 16px; }
.card b { display: block; font-size: 28px; line-height: 1.2; font-variant-numeric: tabular-nums; }
.card span { color: var(--soft); font-size: 13.5px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 10px; border-bottom: 1px solid var(--line); text-align: right; }
th { color: var(--soft); font-weight: 600; font-size: 13px; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
tr.total td { font-weight: 650; border-top: 2px solid var(--ink); border-bottom: 0; }
table.text td, table.text th { text-align: left; }
td small, th small { color: var(--soft); font-weight: 400; white-space: nowrap; }
.scroll { overflow-x: auto; }
img { display: block; max-width: 100%; height: auto; margin: 10px auto; }
code { background: #eef1f5; border-radius: 4px; padding: 1px 5px; font-size: 13px; word-break: break-all; }
.warning { background: #fff4e5; border: 1px solid #f0c48a; border-radius: 8px; padding: 10px 16px; margin: 20px 0 0; }
footer { color: var(--soft); font-size: 13.5px; padding: 6px 0 40px; }
"""


@dataclass(frozen=True)
class Section:
    """A titled block of the page. `body` is HTML, the other texts are not."""

    title: str
    about: str
    body: str


@dataclass(frozen=True, eq=False)
class Overlay:
    """A map of what a model looked at, over the image. image: (H, W) grey uint8; heat: (h, w), any scale, >= 0."""

    image: NDArray[np.uint8]
    heat: NDArray[np.float32]
    title: str
    caption: str


def write_report(path: Path, title: str, subtitle: str, sections: Sequence[Section]) -> None:
    """Write the page atomically."""
    links = "".join(f'<a href="#s{i}">{html.escape(section.title)}</a>' for i, section in enumerate(sections))
    blocks = "".join(
        f'<section id="s{i}"><h2>{html.escape(section.title)}</h2><p class="about">{html.escape(section.about)}</p>'
        f"{section.body}</section>"
        for i, section in enumerate(sections)
    )
    write_atomically(
        path,
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<style>{STYLE}</style></head><body><header><div class="wrap"><h1>{html.escape(title)}</h1>'
        f'<p>{html.escape(subtitle)}</p></div></header><nav><div class="wrap">{links}</div></nav><div class="wrap">'
        f'<div class="warning">{html.escape(WARNING)}</div>{blocks}<footer>{html.escape(WARNING)}</footer></div>'
        "</body></html>\n",
    )


def summary_section(result: Evaluation, notes: Sequence[str]) -> Section:
    cards = []
    for score, colour in zip(result.scores, COLOURS * 3, strict=False):
        cards.append(
            f'<div class="card" style="border-left-color:{colour}"><b>{_number(score.macro_auroc)}</b>'
            f"<span>macro AUROC, {html.escape(score.name)}<br>95 % {_range(score.macro_interval)}, "
            f"{score.num_labels} of {len(LABELS)} labels</span></div>"
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
        "random score has the positives' share.",
        figure_html(_forest(result), "AUROC per label with intervals") + _label_table(result),
    )


def roc_section(tables: Sequence[ScoreTable], targets: NDArray[Any], result: Evaluation) -> Section:
    """ROC curves of every label, all tables in one panel each; precision-recall of the first table."""
    figure = Figure(figsize=(11, 9.4), layout="constrained")
    axes = figure.subplots(4, 4).ravel()
    for label, axis in enumerate(axes[: len(LABELS)]):
        axis.plot([0, 1], [0, 1], color="#c5ccd5", lw=0.8)
        for table, score, colour in zip(tables, result.scores, COLOURS * 3, strict=False):
            if not math.isnan(score.auroc[label]):
                fpr, tpr = metrics.roc_curve(targets[:, label], table.probs[:, label])
                axis.plot(fpr, tpr, color=colour, lw=1.4, label=f"{score.name} {score.auroc[label]:.2f}")
        _panel(axis, f"{LABELS[label]} ({result.positives[label]})")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7, loc="lower right", handlelength=1.2, framealpha=0.8, edgecolor="none")
        else:
            axis.text(0.5, 0.5, "undefined", ha="center", color="#8893a0", fontsize=8)
    axes[14].axis("off")
    axes[15].axis("off")
    figure.supxlabel("false positive rate", fontsize=9)
    figure.supylabel("true positive rate", fontsize=9)
    return Section(
        "ROC curves",
        "True against false positive rate; the number of positives is in brackets, AUROCs in the legends.",
        figure_html(figure, "ROC curves"),
    )


def precision_section(tables: Sequence[ScoreTable], targets: NDArray[Any], result: Evaluation) -> Section:
    figure = Figure(figsize=(11, 9.4), layout="constrained")
    axes = figure.subplots(4, 4).ravel()
    for label, axis in enumerate(axes[: len(LABELS)]):
        share = result.positives[label] / max(result.num_images, 1)
        axis.axhline(share, color="#c5ccd5", lw=0.8)
        for table, score, colour in zip(tables, result.scores, COLOURS * 3, strict=False):
            value = score.average_precision[label]
            if not math.isnan(value):
                recall, precision = metrics.precision_recall_curve(targets[:, label], table.probs[:, label])
                axis.plot(recall, precision, color=colour, lw=1.4, label=f"{score.name} {value:.2f}")
        _panel(axis, f"{LABELS[label]} ({share:.1%})")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7, loc="best", handlelength=1.2, framealpha=0.8, edgecolor="none")
    axes[14].axis("off")
    axes[15].axis("off")
    figure.supxlabel("recall", fontsize=9)
    figure.supylabel("precision", fontsize=9)
    return Section(
        "Precision and recall",
        "The grey line is the share of positives: what a random score reaches. Average precision in the legends.",
        figure_html(figure, "precision-recall curves"),
    )


def calibration_section(tables: Sequence[ScoreTable], targets: NDArray[Any], result: Evaluation) -> Section:
    figure = Figure(figsize=(11, 3.9), layout="constrained")
    axes = figure.subplots(1, 2)
    axes[0].plot([0, 1], [0, 1], color="#c5ccd5", lw=0.8)
    for table, colour in zip(tables, COLOURS * 3, strict=False):
        curve = metrics.reliability(targets, table.probs)
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
        figure_html(figure, "reliability diagram") + _table(head, rows),
    )


def comparison_section(result: Evaluation) -> Section:
    """Paired differences, study averaging, and the subgroups of the first table."""
    body = ""
    if result.comparisons:
        rows = [
            (
                f"{html.escape(item.one)} minus {html.escape(item.other)}",
                f"{item.difference:+.4f}",
                _range(item.interval, "+.4f"),
                f"{item.share_above:.0%}",
            )
            for item in result.comparisons
        ]
        body += _table(("macro AUROC", "difference", "95 % interval", "resamples in which it is above 0"), rows)
    effects = [
        (
            html.escape(s.name),
            _number(s.macro_auroc, 4),
            _number(s.study_averaged_auroc, 4),
            _number(s.study_averaged_auroc - s.macro_auroc, 4, "+"),
        )
        for s in result.scores
    ]
    body += "<br>" + _table(("table", "per image", "images of a study averaged", "effect"), effects)
    if result.subgroups:
        groups = [
            (
                f"{item.kind}: {html.escape(item.value)}",
                f"{item.num_images:,}",
                _number(item.macro_auroc),
                _range(item.interval),
                f"{item.num_labels} of {len(LABELS)}",
            )
            for item in result.subgroups
        ]
        head = (f"subgroup ({html.escape(result.scores[0].name)})", "images", "macro AUROC", "95 % interval", "labels")
        body += "<br>" + _table(head, groups)
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


def images_section(rows: Sequence[tuple[str, Sequence[NDArray[np.uint8]]]], titles: Sequence[str]) -> Section:
    """A grid: per image its name, then pictures (H, W) or (H, W, 3) uint8 under the column titles."""
    figure = Figure(figsize=(11, 11 / len(titles) * len(rows) + 0.4), layout="constrained")
    axes = figure.subplots(len(rows), len(titles), squeeze=False)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=9)
    for row, (name, pictures) in zip(axes, rows, strict=True):
        row[0].set_ylabel(name, fontsize=7)
        for axis, picture in zip(row, pictures, strict=True):
            axis.imshow(picture, cmap="gray", vmin=0, vmax=255)
            axis.set_xticks([])
            axis.set_yticks([])
    return Section(
        "Training images",
        "Stored images and what training made of them in four epochs; the draws depend on seed, epoch and image alone.",
        figure_html(figure, "augmented training images"),
    )


def attention_section(title: str, about: str, overlays: Sequence[Overlay]) -> Section:
    """Each overlay as a pair: the image, and the image under its map."""
    per_row = 3
    num_rows = -(-len(overlays) // per_row)
    figure = Figure(figsize=(11, num_rows * 2.3), layout="constrained")
    axes = figure.subplots(num_rows, 2 * per_row, squeeze=False).reshape(num_rows * per_row, 2)
    for axis in axes.ravel():
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
    for pair, overlay in zip(axes, overlays, strict=False):
        height, width = overlay.image.shape
        for axis in pair:
            axis.imshow(overlay.image, cmap="gray", vmin=0, vmax=255, extent=(0, width, height, 0))
        heat = overlay.heat - overlay.heat.min()
        heat = heat / max(float(heat.max()), 1e-12)
        pair[1].imshow(
            heat,
            cmap="inferno",
            alpha=0.25 + 0.45 * _smooth(heat),
            extent=(0, width, height, 0),
            interpolation="bilinear",
        )
        pair[0].set_title(overlay.title, fontsize=8.5, loc="left", fontweight="bold")
        pair[0].set_xlabel(overlay.caption, fontsize=7.5, loc="left", color="#5b6776")
    return Section(title, about, figure_html(figure, title))


def files_section(paths: Mapping[str, str], timings: Mapping[str, float]) -> Section:
    body = _table(
        ("what", "where"), [(html.escape(k), f"<code>{html.escape(v)}</code>") for k, v in paths.items()], text=True
    )
    if timings:
        rows = [(html.escape(name), _duration(seconds)) for name, seconds in timings.items()]
        rows.append(("<b>total</b>", f"<b>{_duration(sum(timings.values()))}</b>"))
        body += "<br>" + _table(("step", "time"), rows)
    return Section("Files and times", "Where everything lies, as the commands were given.", body)


def figure_html(figure: Figure, alt: str) -> str:
    """The figure as an <img> with its PNG inside."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140, facecolor="white")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def _forest(result: Evaluation) -> Figure:
    figure = Figure(figsize=(11, 5.8), layout="constrained")
    axis = figure.subplots()
    count = len(result.scores)
    for place, (score, colour) in enumerate(zip(result.scores, COLOURS * 3, strict=False)):
        y = np.arange(len(LABELS) + 1) + (place - (count - 1) / 2) * 0.7 / max(count, 2)
        values = np.array([*score.auroc, score.macro_auroc])
        low_high = np.array([*score.auroc_interval, score.macro_interval])
        axis.hlines(y, low_high[:, 0], low_high[:, 1], color=colour, lw=1.6, alpha=0.75)
        axis.plot(values, y, "o", color=colour, ms=5, label=score.name)
    names = [f"{label} ({positives})" for label, positives in zip(LABELS, result.positives, strict=True)]
    axis.set_yticks(range(len(LABELS) + 1), [*names, "macro"])
    axis.axhline(len(LABELS) - 0.5, color="#1d2733", lw=0.8)
    axis.axvline(0.5, color="#c5ccd5", lw=1)
    axis.set(ylim=(len(LABELS) + 0.5, -0.6), xlabel="AUROC (positives in brackets)", xlim=(None, 1.005))
    axis.grid(axis="x", color="#e8ecf1", lw=0.8)
    axis.set_axisbelow(True)
    _clean(axis)
    axis.legend(fontsize=9, frameon=False, loc="upper center", ncols=count, bbox_to_anchor=(0.5, 1.08))
    return figure


def _label_table(result: Evaluation) -> str:
    head = ["label", "positives", *(html.escape(score.name) for score in result.scores), "AP"]
    rows = []
    for label, name in enumerate(LABELS):
        cells = [
            f"{_number(s.auroc[label])}<br><small>{_range(s.auroc_interval[label])}</small>" for s in result.scores
        ]
        rows.append((name, f"{result.positives[label]:,}", *cells, _number(result.scores[0].average_precision[label])))
    cells = [f"{_number(s.macro_auroc)}<br><small>{_range(s.macro_interval)}</small>" for s in result.scores]
    mean_precision = metrics.macro(np.array(result.scores[0].average_precision))[0]
    rows.append((f"macro ({result.scores[0].num_labels} of {len(LABELS)})", "", *cells, _number(mean_precision)))
    return _table(head, rows, total=True)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], total: bool = False, text: bool = False) -> str:
    titles = "".join(f"<th>{cell}</th>" for cell in head)
    lines = []
    for place, row in enumerate(rows):
        kind = ' class="total"' if total and place == len(rows) - 1 else ""
        lines.append(f"<tr{kind}>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>")
    kind = ' class="text"' if text else ""
    body = f"<thead><tr>{titles}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'<div class="scroll"><table{kind}>{body}</table></div>'


def _panel(axis: Any, title: str) -> None:
    axis.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1), aspect="equal")
    axis.set_title(title, fontsize=8.5)
    axis.tick_params(labelsize=7)
    _clean(axis)


def _clean(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)


def _smooth(heat: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.sqrt(heat)


def _number(value: float, digits: int = 3, sign: str = "") -> str:
    return "-" if math.isnan(value) else f"{value:{sign}.{digits}f}"


def _range(interval: tuple[float, float], form: str = ".3f") -> str:
    return "-" if math.isnan(interval[0]) else f"{interval[0]:{form}} to {interval[1]:{form}}"


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{seconds / 60:.1f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )
