"""Inference end to end on a small division: one process against two, and what it refuses before computing."""

import dataclasses
import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from cxrdist import infer, recipes
from cxrdist.augment.views import VIEWS, make_views
from cxrdist.data.folds import write_split
from cxrdist.data.loader import Loader
from cxrdist.data.order import eval_batches
from cxrdist.distributed.group import out_of_memory_named
from cxrdist.errors import UserError
from cxrdist.inference import score
from cxrdist.inference.members import checkpoint_of, load_ensemble, parse_member
from cxrdist.inference.passes import plan_passes
from cxrdist.models import architecture_of
from cxrdist.recipes import recipe_for
from cxrdist.runs.checkpoint import read_tensors, write_checkpoint
from cxrdist.runs.documents import EpochMeta, Facts, read_versioned
from cxrdist.runs.member import load_member
from cxrdist.scoring.tables import ScoreTable, TableMeta, read_table, write_table
from cxrdist.shards.index import open_index
from cxrdist.task import TASKS

TASK = TASKS["b"]
LABELS = TASK.labels


def test_submission_has_the_templates_rows_and_the_plan_is_printed(world, tmp_path, capsys):
    world.run(tmp_path, "--template", str(world.template))
    printed = capsys.readouterr().out
    assert "11 backbone passes instead of 14" in printed
    assert "unreadable: 00000099_001_001.jpg: cannot identify image file" in printed
    result, template = pd.read_csv(tmp_path / "submission.csv"), pd.read_csv(world.template)
    assert result.columns.tolist() == template.columns.tolist()
    assert result["Image_name"].tolist() == template["Image_name"].tolist()
    assert len(result) == 24
    probs = result[list(LABELS)].to_numpy()
    assert ((probs > 0) & (probs < 1)).all()
    assert len(np.unique(probs[:, 0])) == 24


