"""How far a run is, from the logs in its folder alone: read as they grow, a bounded part at a time, without torch."""

import json
import math
import os
import statistics
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cxrdist.documents import LogRow, json_row
from cxrdist.errors import UserError
from cxrdist.files import open_to_read, read_bytes

MAX_BYTES = 2**23  # that are read of a log at once; of a larger one, at first, only its end
MAX_POINTS = 4096  # that are kept of a curve
CHECKED_BYTES = 64  # before the place where a log was read to: other ones mean that it was cut there and written again
MAX_NUMBER = 1e15
SILENT_S, SILENT_ROWS = 300.0, 4  # a run is silent after both so long and the time of so many rows
LOGS = ("metrics.jsonl", "timings.jsonl")
DEPTH = 3  # folders below one that is given in which runs are looked for: runs/<name>_folds/<name>_fold0


class Log:
    """A file of JSON rows that another process appends to, and cuts when it resumes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.modified = 0.0  # seconds since 1970; 0 where there is no file
        self.trouble = ""  # why it could not be read last time
        self._begin(0)

    def _begin(self, place: int) -> None:
        self.begins_at, self.num_bad = place, 0  # the first byte that was read; lines that are no JSON object
        self._place, self._before, self._part = place, b"", b""

    @property
    def half_a_line(self) -> bool:
        """Whether what was read ends within a line: one that is being written, or was when the run was killed."""
        return self._part != b""

    def read(self) -> tuple[list[LogRow], bool]:
        """The rows that are new, and whether those of earlier calls no longer count."""
        self.trouble = ""
        try:
            if not self.path.exists():
                return [], False
            with open_to_read(self.path) as file:
                state, again = os.fstat(file.fileno()), False
                self.modified = state.st_mtime
                file.seek(self._place - len(self._before))
                if file.read(len(self._before)) != self._before:
                    again = True
                    self._begin(0)
                if self._place == 0 and state.st_size > MAX_BYTES:
                    self._begin(state.st_size - MAX_BYTES)
                file.seek(self._place)
                new = file.read(MAX_BYTES)
        except (OSError, UserError) as error:
            self.trouble = str(error)
            return [], False
        in_a_line = 0 < self.begins_at == self._place
        self._place += len(new)
        self._before = (self._before + new)[-CHECKED_BYTES:]
        *lines, self._part = (self._part + new).split(b"\n")
        if in_a_line:
            lines = lines[1:]
        if len(self._part) > MAX_BYTES:  # no row is that long
            self._part = b"?"
        rows = [row for row in map(json_row, lines) if row is not None]
        self.num_bad += len(lines) - len(rows)
        return rows, again


@dataclass
class Curve:
    """The values of a training, in order: every one of them, or every second, fourth, ... where they are too many."""

    values: list[float] = field(default_factory=list)
    _every: int = 1
    _seen: int = 0

    def add(self, value: float) -> None:
        if self._seen % self._every == 0:
            self.values.append(value)
        self._seen += 1
        if len(self.values) > MAX_POINTS:
            del self.values[1::2]
            self._every *= 2


class Progress:
    """A run as its folder tells it; `update` reads what is new. Unknown numbers are None."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.epochs = self.batch = self.images = self.folds = None
        self._metrics, self._timings = (Log(run / name) for name in LOGS)
        self._forget()
        self._speeds: deque[tuple[int, float, float]] = deque(maxlen=5)  # step, images/s, share of waiting
        self.stopped = False  # in order, by a signal or a limit, and not resumed since

    epochs: int | None
    batch: int | None  # images of a step
    images: int | None  # of the split
    folds: int | None

    def _forget(self) -> None:
        self.step = self.epoch = self.done_epochs = self._odd = 0
        self.epoch_steps: int | None = None  # of an epoch, once one is over
        self.begins_at_step: int | None = None
        self.loss: float | None = None
        self.losses, self.aurocs = Curve(), Curve()
        self.auroc: float | None = None
        self.best: tuple[float, int] | None = None  # AUROC and epoch

    def update(self) -> None:
        """Read what was appended since the last call."""
        if self.epochs is None:
            self.epochs, self.batch = (
                _count(self.run / "recipe.json", name) for name in ("epochs", "global_batch_size")
            )
            self.images, self.folds = (_count(self.run / "run.json", "data", name) for name in ("images", "folds"))
        rows, again = self._metrics.read()
        if again:
            self._forget()
        for row in rows:
            self._odd += not self._take(row)
        for row in self._timings.read()[0]:
            self.stopped = isinstance(row.get("stopped"), str)
            step, speed, waiting = (_number(row.get(name)) for name in ("step", "images_per_s", "wait_share"))
            if step is not None and speed and waiting is not None:
                self._speeds.append((int(step), speed, waiting))

    def _take(self, row: LogRow) -> bool:
        """Take in a row of metrics.jsonl; False where it is none of ours."""
        kind, step, epoch = row.get("kind"), _number(row.get("step")), _number(row.get("epoch"))
        if step is None or epoch is None or step < 0 or epoch < 1 or not isinstance(kind, str):
            return False
        self.step, self.epoch = int(step), int(epoch)
        self.begins_at_step = self.step if self.begins_at_step is None else self.begins_at_step
        if kind == "train":
            self.loss = _number(row.get("loss"))
            if self.loss is not None:
                self.losses.add(self.loss)
        elif kind == "epoch":
            self.done_epochs = self.epoch
            self.epoch_steps = self.step // self.epoch if self.step % self.epoch == 0 else self.epoch_steps
        elif kind == "validation":
            self.auroc = _number(row.get("validation/auroc_macro"))
            if self.auroc is not None:
                self.aurocs.add(self.auroc)
                if self.best is None or self.auroc > self.best[0]:
                    self.best = self.auroc, self.epoch
        return True

    @property
    def total_steps(self) -> tuple[int, bool] | None:
        """Steps of the whole training, and whether that is exact."""
        if self.epochs is None:
            return None
        if self.epoch_steps:
            return self.epoch_steps * self.epochs, True
        if not self.images or not self.batch:
            return None
        trained = self.images * (self.folds - 1) / self.folds if self.folds else self.images
        return math.ceil(trained / self.batch) * self.epochs, self.folds is None

    @property
    def images_per_s(self) -> float | None:
        return statistics.median(speed for _, speed, _ in self._speeds) if self._speeds else None

    @property
    def wait_share(self) -> float | None:
        return statistics.median(share for _, _, share in self._speeds) if self._speeds else None

    @property
    def seconds_left(self) -> float | None:
        """At the speed of the last rows; None where it is unknown or over."""
        total, speed = self.total_steps, self.images_per_s
        if total is None or not speed or not self.batch or self.finished:
            return None
        return max(0, total[0] - self.step) * self.batch / speed

    @property
    def finished(self) -> bool:
        return self.epochs is not None and self.done_epochs >= self.epochs

    def silent_s(self, now: float | None = None) -> float | None:
        """Seconds since the last row, by the files' age, where that is too long for a run that works; else None."""
        last = max(self._metrics.modified, self._timings.modified)
        age, row_s = (time.time() if now is None else now) - last, 0.0
        if len(self._speeds) > 1 and self.batch:
            (before, _, _), (step, speed, _) = list(self._speeds)[-2:]
            row_s = max(0, step - before) * self.batch / speed
        return age if age > max(SILENT_S, SILENT_ROWS * row_s) and last else None

    @property
    def notes(self) -> list[str]:
        """What is wrong with the logs, and what of them is not shown."""
        logs = self._metrics, self._timings
        num_bad = self._odd + sum(log.num_bad for log in logs)
        if self.finished or self.silent_s() is not None:
            num_bad += sum(log.half_a_line for log in logs)
        notes = [f"{num_bad:,} damaged line{'s'[: num_bad > 1]} left out"] if num_bad else []
        if self._metrics.begins_at:
            notes.append(f"a long log: shown from step {self.begins_at_step or 0:,}")
        return notes + [log.trouble for log in logs if log.trouble]


