"""`cxrdist watch`: one frame where nobody looks, frames after frames in a terminal, and a quiet end."""

import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cxrdist import watch
from cxrdist.runs.progress import Progress
from cxrdist.terminal import width
from tests.runs.test_progress import add, make_run, trained

pytestmark = pytest.mark.fast

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A finished run with validation, and one that has just begun."""
    one = make_run(tmp_path / "runs" / "eva_x_b", epochs=2)
    for epoch, auroc in ((1, 0.875), (2, 0.75)):
        add(one, *(trained(step, epoch, 1 / step) for step in range(epoch * 10 - 9, epoch * 10 + 1)))
        add(one, {"kind": "epoch", "step": epoch * 10, "epoch": epoch})
        add(one, {"kind": "validation", "step": epoch * 10, "epoch": epoch, "validation/auroc_macro": auroc})
    add(one, {"step": 20, "images_per_s": 31.5, "wait_share": 0.02}, log="timings.jsonl")
    other = make_run(tmp_path / "runs" / "b\x1b[2J\u202evil", folds=5)
    add(other, trained(5))
    add(other, {"step": 5, "images_per_s": 1.0, "wait_share": 0.5}, log="timings.jsonl")
    return tmp_path / "runs"


def test_runs_stand_side_by_side_in_80_columns(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    watch.main([str(runs)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["b?[2J?vil", "running", "eva_x_b", "finished"]
    assert re.match(r"epoch 1/3, step 5/~24 \(21%\) +epoch 2/2, step 20/20 \(100%\)$", lines[1])
    assert re.match(r"loss  0\.5000  ▁ +loss  0\.0500  █.*▁$", lines[2])
    assert re.match(r"1\.0 images/s, waiting 50%, 3 min left +AUROC 0\.7500  █▁$", lines[3])
    assert lines[4].strip() == "best  0.8750 of epoch 1"
    assert all(width(line) <= 80 for line in lines)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", "".join(lines))


@pytest.mark.parametrize("columns", [20, 38, 79, 80, 200])
def test_no_line_is_wider_than_the_terminal_and_what_does_not_fit_is_named(runs: Path, columns: int) -> None:
    found = [Progress(run) for run in sorted(runs.iterdir())]
    assert all(width(line) <= columns for line in watch.frame(found, columns))
    short = watch.frame(found, 38, 8)
    assert len(short) <= 8
    assert short[-1] == "1 more: eva_x_b"


def test_running_ones_come_first_then_silent_ones_then_finished_ones_as_they_were_given(tmp_path: Path) -> None:
    names = ["done_long_ago", "silent", "running", "done"]
    found = []
    for name in names:
        run = make_run(tmp_path / name, epochs=1)
        add(run, trained(1), *([{"kind": "epoch", "step": 1, "epoch": 1}] if "done" in name else []))
        if name in ("done_long_ago", "silent"):
            os.utime(run / "metrics.jsonl", (1000, 1000))
        found.append(Progress(run))
    lines = watch.frame(found, 38)
    assert [line.split()[0] for line in lines if line.split()[:1] and line.split()[0] in names] == [
        "running",
        "silent",
        "done_long_ago",
        "done",
    ]


def test_a_stopped_run_says_so_and_promises_no_end(runs: Path) -> None:
    run = next(runs.glob("b*"))
    add(run, {"step": 5, "stopped": "SIGTERM"}, log="timings.jsonl")
    lines = watch.frame([Progress(run)], 60)
    assert lines[0].split()[-1] == "stopped"
    assert lines[-1].strip() == "1.0 images/s, waiting 50%"
    add(run, {"kind": "epoch", "step": 30, "epoch": 3})
    assert watch.frame([Progress(run)], 60)[0].split()[-1] == "finished"


def test_runs_of_equal_names_are_told_apart(tmp_path: Path) -> None:
    found = [Progress(make_run(tmp_path / place / "run")) for place in ("a", "b")]
    assert sorted(watch.names_of(found).values()) == ["a/run", "b/run"]


def test_a_terminal_gets_frames_until_ctrl_c_and_is_left_as_it_was(runs: Path) -> None:
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80", "LINES": "24", "PYTHONIOENCODING": "utf-8"}
    words = [sys.executable, "-m", "cxrdist", "watch", "--every", "0.1", str(runs)]
    watching = subprocess.Popen(words, cwd=REPOSITORY, env=environment, stdout=theirs, stderr=subprocess.PIPE)
    os.close(theirs)
    text, limit = b"", time.monotonic() + 30
    while text.count(watch.HOME.encode()) < 3:
        text += os.read(ours, 65536)
        assert time.monotonic() < limit
    assert b"0.2500" not in text
    add(next(runs.glob("b*")), trained(6, loss=0.25))
    while b"0.2500" not in text:
        text += os.read(ours, 65536)
        assert time.monotonic() < limit
    watching.send_signal(signal.SIGINT)
    try:
        while part := os.read(ours, 65536):
            text += part
    except OSError:  # how a terminal says that its other side is gone
        pass
    assert watching.wait(10) == 0
    assert watching.stderr is not None
    assert watching.stderr.read() == b""
    assert text.startswith(watch.OPEN.encode())
    left = text.split(watch.CLOSE.encode())[1].decode()
    assert "running" in left
    assert "\x1b" not in left
    assert b"\x1b[2J" not in text


def test_an_output_without_these_letters_gets_others(runs: Path) -> None:
    words = [sys.executable, "-m", "cxrdist", "watch", "--once", str(runs)]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(words, cwd=REPOSITORY, env=environment, capture_output=True, check=True)
    assert b"loss  0.0500  @" in done.stdout
    assert b"\\u" not in done.stdout


def test_it_starts_in_half_a_second_without_torch(runs: Path) -> None:
    code = "import sys, time; from cxrdist import watch; watch.main(sys.argv[1:]); print(time.process_time())\n"
    code += "assert not {'torch', 'numpy', 'pandas', 'wandb'} & set(sys.modules)"
    words = [sys.executable, "-c", code, "--once", str(runs)]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert float(done.stdout.splitlines()[-1]) < 0.5


def test_a_folder_that_is_no_run_is_one_line(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "cxrdist", "watch", str(tmp_path)]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: \S+: holds no run .*; give what training calls --out, .*\n", done.stderr)
