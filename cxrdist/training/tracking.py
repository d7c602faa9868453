"""Where a run's numbers go: `metrics.jsonl` (reproducible), `timings.jsonl` (not), and wandb or trackio if wanted.

The local files are the truth and are written first. The dashboard runs in a thread of its own behind a bounded queue:
it can be slow, offline or broken without the training noticing.
"""

import contextlib
import dataclasses
import errno
import functools
import importlib
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
from dataclasses import dataclass
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
Library = Literal["wandb", "trackio", "none"]
INIT_TIMEOUT_S = 10  # wandb's own default keeps a run without network waiting for 90 s
QUEUE_ROWS = 1000  # rows waiting for the dashboard; further ones are dropped there, never in the local files
CLOSE_TIMEOUT_S = 60.0
NUM_SAMPLES = 4  # augmented images that are shown
SENT = "recipe, versions, hardware, losses, validation scores and curves, speeds, the names of run and group"


@dataclass(frozen=True, eq=False)
class Images:
    """(N, H, W) or (N, H, W, 3) to be shown."""

    images: NDArray[np.uint8]
    captions: list[str]


@dataclass(frozen=True)
class Curves:
    """Lines by name, each of x and y values, in one plot."""

    curves: dict[str, tuple[list[float], list[float]]]
    x_name: str


class Tracker(contextlib.AbstractContextManager["Tracker"]):
    """Writes rows; make it on one rank only. The end of its context gives the dashboard a bounded time for the rest.

    dashboard: None where pictures and curves are not worth making.
    """

    def __init__(
        self,
        run: Path,
        *,
        library: Library = "wandb",
        wandb_mode: WandbMode = "off",
        images: bool = False,
        group: str | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        """library: of the dashboard. wandb_mode: auto is online when logged in, else off. What is sent is said in one
        line, images and their names only where they may be. group: of runs on the dashboard (default: the run alone).
        config: the resolved recipe and environment.
        """
        self.run = run
        self._send_images = images
        mode = resolve_mode(wandb_mode) if library == "wandb" else "off"
        shown = library == "trackio" or mode != "off"
        if shown:
            what = f"{SENT}, and images with their names" if images else f"{SENT}; no images and no names of images"
            _say(library, trackio_says(what) if library == "trackio" else wandb_says(what, mode))
        history = _history(run) if shown else []  # of earlier sessions, before this one writes
        self._metrics = open_to_append(run / "metrics.jsonl")
        self._timings = open_to_append(run / "timings.jsonl")
        self.dashboard: _DashboardThread | None = None
        if shown:
            known = run, group or run.name, config or {}, history
            self.dashboard = _TrackioThread(*known) if library == "trackio" else _WandbThread(*known, mode)

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

    def stopped(self, step: int, reason: str) -> None:
        """Append a row that says why a session ended before the training did; it is for this machine alone."""
        self._write(self._timings, {"step": step, "stopped": reason}, show=False)

    def images(self, step: int, name: str, images: NDArray[np.uint8], captions: list[str]) -> None:
        """Show (N, H, W) or (N, H, W, 3) images under `name` on the dashboard, where they may leave the machine."""
        if not self._send_images:
            return
        self._show(step, name, Images(images, captions))

    def curves(self, step: int, name: str, curves: dict[str, tuple[list[float], list[float]]], x_name: str) -> None:
        """Show lines, each of x and y values, in one plot under `name` on a dashboard that has such plots."""
        self._show(step, name, Curves(curves, x_name))

    def metrics_bytes(self) -> int:
        """Bytes of metrics.jsonl that are safely on disk: what a checkpoint remembers."""
        require_same(self._metrics)
        os.fsync(self._metrics.fileno())
        return self._metrics.tell()

    def _show(self, step: int, name: str, shown: Images | Curves) -> None:
        if self.dashboard is not None:
            self.dashboard.send({"step": step, name: shown})

    def _write(self, file: io.FileIO, row: dict[str, Any], *, show: bool = True) -> None:
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
        if show and self.dashboard is not None:
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
            _say("dashboard", f"warning: {path}: {num_bad:,} damaged lines are not sent; all others are")
    last_step = max((row["step"] for row in found[0]), default=-1)
    shown = (row for row in [*found[0], *found[1]] if row["step"] <= last_step and "stopped" not in row)
    return sorted(shown, key=lambda row: row["step"])


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


def wandb_says(what: str, mode: str) -> str:
    """What of a run goes where."""
    return f"{mode}; {'sends' if mode == 'online' else 'records'} {what} (--wandb off: nothing)"


def trackio_says(what: str) -> str:
    """What of a run goes where: nowhere, unless the environment names a Space or a server."""
    for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):  # trackio's own order
        if place := os.environ.get(name):
            return f"sends {what} to {place}, which {name} names (--tracker none: nothing)"
    return f"records {what}, on this machine alone; `trackio show --project {_trackio_project()}` shows it"


def _trackio_project() -> str:
    return os.environ.get("TRACKIO_PROJECT", "cxrdist")


