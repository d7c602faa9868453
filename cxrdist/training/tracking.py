"""Where a run's numbers go: `metrics.jsonl` (reproducible), `timings.jsonl` (not), and wandb when it is wanted.

The local files are the truth and are written first. wandb runs in a thread of its own behind a bounded queue: it can be
slow, offline or broken without the training noticing.
"""

import contextlib
import dataclasses
import errno
import functools
import io
import itertools
import json
import math
import netrc
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cxrdist.data.loader import Loader
from cxrdist.data.order import MicroBatch
from cxrdist.data.rows import Rows
from cxrdist.documents import read_json_lines
from cxrdist.errors import UserError, redacted
from cxrdist.files import open_to_append, reason, require_same, write_atomically

WandbMode = Literal["auto", "online", "offline", "off"]
INIT_TIMEOUT_S = 10  # wandb's own default keeps a run without network waiting for 90 s
QUEUE_ROWS = 1000  # rows waiting for wandb; further ones are dropped there, never in the local files
CLOSE_TIMEOUT_S = 60.0
NUM_SAMPLES = 4  # augmented images that are shown
SENT = "recipe, versions, hardware, losses, validation scores and curves, speeds, the run folder's name"


class Tracker(contextlib.AbstractContextManager["Tracker"]):
    """Writes rows; make it on one rank only. The end of its context gives wandb a bounded time to send what is left.

    dashboard: None where pictures and curves are not worth making.
    """

    def __init__(
        self,
        run: Path,
        *,
        wandb_mode: WandbMode = "off",
        images: bool = False,
        config: dict[str, Any] | None = None,
    ) -> None:
        """wandb_mode: auto is online when logged in, else off; what is sent is said in one line, images and their names
        only where they may be. config: the resolved recipe and environment.
        """
        self.run = run
        mode = resolve_mode(wandb_mode)
        self._send_images = images
        if mode != "off":
            what = f"{SENT}, and images with their names" if images else f"{SENT}; no images and no names of images"
            _say(f"{mode}; {'sends' if mode == 'online' else 'records'} {what} (--wandb off: nothing)")
        history = [] if mode == "off" else _history(run)  # of earlier sessions, before this one writes
        self._metrics = open_to_append(run / "metrics.jsonl")
        self._timings = open_to_append(run / "timings.jsonl")
        self.dashboard = None if mode == "off" else _WandbThread(run, mode, config or {}, history)

    def __exit__(self, *_: object) -> None:
        self._metrics.close()
        self._timings.close()
        if self.dashboard is not None:
            self.dashboard.close()
            self.dashboard = None

    def metrics(self, row: dict[str, Any]) -> None:
        """Append one reproducible row; numbers that are not finite become null."""
        self._write(self._metrics, row)

    def timings(self, row: dict[str, Any]) -> None:
        """Append one row of speeds, waiting times and memory."""
        self._write(self._timings, row)

    def images(self, step: int, name: str, images: NDArray[np.uint8], captions: list[str]) -> None:
        """Show (N, H, W) or (N, H, W, 3) images under `name` on the dashboard, where they may leave the machine."""
        if not self._send_images:
            return
        pairs = list(zip(images, captions, strict=True))
        self._show(step, name, lambda wandb: [wandb.Image(array, caption=caption) for array, caption in pairs])

    def curves(self, step: int, name: str, curves: dict[str, tuple[list[float], list[float]]], x_name: str) -> None:
        """Show lines, each of x and y values, in one plot under `name` on the dashboard."""
        xs, ys = [x for x, _ in curves.values()], [y for _, y in curves.values()]
        shown = {"keys": list(curves), "title": name, "xname": x_name}
        self._show(step, name, lambda wandb: wandb.plot.line_series(xs, ys, **shown))

    def metrics_bytes(self) -> int:
        """Bytes of metrics.jsonl that are safely on disk: what a checkpoint remembers."""
        require_same(self._metrics)
        os.fsync(self._metrics.fileno())
        return self._metrics.tell()

    def _show(self, step: int, name: str, draw: Callable[[Any], Any]) -> None:
        """`draw` makes what wandb shows, in its thread."""
        if self.dashboard is not None:
            self.dashboard.send({"step": step, name: draw})

    def _write(self, file: io.FileIO, row: dict[str, Any]) -> None:
        line = (json.dumps(_finite(row), allow_nan=False) + "\n").encode()
        require_same(file)
        begin = file.tell()
        try:
            if file.write(line) < len(line):
                raise OSError(errno.ENOSPC, "only a part fits")
        except OSError as error:
            with contextlib.suppress(OSError):
                file.truncate(begin)
            raise UserError(reason(Path(file.name), len(line), error)) from error
        if self.dashboard is not None:
            self.dashboard.send(row)


def show_samples(
    tracker: Tracker, loader: Loader, plan: Iterable[MicroBatch], levels: Callable[[Tensor, Rows], Tensor], step: int
) -> None:
    """What the model sees first of a plan, on the dashboard; `levels` makes grey levels of stored images and keys."""
    # none is `last`, so a stream does not take them for read
    first = [dataclasses.replace(one, rows=one.rows[:NUM_SAMPLES], last=False) for one in itertools.islice(plan, 1)]
    for batch in loader.batches(first):
        pictures = levels(batch.images, batch.keys).permute(0, 2, 3, 1).squeeze(-1).to(torch.uint8).cpu().numpy()
        names = [loader.index.image_names[int(row)] for row in batch.rows]
        tracker.images(step, "augmented samples", pictures, names)


