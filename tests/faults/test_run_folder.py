"""A run saves and ends only in the folder that carries its id, writes through no link, and works without locks."""

import contextlib
import errno
import fcntl
import io
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cxrdist import files, train
from cxrdist.errors import UserError
from cxrdist.recipes import RECIPES
from cxrdist.runs import checkpoint, member, start
from cxrdist.runs.checkpoint import RunFolder
from cxrdist.training.tracking import Tracker, cut_metrics
from tests import training_runs

TINY = ["--set", "image_size=64", "--set", "global_batch_size=16", "--set", "epochs=1", "--set", "member_epochs=1"]
CHEXFOUND = ["--set", "model_kwargs=decoder_dim:16,depth:8,embed_dim:32,num_heads:4,num_queries:40"]


def run_of(shards: Path, out: Path, *more: str) -> None:
    flags = ["--shards", str(shards), "--out", str(out), "--wandb", "off", "--model", "chexfound"]
    train.main([*training_runs.FLAGS, *flags, *TINY, *CHEXFOUND, *more])


@pytest.fixture
def folder(tmp_path: Path) -> Any:
    """A run folder with an id, and what its process knows of it."""
    run = tmp_path / "run"
    with files.folder_lock(run) as holder:
        (run / "run.json").write_text(RUN.replace("ID", "one"))
        (run / "recipe.json").write_text("{}")
        yield RunFolder(path=run, id="one", holder=holder, state=None, meta=None, keep_steps=1)  # type: ignore[arg-type]


RUN = """{"format_version": 2, "id": "ID", "data": {"task": "b", "split": "train", "shards": "x", "images": 1,
"positives": {}, "folds": null, "validate_fold": null, "valid_shards": ""}}"""


def removed(run: Path) -> None:
    shutil.rmtree(run)


def emptied(run: Path) -> None:
    removed(run)
    run.mkdir()


def of_another_run(run: Path) -> None:
    (run / "run.json").write_text(RUN.replace("ID", "two"))


def taken(run: Path) -> None:
    (run / files.LOCK_FILE).write_text("process 1 on another machine, 0123")


def unlocked(run: Path) -> None:
    (run / files.LOCK_FILE).unlink()


