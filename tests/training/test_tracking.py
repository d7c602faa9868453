import io
import json
import math
import os
import re
import sqlite3
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest

from cxrdist.errors import UserError
from cxrdist.flags import train as flags
from cxrdist.training import tracking
from cxrdist.training.tracking import Tracker, cut_metrics, resolve_mode

pytestmark = pytest.mark.fast


def test_rows_are_on_disk_as_soon_as_they_are_logged(tmp_path):
    with Tracker(tmp_path) as tracker:
        tracker.metrics({"step": 1, "loss": math.nan, "nested": [math.inf, 1.0]})
        assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": None, "nested": [None, 1.0]}
        tracker.timings({"step": 1, "images_per_s": 3.5})
    assert json.loads((tmp_path / "timings.jsonl").read_text())["images_per_s"] == 3.5


def test_rows_after_the_checkpoint_are_cut_and_lost_ones_are_told(tmp_path):
    with Tracker(tmp_path) as tracker:
        tracker.metrics({"step": 1})
        kept = tracker.metrics_bytes()
        tracker.metrics({"step": 2})
    assert cut_metrics(tmp_path, kept) is None
    with Tracker(tmp_path) as tracker:
        tracker.metrics({"step": 3})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": 1}, {"step": 3}]
    assert "lost" in (cut_metrics(tmp_path, 1000) or "")


def test_auto_is_off_unless_logged_in(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert resolve_mode("auto") == "off"
    monkeypatch.setenv("WANDB_API_KEY", "canary")
    assert resolve_mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert resolve_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert resolve_mode("auto") == "off"
    assert resolve_mode("offline") == "offline"


def test_a_dashboard_that_hangs_or_fails_stops_nothing(tmp_path, monkeypatch, capsys):
    pytest.importorskip("wandb")  # not within the time below
    monkeypatch.setattr(tracking, "CLOSE_TIMEOUT_S", 0.3)
    monkeypatch.setattr(tracking, "QUEUE_ROWS", 5)
    for start, said in ((lambda *_: time.sleep(3), "still busy"), (lambda *_: 1 / 0, "ZeroDivisionError")):
        monkeypatch.setattr(tracking._WandbThread, "_start", start)
        begun = time.monotonic()
        with Tracker(tmp_path, wandb_mode="offline") as tracker:
            for step in range(100):
                tracker.metrics({"step": step})
            time.sleep(0.2)
        assert time.monotonic() - begun < 2
        assert said in capsys.readouterr().err
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 200


class Session:
    """A wandb run that already has the rows up to a step."""

    def __init__(self, known):
        self.summary = {} if known is None else {"step": known}
        self.rows = []

    def log(self, row):
        self.rows.append(row)

    def finish(self):
        pass


@pytest.mark.parametrize(("known", "sent"), [(None, [1, 1, 2, 3, 3, 5, 5]), (2, [3, 3, 5, 5]), (3, [5, 5])])
def test_a_resumed_dashboard_gets_the_rows_it_lacks(tmp_path, monkeypatch, known, sent):
    with Tracker(tmp_path) as tracker:
        for step in (1, 2, 3):
            tracker.metrics({"step": step, "loss": step / 8})
        for step in (1, 3, 4):
            tracker.timings({"step": step, "images_per_s": 2.5})
        tracker.stopped(3, "SIGINT")
    with (tmp_path / "timings.jsonl").open("a") as file:
        file.write('{"step": 5, "ima')
    session = Session(known)
    monkeypatch.setattr(tracking._WandbThread, "_start", lambda *_: session)
    with Tracker(tmp_path, wandb_mode="offline") as tracker:
        tracker.metrics({"step": 5, "loss": 0.5})
        tracker.timings({"step": 5, "images_per_s": 3.5})
        tracker.stopped(5, "--max-steps")
    *_, speed, end = map(json.loads, (tmp_path / "timings.jsonl").read_text().splitlines()[-2:])
    assert (speed["images_per_s"], end) == (3.5, {"step": 5, "stopped": "--max-steps"})
    assert [row["step"] for row in session.rows] == sent
    if known is None:
        assert session.rows[:2] == [{"step": 1, "loss": 0.125}, {"step": 1, "images_per_s": 2.5}]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_named(tmp_path):
    with Tracker(tmp_path) as tracker:
        tracker._timings = io.FileIO("/dev/full", "w")
        with pytest.raises(UserError, match="/dev/full: the disk is full"):
            tracker.timings({"step": 1})


class Trackio(types.ModuleType):
    """The parts of trackio that are used; runs are kept by name."""

    def __init__(self):
        super().__init__("trackio")
        self.run, self.utils = types.SimpleNamespace(Run=type("Run", (), {})), types.SimpleNamespace()
        self.runs, self.asked = {}, []

    def init(self, **asked):
        self.asked.append(asked)
        rows = self.runs.setdefault(asked["name"], [])
        last = max((step for step, _ in rows), default=-1)
        log = lambda row, step: rows.append((step, row))  # noqa: E731
        return types.SimpleNamespace(log=log, finish=lambda: None, _next_step=last + 1)

    def Image(self, array, caption):
        return array.shape, caption


def track(run, *steps, **more):
    with Tracker(run, library="trackio", config={"recipe": 1}, **more) as tracker:
        for step in steps:
            tracker.metrics({"kind": "train", "step": step, "loss": step / 8})
            tracker.timings({"step": step, "images_per_s": 2.5})
        tracker.images(steps[-1], "samples", np.zeros((2, 4, 4), np.uint8), ["one.png", "two.png"])
        tracker.curves(steps[-1], "roc", {"Nodule": ([0.0, 1.0], [0.0, 1.0])}, "false positives")


def test_trackio_gets_the_rows_once_in_a_run_of_its_own_and_in_its_group(tmp_path, monkeypatch, capsys):
    trackio = Trackio()
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    runs = [tmp_path / place / "run" for place in ("a", "b")]
    for run in runs:
        run.mkdir(parents=True)
        track(run, 1, 2, group="x_folds")
    track(runs[0], 3, images=True)
    assert "stopped" not in (said := capsys.readouterr().err)
    assert said.count("no images and no names of images, on this machine alone") == 2
    assert said.count("and images with their names, on this machine alone") == 1
    names = [f"run-{(run / 'trackio_id').read_text()[:6]}" for run in runs]
    assert list(trackio.runs) == names
    assert names[0] != names[1]
    expected = [
        row for step in (1, 2) for row in ((step, {"kind": "train", "loss": step / 8}), (step, {"images_per_s": 2.5}))
    ]
    assert trackio.runs[names[1]] == expected
    shown = {"samples/0": ((4, 4), "one.png"), "samples/1": ((4, 4), "two.png")}
    more = [(3, {"kind": "train", "loss": 0.375}), (3, {"images_per_s": 2.5}), (3, shown)]
    assert trackio.runs[names[0]] == expected + more
    assert [asked["group"] for asked in trackio.asked] == ["x_folds", "x_folds", "run"]
    assert {(asked["project"], asked["resume"], asked["embed"]) for asked in trackio.asked} == {
        ("cxrdist", "allow", False)
    }


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("TRACKIO_SPACE_ID", "me/space", "sends .* to me/space, which TRACKIO_SPACE_ID names"),
        ("TRACKIO_SERVER_URL", "https://in.house/?write_token=canary", r"sends .* to https://in.house/\?\*\*\*, which"),
    ],
)
def test_where_the_environment_sends_trackio_is_said_without_the_secret(
    tmp_path, monkeypatch, capsys, name, value, said
):
    monkeypatch.setitem(sys.modules, "trackio", Trackio())
    monkeypatch.setenv(name, value)
    track(tmp_path, 1)
    shown = capsys.readouterr().err
    assert re.search(f"^trackio: {said}", shown)
    assert "canary" not in shown


