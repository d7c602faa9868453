"""FAULTS 14-17, 21, 22: killed anywhere, a run goes on and ends as if nothing had happened."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cxrdist.runs import checkpoint
from tests import training_runs

pytestmark = pytest.mark.fault

# dropout on, a validation fold, 4 epochs of 4 steps (36 of 48 images), a checkpoint after every step
FLAGS = [
    "--validate-fold",
    "1",
    "--folds",
    "4",
    "--checkpoint-minutes",
    "0",
    "--device-batch-size",
    "3",
    "--keep-steps",
    "3",
]


def train(shards: Path, run: Path, *more: str, **options) -> training_runs.Ended:
    return training_runs.train(shards, run, *FLAGS, *more, **options)


@pytest.fixture(scope="module")
def undisturbed(uneven_shards, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    ended = train(uneven_shards, run)
    assert ended.code == 0, ended.output
    return run


def running_with(run: Path) -> list[str]:
    found = subprocess.run(["pgrep", "-f", str(run)], capture_output=True, text=True, check=False)
    return found.stdout.split()


def test_five_kills_later_the_run_is_the_undisturbed_one_bit_for_bit(uneven_shards, undisturbed, tmp_path):
    run = tmp_path / "run"
    kills = [
        {"rank": 1, "at": "step", "count": 2},  # in epoch 1 ...
        {"rank": 0, "at": "step", "count": 2},  # ... and again
        {"rank": 0, "at": "validate", "count": 1},
        {"rank": 0, "at": "file", "count": 6},  # in the middle of a checkpoint
        {"rank": 1, "at": "save_epoch", "count": 1},  # at an epoch's end
    ]
    for kill in kills:
        begun = time.monotonic()
        ended = train(uneven_shards, run, "--resume", fault={"kill": kill})
        assert ended.code != 0, f"{kill} did not happen: {ended.output}"
        assert time.monotonic() - begun < 60
        for folder in checkpoint.step_folders(run):
            checkpoint.check(folder)
    ended = train(uneven_shards, run, "--resume")
    assert ended.code == 0, ended.output
    assert "resuming from" in ended.output
    training_runs.assert_same_result(run, undisturbed)


def test_a_run_in_windows_that_is_killed_and_resumed_on_other_ranks_is_the_undisturbed_one(uneven_shards, tmp_path):
    flags = ["--set", "shuffle_window=2"]
    assert train(uneven_shards, tmp_path / "whole", *flags).code == 0
    for kill in ({"rank": 1, "at": "step", "count": 3}, {"rank": 0, "at": "step", "count": 4}, None):
        ended = train(uneven_shards, tmp_path / "run", *flags, "--resume", fault={"kill": kill} if kill else {})
        assert (ended.code == 0) == (kill is None), ended.output
    training_runs.assert_same_result(tmp_path / "run", tmp_path / "whole")
    ended = train(uneven_shards, tmp_path / "run", "--resume")
    assert ended.code != 0
    assert "shuffle_window: 2 -> None" in ended.output


def test_a_run_from_before_there_were_windows_resumes(uneven_shards, undisturbed, tmp_path):
    run = tmp_path / "run"
    ended = train(uneven_shards, run, "--max-steps", "3")
    assert ended.code == 0, ended.output
    recipe = json.loads((run / "recipe.json").read_text())
    assert recipe.pop("shuffle_window", "there") is None
    (run / "recipe.json").write_text(json.dumps(recipe))
    assert train(uneven_shards, run, "--resume").code == 0
    training_runs.assert_same_result(run, undisturbed)


def test_three_ranks_resume_bit_for_bit_although_their_sums_have_an_order(uneven_shards, tmp_path):
    flags = ["--set", "epochs=2", "--set", "member_epochs=2"]
    for name, kill in (("whole", None), ("run", {"rank": 2, "at": "step", "count": 3}), ("run", None)):
        fault = {"kill": kill} if kill else {}
        ended = train(uneven_shards, tmp_path / name, *flags, "--resume", processes=3, model="tiny_eva_x", fault=fault)
        assert (ended.code == 0) == (kill is None), ended.output
    training_runs.assert_same_result(tmp_path / "run", tmp_path / "whole")


def test_the_run_itself_is_reproducible(uneven_shards, undisturbed, tmp_path):
    assert train(uneven_shards, tmp_path / "run").code == 0
    training_runs.assert_same_result(tmp_path / "run", undisturbed)


def test_a_killed_rank_ends_the_others_within_30_s_and_leaves_no_process(uneven_shards, tmp_path):
    process = training_runs.start(
        uneven_shards, tmp_path, *FLAGS, fault={"kill": {"rank": 1, "at": "step", "count": 3}}
    )
    killed_at = None
    while process.poll() is None:
        if killed_at is None and (tmp_path / "checkpoints" / "step_2").exists():
            killed_at = time.monotonic()
        time.sleep(0.1)
    assert killed_at is not None
    assert time.monotonic() - killed_at < 30
    time.sleep(1)
    assert running_with(tmp_path) == []
    ended = training_runs.finish(process)
    assert ended.code != 0
    newest, warnings = checkpoint.newest_step(tmp_path)
    assert newest is not None
    assert warnings == []


@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.safetensors", "loop.safetensors", "state.json", "manifest.json"]
)
@pytest.mark.parametrize("damage", ["cut", "deleted", "flipped"])
def test_a_damaged_checkpoint_is_passed_over(undisturbed, tmp_path, file, damage):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    newest, before = checkpoint.step_folders(run)[:2]
    path = newest / file
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        path.write_bytes(content[:-20] + bytes([content[-20] ^ 1]) + content[-19:])
    else:
        path.unlink()
    found, warnings = checkpoint.newest_step(run)
    assert found == before
    assert len(warnings) == 1
    assert file in warnings[0] or file == "manifest.json"  # a changed hash there points at the file it is of


def test_resuming_past_a_damaged_checkpoint_repeats_only_what_it_held(uneven_shards, undisturbed, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    shutil.rmtree(run / "checkpoints" / "epoch_04")
    newest = checkpoint.step_folders(run)[0]
    (newest / "loop.safetensors").unlink()
    ended = train(uneven_shards, run, "--resume")
    assert ended.code == 0, ended.output
    assert "loop.safetensors is missing; going back" in ended.output
    training_runs.assert_same_result(run, undisturbed)


def test_another_number_of_processes_goes_on_with_the_same_global_batches(uneven_shards, tmp_path):
    flags = ["--set", "drop_rate=0", "--set", "clip_grad_norm=none"]
    whole = tmp_path / "whole"
    assert train(uneven_shards, whole, *flags).code == 0
    run = tmp_path / "run"
    for processes, stop_at in ((2, 5), (1, 5), (2, None)):
        fault = {} if stop_at is None else {"kill": {"rank": 0, "at": "step", "count": stop_at}}
        ended = train(uneven_shards, run, *flags, "--resume", processes=processes, fault=fault)
        assert (ended.code == 0) == (stop_at is None), ended.output
    losses = [[row["loss"] for row in training_runs.rows(folder)] for folder in (run, whole)]
    assert len(losses[0]) == 16
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=0, atol=2e-5)
    epochs = [[row["epoch_loss"] for row in training_runs.rows(folder, "epoch")] for folder in (run, whole)]
    torch.testing.assert_close(torch.tensor(epochs[0]), torch.tensor(epochs[1]), rtol=0, atol=2e-5)
    for ours, theirs in zip(*(training_runs.rows(folder, "validation") for folder in (run, whole)), strict=True):
        assert ours["validation/images"] == theirs["validation/images"] == 8
        assert ours["validation/loss"] == pytest.approx(theirs["validation/loss"], abs=2e-5)
    ours, theirs = (load_file(folder / "checkpoints" / "epoch_04" / "ema.safetensors") for folder in (run, whole))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=5e-3 if "bias" in name else 1e-3)


def test_killed_after_each_file_of_a_checkpoint_one_is_always_whole(uneven_shards, tmp_path):
    run = tmp_path / "run"
    for at, count in [*(("file", count) for count in range(1, 10)), *(("document", count) for count in range(1, 5))]:
        kill = {"rank": 0, "at": at, "count": count}
        ended = train(uneven_shards, run, "--resume", processes=1, fault={"kill": kill})
        if at == "document" or count > 5:
            newest, _ = checkpoint.newest_step(run)
            assert newest is not None
        assert ended.code == -signal.SIGKILL, ended.output


def test_sigterm_leaves_a_checkpoint_and_the_run_goes_on(uneven_shards, undisturbed, tmp_path):
    run = tmp_path / "run"
    process = training_runs.start(uneven_shards, run, *FLAGS, "--checkpoint-minutes", "60", fault={"slow_s": 0.5})
    while not (run / "metrics.jsonl").exists() or len(training_runs.rows(run)) < 2:
        time.sleep(0.1)
        assert process.poll() is None
    os.kill(process.pid, signal.SIGTERM)
    ended = training_runs.finish(process)
    assert "stopped after step" in ended.output
    newest, _ = checkpoint.newest_step(run)
    assert newest is not None
    assert json.loads((newest / "state.json").read_text())["global_step"] < 16
    ended = train(uneven_shards, run, "--resume")
    assert ended.code == 0, ended.output
    training_runs.assert_same_result(run, undisturbed)
