"""Models of ten kinds go the whole way: train, resume, views, maps, an ensemble with the published pair."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cxrdist import evaluate, infer, recipes
from cxrdist import train as train_entry
from cxrdist.errors import UserError
from tests.training import worker
from tests.training_runs import FLAGS, assert_same_result, rows, train

KINDS = {  # a model, and what makes it small
    "timm:convnextv2_atto": (),
    "timm:test_efficientnet": (),
    "timm:test_resnet": ("sync_bn=true",),
    "timm:swin_tiny_patch4_window7_224": ("model_kwargs=embed_dim=24",),
    "timm:test_vit": (),
    "timm:vit_tiny_patch16_224": ("model_kwargs=depth=2,reg_tokens=4", "drop_path=0.2"),
    "timm:eva02_tiny_patch14_224": ("image_size=56", "model_kwargs=depth=2"),
    "timm:test_maxvit": (),
    "timm:regnetx_002": ("train=last:3",),
    "timm:mobilenetv3_small_050": ("train=head", "layer_decay=none"),
    "glori:vit_tiny_patch16_224": ("model_kwargs=depth=4,decoder_dim=16",),
    "rad_dino": ("image_size=56", "model_kwargs=depth=4,embed_dim=32,num_heads=2,decoder_dim=16"),
}
SMALL = ("image_size=64", "global_batch_size=10", "epochs=4", "member_epochs=3,4", "warmup_steps=2", "ema_decay=0.9")


def flags_of(model: str) -> tuple[str, ...]:
    return tuple(word for text in (*SMALL, *KINDS[model]) for word in ("--set", text))


def trained(shards: Path, run: Path, model: str, *flags: str) -> Path:
    """A run of 20 steps in this process."""
    where = ("--model", model, "--wandb", "off", "--shards", str(shards), "--out", str(run))
    train_entry.main([*FLAGS, *where, "--device-batch-size", "5", *flags])
    return run


@pytest.fixture(scope="module")
def runs(uneven_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    torch.set_num_threads(1)
    made = {model: trained(uneven_shards, folder / model.replace(":", "_"), model, *flags_of(model)) for model in KINDS}
    for model in ("tiny_eva_x", "tiny_chexfound"):
        made[model] = trained(uneven_shards, folder / model, model)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("model", KINDS)
def test_it_resumes_bit_for_bit(model: str, runs: dict[str, Path], uneven_shards: Path, tmp_path: Path) -> None:
    trained(uneven_shards, tmp_path / "parts", model, *flags_of(model), "--max-steps", "7")
    trained(uneven_shards, tmp_path / "parts", model, *flags_of(model), "--resume")
    assert_same_result(tmp_path / "parts", runs[model])
    assert len(rows(runs[model])) == 20


def two(model: str) -> object:
    """One kind is enough here; ALL_KINDS=1 in the environment takes them all, in a quarter of an hour."""
    skip = pytest.mark.skipif(model != "timm:test_resnet" and "ALL_KINDS" not in os.environ, reason="ALL_KINDS=1 only")
    return pytest.param(model, marks=skip)


@pytest.mark.slow
@pytest.mark.parametrize("model", map(two, KINDS))
def test_two_processes_learn_the_same_and_resume(model: str, uneven_shards: Path, tmp_path: Path) -> None:
    flags, losses = (*flags_of(model), "--device-batch-size"), {}
    for processes, size in ((1, "10"), (2, "5")):  # the same images a pass, which counts for sync_bn
        run = tmp_path / str(processes)
        ended = train(uneven_shards, run, *flags, size, model=model, processes=processes)
        assert ended.code == 0, ended.output
        losses[processes] = [row["loss"] for row in rows(run)]
    if model.startswith("timm:") and not any("drop" in text for text in KINDS[model]):  # masks go by rank
        assert losses[2] == pytest.approx(losses[1], rel=2e-4)
    for more in (("--max-steps", "7"), ("--resume",)):
        ended = train(uneven_shards, tmp_path / "parts", *flags, "5", *more, model=model)
        assert ended.code == 0, ended.output
    assert_same_result(tmp_path / "parts", tmp_path / "2")


@pytest.mark.slow
def test_all_are_scored_with_views_averaged_and_shown(
    runs: dict[str, Path], uneven_shards: Path, tmp_path: Path
) -> None:
    members = [word for model, run in runs.items() for word in ("--member", f"{run.name}={run}@3,4:tta")]
    infer.main(["--shards", str(uneven_shards), "--split", "train", "--out", str(tmp_path / "scored"), *members])
    tables = sorted((tmp_path / "scored" / "scores").glob("*.csv"))
    assert {table.stem for table in tables} == {run.name for run in runs.values()}
    shown = [word for run in runs.values() for word in ("--run", str(run))]
    where = ["--shards", str(uneven_shards), "--out", str(tmp_path / "report"), "--resamples", "20"]
    evaluate.main(["--scores", *map(str, tables), *shown, *where])
    page = (tmp_path / "report" / "report.html").read_text()
    for model, run in runs.items():
        title = "GLoRI attention" if model.startswith(("glori", "rad", "tiny_chexfound")) else "Grad-CAM"
        assert f"{title} of {run.name}@4" in page, model
    assert len(json.loads((tmp_path / "report" / "metrics.json").read_text())["scores"]) == len(runs) + 1


@pytest.mark.slow
def test_gradient_checkpointing_moves_synced_statistics_once(
    runs: dict[str, Path], uneven_shards: Path, tmp_path: Path
) -> None:
    model = "timm:test_resnet"
    run = trained(uneven_shards, tmp_path / "run", model, *flags_of(model), "--grad-checkpointing")
    assert_same_result(run, runs[model])


@pytest.mark.slow
def test_what_is_not_trained_stays_as_it_began(runs: dict[str, Path]) -> None:
    moved = {}
    for model in ("timm:mobilenetv3_small_050", "timm:regnetx_002", "timm:test_efficientnet", "timm:test_resnet"):
        first, last = (load_file(runs[model] / f"checkpoints/epoch_0{n}" / "model.safetensors") for n in (1, 4))
        moved[model] = {name for name, tensor in last.items() if not tensor.equal(first[name])}
    assert moved["timm:mobilenetv3_small_050"] == {"classifier.weight", "classifier.bias"}
    assert {name.split(".")[0] for name in moved["timm:regnetx_002"]} == {"s4", "head"}
    assert not any("running" in name for name in moved["timm:test_efficientnet"])
    assert any("running" in name for name in moved["timm:test_resnet"])


@pytest.mark.slow
def test_the_published_model_by_its_name_in_timm_learns_the_same_bits(
    uneven_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One mechanism: rows, order, augmentation and average are the recipe's, whatever the model is called."""

    def by_name(task: str) -> recipes.Recipe:
        return dataclasses.replace(worker.tiny_eva_x(task), model="timm:eva_x_base_patch16", drop_rate=0.0)

    monkeypatch.setitem(recipes.RECIPES, "by_name", by_name)
    theirs = trained(uneven_shards, tmp_path / "theirs", "by_name")
    assert_same_result(theirs, trained(uneven_shards, tmp_path / "ours", "tiny_eva_x"))


def test_a_model_that_does_not_fit_is_named_before_anything_is_written(uneven_shards: Path, tmp_path: Path) -> None:
    for model, setting, problem in (
        ("timm:swinv2_tiny_window8_256", "image_size=90", "image_size=90 is not valid .a multiple of 4 px"),
        ("timm:test_maxvit", "image_size=72", "timm:test_maxvit does not take images of 72 x 72 px"),
        ("timm:resnet19", "epochs=6", "no such model; did you mean timm:resnet18"),
        ("timm:test_vit", "sync_bn=true", "sync_bn=true: the model has no BatchNorm"),
        ("timm:pit_ti_224", "train=last:1", "train=last:1: timm:pit_ti_224 does not say the order of its layers"),
        ("glori:test_resnet", "epochs=6", "and test_resnet is none"),
        ("timm:test_resnet", "model_kwargs=depth=3", "has no depth; model_kwargs may be "),
    ):
        with pytest.raises(UserError, match=problem):
            trained(uneven_shards, tmp_path / "run", model, "--set", setting)
        assert not (tmp_path / "run").exists() or os.listdir(tmp_path / "run") == ["lock"], model
