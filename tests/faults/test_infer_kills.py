"""FAULTS row 35: a killed rank, uneven shards on two processes, and images that cannot be read."""

import json
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest

from cxrdist.errors import UserError
from cxrdist.task import TASKS

pytestmark = pytest.mark.fault
LABELS = TASKS["b"].labels
NUM_IMAGES = 23
FILES = ("submission.csv", "scores/eva_x.csv", "scores/chexfound.csv")


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory) -> Path:
    """What one process writes when nothing happens."""
    out = tmp_path_factory.mktemp("undisturbed")
    world.run(out, "--template", str(world.template))
    return out


def assert_same(out: Path, wanted: Path) -> None:
    for name in FILES:
        assert (out / name).read_bytes() == (wanted / name).read_bytes(), name


def ranks_of(process) -> list[psutil.Process]:
    workers = psutil.Process(process.pid).children(recursive=True)
    return [worker for worker in workers if "cxrdist.infer" in " ".join(worker.cmdline())]


def parts_of(out: Path) -> list[Path]:
    return sorted(out.glob("parts/*/*.npz"))


@pytest.mark.parametrize("processes_after", [2, 1])
def test_after_a_killed_rank_no_result_lies_there_and_the_rerun_equals_an_undisturbed_run(
    world, infer_world, undisturbed, tmp_path, processes_after
):
    out, template = tmp_path / "out", ("--template", str(world.template), "--checkpoint-minutes", "0")
    with infer_world.launched(world.arguments(out, *template)) as process:
        deadline = time.monotonic() + 90
        while not parts_of(out) and time.monotonic() < deadline:
            time.sleep(0.001)
        victims = ranks_of(process)
        victims[-1].kill()
        started = time.monotonic()
        process.communicate(timeout=60)
        assert time.monotonic() - started < 30
        assert process.returncode != 0
        assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in victims)
    assert not (out / "submission.csv").exists()
    assert not (out / "scores").exists()
    saved = {path: path.stat().st_mtime_ns for path in parts_of(out)}
    assert 0 < len(saved) < 6
    if processes_after == 2:
        result = world.launch(out, *template)
        assert result.returncode == 0, result.stderr
        assert "resuming:" in result.stdout
    else:
        world.run(out, *template)
    assert_same(out, undisturbed)
    assert {path: path.stat().st_mtime_ns for path in saved} == saved, "finished batches are not scored again"
    names = pd.read_csv(out / "submission.csv")["Image_name"].tolist()
    assert names == pd.read_csv(world.template)["Image_name"].tolist()


def test_a_part_damaged_by_the_crash_is_scored_again(world, undisturbed, tmp_path):
    out, template = tmp_path / "out", ("--template", str(world.template), "--checkpoint-minutes", "0")
    world.run(out, *template)
    part = parts_of(out)[1]
    part.write_bytes(part.read_bytes()[:200])
    (out / "submission.csv").unlink()
    world.run(out, *template)
    assert_same(out, undisturbed)


@pytest.fixture
def undecodable(world, tmp_path, store_undecodable) -> tuple[Path, list[str]]:
    """A copy of the shards in which two images of different shards were stored as no JPEG, and their names."""
    shards = shutil.copytree(world.shards, tmp_path / "shards")
    return shards, store_undecodable(shards, "test", [2, NUM_IMAGES - 1])


def test_unreadable_images_are_named_counted_and_get_the_class_means_on_one_and_two_processes(
    world, undecodable, undisturbed, tmp_path, capsys
):
    shards, bad = undecodable
    flags = ("--template", str(world.template), "--max-unreadable", "3")
    world.run(tmp_path / "one", *flags, shards=shards)
    printed = capsys.readouterr().out
    result = world.launch(tmp_path / "two", *flags, shards=shards)
    assert result.returncode == 0, result.stderr
    for name in FILES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    for text in (printed, result.stdout):
        for name in bad:
            assert f"unreadable: {name}: " in text
        assert re.search(r"submission: .*, 24 images; 3 unreadable \(class means\): 0", text)
        assert re.search(r"inference took .*; 3 unreadable: 0", text.splitlines()[-1])
    rows = pd.read_csv(tmp_path / "one" / "submission.csv").set_index("Image_name")[list(LABELS)]
    complete = pd.read_csv(undisturbed / "submission.csv").set_index("Image_name")[list(LABELS)]
    fallback = [*bad, "00000099_001_001.jpg"]
    means = rows.drop(index=fallback).mean()
    for name in fallback:
        np.testing.assert_allclose(rows.loc[name], means, rtol=1e-5)
    np.testing.assert_allclose(rows.drop(index=fallback), complete.drop(index=fallback), atol=1e-6)
    meta = json.loads((tmp_path / "one" / "scores" / "eva_x.json").read_text())
    assert sorted(meta["unreadable"]) == sorted(fallback)


@pytest.mark.parametrize("most", [(), ("--max-unreadable", "2"), ("--max-unreadable", "8.3%")])
def test_more_unreadable_images_than_allowed_end_the_run_without_a_result(world, undecodable, tmp_path, most):
    """Of 24 images one was left out by preprocessing and two cannot be decoded; 1 % rounded up is one."""
    with pytest.raises(UserError, match=r"more than .* images cannot be decoded|of 24 images are unreadable"):
        world.run(tmp_path / "out", *most, "--checkpoint-minutes", "0", shards=undecodable[0])
    assert not (tmp_path / "out" / "submission.csv").exists()
    assert not (tmp_path / "out" / "scores").exists()


def test_a_source_with_too_many_unreadable_images_is_named_before_a_model_is_read(world, tmp_path):
    with pytest.raises(UserError, match=r"1 of 24 images are unreadable, more than 0, e\.g\. 00000099_001_001\.jpg: "):
        world.run(tmp_path / "out", "--max-unreadable", "0")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["-1", "101%", "nan%", "1.5", "%", "x"])
def test_what_is_no_number_and_no_share_of_images_is_named(world, tmp_path, text, capsys):
    with pytest.raises(SystemExit):
        world.run(tmp_path / "out", f"--max-unreadable={text}")
    assert "is neither a number of images, e.g. 20, nor a share, e.g. 1%" in capsys.readouterr().err
