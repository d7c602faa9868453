"""The sections of a report: figures and tables of an evaluation. The functions take plain numbers and arrays."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cxrdist.report import curves
from cxrdist.report.page import Cell, Html, Section, duration_text, html_table, interval_text, number_text
from cxrdist.report.plots import (
    Series,
    axis_of,
    colour,
    forest_axis,
    forest_low,
    forest_row,
    key,
    legend,
    plot,
    plots,
)
from cxrdist.scoring import metrics
from cxrdist.scoring.evaluation import FEW_CASES, Evaluation
from cxrdist.scoring.operating import OperatingPoint, Rate
from cxrdist.scoring.tables import ScoreTable

MAX_SHOWN = 48  # labels with curves and images of their own
MIN_LOGGED = 5  # rows of an epoch: fewer draw spikes, since one after an epoch's end is the mean of a few batches
NO_RATE = Rate(math.nan, None)


def summary_section(result: Evaluation, notes: Sequence[str]) -> Section:
    about = "AUROC: the chance that an image with the finding scores above one without. Intervals from "
    about += f"{result.num_resamples:,} resamples of the patients."
    cards = []
    for place, score in enumerate(result.scores):
        counted = f"{interval_text(score.macro_interval)}, {score.num_labels} of {len(result.labels)} labels"
        text = f"macro AUROC, {html.escape(score.name)}<br>95 % {counted}"
        cards.append((colour(place), number_text(score.macro_auroc), text))
    cards.append(("", f"{result.num_images:,}", f"images of {result.num_patients:,} patients"))
    body = "".join(f'<div class="card {kind}"><b>{number}</b><span>{text}</span></div>' for kind, number, text in cards)
    listed = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    return Section("Summary", about, f'<div class="cards">{body}</div>' + (f"<ul>{listed}</ul>" if listed else ""))


def label_section(result: Evaluation, points: Sequence[OperatingPoint] = ()) -> Section:
    """The table of labels. points: what the first table's threshold of each label does, where one was chosen."""
    about = "Dots with 95 % intervals from resampled patients. A label without positives or negatives has no AUROC and "
    about += "is left out of the macro. AP: average precision of "
    about += f"{result.scores[0].name}; a random score has the positives' share."
    about += " Sensitivity and specificity are at its calibrated threshold." if points else ""
    about += " A label leads to its curves and images." + _note(result, "These are there for")
    note = f'<p class="note">{FEW_CASES}</p>' if any(result.few_cases()) else ""
    body = legend([score.name for score in result.scores]) + _label_table(result, points) + note
    return Section("Labels", about, body)


def panel_section(
    tables: Sequence[ScoreTable],
    targets: NDArray[Any],
    result: Evaluation,
    points: Sequence[OperatingPoint] = (),
    images: Mapping[int, str] | None = None,
) -> Section:
    """Each label's curves, and its images (HTML, by its place), to be opened. targets: (N, K), nan where masked."""
    panels = []
    for number, label in enumerate(shown_labels(result)):
        truth, name = targets[:, label], result.labels[label]
        columns = [(table.name, table.probs[:, label]) for table in tables]
        aurocs = [score.auroc[label] for score in result.scores]
        precisions = [score.average_precision[label] for score in result.scores]
        sens, spec, ppv, _ = rates_of(points[label]) if points else (NO_RATE,) * 4
        pictures = [
            curves.roc(name, truth, columns, aurocs, (sens.value, spec.value)),
            curves.precision_recall(name, truth, columns, precisions, (sens.value, ppv.value)),
            curves.calibration(name, truth, columns),
        ]
        share = result.positives[label] / max(result.observed[label], 1)
        told = f"AUROC {number_text(aurocs[0])}, {result.positives[label]:,.5g} of {result.observed[label]:,} images"
        told += f" ({share:.1%})"
        if not math.isnan(sens.value + spec.value):
            told += f"; sensitivity {sens.value:.3f}, specificity {spec.value:.3f}"
        panels.append(
            f"<details{'' if number else ' open'}><summary><b>{html.escape(name)}</b> <span>{told}</span></summary>"
            f'<div id="label-{label}">{plots(pictures)}'
            f"{(images or {}).get(label, '')}</div></details>"
        )
    about = "ROC, precision against recall, and calibration in ten bins. Grey: what a random score reaches; "
    about += "of calibration, what honest probabilities do."
    about += " The ring is at the calibrated threshold." if points else ""
    about += _note(result, "Only")
    tools = legend([table.name for table in tables]) + '<p class="tools"></p>'
    return Section("Curves and images of each label", about, tools + "".join(panels))


