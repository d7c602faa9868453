import errno
import re
import shutil
from pathlib import Path

import pytest
import torch

from cxrdist.errors import CheckpointError, UserError
from cxrdist.files import folder_lock
from cxrdist.runs import checkpoint, member
from cxrdist.runs.documents import FileEntry, Manifest
from cxrdist.task import TASKS

pytestmark = pytest.mark.fast


def write(run, name, value=1.0):
    folder = run / "checkpoints" / name
    manifest = Manifest(files={name: FileEntry(bytes=1, sha256="")})  # any document will do
    checkpoint.write_checkpoint(folder, {"model": {"w": torch.full((3,), value)}}, {"state": manifest})
    return folder


def test_what_was_written_comes_back(tmp_path):
    folder = write(tmp_path, "step_7", 2.5)
    checkpoint.check(folder)
    assert torch.equal(checkpoint.read_tensors(folder, "model")["w"], torch.full((3,), 2.5))
    assert list(Manifest.read(folder / "state.json").files) == ["step_7"]
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "model.safetensors", "state.json"]


def test_steps_are_ordered_by_number_and_only_the_newest_are_kept(tmp_path):
    for step in (9, 10, 100):
        write(tmp_path, f"step_{step}")
    (tmp_path / "checkpoints" / ".step_101.tmp").mkdir()
    assert [folder.name for folder in checkpoint.step_folders(tmp_path)] == ["step_100", "step_10", "step_9"]
    checkpoint.keep_newest_steps(tmp_path, 2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_10", "step_100"]


def test_an_existing_checkpoint_is_replaced_as_a_whole(tmp_path):
    write(tmp_path, "epoch_01", 1.0)
    folder = write(tmp_path, "epoch_01", 2.0)
    checkpoint.check(folder)
    assert checkpoint.read_tensors(folder, "model")["w"][0] == 2.0


def test_too_little_disk_is_told_by_what_the_checkpoints_will_take(tmp_path, monkeypatch):
    weights = {name: {"w": torch.zeros(100_000)} for name in ("model", "ema")}
    moments = {"w": torch.zeros(200_000)}  # of 100,000 parameters
    checkpoint.write_checkpoint(tmp_path / "checkpoints" / "epoch_01", weights, {})
    checkpoint.write_checkpoint(tmp_path / "checkpoints" / "step_1", weights | {"optimizer": moments}, {})
    epoch, step = (
        sum(file.stat().st_size for file in (tmp_path / "checkpoints" / name).iterdir())
        for name in ("epoch_01", "step_1")
    )
    need = 3 * epoch + 2 * step
    said = {}
    for share in (0.99, 1.01):
        usage = shutil._ntuple_diskusage(0, 0, round(share * need))
        monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _, usage=usage: usage)
        said[share] = checkpoint.disk_warning(tmp_path, weights, 100_000, 3, 2, "give fewer --epochs")
    assert said[1.01] == ""
    assert re.search(r"3 of epochs, 800,000 bytes .*2 of steps, 1,600,000 .*are free: give fewer --epochs", said[0.99])


def test_a_file_outside_the_checkpoint_is_not_read(tmp_path):
    folder = write(tmp_path, "step_1")
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace("state.json", "../state.json"))
    with pytest.raises(CheckpointError, match="missing"):
        checkpoint.check(folder)


def test_a_failed_write_leaves_the_one_before_and_no_rest(tmp_path, monkeypatch):
    write(tmp_path, "step_1")

    def full(*_):
        raise UserError("the disk is full")

    monkeypatch.setattr(checkpoint, "write_atomically", full)
    with pytest.raises(UserError, match="disk is full"):
        write(tmp_path, "step_2")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_1"]


def test_the_lock_is_for_one_and_leaves_no_empty_folder(tmp_path):
    run = tmp_path / "run"
    with folder_lock(run):
        with pytest.raises(UserError, match="in use by another run"), folder_lock(run):
            pass
        assert run.exists()
    assert not run.exists()


def test_a_folder_on_a_file_system_without_locks_can_be_used(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with folder_lock(tmp_path / "run"):
        assert (tmp_path / "run").exists()


def test_a_save_killed_while_it_replaces_a_checkpoint_loses_none(tmp_path, monkeypatch):
    write(tmp_path, "step_1")
    rename = Path.rename

    def killed(path, target):
        if path.name.endswith(".tmp"):
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, "step_1")
    monkeypatch.undo()
    assert checkpoint.newest_step(tmp_path) == (tmp_path / "checkpoints" / "step_1", [])
    write(tmp_path, "step_1")
    checkpoint.keep_newest_steps(tmp_path, 1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_1"]


def test_a_missing_epoch_names_those_that_are_there(tmp_path):
    from cxrdist import recipes

    (tmp_path / "recipe.json").write_text(recipes.to_json(recipes.eva_x("b")))
    (tmp_path / "task.json").write_text(TASKS["b"].to_json())
    write(tmp_path, "epoch_01")
    with pytest.raises(UserError, match="has epochs: 1"):
        member.load_member(tmp_path, 5)
    with pytest.raises(UserError, match="no such folder; give the folder of a run"):
        member.load_member(tmp_path / "nothing", 5)