def cut_metrics(run: Path, num_bytes: int) -> str | None:
    """Drop the rows of metrics.jsonl after the restored checkpoint; a warning when rows before it are missing."""
    path = run / "metrics.jsonl"
    with open_to_append(path) as file:
        if (size := file.seek(0, os.SEEK_END)) > num_bytes:
            file.truncate(num_bytes)
    return f"{path} lost {num_bytes - size:,} bytes since the checkpoint" if size < num_bytes else None


def _history(run: Path) -> list[dict[str, Any]]:
    """The rows of both local files up to the last one of metrics.jsonl, by step; a damaged line is left out, said."""
    found: list[list[dict[str, Any]]] = []
    for path in (run / "metrics.jsonl", run / "timings.jsonl"):
        rows, num_bad = read_json_lines(path)
        found.append([row for row in rows if type(row.get("step")) is int])
        if num_bad := num_bad + len(rows) - len(found[-1]):
            _say(f"warning: {path}: {num_bad:,} damaged lines are not sent; all others are")
    last_step = max((row["step"] for row in found[0]), default=-1)
    return sorted((row for row in [*found[0], *found[1]] if row["step"] <= last_step), key=lambda row: row["step"])


def resolve_mode(mode: WandbMode) -> Literal["online", "offline", "off"]:
    """What `auto` means here: WANDB_MODE if it is set, else online when logged in, else off."""
    told = os.environ.get("WANDB_MODE", "").lower() if mode == "auto" else mode
    if told in ("disabled", "off"):
        return "off"
    if told in ("offline", "dryrun"):
        return "offline"
    if mode == "online" or os.environ.get("WANDB_API_KEY"):
        return "online"
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        return "online" if netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None else "off"
    return "off"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _WandbThread:
    """Starts wandb and feeds it. Every failure ends in one printed line; none reaches the training.

    `history`, the rows of earlier sessions, is sent first as far as wandb does not have it: a session that was killed
    takes what was on its way with it, and an offline session is a wandb run of its own, so the newest holds all of it.
    """

    def __init__(
        self, run: Path, mode: Literal["online", "offline"], config: dict[str, Any], history: list[dict[str, Any]]
    ) -> None:
        self._run, self._mode, self._config, self._history = run, mode, config, history
        self._rows: queue.Queue[dict[str, Any] | None] = queue.Queue(QUEUE_ROWS)
        self._dropped = 0
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def send(self, row: dict[str, Any]) -> None:
        try:
            self._rows.put_nowait(row)
        except queue.Full:
            self._dropped += 1

    def close(self) -> None:
        with contextlib.suppress(queue.Full):
            self._rows.put(None, timeout=CLOSE_TIMEOUT_S)
        self._thread.join(CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            _say(f"still busy after {CLOSE_TIMEOUT_S:.0f} s, left behind; the local files are complete")
        elif self._dropped:
            _say(f"{self._dropped} rows were dropped there; the local files are complete")

    def _work(self) -> None:
        try:
            import wandb
        except ImportError as error:
            _say(f"not installed ({error}); continuing without it")
            return
        try:
            session = self._start(wandb)
            known = session.summary.get("step", -1)  # what wandb has of this run, nothing when offline
            for past in (row for row in self._history if row["step"] > known):
                session.log(past)
            while (row := self._rows.get()) is not None:
                session.log({key: value(wandb) if callable(value) else value for key, value in row.items()})
            session.finish()
        except Exception as error:  # a dashboard must never end a training, whatever it raises
            _say(f"stopped ({type(error).__name__}: {error}); the local files continue")

    def _start(self, wandb: Any) -> Any:
        shown = {"project": os.environ.get("WANDB_PROJECT", "cxrdist"), "group": self._run.name, "name": self._run.name}
        settings = {"init_timeout": INIT_TIMEOUT_S, "console": "off", "silent": True}
        settings |= dict.fromkeys(
            ("disable_git", "disable_code", "x_disable_meta"), True
        )  # command line, user, remotes
        init = functools.partial(wandb.init, **shown, dir=str(self._run), config=self._config, settings=settings)
        session: Any = None
        if self._mode == "online":
            try:
                file = self._run / "wandb_id"  # the id on wandb, the same for every session of the run folder
                if not file.exists():
                    write_atomically(file, os.urandom(6).hex())
                session = init(id=file.read_text().strip(), resume="allow", mode="online")
            except Exception as error:
                _say(f"not reachable ({type(error).__name__}); recording offline, send it later with `wandb sync`")
        if session is None:
            # an offline run with an old id would overwrite it: a new id each time, tied together by the group
            session = init(mode="offline")
        session.define_metric("step")
        session.define_metric("*", step_metric="step")
        return session


def _say(text: str) -> None:
    print(redacted(f"wandb: {text}"), file=sys.stderr, flush=True)
