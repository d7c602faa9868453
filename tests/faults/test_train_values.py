"""FAULTS 2, 13, 23, 30, 31, 34: bad numbers, full disks, another recipe, other labels, a class nobody has."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from cxrdist import recipes
from cxrdist import train as train_entry
from cxrdist.errors import UserError
from cxrdist.files import folder_lock
from cxrdist.runs import checkpoint, member
from cxrdist.shards.convert import Pixels
from cxrdist.shards.index import open_index
from cxrdist.shards.writer import Source, SplitJob, write_split
from cxrdist.task import TASKS
from tests import training_runs
from tests.training import worker  # noqa: F401, which adds the tiny recipes

pytestmark = pytest.mark.fault

VALIDATE = ["--validate-fold", "1", "--folds", "4"]


def in_process(shards: Path, run: Path, *flags: str, model: str = "tiny_chexfound") -> None:
    command = [*training_runs.FLAGS, "--model", model, "--shards", str(shards), "--out", str(run), "--wandb", "off"]
    train_entry.main([*command, *flags])


def make_shards(folder: Path, targets: np.ndarray, patients: int = 6) -> Path:
    sources = []
    rng = np.random.default_rng(0)
    for number, row in enumerate(targets):
        path = folder / "images" / f"{number % patients:08d}_001_{number:03d}.png"
        path.parent.mkdir(exist_ok=True, parents=True)
        noise = Image.fromarray(rng.integers(0, 255, (30, 30), dtype=np.uint8))
        noise.resize((600, 600), Image.Resampling.BILINEAR).save(path, compress_level=1)
        size, patient = path.stat().st_size, path.name[:8]
        labels = tuple(int(value) for value in row)
        sources.append(Source(number, path.name, str(path), size, "", patient, "001", targets=labels))
    write_split(SplitJob(folder / "div_b", TASKS["b"], "train", sources, Pixels(), 24, {}))
    return folder / "div_b"


def finite(run: Path) -> bool:
    files = list((run / "checkpoints").glob("*/*.safetensors"))
    tensors = [(name, tensor) for file in files for name, tensor in load_file(file).items()]
    return bool(tensors) and all(bool(t.isfinite().all()) for name, t in tensors if name != "counter/grad_norm")


def test_a_nan_on_one_rank_makes_all_skip_the_same_step(uneven_shards, tmp_path):
    import tests.training.worker  # noqa: F401  registers the small recipes

    index = open_index(uneven_shards, "train")
    recipe = recipes.RECIPES["tiny_chexfound"]("b")
    plan = train_entry.order.train_batches(
        np.arange(48), seed=recipe.seed, epoch=1, global_batch_size=10, device_batch_size=5, rank=1, world_size=2
    )
    bad = int(next(micro for micro in plan if micro.step == 2).rows[1])
    fault = {"nan": {"rank": 1, "keys": [int(index.keys[bad])]}}
    ended = training_runs.train(uneven_shards, tmp_path, "--device-batch-size", "5", fault=fault)
    assert ended.code == 0, ended.output
    found = training_runs.rows(tmp_path)
    skipped = [row["step"] for row in found if row["loss"] is None]
    assert 8 in skipped  # epoch 2, step 3; in other epochs the image may be rank 0's
    assert found[-1]["skipped"] == len(skipped)
    assert f"rank 1: {index.image_names[bad]}" in ended.output
    assert finite(tmp_path)


def test_too_many_skips_in_a_row_stop_the_run_and_name_the_images(uneven_shards, tmp_path):
    index = open_index(uneven_shards, "train")
    fault = {"nan": {"rank": 1, "keys": index.keys.tolist()}}
    ended = training_runs.train(uneven_shards, tmp_path, "--max-skips", "3", fault=fault)
    assert ended.code != 0
    assert "3 steps in a row were skipped, up to step 3: non-finite logits on rank 1: 0000" in ended.output
    assert not any(row["loss"] is not None for row in training_runs.rows(tmp_path))


def test_a_streak_of_skips_that_ended_before_the_logged_row_counts(uneven_shards, tmp_path):
    import tests.training.worker  # noqa: F401  registers the small recipes

    index = open_index(uneven_shards, "train")
    recipe = recipes.RECIPES["tiny_chexfound"]("b")
    plan = train_entry.order.train_batches(
        np.arange(48), seed=recipe.seed, epoch=0, global_batch_size=10, device_batch_size=5, rank=1, world_size=2
    )
    bad = [int(index.keys[micro.rows[0]]) for micro in plan if micro.step < 3]
    flags = ["--device-batch-size", "5", "--log-every", "5", "--max-skips", "3"]
    ended = training_runs.train(uneven_shards, tmp_path, *flags, fault={"nan": {"rank": 1, "keys": bad}})
    assert ended.code != 0
    assert "3 steps in a row were skipped, up to step 5: non-finite logits on rank 1: 0000" in ended.output


def test_skipped_images_are_named_once_and_counted(uneven_shards, tmp_path, capsys, store_undecodable):
    shards = shutil.copytree(uneven_shards, tmp_path / "shards")
    (name,) = store_undecodable(shards, "train", [5])
    flags = ("--set", "epochs=2", "--set", "member_epochs=2", "--on-bad", "skip")
    in_process(shards, tmp_path / "run", *flags, "--max-unreadable", "1")
    printed = capsys.readouterr().out
    assert printed.count("leaves out") == 1
    assert f"rank 0 leaves out {name}: " in printed
    with pytest.raises(UserError, match=r"more than 0 images cannot be decoded .*though its bytes"):
        in_process(shards, tmp_path / "none", *flags, "--max-unreadable", "0")


def test_a_resumed_run_keeps_the_split_it_recorded(uneven_shards, tmp_path, monkeypatch):
    def other(*_):
        raise AssertionError("the split was drawn again")

    in_process(uneven_shards, tmp_path / "run", *VALIDATE, "--max-steps", "1")
    monkeypatch.setattr("cxrdist.data.selection.assign_folds", other)
    in_process(uneven_shards, tmp_path / "run", *VALIDATE, "--max-steps", "2", "--resume")
    (tmp_path / "run" / "split.csv").unlink()
    with pytest.raises(UserError, match=r"split\.csv: no such file"):
        in_process(uneven_shards, tmp_path / "run", *VALIDATE, "--resume")


@pytest.mark.parametrize(
    "flags",
    [
        ("--keep-steps", "0"),
        ("--log-every", "0"),
        ("--threads", "-1"),
        ("--device-batch-size", "0"),
        ("--max-steps", "x"),
        ("--checkpoint-minutes", "nan"),
        ("--folds", "1"),
    ],
)
def test_an_impossible_number_is_named_before_anything_is_read(tmp_path, capsys, flags):
    with pytest.raises(SystemExit, match="2"):
        in_process(tmp_path / "none", tmp_path / "run", *flags)
    assert f"argument {flags[0]}: {flags[1]!r} is not a" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_overflowing_loss_scale_backs_off_and_nothing_else_moves(uneven_shards, tmp_path):
    ended = training_runs.train(
        uneven_shards, tmp_path, "--set", "epochs=2", "--set", "member_epochs=2", fault={"loss_scale": 2.0**70}
    )
    assert ended.code == 0, ended.output
    found = training_runs.rows(tmp_path)
    skipped = found[-1]["skipped"]
    assert 0 < skipped < 10
    assert found[-1]["loss_scale"] == 2.0 ** (70 - skipped)
    warmup = [row["lr/glori"] for row in found[: skipped + 3]]
    assert warmup[:skipped] == [warmup[0]] * skipped  # the schedule waits for the first step that is taken
    assert warmup[skipped] > warmup[0]
    state = load_file(checkpoint.step_folders(tmp_path)[0] / "loop.safetensors")
    assert float(state["ema_num_updates"]) == 10 - skipped
    assert finite(tmp_path)


def test_a_class_without_positives_in_validation_has_no_auroc_and_the_run_goes_on(tmp_path):
    rng = np.random.default_rng(1)
    targets = rng.random((32, 14)) < 0.4
    targets[:, 5] = False
    shards = make_shards(tmp_path, targets)
    in_process(shards, tmp_path / "run", *VALIDATE, "--set", "epochs=1", "--set", "member_epochs=1")
    (row,) = training_runs.rows(tmp_path / "run", "validation")
    assert row["validation/auroc/Fracture"] is None
    assert row["validation/auroc_labels"].endswith(" of 14")
    assert int(row["validation/auroc_labels"].split()[0]) <= 13
    assert 0.0 <= row["validation/auroc_macro"] <= 1.0


@pytest.fixture
def begun(uneven_shards, tmp_path) -> Path:
    in_process(uneven_shards, tmp_path / "run", *VALIDATE, "--set", "epochs=1", "--set", "member_epochs=1")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "epoch_01")  # as if it had been killed before its end
    return tmp_path / "run"


ONE = ("--set", "epochs=1", "--set", "member_epochs=1")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((*VALIDATE, *ONE, "--set", "ema_decay=0.5"), r"another recipe: ema_decay: 0.9 -> 0.5"),
        ((*ONE,), r"--folds 4, not None"),
        (("--validate-fold", "2", "--folds", "4", *ONE), r"--validate-fold 1, not 2"),
    ],
)
def test_resuming_with_something_else_names_it(uneven_shards, begun, flags, message):
    before = {path: path.stat().st_mtime_ns for path in begun.rglob("*") if path.is_file() and path.name != ".lock"}
    with pytest.raises(UserError, match=message):
        in_process(uneven_shards, begun, *flags, "--resume")
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_resuming_on_swapped_labels_names_the_labels(uneven_shards, begun, tmp_path):
    targets = open_index(uneven_shards, "train").targets[:][:, [1, 0, *range(2, 14)]]
    shards = make_shards(tmp_path / "other", targets)
    with pytest.raises(UserError, match=r"another shard set .*Atelectasis \d+ -> \d+, Cardiomegaly \d+ -> \d+"):
        in_process(shards, begun, *VALIDATE, *ONE, "--resume")


def test_shards_of_the_other_division_are_refused_before_anything_is_written(uneven_shards, tmp_path):
    flags = [
        *training_runs.FLAGS,
        "--model",
        "tiny_chexfound",
        "--shards",
        str(uneven_shards),
        "--out",
        str(tmp_path / "run"),
    ]
    flags[flags.index("b")] = "a"
    with pytest.raises(UserError, match=r"another task \(task a and b\)"):
        train_entry.main(flags)
    assert not (tmp_path / "run").exists()


def test_a_damaged_tar_header_is_named_before_anything_is_written(uneven_shards, tmp_path):
    shards = tmp_path / "div_b"
    shutil.copytree(uneven_shards, shards)
    with next(shards.glob("train-000001.tar")).open("r+b") as file:
        file.write(b"\xff" * 64)
    flags = [*training_runs.FLAGS, "--model", "demo_eva_x", "--shards", str(shards), "--out", str(tmp_path / "run")]
    with pytest.raises(UserError, match=r"train-000001\.tar: damaged: 000000\d\d\.jpg should be at byte 0"):
        train_entry.main(flags)
    assert not (tmp_path / "run").exists()


def test_a_used_folder_needs_resume_and_a_second_run_waits_outside(uneven_shards, begun):
    with pytest.raises(UserError, match=r"unfinished run: --resume"):
        in_process(uneven_shards, begun, *VALIDATE, *ONE)
    with folder_lock(begun):
        ended = training_runs.train(uneven_shards, begun, *VALIDATE, *ONE, "--resume", processes=1)
    assert ended.code == 2
    assert "is in use by another run (process" in ended.output
    in_process(uneven_shards, begun, *VALIDATE, *ONE, "--resume")
    assert (begun / "checkpoints" / "epoch_01").exists()


def test_fewer_processes_than_expected_end_before_anything_is_read(tmp_path):
    ended = training_runs.train(tmp_path / "none", tmp_path / "run", "--expect-processes", "2", processes=1)
    assert ended.code == 2
    assert "1 processes were started, 2 expected" in ended.output
    assert not (tmp_path / "run").exists()


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=7m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_named_and_the_checkpoints_before_it_stay_whole(uneven_shards, small_disk):
    run = small_disk / "run"
    flags = ["--checkpoint-minutes", "0", "--keep-steps", "50"]
    ended = training_runs.train(uneven_shards, run, *flags)
    assert ended.code != 0
    assert ended.output.count("give fewer --epochs, or --out on a larger disk") == 1
    assert re.search(
        r"error: \S+step_\d+\S*: .*(disk is full|No space left)[^\n]*[\d,]+ (bytes )?(are )?free", ended.output
    )
    newest, warnings = checkpoint.newest_step(run)
    assert newest is not None
    assert warnings == []
    assert not list((run / "checkpoints").glob(".*"))
    for folder in checkpoint.step_folders(run)[2:]:
        shutil.rmtree(folder)
    ended = training_runs.train(uneven_shards, run, "--resume")
    assert ended.code == 0, ended.output
    assert json.loads((run / "recipe.json").read_text())["epochs"] == 4


def test_the_frozen_backbone_is_checked_when_a_member_is_loaded(begun, uneven_shards):
    in_process(uneven_shards, begun, *VALIDATE, *ONE, "--resume")
    found = member.load_member(begun, 1)
    assert found.recipe.epochs == 1
    assert not found.model.training
    path = begun / "backbone.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"was trained on is not there, and .*backbone.safetensors is another"):
        member.load_member(begun, 1)
