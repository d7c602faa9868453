"""Set-up fails loudly and mends itself: no network, a pip that fails or is killed half way, a Python that is too old.

A stand-in `python3.x` does what `venv` and `pip` would do, in milliseconds; one test uses the real ones, offline.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

PROJECT = Path(__file__).parents[2]
HOW_TO_USE = "ready; to use the environment in this shell: source .venv/bin/activate"
# Installs two packages; between them it does what the file `pip` in the checkout says. Each call is noted in `calls`.
PYTHON = """#!/usr/bin/env bash
case "$*" in
  --version) echo "Python VERSION" ;;
  "-c import sys"*) [[ VERSION == 3.1[1-9]* ]] ;;
  "-m venv .venv")
    mkdir -p .venv/bin .venv/lib/python3/site-packages/pip
    cp "$0" .venv/bin/python
    echo venv >> calls ;;
  "-m pip install"*)
    echo "pip ${*: -1}" >> calls
    sleep 0.02
    mode=$(cat pip 2> /dev/null || true)
    [ "$mode" != offline ] || { echo "no route to the index" >&2; exit 1; }
    touch .venv/lib/python3/site-packages/half
    [ "$mode" != hang ] || { touch halfway; sleep 60; }
    [ "$mode" != full ] || { echo "No space left on device" >&2; exit 1; }
    touch .venv/lib/python3/site-packages/complete ;;
  *) echo "ran $*"; [ -e .venv/lib/python3/site-packages/complete ] ;;
esac
"""


def stand_in(folder: Path, name: str, version: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(PYTHON.replace("VERSION", version))
    (folder / name).chmod(0o755)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What set-up reads, and `bin` with the only Pythons there are: python3.11 and an older python3."""
    folder = tmp_path / "a checkout"
    folder.mkdir()
    for name in ("launch.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(PROJECT / name, folder)
    stand_in(folder / "bin", "python3.11", "3.11.9")
    stand_in(folder / "bin", "python3", "3.10.13")
    for tool in (
        "bash",
        "env",
        "cat",
        "cksum",
        "cp",
        "dirname",
        "find",
        "flock",
        "mkdir",
        "rm",
        "sed",
        "sleep",
        "touch",
    ):
        (folder / "bin" / tool).symlink_to(shutil.which(tool) or tool)
    return folder


def command(checkout: Path, *arguments: str) -> "subprocess.Popen[str]":
    environment = {"PATH": str(checkout / "bin"), "HOME": str(checkout)}
    pipe = subprocess.PIPE
    call = ["bash", str(checkout / "launch.sh"), *arguments]
    return subprocess.Popen(call, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def launch(checkout: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    process = command(checkout, *arguments)
    stdout, stderr = process.communicate(timeout=30)
    return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)


def end(process: "subprocess.Popen[str]") -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=20)


def calls(checkout: Path) -> list[str]:
    return (checkout / "calls").read_text().splitlines() if (checkout / "calls").exists() else []


def assert_works(checkout: Path) -> None:
    done = launch(checkout, "setup")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, HOW_TO_USE), done.stderr
    done = launch(checkout, "demo", "--seed", "3")
    assert (done.returncode, done.stdout) == (0, "ran -m cxrdist demo --seed 3\n"), done.stderr


@pytest.mark.parametrize("mode", ["offline", "full"])
@pytest.mark.parametrize("first", ["setup", "demo", "test"])
def test_after_a_failed_install_nothing_runs_and_the_next_command_tries_again(checkout, mode, first):
    (checkout / "pip").write_text(mode)
    for _ in range(2):
        done = launch(checkout, first)
        assert done.returncode == 2
        assert "error: pip failed, see above; when its cause (network, disk) is mended, run this again" in done.stderr
        assert "ran " not in done.stdout
        assert HOW_TO_USE not in done.stdout
        assert not list((checkout / ".venv").glob(".cxrdist-[cd]*"))
    (checkout / "pip").unlink()
    assert_works(checkout)
    made_anew = [call for call in calls(checkout) if call == "venv"]
    assert len(made_anew) == (1 if mode == "offline" else 3), "an environment with half a package is made from scratch"


