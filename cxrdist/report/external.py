"""External validation as a page: one table of AUROC with its intervals drawn, by label and set, and prevalence."""

import html
from collections.abc import Sequence

from cxrdist.report.figures import name_head
from cxrdist.report.page import Cell, Html, Section, html_table, interval_text, number_text
from cxrdist.report.plots import colour, forest_axis, forest_low, forest_row, legend
from cxrdist.scoring.external import LabelScore, SetResult, Validation

NAN = float("nan")


def external_sections(result: Validation, notes: Sequence[str]) -> list[Section]:
    return [_summary(result, notes), _scores(result), _names(result)]


def share_text(score: LabelScore) -> str:
    """`56 of 1,234 (4.5 %)`: positives, images and prevalence; '' where the set does not have the label."""
    if not score.own:
        return ""
    share = "-" if score.prevalence is None else f"{100 * score.prevalence:.1f} %"
    return f"{score.positives:,.7g} of {score.num_images:,} ({share})"


def auroc_text(score: LabelScore) -> str:
    """`0.778 (0.712 to 0.834)`, or `-`."""
    return "-" if score.auroc is None else f"{score.auroc:.3f} ({interval_text(score.interval or (NAN, NAN))})"


def macro_text(one: SetResult) -> str:
    """As `auroc_text`, of the labels that all sets share."""
    return (
        "-" if one.macro_auroc is None else f"{one.macro_auroc:.3f} ({interval_text(one.macro_interval or (NAN, NAN))})"
    )


def shared_text(result: Validation) -> str:
    """What the macro is taken over."""
    return f"macro over the {len(result.shared)} of {len(result.labels)} labels with an AUROC on every set"


def _summary(result: Validation, notes: Sequence[str]) -> Section:
    cards = ""
    for place, one in enumerate(result.sets):
        ends = interval_text(one.macro_interval or (NAN, NAN))
        value = number_text(NAN if one.macro_auroc is None else one.macro_auroc)
        text = f"macro AUROC, {html.escape(one.name)}<br>95 % {ends}<br>"
        text += f"{one.num_images:,} images of {one.num_patients:,} patients, task {html.escape(one.task)}"
        cards += f'<div class="card {colour(place)}"><b>{value}</b><span>{text}</span></div>'
    listed = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    about = f"AUROC: the chance that an image with the finding scores above one without; {shared_text(result)}. "
    about += f"Intervals from {result.num_resamples:,} resamples of each set's patients."
    return Section("Summary", about, f'<div class="cards">{cards}</div>' + (f"<ul>{listed}</ul>" if listed else ""))


def _scores(result: Validation) -> Section:
    return Section(
        "AUROC by label and set",
        "Dots with 95 % intervals; below a number its interval, positives, images whose label is known, and the "
        "prevalence. AUROC does not depend on the prevalence. A label that a set does not have, or that is positive in "
        "none or in all of its images, is a blank.",
        legend([one.name for one in result.sets]) + _table(result),
    )


def _table(result: Validation) -> str:
    cells = [one.cells for one in result.sets]
    macros = [LabelScore(label="", auroc=one.macro_auroc, interval=one.macro_interval) for one in result.sets]
    low = forest_low([score.interval or (NAN, NAN) for row in [*cells, macros] for score in row])
    rows: list[list[Cell]] = []
    for label, *scores in zip(result.labels, *cells, strict=True):
        rows.append([label, _bars(scores, low), *map(_score_cell, scores)])
    title = f"macro ({len(result.shared)} of {len(result.labels)})"
    rows.append([title, _bars(macros, low), *map(_score_cell, macros)])
    heads = [name_head(place, one.name) for place, one in enumerate(result.sets)]
    head: list[Cell] = ["label", Html(f"AUROC{forest_axis(low)}"), *heads]
    return html_table(head, rows, total=True, kind="scores sortable", bars=1)


def _score_cell(score: LabelScore) -> Cell:
    """The AUROC; below it the interval, the counts, and why there is none."""
    ends = "" if score.interval is None else interval_text(score.interval)
    below = "<br>".join(html.escape(text) for text in (ends, share_text(score), score.blank) if text)
    return number_text(NAN if score.auroc is None else score.auroc), Html(below)


def _bars(scores: Sequence[LabelScore], low: float) -> Html:
    values = [NAN if score.auroc is None else score.auroc for score in scores]
    return Html(forest_row(values, [score.interval or (NAN, NAN) for score in scores], low))


def _names(result: Validation) -> Section:
    """Which label of a set was taken for which of the scores, and what was compared with nothing."""
    rows = []
    for place, label in enumerate(result.labels):
        own = [one.cells[place] for one in result.sets]
        if any(score.own not in ("", label) for score in own):
            rows.append([label, *(score.own or "-" for score in own)])
    left = [("labels of the scores that no set has", result.nowhere)]
    left += [(f"labels of {one.name} that no score is of", one.not_scored) for one in result.sets]
    texts = [f"{what}: {', '.join(names)}" for what, names in left if names]
    listed = "".join(f"<li>{html.escape(text)}</li>" for text in texts)
    body = html_table(["label of the scores", *(one.name for one in result.sets)], rows) if rows else ""
    about = (
        "Labels are the same when their names are, without regard to case, spaces, '_' and '-', or when the map says "
    )
    about += "so. " + (
        "Labels that all sets call alike are not listed." if rows else "All sets call every label alike."
    )
    return Section("Names of the labels", about, body + (f"<ul>{listed}</ul>" if listed else ""))