class _DashboardThread:
    """Starts a library and feeds it. Every failure ends in one printed line; none reaches the training.

    `history`, the rows of earlier sessions, is sent first as far as the library does not have it: a session that was
    killed takes what was on its way with it, and an offline session of wandb is a run of its own, so the newest holds
    all of it.
    """

    library = ""

    def __init__(self, run: Path, group: str, config: dict[str, Any], history: list[dict[str, Any]]) -> None:
        self._run, self._group, self._config, self._history = run, group, config, history
        self._rows: queue.Queue[dict[str, Any] | None] = queue.Queue(QUEUE_ROWS)
        self._dropped = 0
        self._thread = threading.Thread(target=self._work, name=self.library, daemon=True)
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
            self._say(f"still busy after {CLOSE_TIMEOUT_S:.0f} s, left behind; the local files are complete")
        elif self._dropped:
            self._say(f"{self._dropped} rows were dropped there; the local files are complete")

    def _work(self) -> None:
        try:
            module = importlib.import_module(self.library)
        except ImportError as error:
            self._say(f"not installed ({error}); continuing without it")
            return
        try:
            session = self._start(module)
            known = self._known(session)
            for past in (row for row in self._history if row["step"] > known):
                self._log(module, session, past)
            while (row := self._rows.get()) is not None:
                self._log(module, session, row)
            session.finish()
        except Exception as error:  # a dashboard must never end a training, whatever it raises
            self._say(f"stopped ({type(error).__name__}: {error}); the local files continue")

    def _start(self, module: Any) -> Any:
        raise NotImplementedError

    def _known(self, session: Any) -> int:
        """The last step that the library has of this run; -1 without any."""
        raise NotImplementedError

    def _log(self, module: Any, session: Any, row: dict[str, Any]) -> None:
        raise NotImplementedError

    def _id(self) -> str:
        """The run's on the dashboard, the same for every session of the run folder."""
        file = self._run / f"{self.library}_id"
        if not file.exists():
            write_atomically(file, os.urandom(6).hex())
        return file.read_text().strip()

    def _say(self, text: str) -> None:
        _say(self.library, text)


class _WandbThread(_DashboardThread):
    library = "wandb"

    def __init__(
        self,
        run: Path,
        group: str,
        config: dict[str, Any],
        history: list[dict[str, Any]],
        mode: Literal["online", "offline", "off"],
    ) -> None:
        self._mode = mode
        super().__init__(run, group, config, history)

    def _start(self, module: Any) -> Any:
        shown = {"project": os.environ.get("WANDB_PROJECT", "cxrdist"), "group": self._group, "name": self._run.name}
        settings = {"init_timeout": INIT_TIMEOUT_S, "console": "off", "silent": True}
        settings |= dict.fromkeys(
            ("disable_git", "disable_code", "x_disable_meta"), True
        )  # command line, user, remotes
        init = functools.partial(module.init, **shown, dir=str(self._run), config=self._config, settings=settings)
        session: Any = None
        if self._mode == "online":
            try:
                session = init(id=self._id(), resume="allow", mode="online")
            except Exception as error:
                self._say(f"not reachable ({type(error).__name__}); recording offline, send it later with `wandb sync`")
        if session is None:
            # an offline run with an old id would overwrite it: a new id each time, tied together by the group
            session = init(mode="offline")
        session.define_metric("step")
        session.define_metric("*", step_metric="step")
        return session

    def _known(self, session: Any) -> int:
        return int(session.summary.get("step", -1))  # nothing when offline

    def _log(self, module: Any, session: Any, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if isinstance(value, Images):
                pairs = zip(value.images, value.captions, strict=True)
                row = row | {name: [module.Image(array, caption=caption) for array, caption in pairs]}
            elif isinstance(value, Curves):
                lines = [list(axis) for axis in zip(*value.curves.values(), strict=True)] or [[], []]
                shown = {"keys": list(value.curves), "title": name, "xname": value.x_name}
                row = row | {name: module.plot.line_series(*lines, **shown)}
        session.log(row)


class _TrackioThread(_DashboardThread):
    library = "trackio"

    def _start(self, module: Any) -> Any:
        # It asks huggingface.co whose token lies on this machine, to record the name, and prints "Uploading" into the
        # training's output also where nothing is.
        module.run.Run._get_username = lambda _: None
        for part in (module, module.run, module.utils):
            part.print = lambda *_, **__: None
        # it resumes by the name, which runs of other folders may have, too
        shown = {"project": _trackio_project(), "group": self._group, "name": f"{self._run.name}-{self._id()[:6]}"}
        quiet = {"embed": False, "auto_log_cpu": False, "auto_log_gpu": False}
        return module.init(**shown, config=self._config, resume="allow", **quiet)

    def _known(self, session: Any) -> int:
        return int(getattr(session, "_next_step", 0)) - 1  # without it, all rows are sent again

    def _log(self, module: Any, session: Any, row: dict[str, Any]) -> None:
        found = {}
        for name, value in row.items():
            if isinstance(value, Images):
                for number, array in enumerate(value.images):
                    found[f"{name}/{number}"] = module.Image(array, caption=value.captions[number])
            elif name != "step" and not isinstance(value, Curves):  # it has no such plot
                found[name] = value
        if found:
            session.log(found, step=row["step"])


def _say(library: str, text: str) -> None:
    print(redacted(f"{library}: {text}"), file=sys.stderr, flush=True)
