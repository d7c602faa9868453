"""`cxrdist train` and `infer` start their ranks themselves: an end is one line, and its exit code is the rank's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

RANK = """
import os, signal, sys
print(os.environ.get("RANK", "alone"), os.environ.get("WORLD_SIZE"), os.environ.get("ACCELERATE_MIXED_PRECISION"))
print(*sys.argv[1:], flush=True)
if os.environ.get("RANK", "1") == "1":
    {end}
"""


def begun(tmp_path: Path, processes: int, end: str) -> "subprocess.Popen[str]":
    """`launch` with a module whose last rank ends by `end`."""
    (tmp_path / "ends.py").write_text(RANK.format(end=end))
    code = (
        "from cxrdist.distributed.launch import launch; import sys; sys.exit(launch('ends', ['--x'], again='resume'))"
    )
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}", "RANK": ""}
    environment |= {"CXRDIST_PROCESSES": str(processes), "ACCELERATE_USE_CPU": "true"}
    del environment["RANK"]
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=pipe, stderr=pipe, text=True)


def started(tmp_path: Path, processes: int, end: str) -> "subprocess.CompletedProcess[str]":
    process = begun(tmp_path, processes, end)
    output = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, *output)


@pytest.mark.parametrize("processes", [1, 2])
def test_the_exit_code_is_the_ranks_and_nothing_else_is_said(tmp_path: Path, processes: int) -> None:
    done = started(tmp_path, processes, "sys.exit(2)")
    assert (done.returncode, done.stderr) == (2, "")
    assert done.stdout.count("no\n") == processes
    done = started(tmp_path, processes, "pass")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_rank_that_was_killed_is_named_with_the_remedy(tmp_path: Path) -> None:
    done = started(tmp_path, 2, "os.kill(os.getpid(), signal.SIGKILL)")
    assert done.returncode == 1
    assert done.stderr == "error: the process of rank 1 was ended by SIGKILL; then resume\n"
    assert "--x --expect-processes 2" in done.stdout


def test_sigterm_ends_the_ranks_and_is_not_spoken_of(tmp_path: Path) -> None:
    process = begun(tmp_path, 2, "import time; time.sleep(100)")
    assert process.stdout is not None
    while "--x" not in process.stdout.readline():
        pass
    process.terminate()
    assert (process.communicate(timeout=100)[1], process.returncode) == ("", 143)


def test_what_another_rank_than_the_first_says_is_told_at_the_end(tmp_path: Path) -> None:
    said = (
        "from cxrdist.cli import run_entry; from cxrdist.errors import UserError\n    def fail(): raise UserError('no')"
    )
    done = started(tmp_path, 2, f"{said}\n    sys.exit(run_entry(fail))")
    assert (done.returncode, done.stderr) == (2, "error [rank 1]: no\n")


def test_a_users_mistake_is_one_line_also_with_several_processes(tmp_path: Path) -> None:
    environment = os.environ | {"CXRDIST_PROCESSES": "2", "ACCELERATE_USE_CPU": "true"}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2])}
    call = [sys.executable, "-m", "cxrdist", "train", "--shards", "nowhere", "--init", "random"]
    done = subprocess.run(call, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2
    assert done.stderr == "error: nowhere: no such folder; make it with `cxrdist preprocess --task NAME ...`\n"
    assert os.listdir(tmp_path) == []
