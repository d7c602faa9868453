"""What a model says of one image -> HTML: a bar for each finding, and the maps of the chosen one.

Everything that a file or a task may have named is escaped, Gradio's own templates (`${...}`, `{{...}}`) included.
"""

import base64
import html
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from cxrdist.data.images import Levels
from cxrdist.errors import UserError, one_line
from cxrdist.inference.findings import NOT_CALIBRATED, is_positive, ranked, shown_prob
from cxrdist.inference.predictor import Prediction, Predictor
from cxrdist.report.page import WARNING
from cxrdist.report.saliency import FROM_RANDOM, MEANING, overlay
from cxrdist.scoring.operating import LabelCalibration, Range

SHOWN = 20  # findings in the open; the others are behind a line that opens
EMPTY = '<p class="cx-empty">Drop an X-ray to see what the model says of it.</p>'
NO_MAP = '<p class="cx-soft">Choose a finding to see which parts of the image moved its score.</p>'


@dataclass(frozen=True, eq=False)
class Look:
    """An image that was dropped: its name, the bytes of its file, what the model says of it, the finding chosen."""

    name: str
    content: bytes
    found: Prediction
    chosen: int | None = None


def text(value: str) -> str:
    """Any text as one line of HTML that shows it as it is."""
    escaped = html.escape(one_line(value))
    return escaped.replace("$", "&#36;").replace("{", "&#123;").replace("}", "&#125;")


def head_html(model: Predictor) -> str:
    names = ", ".join(member.name for member in model.members)
    whose = f"the average of {names}" if len(model.members) > 1 else names
    about = f"Task {model.task.name}: {len(model.labels):,} findings by {whose}, on the {model.device.type.upper()}"
    notes = "".join(f'<p class="cx-soft">{text(note)}</p>' for note in model.notes)
    return (
        f'<header class="cx-head"><h1>Chest X-ray findings</h1><p>{text(about)}</p></header>'
        f'<p class="cx-warning" role="note">{text(WARNING)}</p>{notes}'
    )


def message_html(message: str, *, wrong: bool = False) -> str:
    kind = "cx-status cx-wrong" if wrong else "cx-status"
    return f'<p class="{kind}" role="status">{text(message)}</p>' if message else ""


def told(look: Look) -> str:
    """One line about the image, for a status that is read aloud."""
    found, top = look.found, ranked(look.found, 0)[0]
    if found.decisions is None:
        return f"{look.name}: the highest of {len(found.labels):,} scores is {found.labels[top]}"
    return f"{look.name}: {np.count_nonzero(found.decisions == 1):,} of {len(found.labels):,} findings are positive"


def findings_html(model: Predictor, look: Look, compared: Sequence[str] = ()) -> str:
    """A button with a bar for each finding, positive ones first, then by probability; under it the members compared."""
    order = ranked(look.found, 0)
    rows = [_row(model, look, place, compared) for place in order]
    more = f"<details><summary>and {len(rows) - SHOWN:,} more findings</summary>{_list(rows[SHOWN:])}</details>"
    calibration = look.found.calibrated is not None and model.calibration is not None
    legend = ["Bars are calibrated probabilities; the line is the threshold, the band its 95 % interval."]
    legend = legend if calibration else [f"{NOT_CALIBRATED[0].upper()}{NOT_CALIBRATED[1:]}."]
    if compared:
        legend.append("The thin bars are raw scores, one for each member.")
        keys = (f'<li><span class="cx-key cx-{side}"></span>{text(name)}</li>' for side, name in _sides(compared))
        legend_list = f'<ul class="cx-keys">{"".join(keys)}</ul>'
    return (
        f'<h2>Findings in {text(look.name)}</h2><p class="cx-soft">{text(" ".join(legend))}</p>'
        f"{legend_list if compared else ''}{_list(rows[:SHOWN])}{more if len(rows) > SHOWN else ''}"
    )


