"""External validation as a page: one figure and one table of AUROC by label and set, with prevalence beside it."""

import html
from collections.abc import Sequence
from itertools import cycle

from matplotlib.figure import Figure

from cxrdist.report.figures import COLOURS, GREY, MAX_SHOWN, short_label
from cxrdist.report.page import Cell, Section, figure_html, html_table, interval_text, number_text
from cxrdist.scoring.external import LabelScore, SetResult, Validation

MAX_LINES = 240  # of the picture: 8,000 pixels
INCH, GAP = 0.21, 1.3  # height of a line; lines between the last set of a label and the first of the next
SOFT = "#5b6776"
# A number and its interval on one line; a phone shows the picture's dots, and the numbers beside them when scrolled.
STYLE = """<style>
table:not(.text) td + td { white-space: nowrap; }
@media (max-width: 700px) { .figure img { width: 620px; } }
</style>"""
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
    for one, colour in zip(result.sets, cycle(COLOURS)):
        ends = interval_text(one.macro_interval or (NAN, NAN))
        value = number_text(NAN if one.macro_auroc is None else one.macro_auroc)
        text = f"macro AUROC, {html.escape(one.name)}<br>95 % {ends}<br>"
        text += f"{one.num_images:,} images of {one.num_patients:,} patients, task {html.escape(one.task)}"
        cards += f'<div class="card" style="border-left-color:{colour}"><b>{value}</b><span>{text}</span></div>'
    listed = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    about = f"AUROC: the chance that an image with the finding scores above one without; {shared_text(result)}. "
    about += f"Intervals from {result.num_resamples:,} resamples of each set's patients."
    return Section("Summary", about, f'<div class="cards">{cards}</div>' + (f"<ul>{listed}</ul>" if listed else ""))


def _scores(result: Validation) -> Section:
    shown = _shown(result)
    only = (
        "" if len(shown) == len(result.labels) else f" The picture shows the {len(shown)} labels with most positives."
    )
    return Section(
        "AUROC by label and set",
        "Dots with 95 % intervals; beside them positives, images whose label is known, and the prevalence. AUROC does "
        "not depend on the prevalence. A label that a set does not have, or that is positive in none or "
        "in all of its images, is a blank." + only,
        figure_html(forest(result), "AUROC by label and set with intervals") + _table(result),
    )


def _table(result: Validation) -> str:
    rows: list[list[Cell]] = []
    for place, label in enumerate(result.labels):
        scores = [one.cells[place] for one in result.sets]
        rows.append([label, *((auroc_text(s), "; ".join(filter(None, (share_text(s), s.blank)))) for s in scores)])
    rows.append([f"macro ({len(result.shared)} of {len(result.labels)})", *map(macro_text, result.sets)])
    return html_table(["label", *(one.name for one in result.sets)], rows, total=True)


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


def _shown(result: Validation) -> list[int]:
    """The labels that get a place in the picture: all, or where there are too many those with the most positives."""
    most = max(1, min(MAX_SHOWN, MAX_LINES // (len(result.sets) + 1)))
    positives = [sum(one.cells[place].positives for one in result.sets) for place in range(len(result.labels))]
    return sorted(sorted(range(len(positives)), key=lambda place: -positives[place])[:most])


def forest(result: Validation) -> Figure:
    """A block for each label with a line for each set: AUROC, its interval, and the counts; last the macro."""
    blocks = [(result.labels[place], [one.cells[place] for one in result.sets]) for place in _shown(result)]
    if result.shared:
        macros = [LabelScore(label="", auroc=one.macro_auroc, interval=one.macro_interval) for one in result.sets]
        blocks.append((f"macro ({len(result.shared)} labels)", macros))
    num_lines = len(blocks) * (len(result.sets) + GAP) + 1
    figure = Figure(figsize=(8, 0.7 + INCH * num_lines), layout="constrained")
    axis, beside = figure.subplots(1, 2, sharey=True, width_ratios=(1.1, 1))
    across, aside = axis.get_yaxis_transform(), beside.get_yaxis_transform()
    y, names, lowest = 0.0, {}, 0.5
    for x, title in ((0.0, "AUROC (95 %)"), (0.52, "positives of images")):
        beside.text(x, y, title, fontsize=8.5, color=SOFT, va="center", transform=aside)
    for label, scores in blocks:
        axis.text(0.01, y, short_label(label, 48), fontsize=9, weight="bold", va="center", transform=across)
        for one, score, colour in zip(result.sets, scores, cycle(COLOURS)):
            y += 1
            names[y] = short_label(one.name, 24)
            if score.auroc is None:
                axis.text(0.5, y, score.blank, fontsize=8, color=SOFT, ha="center", va="center", transform=across)
            else:
                low, high = score.interval or (score.auroc, score.auroc)
                lowest = min(lowest, low)
                axis.hlines(y, low, high, color=colour, lw=1.8, alpha=0.75)
                axis.plot(score.auroc, y, "o", color=colour, ms=5)
            for x, text in ((0.0, auroc_text(score)), (0.52, share_text(score))):
                beside.text(x, y, text, fontsize=8.5, va="center", transform=aside)
        y += GAP
    axis.axvline(0.5, color=GREY, lw=1)
    axis.set_yticks(list(names), list(names.values()), fontsize=8.5)
    axis.set(ylim=(y - 0.6, -0.7), xlim=(lowest - 0.02, 1.01), xlabel="AUROC")
    axis.grid(axis="x", color="#e8ecf1", lw=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    beside.axis("off")
    return figure
