"""An evaluation as one self-contained HTML page: styles, script and pictures are inside, no address is fetched."""

import base64
import html
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cxrdist.files import write_output
from cxrdist.report.style import SCRIPT, STYLE

WARNING = "Research software, not a medical device and not for clinical use: no diagnosis may rest on it."
PRIVACY = "This page holds images of patients and their ids: treat it like the data, and do not send it around."
MAX_ROWS = 60  # of a table that is shown at its full length
JPEG_QUALITY = 75


class Html(str):
    """Text that is HTML already, which is not escaped again."""


Cell = str | Html | tuple[str, str]


@dataclass(frozen=True)
class Section:
    """A titled block of the page. `body` is HTML, the other texts are not."""

    title: str
    about: str
    body: str


def write_report(path: Path, title: str, subtitle: str, sections: Sequence[Section], *, head: str = "") -> None:
    """Write the page atomically, recorded as cxrdist's own. head: HTML behind the style."""
    links, blocks, title = "", "", html.escape(title)
    for i, section in enumerate(sections):
        name, about = html.escape(section.title), html.escape(section.about)
        links += f'<a href="#s{i}">{name}</a>'
        blocks += f'<section id="s{i}"><h2>{name}</h2><p class="about">{about}</p>{section.body}</section>'
    write_output(
        path,
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<style>{STYLE}</style>{head}</head><body><header><div class="wrap"><h1>{title}</h1>'
        f'<p>{html.escape(subtitle)}</p></div></header><nav><div class="wrap">{links}</div></nav><div class="wrap">'
        f'<div class="warning">{html.escape(WARNING)}</div>{blocks}<footer>{html.escape(WARNING)}</footer></div>'
        f"<script>{SCRIPT}</script></body></html>\n",
    )


def jpeg_html(levels: NDArray[np.uint8], size_px: int, alt: str) -> str:
    """An <img> with a JPEG of that size inside, of an image (H, W) or (H, W, 1 or 3)."""
    pixels = levels[..., 0] if levels.ndim == 3 and levels.shape[2] == 1 else levels
    buffer = io.BytesIO()
    small = Image.fromarray(pixels).resize((size_px, size_px), Image.Resampling.BICUBIC)
    small.save(buffer, "JPEG", quality=JPEG_QUALITY, optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(alt)}" width="{size_px}" height="{size_px}" src="data:image/jpeg;base64,{data}">'


def html_table(
    head: Sequence[Cell],
    rows: Sequence[Sequence[Cell]],
    *,
    total: bool = False,
    kind: str = "",
    bars: int | None = None,
) -> str:
    """A table of plain texts; a cell of two has the second in small print. total: the last row is a sum.

    kind: classes; a `sortable` one is sorted by its heads, the total stays below. bars: the column that holds pictures.
    A table of more than MAX_ROWS scrolls in a box of its own under its head.
    """

    def line(row: Sequence[Cell], tag: str) -> str:
        marks = [' class="bars"' if place == bars else "" for place in range(len(row))]
        return "".join(f"<{tag}{mark}>{_cell(cell)}</{tag}>" for mark, cell in zip(marks, row, strict=True))

    lines = [line(row, "td") for row in rows]
    foot = f'<tfoot><tr class="total">{lines.pop()}</tr></tfoot>' if total else ""
    body = "".join(f"<tr>{each}</tr>" for each in lines)
    inside = f"<thead><tr>{line(head, 'th')}</tr></thead><tbody>{body}</tbody>{foot}"
    box = "scroll tall" if len(rows) > MAX_ROWS else "scroll"
    return f'<div class="{box}"><table class="{kind}">{inside}</table></div>'


def _cell(cell: Cell) -> str:
    if isinstance(cell, tuple):
        return f"{_cell(cell[0])}<br><small>{_cell(cell[1])}</small>"
    return cell if isinstance(cell, Html) else html.escape(cell)


def number_text(value: float, digits: int = 3, sign: str = "") -> str:
    return "-" if math.isnan(value) else f"{value:{sign}.{digits}f}"


def interval_text(interval: tuple[float, float], form: str = ".3f") -> str:
    return "-" if math.isnan(interval[0]) else f"{interval[0]:{form}} to {interval[1]:{form}}"


def duration_text(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
