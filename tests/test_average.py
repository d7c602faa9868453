"""Averaged weights: the mean, as a run folder that loads like any other."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from cxrdist import average
from cxrdist import train as train_entry
from cxrdist.errors import UserError
from cxrdist.recipes import Inference
from cxrdist.runs.checkpoint import read_tensors, write_checkpoint
from cxrdist.runs.documents import EpochMeta, RunDocument, read_versioned
from cxrdist.runs.member import load_member, read_task
from cxrdist.task import TASKS
from tests import training_runs
from tests.training import worker

VERSION_1 = Path(__file__).parent / "golden" / "version1"


@pytest.fixture(scope="module")
def run(uneven_shards, tmp_path_factory):
    assert worker.tiny_chexfound("b").name == "tiny_chexfound"  # the import registers the recipe
    folder = tmp_path_factory.mktemp("average") / "run"
    flags = ["--shards", str(uneven_shards), "--out", str(folder), "--wandb", "off", "--set", "epochs=3"]
    flags += ["--set", "member_epochs=2,3"]
    train_entry.main([*training_runs.FLAGS, "--model", "tiny_chexfound", *flags])
    return folder


def test_the_average_is_the_mean_and_loads_like_a_member(run, tmp_path, capsys):
    average.main(["--from", f"{run}@2,3", "--out", str(tmp_path / "mean")])
    assert "the mean of 2 checkpoints" in capsys.readouterr().out
    mean = load_member(tmp_path / "mean", 3)
    assert mean.recipe.inference == Inference(views=mean.recipe.inference.views, member_epochs=(3,))
    assert mean.meta.averaged == tuple(f"{run.resolve()}@{epoch}" for epoch in (2, 3))
    assert read_task(tmp_path / "mean") == TASKS["b"]
    assert RunDocument.read(tmp_path / "mean" / "run.json").data == mean.meta.data
    trained = mean.architecture.trained_state_dict
    parts = [trained(load_member(run, epoch).model) for epoch in (2, 3)]
    for name, tensor in trained(mean.model).items():
        torch.testing.assert_close(tensor, (parts[0][name] + parts[1][name]) / 2, rtol=1e-6, atol=1e-7)
    original = load_member(run, 3).model.state_dict()
    frozen = mean.architecture.frozen_names(mean.model)
    assert all(torch.equal(mean.model.state_dict()[name], original[name]) for name in frozen)


def test_what_cannot_be_averaged_is_named(run, tmp_path):
    for text, message in (
        (f"{run}@3", "at least two"),
        (f"{run}@3,9", "has epochs: 1, 2, 3"),
        (str(run), "RUN@EPOCHS"),
    ):
        with pytest.raises(UserError, match=message):
            average.main(["--from", text, "--out", str(tmp_path / "mean")])
    assert not (tmp_path / "mean").exists()
    with pytest.raises(UserError, match="lies in an input folder"):
        average.main(["--from", f"{run}@2,3", "--out", str(run)])
    other = tmp_path / "other"
    shutil.copytree(run, other)
    (other / "task.json").write_text(TASKS["a"].to_json())
    meta = other / "checkpoints" / "epoch_03" / "meta.json"
    changed = dataclasses.replace(EpochMeta.read(meta), task=TASKS["a"])
    write_checkpoint(meta.parent, {"ema": read_tensors(meta.parent, "ema")}, {"meta": changed})
    with pytest.raises(UserError, match="cannot be averaged: task b and a"):
        average.main(["--from", f"{run}@2", "--from", f"{other}@3", "--out", str(tmp_path / "mean")])


def test_a_version_1_run_averages_to_the_same_bits_and_a_version_1_average_loads(tmp_path):
    run = VERSION_1 / "run_full_chexfound"
    average.main(["--from", f"{run}@1,2", "--out", str(tmp_path / "mean")])
    for name in ("ema.safetensors", "model.safetensors"):
        path = Path("checkpoints", "epoch_02", name)
        assert (tmp_path / "mean" / path).read_bytes() == (VERSION_1 / "average" / path).read_bytes()
    new, old = load_member(tmp_path / "mean", 2), load_member(VERSION_1 / "average", 2)
    assert new.task == old.task == TASKS["b"]
    own = old.model.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in new.model.state_dict().items())


def test_runs_of_different_folds_average_without_a_claim_on_any(tmp_path):
    one, other = VERSION_1 / "run_full_eva_x", tmp_path / "other"
    shutil.copytree(one, other)
    folder = other / "checkpoints" / "epoch_02"
    old = read_versioned(EpochMeta, folder / "meta.json")
    meta = dataclasses.replace(old, format_version=2, data=dataclasses.replace(old.data, validate_fold=1))
    write_checkpoint(folder, {"ema": read_tensors(folder, "ema")}, {"meta": meta})
    average.main(["--from", f"{one}@2", "--from", f"{other}@2", "--out", str(tmp_path / "mean")])
    assert load_member(tmp_path / "mean", 2).meta.data is None
