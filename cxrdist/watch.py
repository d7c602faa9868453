"""Watch trainings in the terminal: what their logs say, drawn side by side."""

import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

from cxrdist.cli import run_entry
from cxrdist.flags.watch import parser
from cxrdist.runs.progress import Progress, find_runs
from cxrdist.steps import stop_as_interrupted
from cxrdist.terminal import BARS, curve, fitted, printable

MIN_CARD, MAX_CARD, GAP = 38, 64, 2  # columns
RESCAN_S = 10.0  # between looks for new runs
OPEN, CLOSE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"  # the terminal's second screen without a cursor, and back
HOME, LINE_END, BELOW = "\x1b[H", "\x1b[K", "\x1b[J"


def main(argv: list[str] | None = None) -> None:
    """Show the runs again and again; once, where the output is no terminal or --once is given."""
    args = parser().parse_args(argv)
    runs = {run: Progress(run) for run in find_runs(args.runs)}
    if args.once or not sys.stdout.isatty() or os.environ.get("TERM") == "dumb":
        print("\n".join(frame(list(runs.values()), shutil.get_terminal_size().columns)))
        return
    stop_as_interrupted()
    lines: list[str] = []
    try:
        sys.stdout.write(OPEN)
        looked = time.monotonic()
        while True:
            if time.monotonic() - looked > RESCAN_S:
                looked = time.monotonic()
                runs |= {run: Progress(run) for run in find_runs(args.runs) if run not in runs}
            size = shutil.get_terminal_size()
            lines = frame(list(runs.values()), size.columns, size.lines - 1)
            sys.stdout.write(HOME + "".join(f"{line}{LINE_END}\r\n" for line in lines) + BELOW)
            sys.stdout.flush()
            time.sleep(args.every)
    except KeyboardInterrupt:
        pass
    finally:
        sys.stdout.write(CLOSE)
        print("\n".join(lines))  # stays


def frame(runs: Sequence[Progress], columns: int, max_lines: int | None = None) -> list[str]:
    """What a terminal of so many columns shows of the runs, those first that are running."""
    for run in runs:
        run.update()
    now = time.time()
    order = sorted(runs, key=lambda run: 2 if run.finished else run.stopped or run.silent_s(now) is not None)
    across = max(1, (columns + GAP) // (MIN_CARD + GAP))
    each = min(MAX_CARD, (columns - GAP * (across - 1)) // across)
    names = names_of(runs)
    bands: list[list[str]] = []
    for start in range(0, len(order), across):
        cards = [card(run, names[run.run], each, now) for run in order[start : start + across]]
        band = [(" " * GAP).join(parts).rstrip() for parts in zip_longest(*cards, fillvalue=" " * each)]
        if max_lines is not None and bands and sum(map(len, bands)) + len(bands) + len(band) + 2 > max_lines:
            left = [names[run.run] for run in order[start:]]
            bands.append([fitted(f"{len(left)} more: {', '.join(left)}", columns - 1).rstrip()])
            break
        bands.append(band)
    lines = [line for band in bands for line in (*band, "")][:-1]
    return lines if max_lines is None else lines[:max_lines]


def card(run: Progress, name: str, columns: int, now: float) -> list[str]:
    """A run in lines of exactly so many columns."""
    silent = run.silent_s(now)
    state = "running" if silent is None else f"silent for {duration(silent)}"
    state = "finished" if run.finished else "stopped" if run.stopped else state
    lines = [fitted(name, max(columns - len(state) - 1, 8)) + " " + state, place(run)]
    encoding = sys.stdout.encoding or "ascii"
    plain = BARS.encode(encoding, "replace").decode(encoding) != BARS
    curves = [("loss", run.loss, run.losses)]
    if run.best is not None:
        curves.append(("AUROC", run.auroc, run.aurocs))
    for title, value, past in curves:
        text = f"{title:<6}{figure(value)}  "
        lines.append(text + curve(past.values, columns - len(text), ascii_only=plain))
    if run.best is not None and run.best[0] != run.auroc:
        lines.append(f"best  {figure(run.best[0])} of epoch {run.best[1]}")
    speed = [] if run.images_per_s is None else [f"{run.images_per_s:,.{int(run.images_per_s < 100)}f} images/s"]
    speed += [] if run.wait_share is None else [f"waiting {run.wait_share:.0%}"]
    left_s = run.seconds_left if silent is None and not run.stopped else None
    speed += [] if left_s is None else [f"{duration(left_s)} left"]
    lines += [", ".join(speed)] if speed else []
    return [fitted(line, columns) for line in (*lines, *map(printable, run.notes))]


def place(run: Progress) -> str:
    """Epoch and step."""
    if not run.step:
        return "no row yet"
    epoch = f"epoch {run.epoch}" + (f"/{run.epochs}" if run.epochs else "")
    if (total := run.total_steps) is None:
        return f"{epoch}, step {run.step:,}"
    about = "" if total[1] else "~"
    return f"{epoch}, step {run.step:,}/{about}{total[0]:,} ({min(run.step / total[0], 1):.0%})"


def figure(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"


def duration(seconds: float) -> str:
    """In the two largest units."""
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min" if minutes else f"{seconds:.0f} s"
    return (
        f"{minutes // 60} h {minutes % 60:02} min" if minutes < 1440 else f"{minutes // 1440} d {minutes // 60 % 24} h"
    )


def names_of(runs: Sequence[Progress]) -> dict[Path, str]:
    """The end of each run's path that no other run's has."""
    names: dict[Path, str] = {}
    parts = [os.path.abspath(run.run).split(os.sep) for run in runs]
    for length in range(1, max(map(len, parts), default=0) + 1):
        ends = [os.sep.join(part[-length:]) for part in parts]
        counts = Counter(ends)
        names = {run.run: end for run, end in zip(runs, ends, strict=True) if counts[end] == 1} | names
    return {run: printable(name) for run, name in names.items()}


if __name__ == "__main__":
    raise SystemExit(run_entry(main))
