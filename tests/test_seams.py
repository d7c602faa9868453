"""The seams of the house: other labels, another model and another loss go from the first image to the report.

Nothing in the package knows them. The model is one module of at most 40 lines, the recipe has at most 25.
"""

import csv
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cxrdist import ensemble, evaluate, preprocess
from cxrdist.task import Columns, Task

REPOSITORY = Path(__file__).parents[1]
TASK = Task(
    name="tb_2024",
    labels=("Tuberculosis", "Nodule, solitary", "Normal"),
    columns=Columns(image="file", patient="who", sex="sex"),
)
MODEL = '''
"""A toy convolutional model, added from outside."""
import torch
from torch import nn

from cxrdist.models import ARCHITECTURES
from cxrdist.models.architecture import Architecture


def create(image_size, num_classes, drop_rate, width=8):
    return nn.Sequential(
        nn.Conv2d(3, width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, num_classes),
    )


ARCHITECTURES["toy"] = Architecture(name="toy", create=create, sizes=("width",), head="6.")
'''
RECIPE = '''
from cxrdist.recipes import AUGMENTS, RECIPES, Group, Inference, Recipe


def toy(task):
    """For tests."""
    return Recipe(
        name="toy", model="toy", image_size=50, epochs=2, seed=3, global_batch_size=8, loss="brier_and_bce",
        groups=(Group(pattern="", lr=1e-2),), ema_decay=0.9, ema_ramp=True, augment=AUGMENTS["crop_flip"],
        inference=Inference(member_epochs=(1, 2), views=("plain", "hflip")),
    )


RECIPES["toy"] = toy
'''
LOSS = """
import torch.nn.functional as F

from cxrdist.training.losses import LOSSES


def brier_and_bce(recipe, pos_weight, masked):
    def criterion(logits, targets):
        bce = F.binary_cross_entropy_with_logits(logits.float(), targets)
        brier = (logits.float().sigmoid() - targets).square().mean()
        return {"total": bce + brier, "bce": bce, "brier": brier}
    return criterion


LOSSES["brier_and_bce"] = brier_and_bce
"""
RUN = """
import importlib, sys
import toy_model, toy_recipe, toy_loss
from cxrdist.cli import run_entry
main = importlib.import_module(sys.argv.pop(1)).main
raise SystemExit(run_entry(main))
"""
TINY_CHEXFOUND = ["--set", "model_kwargs=decoder_dim:16,depth:4,embed_dim:32,init_values:1.0,num_heads:2"]
TINY_CHEXFOUND += ["--set", "image_size=32", "--set", "global_batch_size=8", "--set", "epochs=2"]
TINY_CHEXFOUND += ["--set", "member_epochs=1,2"]


def write_data(folder: Path, num_patients: int, first: int) -> Path:
    """Images in nested folders with names that need care, three of each patient, and their table."""
    rng = np.random.default_rng(first)
    rows = []
    for number in range(first, first + num_patients):
        patient = f"P-{number} Müller"
        for image in range(3):
            name = f"site {number % 2}/{number:03d}/v1.{image} ({image}).png"
            present = [int(rng.random() < 0.5) for _ in TASK.labels]
            path = folder / "images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 60, (40, 48)) + 120 * np.arange(48) // 48 * present[0] + 60 * present[1]
            Image.fromarray(pixels.astype(np.uint8)).save(path)
            rows.append([name, patient, "F" if number % 2 else "M", *present])
    table = folder / f"labels_{first}.csv"
    with table.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["file", "who", "sex", *TASK.labels], *rows])
    return table


def launch(folder: Path, module: str, *flags: str) -> str:
    """An entry on two gloo processes that know the toy model, recipe and loss."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY}:{folder}", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*command, str(folder / "run.py"), module, *flags],
        env=environment | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("house")
    for name, text in (("toy_model", MODEL), ("toy_recipe", RECIPE), ("toy_loss", LOSS), ("run", RUN)):
        (folder / f"{name}.py").write_text(textwrap.dedent(text).lstrip())
    (folder / "task.toml").write_text(TASK.to_toml())
    train, test = write_data(folder, 14, 0), write_data(folder, 6, 100)
    names = pd.read_csv(test)["file"].sample(frac=1, random_state=0)
    template = pd.DataFrame({"file": names} | {label: 0.5 for label in reversed(TASK.labels)})
    template.to_csv(folder / "template.csv", index=False)
    base = ["--task", str(folder / "task.toml"), "--images", str(folder / "images"), "--out", str(folder / "shards")]
    preprocess.main([*base, "--csv", str(train), "--workers", "1"])
    preprocess.main([*base, "--csv", str(folder / "template.csv"), "--split", "test", "--workers", "1"])
    return folder


def test_the_model_and_the_recipe_are_small() -> None:
    assert len(MODEL.strip().splitlines()) <= 40
    assert len(RECIPE.strip().splitlines()) <= 25


@pytest.mark.parametrize(
    ("model", "flags", "parts"),
    [
        ("toy", [], ["bce", "brier"]),
        pytest.param("chexfound", TINY_CHEXFOUND, ["focal", "bce"], marks=pytest.mark.slow),
    ],
)
def test_other_labels_another_model_and_another_loss_go_all_the_way(
    house: Path, tmp_path: Path, model: str, flags: list[str], parts: list[str]
) -> None:
    shards, run, out = house / "shards", tmp_path / "run", tmp_path / "out"
    common = ["--precision", "fp32", "--shards", str(shards)]
    output = launch(
        house, "cxrdist.train", *common, "--model", model, "--init", "random", "--out", str(run), "--wandb", "off",
        "--log-every", "1", "--folds", "3", "--validate-fold", "0", "--threads", "1", *flags,
    )  # fmt: skip
    assert "of 3 labels" in output
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (first, *_), validation = ([row for row in rows if row["kind"] == kind] for kind in ("train", "validation"))
    assert [name for name in first if name in ("loss", "focal", "bce", "brier")] == ["loss", *parts]
    assert {f"validation/{part}" for part in ("loss", *parts)} <= validation[-1].keys()
    assert f"validation/auroc/{TASK.labels[1]}" in validation[-1]
    assert (run / "split.csv").read_text(encoding="utf-8").count("Müller") == 14

    member = ["--member", f"{model}={run}", "--member", f"plain={run}@2:plain"]
    launch(
        house, "cxrdist.infer", *common, *member, "--template", str(house / "template.csv"), "--out", str(out),
        "--device-batch-size", "4",
    )  # fmt: skip
    template = pd.read_csv(house / "template.csv")
    submission = pd.read_csv(out / "submission.csv")
    assert list(submission) == list(template)
    assert list(submission["file"]) == list(template["file"])

    tables = [str(out / "scores" / f"{name}.csv") for name in (model, "plain")]
    again = tmp_path / "submission.csv"
    ensemble.main(["--scores", *tables, "--template", str(house / "template.csv"), "--out", str(again)])
    assert again.read_bytes() == (out / "submission.csv").read_bytes()

    evaluate.main(["--scores", *tables, "--csv", str(house / "labels_100.csv"), "--out", str(tmp_path / "report"),
                   "--resamples", "20", "--shards", str(shards)])  # fmt: skip
    scores = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert (scores["labels"], scores["num_patients"]) == (list(TASK.labels), 6)
    page = (tmp_path / "report" / "report.html").read_text()
    assert "Nodule, solitary" in page
    assert "3 of 3" in page