def test_two_processes_write_the_same_bytes_as_one(world, tmp_path):
    world.run(tmp_path / "one")
    result = world.launch(tmp_path / "two", "--expect-processes", "2")
    assert result.returncode == 0, result.stderr
    assert "2 processes on cpu, fp32" in result.stdout
    for name in ("submission.csv", "scores/eva_x.csv", "scores/chexfound.csv"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_models_that_take_turns_on_the_device_give_the_same_scores(world, tmp_path, monkeypatch):
    world.run(tmp_path / "resident")
    monkeypatch.setattr(score, "fits", lambda models, device: False)
    world.run(tmp_path / "turns")
    assert (tmp_path / "turns/submission.csv").read_bytes() == (tmp_path / "resident/submission.csv").read_bytes()


def test_scores_equal_a_plain_loop_over_epochs_and_views(world, tmp_path):
    """The published inference, as a loop: mean over six views, then over epochs, then over the two models."""
    world.run(tmp_path)
    index = open_index(world.shards, "test", TASK)
    with Loader(index) as loader:
        batches = list(loader.batches(eval_batches(np.arange(len(index)), 4, 0, 1)))
    tables = []
    for run, views in ((world.eva_x, VIEWS), (world.chexfound, ("plain",))):
        for epoch in (1, 2):
            member = load_member(run, epoch)
            recipe, model = member.recipe, member.model
            probs = []
            with torch.no_grad():
                for view in views:
                    inputs = (next(make_views(batch.images, (view,), recipe.image_size))[1] for batch in batches)
                    probs.append(torch.cat([model(x).sigmoid() for x in inputs]))
            tables.append(torch.stack(probs).mean(dim=0))
    wanted = torch.stack(tables).mean(dim=0).numpy()
    result = pd.read_csv(tmp_path / "submission.csv").set_index("Image_name").loc[list(index.image_names), list(LABELS)]
    np.testing.assert_allclose(result.to_numpy(), wanted, rtol=0, atol=5e-7)


def published_file(path, kind="eva_x_tiny", image_size=448):
    """A weight file as the published solution wrote it, of random weights, and its model."""
    torch.manual_seed(0)
    model = architecture_of(kind).build(image_size, TASK.num_labels)
    state = {f"backbone.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"epoch": 5, "ema_state_dict": state}, path)
    return model


def test_a_published_weight_file_is_a_member_and_equal_weights_are_one_checkpoint(tmp_path):
    recipe = recipe_for("eva_x_tiny", "b")
    for name in ("a.pth", "b.pth"):
        model = published_file(tmp_path / name)
    specs = [parse_member(f"eva_x_tiny={tmp_path / name}:plain") for name in ("a.pth", "b.pth")]
    ensemble = load_ensemble(specs, TASK)
    assert len(ensemble.models) == 1
    assert len(ensemble.members[0].checkpoints) == 2
    wanted = checkpoint_of("", recipe, model, ("plain",)).sha256
    assert list(ensemble.models) == [wanted]
    (only,) = plan_passes(ensemble.members)
    assert (only.view, only.image_size) == ("plain", 448)
    with pytest.raises(UserError, match="neither a run folder nor a weight file"):
        load_ensemble([parse_member("x=nothing.pth")], TASK)


def test_the_files_layout_decides_the_architecture_whatever_the_member_is_called(tmp_path):
    path = tmp_path / "weights.pth"
    published_file(path)
    for name in ("chexfound", "eva_x_224", "anything"):
        (member,) = load_ensemble([parse_member(f"{name}={path}")], TASK).members
        (checkpoint,) = member.checkpoints
        assert (member.name, checkpoint.model, checkpoint.image_size) == (name, "eva_x_tiny", 448)
        assert checkpoint.num_views == 6, "the published views of its own recipe"


def test_another_recipe_of_the_files_architecture_is_named_after_a_hash_sign(tmp_path, monkeypatch):
    path = tmp_path / "weights.pth"
    published_file(path, image_size=224)
    small = dataclasses.replace(recipe_for("eva_x_224", "b"), model="eva_x_tiny")
    monkeypatch.setitem(recipes.RECIPES, "tiny_224", lambda task: small)
    (member,) = load_ensemble([parse_member(f"eva_x={path}#tiny_224:plain*2")], TASK).members
    assert (member.checkpoints[0].image_size, member.checkpoints[0].num_views, member.weight) == (224, 1, 2.0)
    with pytest.raises(UserError, match="holds weights of eva_x_tiny, and recipes of that are eva_x_tiny, "):
        load_ensemble([parse_member(f"x={path}#chexfound")], TASK)


def test_heads_on_one_frozen_backbone_share_its_module(world):
    ensemble = load_ensemble([parse_member(f"chexfound={world.chexfound}@1,2")], TASK)
    first, second = ensemble.models.values()
    assert first is not second
    assert first.backbone is second.backbone


def test_the_shard_set_says_the_task_and_the_folder_of_the_results(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    infer.main(["--shards", str(world.shards), "--precision", "fp32", "--member", f"x={world.chexfound}@1"])
    table = read_table(tmp_path / "predictions" / "div_b" / "scores" / "x.csv")
    assert table.meta.task == TASK
    assert (tmp_path / "predictions" / "div_b" / "submission.csv").is_file()


def test_only_a_held_out_fold_is_scored_and_it_counts_as_out_of_fold_only_where_it_was_held_out(
    world, tmp_path, capsys
):
    index = open_index(world.shards, "train", TASK)
    run = tmp_path / "run"
    shutil.copytree(world.eva_x, run)
    folds = np.array([int(patient) % 3 for patient in index.patients])
    write_split(run / "split.csv", index.patients, folds)
    for folder in (run / "checkpoints").iterdir():
        facts = Facts(
            task="b", split="train", shards=index.fingerprint, images=23, positives={}, folds=3, validate_fold=1
        )
        meta = dataclasses.replace(read_versioned(EpochMeta, folder / "meta.json"), data=facts)
        write_checkpoint(folder, {"ema": read_tensors(folder, "ema")}, {"meta": meta})
    members = ["--member", f"eva_x={run}@1,2:plain"]
    for fold in (1, 2):
        world.run(tmp_path / str(fold), "--split", "train", "--fold", str(fold), members=members)
        table = read_table(tmp_path / str(fold) / "scores/eva_x.csv")
        assert table.image_names.tolist() == index.image_names[folds == fold].to_list()
        assert table.meta.out_of_fold is (fold == 1)
        warned = capsys.readouterr().out.count("warning: eva_x may have been trained on these images: ")
        assert warned == (fold != 1)
        assert not (tmp_path / str(fold) / "submission.csv").exists()
    with pytest.raises(UserError, match="add --split train"):
        world.run(tmp_path / "x", "--fold", "1", members=members)


def test_scores_of_another_split_or_shard_set_are_not_replaced(world, tmp_path):
    index = open_index(world.shards, "train", TASK)
    path = tmp_path / "scores" / "m.csv"
    path.parent.mkdir()
    scored = [("test", index.fingerprint, "of split 'test'"), ("train", "0" * 64, "of another shard set")]
    for split, shards, told in [*scored, ("train", index.fingerprint, None), ("", "", None)]:
        meta = TableMeta(member="m", task=TASK, split=split, shards=shards)
        write_table(path, ScoreTable(np.array(["a"], object), np.zeros((1, len(LABELS)), np.float32), meta))
        score.check_same_images(path.parent, ["other"], index)
        if told is None:
            score.check_same_images(path.parent, ["m"], index)
            continue
        with pytest.raises(UserError, match=rf"m\.csv: holds scores {told}.*by --out"):
            score.check_same_images(path.parent, ["m"], index)
    write_table(path, ScoreTable(np.array(["a"], object), np.zeros((1, len(LABELS)), np.float32), meta))
    path.with_suffix(".json").write_text("{")
    score.check_same_images(path.parent, ["m"], index)


def test_averaging_again_in_another_way_computes_no_pass(world, tmp_path, monkeypatch, capsys):
    world.run(tmp_path)
    plain = (tmp_path / "submission.csv").read_bytes()
    monkeypatch.setattr(score, "run_passes", None)
    for flags in (("--average", "logit"), ("--average", "rank"), ("--average-studies",)):
        world.run(tmp_path, *flags)
        assert (tmp_path / "submission.csv").read_bytes() != plain
    world.run(tmp_path)
    assert (tmp_path / "submission.csv").read_bytes() == plain
    assert "resuming: 6 of 6 batches are scored already" in capsys.readouterr().out


def test_a_full_gpu_is_named_with_the_flag_that_helps():
    message = "out of memory on cpu with 64 images at once; use --device-batch-size 32 with which"
    with pytest.raises(UserError, match=message), out_of_memory_named(torch.device("cpu"), 64, "with which"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
