"""Which weights and which recipe a member gets: EMA or raw, a run's or what lies beside a weight file."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

import cxrdist
from cxrdist import export
from cxrdist.errors import UserError
from cxrdist.inference.members import Ensemble, load_ensemble, parse_member, task_of_models
from cxrdist.inference.passes import describe_plan, plan_passes
from cxrdist.runs import checkpoint
from cxrdist.runs.documents import EpochMeta, Facts, RunDocument
from cxrdist.scoring.tables import read_table
from cxrdist.task import TASKS

TASK = TASKS["b"]
FACTS = Facts(task="b", split="train", shards="f", images=1, positives={}, folds=None, validate_fold=None)


@pytest.fixture(params=["eva_x", "chexfound"])
def run(request, world, tmp_path) -> Path:
    """A run with raw weights beside the EMA, as training writes it; the world's runs have an EMA alone."""
    folder = tmp_path / "runs" / f"{request.param}_b"
    shutil.copytree(getattr(world, request.param), folder)
    for epoch in (1, 2):
        place = checkpoint.epoch_folder(folder, epoch)
        ema, meta = checkpoint.read_tensors(place, "ema"), EpochMeta.read(place / "meta.json")
        raw = {name: tensor + 0.5 for name, tensor in ema.items()}
        checkpoint.write_checkpoint(place, {"ema": ema, "model": raw}, {"meta": meta})
    return folder


def load(*texts: str) -> Ensemble:
    return load_ensemble([parse_member(text) for text in texts], TASK)


def head_of(ensemble: Ensemble) -> torch.Tensor:
    (model,) = ensemble.models.values()
    return [*model.state_dict().values()][-1]


def test_raw_weights_are_scored_when_asked_and_said(run, world, tmp_path, capsys) -> None:
    ema, raw = load(f"x={run}@2"), load(f"x={run}@2:raw")
    torch.testing.assert_close(head_of(raw), head_of(ema) + 0.5)
    (item,) = raw.members[0].checkpoints
    assert (item.weights, raw.notes) == ("raw", [])
    assert "@2, raw weights" in describe_plan(raw.members, plan_passes(raw.members), 5)
    assert load(f"x={run}@2:plain:raw").members[0].checkpoints[0].sha256 == item.sha256
    world.run(tmp_path / "out", members=["--member", f"x={run}@1,2:plain:raw"])
    table = read_table(tmp_path / "out" / "scores" / "x.csv")
    assert [each.weights for each in table.meta.checkpoints] == ["raw", "raw"]


def test_a_bundle_of_raw_weights_says_so_and_what_they_say(run, tmp_path) -> None:
    member = f"x={run}@2:plain:raw"
    export.main([member, "--out", str(tmp_path / "model")])
    assert "| raw |" in (tmp_path / "model" / "README.md").read_text()
    bundle = cxrdist.load(tmp_path / "model", precision="fp32")
    image = torch.randint(0, 255, (90, 90), dtype=torch.uint8).numpy()
    wanted = cxrdist.load([member], precision="fp32").predict(image).probabilities
    assert bundle.predict(image).probabilities.tobytes() == wanted.tobytes()
    assert (
        cxrdist.load([f"x={run}@2:plain"], precision="fp32").predict(image).probabilities.tobytes() != wanted.tobytes()
    )


def test_weights_that_are_no_raw_ones_are_refused(run, world, tmp_path) -> None:
    place = checkpoint.epoch_folder(run, 2)
    with pytest.raises(UserError, match=r"ema\.safetensors holds EMA weights; leave out :raw"):
        load(f"x={place / 'ema.safetensors'}:raw")
    meta = dataclasses.replace(EpochMeta.read(place / "meta.json"), averaged=("a@1", "a@2"), weights="ema")
    tensors = {name: checkpoint.read_tensors(place, name) for name in ("ema", "model")}
    checkpoint.write_checkpoint(place, tensors, {"meta": meta})
    with pytest.raises(UserError, match="holds EMA weights; leave out :raw"):
        load(f"x={run}@2:raw")
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load(f"x={world.eva_x}@2:raw")  # has an EMA alone


def test_a_file_of_a_run_is_that_epoch_of_the_run(run, monkeypatch) -> None:
    wanted = {weights: load(f"x={run}@2{weights}") for weights in ("", ":raw")}
    place = checkpoint.epoch_folder(run, 2)
    for name, weights in (("ema", ""), ("model", ":raw")):
        file = place / f"{name}.safetensors"
        assert task_of_models([parse_member(f"x={file}")], None) == TASK
        found = load(f"x={file}")
        assert found.members == wanted[weights].members
        assert found.notes[0] == f"x: {file} is read with the recipe in {run / 'recipe.json'}"
    monkeypatch.chdir(place)
    assert load("x=ema.safetensors").members[0].checkpoints[0].sha256 == wanted[""].members[0].checkpoints[0].sha256


def test_a_copied_file_is_read_with_the_recipe_and_the_task_beside_it(run, tmp_path) -> None:
    home = tmp_path / "copied"
    home.mkdir()
    for path in (run / "recipe.json", run / "task.json", checkpoint.epoch_folder(run, 2) / "ema.safetensors"):
        shutil.copy(path, home)
    source = str(home / "ema.safetensors")
    if (run / "backbone.safetensors").exists():
        source += f",{run / 'backbone.safetensors'}"
    (wanted,) = load(f"x={run}@2").members[0].checkpoints
    found = load(f"x={source}")
    (item,) = found.members[0].checkpoints
    assert (item.sha256, item.image_size, item.views) == (wanted.sha256, wanted.image_size, wanted.views)
    assert (item.weights, item.task) == ("ema", "b")
    assert found.notes == [f"x: {source} is read with the recipe in {home / 'recipe.json'}"]
    other = json.loads((home / "task.json").read_text()) | {"name": "other"}
    (home / "task.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match="was trained for another task"):
        load(f"x={source}")
    (home / "task.json").unlink()
    assert load(f"x={source}").members[0].checkpoints[0].task == ""
    with pytest.raises(UserError, match="a weight file does not say its task; name it: --task"):
        task_of_models([parse_member(f"x={source}")], None)


def test_a_recipe_that_is_named_counts_more_than_the_one_beside_the_file(world, run) -> None:
    file = checkpoint.epoch_folder(run, 2) / "ema.safetensors"
    with pytest.raises(UserError, match=r"holds weights of|does not fit the model"):
        load(f"x={file}#eva_x_224")


@pytest.mark.parametrize(("init", "known"), [("random", True), ("eva_x_base.pt", False), ("", None)])
def test_a_member_knows_whether_its_run_began_from_random_weights(run, init, known) -> None:
    (run / "run.json").write_text(RunDocument(id="0", data=FACTS, init=init).to_json())
    found = load(f"x={run}@2").members[0].checkpoints[0].from_random
    wrote_a_random_backbone = (run / "backbone.safetensors").exists()  # where the run itself does not say it
    assert found is (wrote_a_random_backbone if known is None else known)
