"""An evaluation as one self-contained HTML page: styles and pictures (PNG) are inside, no address is fetched."""

import base64
import html
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from numpy.typing import NDArray

from cxrdist.files import write_output

Cell = str | tuple[str, str]
WARNING = "Research software, not a medical device and not for clinical use: no diagnosis may rest on it."
MAX_ROWS = 60  # of a table that is shown at its full length
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
.tall { max-height: 620px; overflow: auto; }
.tall th { position: sticky; top: 0; background: #fff; }
img { display: block; max-width: 100%; height: auto; margin: 10px auto; }
table.text td:last-child { font: 13px monospace; word-break: break-all; }
.warning { background: #fff4e5; border: 1px solid #f0c48a; border-radius: 8px; padding: 10px 16px; margin: 20px 0 0; }
footer { color: var(--soft); font-size: 13.5px; padding: 6px 0 40px; }
@media (max-width: 700px) {
  nav { position: static; }
  .wrap { padding: 0 14px; }
  section { padding: 16px 14px; }
  .figure img { max-width: none; width: 760px; }
}
"""


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
        "</body></html>\n",
    )


def figure_html(figure: Figure, alt: str) -> str:
    """The figure as an <img> with its PNG inside, which a narrow screen scrolls instead of shrinking it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140, facecolor="white")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<div class="scroll figure"><img alt="{html.escape(alt)}" src="data:image/png;base64,{data}"></div>'


def html_table(head: Sequence[str], rows: Sequence[Sequence[Cell]], *, total: bool = False, kind: str = "") -> str:
    """A table of plain texts; a cell of two has the second in small print. total: the last row is a sum.

    A table of more than MAX_ROWS scrolls in a box of its own under its head.
    """
    lines = ["".join(f"<td>{_cell(cell)}</td>" for cell in row) for row in rows]
    marks = [""] * (len(rows) - total) + [' class="total"'] * total
    titles = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join(f"<tr{mark}>{line}</tr>" for mark, line in zip(marks, lines, strict=True))
    head_and_body = f"<thead><tr>{titles}</tr></thead><tbody>{body}</tbody>"
    box = "scroll tall" if len(rows) > MAX_ROWS else "scroll"
    return f'<div class="{box}"><table class="{kind}">{head_and_body}</table></div>'


def _cell(cell: Cell) -> str:
    return html.escape(cell) if isinstance(cell, str) else f"{_cell(cell[0])}<br><small>{_cell(cell[1])}</small>"


def grid(num_rows: int, per_row: int, width: float, height: float) -> tuple[Figure, NDArray[Any]]:
    """A figure of that many inches and its axes (num_rows, per_row), open at the top and the right."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(num_rows, per_row, squeeze=False)
    for axis in axes.ravel():
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def number_text(value: float, digits: int = 3, sign: str = "") -> str:
    return "-" if math.isnan(value) else f"{value:{sign}.{digits}f}"


def interval_text(interval: tuple[float, float], form: str = ".3f") -> str:
    return "-" if math.isnan(interval[0]) else f"{interval[0]:{form}} to {interval[1]:{form}}"


def duration_text(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def plain(text: str) -> str:
    """Text that matplotlib draws as it is: dollar signs would begin a formula, a '_' keeps a line out of the legend."""
    return ("\u200b" if text.startswith("_") else "") + text.replace("$", r"\$")