def find_runs(paths: list[Path]) -> list[Path]:
    """The run folders that the paths are or hold, each once; UserError for a path without any."""
    found: dict[Path, None] = {}
    for path in paths:
        if not path.is_dir():
            what = "is no folder" if path.exists() else "no such folder"
            raise UserError(f"{path}: {what}; give a run's folder (what training calls --out), or one that holds runs")
        if not (runs := list(_runs_below(path, DEPTH))):
            raise UserError(
                f"{path}: holds no run (a folder with {LOGS[0]}), nor do the folders in it; "
                "give what training calls --out, or a folder of such, e.g. runs"
            )
        found |= dict.fromkeys(runs)
    return list(found)


def _runs_below(folder: Path, depth: int) -> list[Path]:
    if any((folder / name).is_file() for name in (LOGS[0], "run.json")):
        return [folder]
    if depth == 0:
        return []
    try:
        inside = sorted(entry.path for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False))
    except OSError:  # not ours to read
        return []
    return [run for path in inside for run in _runs_below(Path(path), depth - 1)]


def _number(value: Any) -> float | None:
    if isinstance(value, int | float) and not isinstance(value, bool) and -MAX_NUMBER <= value <= MAX_NUMBER:
        return float(value)
    return None


def _count(path: Path, *names: str) -> int | None:
    """The positive integer at these keys of a JSON file; None where there is none."""
    try:
        found: Any = json.loads(read_bytes(path, MAX_BYTES))
        for name in names:
            found = found[name]
    except (OSError, UserError, ValueError, RecursionError, KeyError, TypeError):
        return None
    return found if type(found) is int and 0 < found < MAX_NUMBER else None
