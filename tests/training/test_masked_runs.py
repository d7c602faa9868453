"""A set with half its cells masked, unevenly: any number of processes learns the same, and validates by itself."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from cxrdist import train as train_entry
from cxrdist.errors import UserError
from cxrdist.recipes import chexfound, ema_warning, eva_x, eva_x_tiny, fitted, initial_share, recipe_for
from cxrdist.runs.start import read_facts
from cxrdist.shards.convert import Pixels
from cxrdist.shards.writer import Source, SplitJob, write_split
from cxrdist.task import Columns, Task
from tests.training import worker  # noqa: F401, which adds the tiny recipes
from tests.training_runs import FLAGS, rows, train

LABELS = ("one", "two", "three")


@pytest.fixture(scope="module")
def masked_shards(uneven_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 grey images of 12 text patients: the first half has hardly a cell, one image has none, a label is all masked
    in whole batches, and some cells are soft.
    """
    folder = tmp_path_factory.mktemp("masked")
    images = sorted((uneven_shards.parent / "images").iterdir())
    rng = np.random.default_rng(1)
    targets = (rng.random((len(images), 3)) < 0.4).astype(np.float32)
    targets[rng.random((len(images), 3)) < np.linspace(0.9, 0.1, len(images))[:, None]] = np.nan
    targets[::7, 1] = 0.6
    targets[3] = np.nan
    targets[:, 2] = np.where(np.arange(len(images)) % 5 == 0, targets[:, 2], np.nan)
    task = Task(name="own", labels=LABELS, columns=Columns(image="image"))
    sources = [
        Source(key, path.name, str(path), path.stat().st_size, "", f"P-{key % 12}", "", targets=tuple(row.tolist()))
        for key, (path, row) in enumerate(zip(images, targets, strict=True))
    ]
    write_split(SplitJob(folder, task, "train", sources, Pixels(), 24, {}))
    write_split(SplitJob(folder / "with_valid", task, "train", sources, Pixels(), 24, {}))
    write_split(SplitJob(folder / "with_valid", task, "valid", sources[:9], Pixels(), 24, {}))
    (folder / "own.toml").write_text(task.to_toml())
    return folder


def arrays(run: Path, epoch: int) -> dict[str, np.ndarray]:
    return load_file(run / "checkpoints" / f"epoch_{epoch:02d}" / "model.safetensors")


@pytest.mark.slow
def test_one_two_and_three_processes_agree_on_masked_cells(masked_shards: Path, tmp_path: Path) -> None:
    runs = {}
    for world in (1, 2, 3):
        run = tmp_path / f"run{world}"
        flags = (
            "--task",
            str(masked_shards / "own.toml"),
            "--set",
            "epochs=2",
            "--set",
            "member_epochs=1,2",
            "--device-batch-size",
            str(4 - world),
        )
        ended = train(masked_shards, run, *flags, model="tiny_eva_x", processes=world)
        assert ended.code == 0, ended.output
        runs[world] = run
    logged = {world: [row["loss"] for row in rows(run)] for world, run in runs.items()}
    weights = {world: arrays(run, 2) for world, run in runs.items()}
    before = arrays(runs[1], 1)
    for world in (2, 3):
        np.testing.assert_allclose(logged[world][0], logged[1][0], rtol=0, atol=2e-7)  # before the first update
        # From there on Adam makes steps of rounding, more or less by the CPU: up to 2e-6 in the third loss.
        np.testing.assert_allclose(logged[world], logged[1], rtol=1e-4)
        for name, tensor in weights[1].items():  # as in test_train_trace: Adam makes steps of rounding
            moved = np.linalg.norm(tensor - before[name])
            assert "bias" in name or np.linalg.norm(weights[world][name] - tensor) <= 0.01 * moved, name
    validations = {world: rows(run, "validation") for world, run in runs.items()}
    counts = {world: [row["validation/images"] for row in found] for world, found in validations.items()}
    assert counts[1] == counts[2] == counts[3] != []
    assert np.isfinite([row["validation/loss"] for row in validations[1]]).all()


def test_own_data_is_validated_by_patient_or_on_its_valid_split_unless_the_user_says_no(
    masked_shards: Path, tmp_path: Path
) -> None:
    flags = (
        "--task",
        str(masked_shards / "own.toml"),
        "--set",
        "epochs=1",
        "--set",
        "member_epochs=1",
        "--max-steps",
        "1",
    )
    said = {}
    for name, shards, more in (
        ("fold", masked_shards, ()),
        ("valid", masked_shards / "with_valid", ()),
        ("none", masked_shards, ("--validate-fold", "none")),
    ):
        where = ("--model", "tiny_eva_x", "--wandb", "off", "--shards", str(shards), "--out", str(tmp_path / name))
        train_entry.main([*FLAGS, *where, *flags, *more])
        data = json.loads((tmp_path / name / "run.json").read_text())["data"]
        said[name] = (data["validate_fold"], bool(data["valid_shards"]))
        assert data["positives"]["two"] % 1 != 0
    assert said == {"fold": (0, False), "valid": (None, True), "none": (None, False)}


def test_a_full_size_recipe_fits_a_small_set_and_the_published_tasks_keep_theirs() -> None:
    for function in (eva_x, chexfound):
        for task in ("a", "b"):
            assert recipe_for(function.__name__, task, 480) == function(task)
    for num_images in (64, 480, 5_000, 107_000, 2_000_000):
        recipe = recipe_for("eva_x_tiny", "mine", num_images)
        steps = -(-num_images // recipe.global_batch_size) * recipe.epochs
        assert initial_share(recipe, steps) < 0.01
        assert recipe.warmup_steps <= steps // 20
        assert recipe.inference.member_epochs == (recipe.epochs - 1, recipe.epochs)
        assert recipe.groups == eva_x_tiny("mine").groups
    assert fitted(eva_x("mine"), 107_000).epochs == eva_x("mine").epochs
    assert recipe_for("demo_eva_x", "mine", 480).epochs == 30


def test_an_average_of_the_first_weights_is_warned_of() -> None:
    assert initial_share(eva_x("b"), 474) == pytest.approx(0.9997**474)
    assert "still 87% of the first weights" in ema_warning(eva_x("b"), 474)
    assert ema_warning(eva_x("b"), 10_140) == ""


@pytest.mark.parametrize(
    ("folder", "num_folds", "told"),
    [("with_valid", "3", "split valid is validated on"), (".", "13", "there are fewer patients")],
)
def test_folds_of_which_none_would_be_held_out_are_refused(
    masked_shards: Path, tmp_path: Path, folder: str, num_folds: str, told: str
) -> None:
    words = ["--shards", str(masked_shards / folder), "--model", "tiny_eva_x", "--init", "random", "--wandb", "off"]
    with pytest.raises(UserError, match=f"--folds {num_folds} would change nothing, as {told}.*cxrdist folds"):
        train_entry.main([*words, "--folds", num_folds, "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_folds_of_ones_own_labels_need_no_more_as_the_first_is_held_out(masked_shards: Path, tmp_path: Path) -> None:
    words = ["--shards", str(masked_shards), "--model", "tiny_eva_x", "--init", "random", "--wandb", "off"]
    train_entry.main(
        [*words, "--folds", "3", "--max-steps", "1", "--precision", "fp32", "--out", str(tmp_path / "run")]
    )
    facts = read_facts(tmp_path / "run")
    assert (facts.folds, facts.validate_fold) == (3, 0)
