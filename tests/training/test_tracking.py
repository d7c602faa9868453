import io
import json
import math
import time
from pathlib import Path

import pytest

from cxrdist.errors import UserError
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
    with (tmp_path / "timings.jsonl").open("a") as file:
        file.write('{"step": 5, "ima')
    session = Session(known)
    monkeypatch.setattr(tracking._WandbThread, "_start", lambda *_: session)
    with Tracker(tmp_path, wandb_mode="offline") as tracker:
        tracker.metrics({"step": 5, "loss": 0.5})
        tracker.timings({"step": 5, "images_per_s": 3.5})
    assert json.loads((tmp_path / "timings.jsonl").read_text().splitlines()[-1])["images_per_s"] == 3.5
    assert [row["step"] for row in session.rows] == sent
    if known is None:
        assert session.rows[:2] == [{"step": 1, "loss": 0.125}, {"step": 1, "images_per_s": 2.5}]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_named(tmp_path):
    with Tracker(tmp_path) as tracker:
        tracker._timings = io.FileIO("/dev/full", "w")
        with pytest.raises(UserError, match="/dev/full: the disk is full"):
            tracker.timings({"step": 1})
