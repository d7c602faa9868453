"""Inference end to end on a small division: one process against two, and what it refuses before computing."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from cxrdist import infer
from cxrdist.augment.views import VIEWS, make_views
from cxrdist.data.folds import write_split
from cxrdist.data.loader import Loader
from cxrdist.data.order import eval_batches
from cxrdist.errors import UserError
from cxrdist.inference.passes import parse_member, plan_passes
from cxrdist.labels import LABELS
from cxrdist.models import build_model
from cxrdist.recipes import recipe_for
from cxrdist.runs.checkpoint import load_member, read_tensors, write_checkpoint
from cxrdist.scoring.tables import read_table
from cxrdist.shards.index import open_index


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
    monkeypatch.setattr(infer, "fits", lambda models, device: False)
    world.run(tmp_path / "turns")
    assert (tmp_path / "turns/submission.csv").read_bytes() == (tmp_path / "resident/submission.csv").read_bytes()


def test_scores_equal_a_plain_loop_over_epochs_and_views(world, tmp_path):
    """The published inference, as a loop: mean over six views, then over epochs, then over the two models."""
    world.run(tmp_path)
    index = open_index(world.shards, "test", "b")
    with Loader(index) as loader:
        batches = list(loader.batches(eval_batches(np.arange(len(index)), 4, 0, 1)))
    tables = []
    for run, views in ((world.eva_x, VIEWS), (world.chexfound, ("plain",))):
        for epoch in (1, 2):
            recipe, model = load_member(run, epoch)
            probs = []
            with torch.no_grad():
                for view in views:
                    inputs = (next(make_views(batch.images, (view,), recipe.image_size))[1] for batch in batches)
                    probs.append(torch.cat([model(x).sigmoid() for x in inputs]))
            tables.append(torch.stack(probs).mean(dim=0))
    wanted = torch.stack(tables).mean(dim=0).numpy()
    result = pd.read_csv(tmp_path / "submission.csv").set_index("Image_name").loc[list(index.image_names), list(LABELS)]
    np.testing.assert_allclose(result.to_numpy(), wanted, rtol=0, atol=5e-7)


def test_a_published_weight_file_is_a_member_and_equal_weights_are_one_checkpoint(tmp_path):
    torch.manual_seed(0)
    recipe = recipe_for("eva_x_tiny", "b")
    model = build_model(recipe.model, recipe.image_size)
    state = {f"backbone.{name}": tensor for name, tensor in model.state_dict().items()}
    for name in ("a.pth", "b.pth"):
        torch.save({"epoch": 5, "ema_state_dict": state}, tmp_path / name)
    specs = [parse_member(f"eva_x_tiny={tmp_path / name}:plain") for name in ("a.pth", "b.pth")]
    ensemble = infer.load_ensemble(specs, "b")
    assert len(ensemble.models) == 1
    assert len(ensemble.members[0].checkpoints) == 2
    wanted = infer.checkpoint_of("", recipe, model, ("plain",)).sha256
    assert list(ensemble.models) == [wanted]
    (only,) = plan_passes(ensemble.members)
    assert (only.view, only.image_size) == ("plain", 448)
    with pytest.raises(UserError, match="neither a run folder nor a weight file"):
        infer.load_ensemble([parse_member("x=nothing.pth")], "b")


def test_a_held_out_fold_is_scored_alone_and_counts_as_out_of_fold_only_where_it_was_held_out(world, tmp_path):
    index = open_index(world.shards, "train", "b")
    run = tmp_path / "run"
    shutil.copytree(world.eva_x, run)
    folds = np.array([int(patient) % 3 for patient in index.patients])
    write_split(run / "split.csv", index.patients, folds)
    for folder in (run / "checkpoints").iterdir():
        meta = json.loads((folder / "meta.json").read_text())
        facts = {"validate_fold": 1, "shards": index.fingerprint}
        write_checkpoint(folder, {"ema": read_tensors(folder, "ema")}, {"meta": meta | {"data": facts}})
    members = ["--member", f"eva_x={run}@1,2:plain"]
    for fold in (1, 2):
        world.run(tmp_path / str(fold), "--split", "train", "--fold", str(fold), members=members)
        table = read_table(tmp_path / str(fold) / "scores/eva_x.csv")
        assert table.image_names.tolist() == index.image_names[folds == fold].tolist()
        assert table.meta["out_of_fold"] is (fold == 1)
        assert not (tmp_path / str(fold) / "submission.csv").exists()
    with pytest.raises(UserError, match="add --split train"):
        world.run(tmp_path / "x", "--fold", "1", members=members)


def test_averaging_again_in_another_way_computes_no_pass(world, tmp_path, monkeypatch, capsys):
    world.run(tmp_path)
    plain = (tmp_path / "submission.csv").read_bytes()
    monkeypatch.setattr(infer, "run_passes", None)
    for flags in (("--average", "logit"), ("--average", "rank"), ("--average-studies",)):
        world.run(tmp_path, *flags)
        assert (tmp_path / "submission.csv").read_bytes() != plain
    world.run(tmp_path)
    assert (tmp_path / "submission.csv").read_bytes() == plain
    assert "going on: 6 of 6 batches are scored already" in capsys.readouterr().out


def test_a_full_gpu_is_named_with_the_flag_that_helps():
    message = "out of memory with 64 images at once; use --device-batch-size 32"
    with pytest.raises(UserError, match=message), infer.named_out_of_memory(64):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