@pytest.mark.parametrize("victim", ["pip", "launch.sh", "both"])
def test_killed_in_mid_install_the_next_command_starts_from_scratch(checkout, victim):
    (checkout / "pip").write_text("hang")
    process = command(checkout, "setup")
    deadline = time.monotonic() + 20
    while not (checkout / "halfway").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    if victim == "pip":
        (pip,) = (child for child in psutil.Process(process.pid).children() if "pip" in child.cmdline())
        pip.kill()
        assert process.wait(timeout=20) == 2
    elif victim == "launch.sh":
        process.kill()
        waiting = command(checkout, "setup")
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(timeout=0.5)  # the pip that outlived its launch.sh still writes
        end(waiting)
    end(process)
    (checkout / "pip").unlink()
    assert_works(checkout)
    assert calls(checkout).count("venv") == 2


def test_a_working_core_survives_a_failed_installation_of_the_tools(checkout):
    assert launch(checkout, "setup").returncode == 0
    (checkout / "pip").write_text("offline")
    assert launch(checkout, "test").returncode == 2
    assert launch(checkout, "demo").stdout == "ran -m cxrdist demo\n"
    assert calls(checkout) == ["venv", "pip .", "pip .[dev,dicom,onnx,app,s3,trackio]"]


def test_core_and_tools_are_installed_when_needed_and_once(checkout):
    for arguments in (
        ["demo"],
        ["doctor"],
        ["test", "-x"],
        ["test"],
        ["format"],
        ["soak"],
        ["fuzz"],
        ["demo"],
        ["setup"],
    ):
        done = launch(checkout, *arguments)
        assert done.returncode == 0, done.stderr
    assert calls(checkout) == ["venv", "pip .", "pip .[dev,dicom,onnx,app,s3,trackio]"]
    (checkout / "constraints.txt").write_text("numpy==1\n")
    assert launch(checkout, "demo").returncode == 0
    assert calls(checkout)[3:] == ["pip ."]


def test_a_checkout_that_moved_is_installed_again(checkout):
    assert_works(checkout)
    moved = checkout.rename(checkout.with_name("moved"))
    assert_works(moved)
    assert calls(moved) == ["venv", "pip .", "pip ."]


def test_an_older_python_first_on_path_is_passed_over_and_alone_it_is_named_first(checkout):
    stand_in(checkout / "bin", "python3", "3.12.1")
    (checkout / "bin" / "python3.11").unlink()
    assert "Python 3.12.1" in launch(checkout, "setup").stdout
    shutil.rmtree(checkout / ".venv")
    stand_in(checkout / "bin", "python3", "3.10.13")
    done = launch(checkout, "demo")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(
        "error: Python 3.11 or newer is needed; python3 is Python 3.10.13; install python3.11"
    )
    assert not (checkout / ".venv" / "bin").exists()
    stand_in(checkout / "bin", "python3.11", "3.11.9")
    assert_works(checkout)


def test_an_environment_of_an_older_python_is_made_from_scratch(checkout):
    (checkout / ".venv").mkdir()
    stand_in(checkout / ".venv" / "bin", "python", "3.10.1")
    assert_works(checkout)
    assert calls(checkout) == ["venv", "pip ."]


def test_an_older_python_in_cxrdist_python_is_named(checkout):
    environment = {"PATH": str(checkout / "bin"), "CXRDIST_PYTHON": str(checkout / "bin" / "python3")}
    call = ["bash", str(checkout / "launch.sh"), "demo"]
    done = subprocess.run(call, env=environment, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert done.stderr == f"error: CXRDIST_PYTHON: '{checkout}/bin/python3' is not a Python of 3.11 or newer\n"


@pytest.mark.fault
def test_the_real_venv_and_pip_without_an_index_fail_by_name_and_leave_no_stamp(checkout):
    (checkout / "bin" / "python3.11").unlink()
    (checkout / "bin" / "python3.11").symlink_to(sys.executable)
    offline = {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0"}
    environment = {"PATH": f"{checkout / 'bin'}:{os.environ['PATH']}", "HOME": str(checkout)} | offline
    for _ in range(2):
        call = ["bash", str(checkout / "launch.sh"), "demo"]
        done = subprocess.run(call, env=environment, capture_output=True, text=True, timeout=250)
        assert done.returncode == 2, done.stdout
        assert "error: pip failed, see above" in done.stderr
        assert "No module named cxrdist" not in done.stderr
        assert not list((checkout / ".venv").glob(".cxrdist-[cd]*"))
