import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from cxrdist import recipes, train
from cxrdist.errors import UserError
from cxrdist.models.weights.layouts import read_weights
from cxrdist.runs import checkpoint, member
from cxrdist.runs.documents import RunDocument
from tests import training_runs

GOLDEN = Path(__file__).parent / "golden"
EVA_X = ["--set", "image_size=224", "--set", "model_kwargs=depth:2,embed_dim:48,num_heads:3"]
CHEXFOUND = [
    "--set",
    "image_size=96",
    "--set",
    "model_kwargs=decoder_dim:16,depth:8,embed_dim:32,num_heads:4,num_queries:40",
]
ONE_EPOCH = ["--set", "epochs=1", "--set", "member_epochs=1", "--set", "global_batch_size=16", "--wandb", "off"]


def start(shards: Path, run: Path, *flags: str) -> None:
    command = [flag for flag in training_runs.FLAGS if flag not in ("--init", "random")]
    train.main([*command, "--shards", str(shards), "--out", str(run), *ONE_EPOCH, *flags])


def test_eva_x_starts_from_the_official_layout(uneven_shards, tmp_path, capsys):
    run = tmp_path / "run"
    init = GOLDEN / "evax" / "base_mim.pt"
    start(uneven_shards, run, "--model", "eva_x", *EVA_X, "--init", str(init), "--max-steps", "1")
    assert "base_mim.pt" in capsys.readouterr().out
    assert RunDocument.read(run / "run.json").init == "base_mim.pt"
    step = checkpoint.read_tensors(run / "checkpoints" / "step_1", "model")
    official = torch.load(init, weights_only=True)["model"]
    assert torch.equal(step["cls_token"], official["cls_token"])  # frozen by the recipe
    moved = (step["blocks.0.norm1.weight"] - official["blocks.0.norm1.weight"]).abs().max()
    assert 0 < float(moved) < 2e-6  # one step at 1e-6


def test_chexfound_starts_from_two_files_and_names_its_backbone(uneven_shards, tmp_path):
    files = tmp_path / "official"
    files.mkdir()
    for name in ("teacher_checkpoint.pth", "glori.pth", "results_eval_linear.json"):
        shutil.copy(GOLDEN / "chexfound" / name, files / name)
    run = tmp_path / "run"
    start(uneven_shards, run, "--model", "chexfound", *CHEXFOUND, "--init", str(files))
    assert not (run / "backbone.safetensors").exists()
    meta = json.loads((run / "checkpoints" / "epoch_01" / "meta.json").read_text())
    assert meta["frozen"]["file"] == str(files / "teacher_checkpoint.pth")
    found = member.load_member(run, 1)
    model = found.model
    official = torch.load(files / "teacher_checkpoint.pth", weights_only=True)["teacher"]
    assert torch.equal(
        model.state_dict()["backbone.blocks.5.norm1.weight"], official["backbone.blocks.2.5.norm1.weight"]
    )
    assert found.architecture.frozen_names(model)
    (files / "teacher_checkpoint.pth").rename(files / "moved.pth")
    with pytest.raises(UserError, match=r"teacher_checkpoint.pth: the frozen backbone that .* is not there"):
        member.load_member(run, 1)
    again = member.load_member(run, 1, backbone=files / "moved.pth").model
    assert torch.equal(again.state_dict()["backbone.pos_embed"], model.state_dict()["backbone.pos_embed"])


def test_the_published_epoch_three_is_continued_as_epoch_four(uneven_shards, tmp_path):
    run = tmp_path / "run"
    init = GOLDEN / "chexfound" / "model3_finetuned.pth"
    four = ["--set", "epochs=4", "--set", "member_epochs=4", "--init", str(init), "--continue-init"]
    start(uneven_shards, run, "--model", "chexfound", *CHEXFOUND, *four, "--log-every", "1")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(row["epoch"], row["step"]) for row in rows if row["kind"] == "train"] == [(4, 10), (4, 11), (4, 12)]
    assert [path.name for path in (run / "checkpoints").glob("epoch_*")] == ["epoch_04"]
    found = read_weights(init)
    average = checkpoint.read_tensors(run / "checkpoints" / "epoch_04", "ema")["glori.layers.0.linear1.weight"]
    published = found.ema["glori.layers.0.linear1.weight"]
    assert not torch.equal(published, found.tensors["glori.layers.0.linear1.weight"])
    torch.testing.assert_close(average, published, rtol=0, atol=3 * 3.3e-4 * 3 * 2e-4)  # three steps, decay .99967
    before = found.optimizer["glori.layers.0.linear1.weight"]["step"]
    after = checkpoint.read_tensors(run / "checkpoints" / "step_12", "optimizer")["step/glori.layers.0.linear1.weight"]
    assert float(after) == float(before) + 3


def test_continuing_needs_a_file_with_the_state_of_its_training(uneven_shards, tmp_path):
    init = ["--init", str(GOLDEN / "evax" / "base_mim.pt"), "--continue-init"]
    with pytest.raises(UserError, match="holds no EMA and no optimizer state and no epoch"):
        start(uneven_shards, tmp_path / "run", "--model", "eva_x", *EVA_X, *init)


def test_without_init_the_missing_file_is_named_and_nothing_is_written(uneven_shards, tmp_path, monkeypatch):
    shards = uneven_shards.resolve()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"eva_x_base_patch16_merged520k_mim\.pt in weights/"):
        start(shards, tmp_path / "run", "--model", "eva_x")
    assert not (tmp_path / "run").exists()


def test_the_run_folder_says_what_ran_and_the_terminal_says_the_recipe_in_one_line(uneven_shards, tmp_path, capsys):
    run = tmp_path / "run"
    flags = ["--model", "eva_x", *EVA_X, "--init", "random", "--max-steps", "2", "--validate-fold", "0", "--folds", "3"]
    start(uneven_shards, run, *flags)
    (told,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("recipe "))
    assert told == f"{recipes.summary(member.read_recipe(run))} (all of it: {run / 'recipe.json'})"
    assert RunDocument.read(run / "run.json").init == "random"
    recipe = dataclasses.replace(recipes.eva_x("b"), image_size=224)
    assert {text.split(":")[0] for text in recipes.differences(recipe, member.read_recipe(run))} == {
        "epochs",
        "global_batch_size",
        "ema_decay",
        "model_kwargs",
    }
    (session,) = json.loads((run / "environment.json").read_text())["sessions"]
    assert (session["world_size"], session["precision"]) == (1, "fp32")
    assert torch.__version__.startswith(session["packages"]["torch"])
    assert (run / "split.csv").read_text().startswith("patient,fold\n")
    with pytest.raises(UserError, match="--resume continues it"):
        start(uneven_shards, run, *flags)
    start(uneven_shards, run, *flags, "--resume")
    assert len(json.loads((run / "environment.json").read_text())["sessions"]) == 2