def calibration_section(tables: Sequence[ScoreTable], targets: NDArray[Any], result: Evaluation) -> Section:
    columns = [(table.name, table.probs) for table in tables]
    pictures = [curves.calibration("all labels", targets, columns), curves.histogram("all labels", columns)]
    head = ("table", "calibration error", "temperature", "error after scaling (fitted on other patients)")
    numbers = [(s.name, s.calibration_error, s.temperature, s.calibration_error_after) for s in result.scores]
    rows = [(name, f"{error:.3f}", f"{value:.2f}", f"{after:.3f}") for name, error, value, after in numbers]
    return Section(
        "Calibration",
        "Over all labels together, in ten bins. A temperature above 1 means overconfident, below 1 too cautious. The "
        "training loss (focal, with class weights) is not made for calibrated probabilities; AUROC does not need them.",
        legend([table.name for table in tables]) + plots(pictures) + html_table(head, rows),
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
    about = (
        "Differences are paired: both tables are scored on the same resamples of the patients. Macros of subgroups "
        "may hold fewer labels; compare them with care."
    )
    if not any(rows for _, rows in tables):
        about = "None: there is one table, and view, sex, age and study of the images are not known."
    return Section(
        "Comparisons and subgroups",
        about,
        "<br>".join(html_table(head, rows, kind="sortable") for head, rows in tables if rows),
    )


def training_section(runs: Mapping[str, Sequence[Mapping[str, Any]]], colours: Mapping[str, int]) -> Section:
    """Training loss (and validation AUROC where there is one) of each run, from the rows of its metrics.jsonl.

    colours: the place in the palette of each run.
    """
    losses, aurocs, names = [], [], sorted(runs, key=colours.__getitem__)
    for name in names:
        rows, place = runs[name], colours[name]
        per_epoch = next((row["step"] / row["epoch"] for row in reversed(rows)), 1)
        logged = [(row["step"] / per_epoch, row["loss"]) for row in rows if row.get("loss") is not None]
        means = [(row["epoch"], row["epoch_loss"]) for row in rows if row.get("epoch_loss") is not None]
        if means and len(logged) < MIN_LOGGED * len(means):
            x, y = np.array(means, dtype=float).T
            losses.append(Series(x, y, place, ("line", "dot")))
        elif logged:
            x, y = np.array(logged, dtype=float).T
            window = max(1, len(y) // 25)
            losses.append(Series(x, y, place, ("thin",)))
            losses.append(Series(x[window - 1 :], np.convolve(y, np.ones(window) / window, mode="valid"), place))
        points = [(row["epoch"], row.get("validation/auroc_macro")) for row in rows if row["kind"] == "validation"]
        if points := [point for point in points if point[1] is not None]:
            x, y = np.array(points, dtype=float).T
            aurocs.append(Series(x, y, place, ("line", "dot")))
    pictures = []
    for title, series in (("training loss", losses), ("validation macro AUROC", aurocs)):
        if series:
            x, y = (np.concatenate([getattr(one, side) for one in series]) for side in "xy")
            pictures.append(
                plot(axis_of("epoch", x), axis_of(title, y), series, title, f"<b>{title[0].upper()}{title[1:]}</b>")
            )
    about = "Loss of each run per logged step (thin) and, where there are many, its moving average; the mean of each "
    about += f"epoch (dots) where fewer than {MIN_LOGGED} steps of an epoch were logged."
    items = "".join(f"<li>{key(colours[name])}{html.escape(name)}</li>" for name in names)
    return Section("Training", about, f'<ul class="legend">{items}</ul>{plots(pictures)}')


def files_section(paths: Mapping[str, str], timings: Mapping[str, float]) -> Section:
    body = html_table(("what", "where"), list(paths.items()), kind="text")
    if timings:
        rows = [(name, duration_text(value)) for name, value in {**timings, "total": sum(timings.values())}.items()]
        body += "<br>" + html_table(("step", "time"), rows, total=True)
    return Section("Files and times", "Where everything lies, as the commands were given.", body)


def shown_labels(result: Evaluation) -> list[int]:
    """The labels with a panel: all, or where there are too many those with the most positives."""
    return sorted(sorted(range(len(result.labels)), key=lambda label: -result.positives[label])[:MAX_SHOWN])


def _note(result: Evaluation, start: str) -> str:
    return f" {start} the {MAX_SHOWN} labels with the most positives." if len(result.labels) > MAX_SHOWN else ""


def rates_of(point: OperatingPoint) -> tuple[Rate, Rate, Rate, Rate]:
    """Sensitivity, specificity, positive and negative predictive value."""
    return point.sensitivity, point.specificity, point.ppv, point.npv


def rate_cell(rate: Rate) -> Cell:
    return number_text(rate.value), "" if rate.interval is None else interval_text(rate.interval)


def name_head(place: int, name: str) -> Html:
    """The head of a column: the colour at that place, and the name."""
    return Html(f"{key(place)}{html.escape(name)}")


def _label_table(result: Evaluation, points: Sequence[OperatingPoint]) -> str:
    first, shown = result.scores[0], set(shown_labels(result))
    low = forest_low([ends for score in result.scores for ends in [*score.auroc_interval, score.macro_interval]])
    some_masked = min(result.observed) < result.num_images
    rows: list[list[Cell]] = []
    for label, (name, few) in enumerate(zip(result.labels, result.few_cases(), strict=True)):
        some, seen = result.positives[label], result.observed[label]
        cells = [(score.auroc[label], score.auroc_interval[label]) for score in result.scores]
        star = "\N{NO-BREAK SPACE}*" if few else ""
        link = Html(f'<a href="#label-{label}">{html.escape(name)}</a>{star}') if label in shown else name + star
        bars = Html(forest_row([value for value, _ in cells], [ends for _, ends in cells], low))
        numbers = [(number_text(value), interval_text(ends)) for value, ends in cells]
        rates = [rate_cell(rate) for rate in rates_of(points[label])[:2]] if points else []
        cases = f"{some:,.7g} of {seen:,}" if some_masked else f"{some:,.7g}"
        rows.append([link, bars, numbers[0], *rates, *numbers[1:], number_text(first.average_precision[label]), cases])
    macros = [(number_text(s.macro_auroc), interval_text(s.macro_interval)) for s in result.scores]
    bars = Html(forest_row([s.macro_auroc for s in result.scores], [s.macro_interval for s in result.scores], low))
    mean_precision = number_text(metrics.macro(np.array(first.average_precision))[0])
    empty = [""] * (2 if points else 0)
    title = f"macro ({first.num_labels} of {len(result.labels)})"
    rows.append([title, bars, macros[0], *empty, *macros[1:], mean_precision, ""])
    heads = [name_head(place, score.name) for place, score in enumerate(result.scores)]
    rates_heads = ["sensitivity", "specificity"] if points else []
    cases_title = "positives of observed" if some_masked else "positives"
    head: list[Cell] = [
        "label",
        Html(f"AUROC{forest_axis(low)}"),
        heads[0],
        *rates_heads,
        *heads[1:],
        "AP",
        cases_title,
    ]
    return html_table(head, rows, total=True, kind="scores sortable", bars=1)
