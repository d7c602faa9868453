"""Text for a terminal: without control characters, in columns, and rows of numbers as small curves."""

import itertools
import math
import unicodedata
from collections.abc import Sequence

MAX_FIRST = 40  # columns of a table's first column
BARS, BARS_ASCII = "▁▂▃▄▅▆▇█", "_.-=+*#@"


def printable(text: object) -> str:
    """The text, whoever wrote it, with `?` for each character that steers a terminal or is not to be seen.

    Names of runs, labels and images come from files: an escape sequence in one could rewrite the screen.
    """
    return "".join("?" if unicodedata.category(one) in _UNSEEN else one for one in str(text))


_UNSEEN = {"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp"}  # control, format (directions, zero width), unassigned, breaks


def width(text: str) -> int:
    """The columns that a terminal takes for printable text."""
    return sum((unicodedata.east_asian_width(one) in "WF") + (not unicodedata.combining(one)) for one in text)


def fitted(text: str, columns: int) -> str:
    """Printable text in exactly so many columns: cut, with a `~` at the end, or filled with spaces."""
    if width(text) > columns:
        while width(text) > columns - 1:
            text = text[:-1]
        text += "~"
    return text + " " * (columns - width(text))


def aligned(head: Sequence[str], rows: Sequence[Sequence[object]], max_first: int = MAX_FIRST) -> list[str]:
    """The lines of a table: its first column is text, cut at `max_first` columns, the others stand to the right."""
    cells = [[printable(cell) for cell in row] for row in (head, *rows)]
    first, *widths = (max(map(width, column)) for column in zip(*cells, strict=True))
    lines = []
    for name, *others in cells:
        padded = [" " * (most - width(cell)) + cell for cell, most in zip(others, widths, strict=True)]
        lines.append("  ".join([fitted(name, min(first, max_first)), *padded]).rstrip())
    return lines


def with_interval(value: float, ends: tuple[float, float]) -> tuple[str, str]:
    """Two cells of such a table: a score and its interval; none where it is nan."""
    return ("none", "") if math.isnan(value) else (f"{value:.4f}", f"{ends[0]:.4f} to {ends[1]:.4f}")


def curve(values: Sequence[float], columns: int, *, ascii_only: bool = False) -> str:
    """Finite numbers as bars between their smallest and largest, at most `columns` of them: the mean of neighbours."""
    bars, count = BARS_ASCII if ascii_only else BARS, min(columns, len(values))
    edges = [place * len(values) // count for place in range(count + 1)] if count > 0 else []
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means, default=0.0), max(means, default=0.0)
    return "".join(bars[round((mean - low) / (high - low) * (len(bars) - 1)) if high > low else 0] for mean in means)
