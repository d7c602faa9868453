"""Small pictures as SVG inside the page: curves between two axes, and intervals in the row of a table.

A colour is a place in the page's palette, so that pictures follow light and dark. A browser without SVG shows the PNG
that each picture of curves holds.
"""

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont

from cxrdist.report.style import LIGHT, NUM_COLOURS

WIDTH, HEIGHT = 300, 240  # user units, about pixels
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 10, 40  # margins
Points = list[tuple[float, float]]
TOLERANCE = 1 / 2000  # of an axis: a tenth of a unit, which no screen shows


@dataclass(frozen=True)
class Series:
    """Points to be drawn, as a line, a thin line, dots or rings. colour: a place in the palette, None for grey."""

    x: ArrayLike
    y: ArrayLike
    colour: int | None
    looks: Sequence[str] = ("line",)


@dataclass(frozen=True)
class Axis:
    """A title, the values at both ends, and the texts of the ticks."""

    title: str
    ends: tuple[float, float]
    ticks: Mapping[float, str]


def unit_axis(title: str) -> Axis:
    return Axis(title, (0.0, 1.0), {0.0: "0", 0.25: "", 0.5: "0.5", 0.75: "", 1.0: "1"})


def axis_of(title: str, values: ArrayLike) -> Axis:
    """Around the finite values, with two to six ticks at round numbers."""
    known = np.asarray(values, dtype=np.float64)
    known = known[np.isfinite(known)].clip(-1e300, 1e300)
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    if high - low < 1e-12 * max(abs(low), abs(high), 1e-200):
        low, high = low - max(abs(low), 1) / 2, high + max(abs(high), 1) / 2
    size = 10.0 ** math.floor(math.log10((high - low) / 2))
    step = next(size * by for by in (1, 2, 5, 10) if (high - low) / (size * by) <= 5)
    ticks = [step * place for place in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return Axis(title, (low, high), {tick: f"{round(tick, 12):,.6g}" for tick in ticks})


def count_axis(title: str, most: float) -> Axis:
    """Of log10 of counts up to `most`, from a little below 1."""
    powers = range(max(math.ceil(math.log10(max(most, 1))), 1) + 1)
    step = 1 + len(powers) // 6
    return Axis(title, (-0.2, powers[-1]), {float(p): f"{10**p:,}" if p < 4 else f"1e{p}" for p in powers[::step]})


def plot(x: Axis, y: Axis, series: Sequence[Series], alt: str, caption: str) -> str:
    """A <figure> with the SVG. alt: what a reader hears; caption: HTML below the picture."""
    lines, texts = [], []
    for tick, text in x.ticks.items():
        at = _across(x, tick)
        lines.append(f"M{at:.1f} {TOP}V{HEIGHT - BOTTOM}")
        texts.append(
            f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{text}</text>' if text else ""
        )
    for tick, text in y.ticks.items():
        at = _down(y, tick)
        lines.append(f"M{LEFT} {at:.1f}H{WIDTH - RIGHT}")
        texts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{text}</text>' if text else "")
    middle = (TOP + HEIGHT - BOTTOM) / 2
    texts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{x.title}</text>')
    texts.append(f'<text x="11" y="{middle}" text-anchor="middle" transform="rotate(-90 11 {middle})">{y.title}</text>')
    drawn = [(each, _points(x, y, each)) for each in series]
    marks = "".join(_marks(*each) for each in drawn)
    return (
        f'<figure><svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(alt)}">'
        f'{_image(x, y, drawn, alt)}<path class="grid" d="{"".join(lines)}"/>{"".join(texts)}{marks}</svg>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def plots(figures: Sequence[str]) -> str:
    """Pictures beside each other where there is room."""
    return f'<div class="plots">{"".join(figures)}</div>'


def key(place: int) -> str:
    """A piece of the line of the colour at that place."""
    line = f'<path class="line {colour(place)}" d="M0 5H28"/>'
    return f'<svg class="key" viewBox="0 0 28 10" aria-hidden="true">{line}</svg>'


def legend(names: Sequence[str]) -> str:
    """Which line is whose, in the order of the palette."""
    items = (f"<li>{key(place)}{html.escape(name)}</li>" for place, name in enumerate(names))
    return f'<ul class="legend">{"".join(items)}</ul>'


def colour(place: int) -> str:
    """The class of the colour at that place; after the last it begins again."""
    return f"c{place % NUM_COLOURS}"


def forest_low(intervals: Sequence[tuple[float, float]]) -> float:
    """The left end of AUROC intervals' axis, whose right end is 1: a tenth, at most 0.5."""
    ends = [low for low, _ in intervals if not math.isnan(low)]
    return min(0.5, math.floor(10 * min(ends, default=0.5)) / 10)


def forest_row(values: Sequence[float], intervals: Sequence[tuple[float, float]], low: float) -> str:
    """Dots and intervals between `low` and 1 below each other, of each colour one; nan leaves its line empty."""
    height, marks = 11 * len(values) + 8, ""
    tenths = [place / 10 for place in range(round(10 * low), 11)]
    for tick in tenths:
        kind = "chance" if tick == 0.5 else "grid"
        marks += f'<line class="{kind}" x1="{_share(tick, low)}" x2="{_share(tick, low)}" y1="0" y2="{height}"/>'
    for place, (value, (left, right)) in enumerate(zip(values, intervals, strict=True)):
        if not math.isnan(value):
            y, ends = 9.5 + 11 * place, [value if math.isnan(end) else end for end in (left, right)]
            at = f'x1="{_share(ends[0], low)}" x2="{_share(ends[1], low)}" y1="{y}" y2="{y}"'
            marks += f'<line class="whole {colour(place)}" stroke-width="2.5" {at}/>'
            marks += f'<circle class="dot {colour(place)}" cx="{_share(value, low)}" cy="{y}" r="4"/>'
    return f'<svg class="row" height="{height}" aria-hidden="true">{marks}</svg>'


def forest_axis(low: float) -> str:
    """The texts of the axis above such rows."""
    tenths = range(round(10 * low), 11)
    shown = [tenth for tenth in tenths if (tenth - 10) % (1 if len(tenths) < 7 else 2 if len(tenths) < 9 else 5) == 0]
    texts = (
        f'<text x="{_share(tenth / 10, low)}" y="12" text-anchor="middle">{tenth / 10:.1f}</text>' for tenth in shown
    )
    return f'<svg class="row" height="16" aria-hidden="true">{"".join(texts)}</svg>'


def thinned(x: ArrayLike, y: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Few points of a line within a unit square: none that is left out lies farther from it than twice TOLERANCE.

    Source: Ramer 1972, Douglas and Peucker 1973; before, of the points in one column its ends, lowest and highest.
    """
    points = np.stack([np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)])
    columns = np.cumsum(np.diff(points[0] // TOLERANCE, prepend=0) != 0)
    by_height = np.lexsort((points[1], columns))
    ends = [np.unique(order_columns, return_index=True)[1] for order_columns in (columns, columns[::-1])]
    lowest, highest = by_height[ends[0]], by_height[len(columns) - 1 - ends[1]]
    points = points[:, np.unique([ends[0], len(columns) - 1 - ends[1], lowest, highest])]
    keep = np.zeros(points.shape[1], dtype=bool)
    keep[[0, -1]] = True
    left = [(0, points.shape[1] - 1)]
    while left:
        first, last = left.pop()
        if last - first < 2:
            continue
        along = points[:, last] - points[:, first]
        offset = points[:, first + 1 : last] - points[:, first, None]
        share = np.clip(along @ offset / max(float(along @ along), 1e-300), 0, 1)
        distance = ((offset - along[:, None] * share) ** 2).sum(axis=0)
        farthest = first + 1 + int(distance.argmax())
        if distance.max() > TOLERANCE**2:
            keep[farthest] = True
            left += [(first, farthest), (farthest, last)]
    return points[0, keep], points[1, keep]


def _share(value: float, low: float) -> str:
    return f"{6 + 88 * (value - low) / (1 - low):.2f}%"


def _across(axis: Axis, value: ArrayLike) -> NDArray[np.float64]:
    low, high = axis.ends
    return LEFT + (np.asarray(value, dtype=np.float64) - low) / (high - low) * (WIDTH - LEFT - RIGHT)


def _down(axis: Axis, value: ArrayLike) -> NDArray[np.float64]:
    low, high = axis.ends
    return HEIGHT - BOTTOM - (np.asarray(value, dtype=np.float64) - low) / (high - low) * (HEIGHT - BOTTOM - TOP)


def _points(x: Axis, y: Axis, series: Series) -> Points:
    """Where the series' points lie, in user units, without those that a line does not need."""
    points = np.stack([_across(x, series.x), _down(y, series.y)])
    across, down = points[:, np.isfinite(points).all(axis=0)]
    if {"line", "thin"} >= set(series.looks) and len(across):  # a dot is drawn of every point
        across, down = (ends * 200 for ends in thinned(across / 200, down / 200))
    return list(zip(across.round(1).tolist(), down.round(1).tolist(), strict=True))


def _marks(series: Series, points: Points) -> str:
    name, found = "chance" if series.colour is None else colour(series.colour), ""
    for look in series.looks:
        if look in ("line", "thin"):
            path = "L".join(f"{a:g} {b:g}" for a, b in points)
            found += f'<path class="{look} {name}" d="M{path}"/>' if points else ""
        else:
            radius = 3 if look == "dot" else 4.5
            found += "".join(f'<circle class="{look} {name}" cx="{a:g}" cy="{b:g}" r="{radius}"/>' for a, b in points)
    return found


def _image(x: Axis, y: Axis, drawn: Sequence[tuple[Series, Points]], alt: str) -> str:
    """The picture as a PNG, which a browser without SVG takes for an <img> and one with it does not look at."""
    sheet = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    draw.rectangle((LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM), outline=LIGHT["mark"])
    for tick, text in x.ticks.items():
        draw.text((float(_across(x, tick)), HEIGHT - BOTTOM + 4), text, LIGHT["soft"], font, anchor="ma")
    for tick, text in y.ticks.items():
        draw.text((LEFT - 4, float(_down(y, tick))), text, LIGHT["soft"], font, anchor="rm")
    draw.text(((LEFT + WIDTH) / 2, HEIGHT - 4), f"{x.title}; up: {y.title}", LIGHT["soft"], font, anchor="ms")
    for each, points in drawn:
        ink = LIGHT["mark" if each.colour is None else colour(each.colour)]
        if {"line", "thin"} & set(each.looks) and len(points) > 1:
            draw.line(points, ink, 1 + ("line" in each.looks))
        if {"dot", "ring"} & set(each.looks):
            for across, down in points:
                draw.ellipse((across - 3, down - 3, across + 3, down + 3), ink)
    buffer = io.BytesIO()
    sheet.quantize(16, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<image alt="{html.escape(alt)}" src="data:image/png;base64,{data}"/>'
