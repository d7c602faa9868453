"""Preprocessing killed, interrupted, run twice at once, or out of disk: complete shards count, the work resumes."""

import hashlib
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from cxrdist import preprocess
from cxrdist.errors import UserError
from cxrdist.shards.index import open_index
from cxrdist.shards.verify import verify
from cxrdist.task import TASKS

pytestmark = pytest.mark.fault
NUM_IMAGES = 60


@pytest.fixture
def arguments(make_division: Any) -> list[str]:
    images, table = make_division([f"{number:08d}_001_001.jpg" for number in range(NUM_IMAGES)], size=(1500, 1500))
    (images / f"{7:08d}_001_001.jpg").write_bytes(b"no image")
    return ["--div", "b", "--images", str(images), "--csv", str(table), "--rows-per-shard", "6", "--workers", "2"]


def bytes_of(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.iterdir()) if path.is_file())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def start(arguments: list[str], out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "cxrdist.preprocess", *arguments, "--out", str(out)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for_shards(out: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while len(list(out.glob("train-*.tar"))) < count:
        assert time.monotonic() < deadline
        time.sleep(0.002)


def group_is_gone(group: int) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_leaves_complete_shards_and_resumes_to_the_same_bytes(
    arguments: list[str], tmp_path: Path, kill: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    preprocess.main([*arguments, "--out", str(tmp_path / "undisturbed")])
    expected = bytes_of(tmp_path / "undisturbed")
    out = tmp_path / "out"
    for wanted in (2, 5):  # killed twice on the way
        process = start(arguments, out)
        try:
            wait_for_shards(out, wanted)
            os.killpg(process.pid, kill) if kill == signal.SIGINT else os.kill(process.pid, kill)
            _, errors = process.communicate(timeout=30)
            assert group_is_gone(process.pid), "workers outlive the killed run"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        assert not (out / "train.json").exists()
        for tar in out.glob("train-*.tar"):
            assert hashlib.sha256(tar.read_bytes()).hexdigest() == expected[tar.name]
            with tarfile.open(tar) as finished:
                assert len(finished.getnames()) in (10, 12)
        with pytest.raises(UserError, match=r"train\.json is missing"):
            open_index(out, "train", TASKS["b"])
        if kill == signal.SIGINT:
            assert process.returncode == 130
            assert "interrupted" in errors
            assert "Traceback" not in errors
            assert not list(out.rglob("*.tmp"))
    capsys.readouterr()
    preprocess.main([*arguments, "--out", str(out)])
    printed = capsys.readouterr().out
    assert "reused: " in printed
    assert f"{NUM_IMAGES} rows = {NUM_IMAGES - 1} images stored + 1 left out" in printed
    assert bytes_of(out) == expected
    verify(out, "train", TASKS["b"], hashes=True)


def test_a_killed_worker_ends_the_run_by_name(arguments: list[str], tmp_path: Path) -> None:
    process = start(arguments, tmp_path / "out")
    try:
        wait_for_shards(tmp_path / "out", 2)
        children = psutil.Process(process.pid).children(recursive=True)
        max(children, key=lambda child: child.cpu_times().user).kill()
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 2
        assert "a worker process was killed (out of memory?)" in errors
        assert group_is_gone(process.pid)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_two_runs_at_once_in_one_folder_are_named(arguments: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(arguments, out)
    try:
        wait_for_shards(out, 1)
        with pytest.raises(UserError, match=r"another cxrdist\.preprocess"):
            preprocess.main([*arguments, "--out", str(out)])
        assert process.wait(timeout=60) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    verify(out, "train", TASKS["b"], hashes=True)


def test_nodes_that_work_at_the_same_time_join_to_the_same_bytes(arguments: list[str], tmp_path: Path) -> None:
    preprocess.main([*arguments, "--out", str(tmp_path / "one")])
    for attempt in range(2):
        out = tmp_path / f"nodes{attempt}"
        nodes = [start([*arguments, "--num-nodes", "3", "--node-rank", str(node)], out) for node in range(3)]
        try:
            assert [node.wait(timeout=120) for node in nodes] == [0, 0, 0]
        finally:
            for node in nodes:
                if node.poll() is None:
                    os.killpg(node.pid, signal.SIGKILL)
        assert bytes_of(out) == bytes_of(tmp_path / "one")
        assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in (tmp_path / "one").iterdir())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(disk)], capture_output=True)
    if mount.returncode:
        pytest.skip("may not mount a tmpfs here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_too_small_is_named_beforehand(make_division: Any, small_disk: Path) -> None:
    images, table = make_division([f"{number}.png" for number in range(120)])
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (600, 600), dtype=np.uint8))
    noise.save(images / "0.png")
    for path in images.iterdir():
        path.write_bytes((images / "0.png").read_bytes())
    with pytest.raises(UserError, match=rf"{small_disk}.* bytes are needed for 120 images, [\d,]+ are free"):
        preprocess.main(["--div", "b", "--images", str(images), "--csv", str(table), "--out", str(small_disk / "out")])
    assert not list((small_disk / "out").glob("*.tar"))


def test_a_disk_that_fills_up_is_named_and_what_was_written_counts(make_division: Any, small_disk: Path) -> None:
    images, table = make_division([f"{number}.png" for number in range(80)])
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (600, 600), dtype=np.uint8))
    noise.save(images / "1.png")
    for number in range(80):
        if number % 10:  # the images that are probed beforehand stay small
            (images / f"{number}.png").write_bytes((images / "1.png").read_bytes())
    out = small_disk / "out"
    arguments = ["--div", "b", "--images", str(images), "--csv", str(table), "--rows-per-shard", "8", "--workers", "2"]
    (small_disk / "ballast").write_bytes(bytes(5_000_000))
    with pytest.raises(UserError, match=rf"{small_disk}\S*: the disk is full \([\d,]+ bytes free in"):
        preprocess.main([*arguments, "--out", str(out)])
    finished = bytes_of_tars(out)
    assert finished
    assert not list(out.rglob("*.tmp"))
    (small_disk / "ballast").unlink()
    subprocess.run(["mount", "-o", "remount,size=60m", str(small_disk)], check=True)
    preprocess.main([*arguments, "--out", str(out)])
    assert finished.items() <= bytes_of_tars(out).items()
    verify(out, "train", TASKS["b"], hashes=True)


def bytes_of_tars(folder: Path) -> dict[str, str]:
    return {name: value for name, value in bytes_of(folder).items() if name.endswith(".tar")} if folder.exists() else {}