@pytest.mark.parametrize("change", [removed, emptied, of_another_run, taken, unlocked])
@pytest.mark.parametrize("during", [False, True])
def test_a_save_names_a_folder_that_is_not_the_one_begun(
    folder: RunFolder, change: Any, during: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.require_same()
    written = []

    def write(path: Path, *_: Any) -> None:
        written.append(path)
        if during:
            change(folder.path)

    monkeypatch.setattr(checkpoint, "write_checkpoint", write)
    monkeypatch.setattr(checkpoint.dataclasses, "replace", lambda meta, **_: type("Meta", (), {"epoch": 1}))
    if not during:
        change(folder.path)
    with pytest.raises(UserError, match=r"while the run was at work: nothing more is saved"):
        folder.save_epoch({})
    assert len(written) == during


def test_a_log_that_was_removed_or_replaced_is_named(tmp_path: Path) -> None:
    for change in (lambda path: path.unlink(), lambda path: files.write_atomically(path, "")):
        with Tracker(tmp_path) as tracker:
            tracker.metrics({"step": 1})
            change(tmp_path / "metrics.jsonl")
            with pytest.raises(UserError, match=r"metrics\.jsonl was removed or replaced"):
                tracker.metrics({"step": 2})
            with pytest.raises(UserError, match=r"metrics\.jsonl was removed or replaced"):
                tracker.metrics_bytes()


@pytest.mark.parametrize("name", sorted(start.RUN_FILES))
def test_nothing_is_written_through_a_link_in_a_run_folder(name: str, tmp_path: Path) -> None:
    run, victim = tmp_path / "run", tmp_path / "victim"
    run.mkdir()
    victim.write_text("mine\n")
    (run / name).symlink_to(victim)
    with pytest.raises(UserError, match="is a symbolic link"):
        start.check_folder(run, tmp_path / "shards")
    if name == files.LOCK_FILE:
        with pytest.raises(UserError, match="is a symbolic link"), files.folder_lock(run):
            pass
    if name in ("metrics.jsonl", "timings.jsonl"):
        with pytest.raises(UserError, match="is a symbolic link"), Tracker(run):
            pass
    if name == "metrics.jsonl":
        with pytest.raises(UserError, match="is a symbolic link"):
            cut_metrics(run, 0)
    assert victim.read_text() == "mine\n"


def test_a_run_does_not_begin_over_foreign_files_or_among_the_shards(tmp_path: Path) -> None:
    shards, run = tmp_path / "shards", tmp_path / "run"
    for folder in (shards, run):
        folder.mkdir()
    (run / "notes.txt").write_text("mine")
    start.check_folder(run, shards)
    for name in set(start.RUN_FILES) - {"run.json", "recipe.json", files.LOCK_FILE}:
        (run / name).write_text("mine")
        with pytest.raises(UserError, match=f"{name}: is there and of no run"):
            start.check_folder(run, shards)
        (run / "run.json").write_text(RUN)  # a start of cxrdist that was interrupted
        start.check_folder(run, shards)
        (run / "run.json").write_text("mine")
        with pytest.raises(UserError, match=r"run\.json"):
            start.check_folder(run, shards)
        for there in (name, "run.json"):
            (run / there).unlink()
    for out in (shards, shards / "run"):
        with pytest.raises(UserError, match=r"is an input|lies in an input folder"):
            start.check_folder(out, shards)


def test_file_systems_without_locks_and_folder_sync_work_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    def flock(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(fcntl, "flock", flock)
    files.warn_once.cache_clear()
    run = tmp_path / "run"
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(files.folder_lock(run))
        files.write_atomically(run / "recipe.json", "{}")
        files.write_atomically(run / "run.json", RUN)
        told = capsys.readouterr().err
        assert told.count("cannot lock: start no second command") == told.count("cannot sync a folder") == 1
        assert files.is_held(run, first)
        second = stack.enter_context(files.folder_lock(run))  # which a lock would have refused
        assert files.is_held(run, second)
        with pytest.raises(UserError, match="another process took the folder"):
            RunFolder(path=run, id="ID", holder=first, state=None, meta=None, keep_steps=1).require_same()  # type: ignore[arg-type]


def test_a_lock_on_a_full_disk_holds_without_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    class Full(io.FileIO):
        write = full

    monkeypatch.setattr(files.io, "FileIO", Full)
    with files.lock(tmp_path / ".lock", wait=False, message="") as holder:
        assert holder == ""
        assert files.is_held(tmp_path, holder)


def test_a_start_killed_before_recipe_json_leaves_no_frozen_weights_for_another_seed(
    uneven_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "chexfound" in RECIPES
    run, other = tmp_path / "run", tmp_path / "other"

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(start, "write_start", killed)
        with pytest.raises(KeyboardInterrupt):
            run_of(uneven_shards, run, "--max-steps", "1", "--set", "seed=1")
    left = (run / member.BACKBONE_FILE).read_bytes()
    assert not (run / "recipe.json").exists()
    for out in (run, other):
        run_of(uneven_shards, out, "--set", "seed=2")
    assert (run / member.BACKBONE_FILE).read_bytes() == (other / member.BACKBONE_FILE).read_bytes() != left
    one, two = (member.load_member(out, 1).model.state_dict() for out in (run, other))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.fault
def test_a_run_whose_folder_is_removed_ends_named(uneven_shards: Path, tmp_path: Path, monkeypatch: Any) -> None:
    run, real = tmp_path / "run", RunFolder.save_step

    def save(self: RunFolder, *arguments: Any, **changes: Any) -> None:
        shutil.rmtree(run)
        real(self, *arguments, **changes)

    monkeypatch.setattr(RunFolder, "save_step", save)
    with pytest.raises(UserError, match="was removed or replaced"):
        run_of(uneven_shards, run)
    assert not (run / "checkpoints").exists()