def maps_html(model: Predictor, look: Look, members: Sequence[str]) -> str:
    """The image as the model gets it and, of the finding chosen, the maps of these members."""
    seen = model.seen(look.content)
    size = f"{seen.shape[1]} x {seen.shape[0]} px"
    figures = [_figure(seen, f"The X-ray as the model gets it, {size}", f"X-ray {look.name}")]
    if look.chosen is None:
        return f'<div class="cx-maps">{figures[0]}</div>{NO_MAP}'
    label, notes = model.labels[look.chosen], list[str]()
    for name in members:
        try:
            heat, levels = model.maps(look.content, [label], member=name)
        except UserError as error:
            notes.append(f"{error}.")
            continue
        title, about, from_random = model.about_maps(name)
        caption = f"{title} of {name}, whose raw score is {look.found.members[name][0, look.chosen]:.3f}. {about}"
        caption += f" {FROM_RANDOM}" if from_random else ""
        figures.append(_figure(overlay(levels, heat[0]), caption, f"Map of {label} by {name}"))
    said = text(" ".join([*notes, MEANING]))
    return f'<h2>{text(label)}</h2><div class="cx-maps">{"".join(figures)}</div><p class="cx-soft">{said}</p>'


def _sides(compared: Sequence[str]) -> list[tuple[str, str]]:
    return list(zip(("a", "b"), compared, strict=False))


def _list(rows: Sequence[str]) -> str:
    return f'<ol class="cx-list">{"".join(rows)}</ol>'


def _row(model: Predictor, look: Look, place: int, compared: Sequence[str]) -> str:
    found, label = look.found, model.labels[place]
    prob, raw = shown_prob(found, 0, place), float(found.probabilities[0, place])
    point = None if model.calibration is None else model.calibration.labels[place]
    positive = point is not None and is_positive(found, 0, place)
    bars = _with_number(_bar(prob, point), prob)
    for side, name in _sides(compared):
        score = float(found.members[name][0, place])
        about = f'class="cx-member" data-member="{text(name)}" data-probability="{score!r}"'
        said = f'<span class="cx-hidden">{text(name)}</span>'
        bars += f"<span {about}>{said}{_with_number(_bar(score, kind=f'cx-{side}'), score)}</span>"
    mark = '<span class="cx-positive">positive</span>' if positive else ""
    return (
        f'<li><button type="button" class="cx-row" data-place="{place}" data-label="{text(label)}" '
        f'data-probability="{raw!r}" data-shown="{prob!r}" aria-pressed="{str(look.chosen == place).lower()}">'
        f'<span class="cx-line"><span class="cx-name">{text(label)}</span>{mark}</span>{bars}'
        f"{'' if point is None else _point_html(point, raw)}</button></li>"
    )


def _with_number(bar: str, value: float) -> str:
    return f'<span class="cx-line">{bar}<span class="cx-number">{value:.3f}</span></span>'


def _bar(value: float, point: LabelCalibration | None = None, kind: str = "") -> str:
    fill, band, tick = f'<span class="cx-fill" style="width:{_percent(value)}"></span>', "", ""
    if point is not None and point.threshold is not None:
        tick = f'<span class="cx-tick" style="left:{_percent(point.threshold)}"></span>'
        if point.threshold_interval is not None:
            low, high = point.threshold_interval
            band = f'<span class="cx-band" style="left:{_percent(low)};width:{_percent(high - low)}"></span>'
    return f'<span class="cx-bar {kind}" aria-hidden="true">{band}{fill}{tick}</span>'


def _point_html(point: LabelCalibration, raw: float) -> str:
    """The threshold of a finding and what it reaches, with 95 % intervals, and the raw score."""
    told = [_rate("threshold", point.threshold, point.threshold_interval)]
    told += [_rate("sensitivity", point.sensitivity, point.sensitivity_interval)]
    told += [_rate("specificity", point.specificity, point.specificity_interval)]
    parts = [each for each in told if each] or ["no threshold"]
    pieces = (f"<span>{each}</span>" for each in [*parts, f"raw score {raw:.3f}"])
    return f'<span class="cx-small">{"; ".join(pieces)}</span>'


def _rate(name: str, value: float | None, interval: Range | None) -> str:
    if value is None:
        return ""
    return f"{name} {value:.2f}" + ("" if interval is None else f" ({interval[0]:.2f} to {interval[1]:.2f})")


def _percent(share: float) -> str:
    return f"{100 * min(max(share, 0.0), 1.0) if math.isfinite(share) else 0:.2f}%"


def _figure(levels: Levels, caption: str, alt: str) -> str:
    buffer = io.BytesIO()
    Image.fromarray(levels[..., 0] if levels.shape[2] == 1 else np.ascontiguousarray(levels)).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    picture = f'<img src="data:image/png;base64,{data}" alt="{text(alt)}">'
    return f"<figure>{picture}<figcaption>{text(caption)}</figcaption></figure>"