def test_no_tracker_asks_no_library(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "canary")
    with Tracker(tmp_path, library="none", wandb_mode="online") as tracker:
        assert tracker.dashboard is None
    assert capsys.readouterr().err == ""


def test_flags_of_another_tracker_and_one_that_is_not_installed_end_before_anything_starts(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "trackio", None)  # as if it were not there

    def refused(*words):
        with pytest.raises((SystemExit, UserError)) as ended:
            flags.parser().parse_args(["--task", "b", *words])
        return str(ended.value) + capsys.readouterr().err

    assert "--tracker trackio needs: pip install 'cxrdist[trackio]'" in refused("--tracker", "trackio")
    assert "--wandb online is for --tracker wandb" in refused("--tracker", "none", "--wandb", "online")
    assert flags.parser().parse_args(["--task", "b", "--tracker", "none", "--wandb", "off"]).tracker == "none"


REAL = """
import sys
seen = []
sys.addaudithook(lambda event, args: seen.append(event) if event in ("socket.connect", "socket.getaddrinfo") else None)
import numpy as np
from pathlib import Path
from cxrdist.training.tracking import Tracker
for steps in ((1, 2), (3,)):
    with Tracker(Path(sys.argv[1]), library="trackio", images=True, group="folds", config={"recipe": {}}) as tracker:
        for step in steps:
            tracker.metrics({"kind": "train", "step": step, "loss": 1 / step})
        tracker.images(steps[-1], "samples", np.zeros((1, 4, 4), np.uint8), ["one.png"])
        tracker.curves(steps[-1], "roc", {"a": ([0.0], [0.0])}, "x")
assert not seen, seen
"""


def test_the_real_trackio_keeps_all_rows_and_speaks_to_nobody(tmp_path):
    pytest.importorskip("trackio", reason="pip install 'cxrdist[trackio]'")
    folder = tmp_path / "run"
    folder.mkdir()
    environment = {name: text for name, text in os.environ.items() if not name.startswith("TRACKIO")}
    environment |= {"TRACKIO_DIR": str(tmp_path / "kept"), "HF_TOKEN": "hf_canary"}
    words = [sys.executable, "-W", "error::UserWarning", "-c", REAL, str(folder)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("trackio: records recipe") == 2
    assert len(done.stderr.splitlines()) == 2, done.stderr
    with sqlite3.connect(tmp_path / "kept" / "cxrdist.db") as database:
        rows = [(step, json.loads(row)) for step, row in database.execute("select step, metrics from metrics")]
        (config,) = database.execute("select config from configs").fetchall()
    assert [step for step, row in rows if "loss" in row] == [1, 2, 3]
    assert [step for step, row in rows if "samples/0" in row] == [2, 3]
    assert json.loads(config[0])["_Group"] == "folds"
    assert json.loads(config[0])["_Username"] is None
