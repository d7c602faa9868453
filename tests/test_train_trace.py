"""The loop against a plain one written from the recipe: no accelerate, no DDP, no fused optimizer, no accumulation."""

import dataclasses
import io
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from cxrdist import train as train_entry
from cxrdist.augment.pipeline import TrainingAugment
from cxrdist.data.order import epoch_order
from cxrdist.data.reader import ShardReader
from cxrdist.models import architecture_of
from cxrdist.recipes import Recipe
from cxrdist.shards.index import open_index
from cxrdist.task import COMPETITION_LABELS as LABELS
from tests import training_runs
from tests.training import worker

RECIPES = {"tiny_eva_x": worker.tiny_eva_x("b"), "tiny_chexfound": worker.tiny_chexfound("b")}


@dataclasses.dataclass
class Trace:
    losses: list[float]
    start: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    ema: dict[str, torch.Tensor]


def plain_loop(recipe: Recipe, shards: Path) -> Trace:
    """Twenty steps of five global batches an epoch (10, 10, 10, 10 and 8 images), one forward pass each."""
    index = open_index(shards, "train")
    reader = ShardReader(index)
    positives = index.targets[:].astype(np.float64).sum(axis=0)

    def effective(count):
        return (1 - 0.9999**count) / (1 - 0.9999)

    ratio = effective(len(index) - positives) / (effective(positives) + 1e-8)
    pos_weight = torch.tensor(np.minimum(ratio, 10.0), dtype=torch.float32)
    torch.manual_seed(recipe.seed)
    model = architecture_of(recipe.model).build(32, len(LABELS), 0.0, **dict(recipe.model_kwargs)).train()
    by_row: dict[int, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        row = next(i for i, group in enumerate(recipe.groups) if re.search(group.pattern, name))
        if recipe.groups[row].lr is None:
            parameter.requires_grad_(False)
        else:
            by_row.setdefault(row, []).append(parameter)
    base = {row: float(recipe.groups[row].lr or 0) for row in by_row}
    optimizer = torch.optim.AdamW(
        [
            {"params": p, "lr": base[r], "weight_decay": recipe.groups[r].weight_decay, "row": r}
            for r, p in by_row.items()
        ],
        foreach=False,
    )
    start_values = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    tracked = dict(start_values)
    augment = TrainingAugment(32, recipe.augment, recipe.seed)
    losses: list[float] = []
    for epoch in range(4):
        order = epoch_order(np.arange(len(index)), recipe.seed, epoch)
        for start in range(0, 48, 10):
            rows = order[start : start + 10]
            pixels = np.stack([np.asarray(Image.open(io.BytesIO(reader.read(int(row))))) for row in rows])
            targets = torch.from_numpy(index.targets[rows])
            logits = model(augment(torch.from_numpy(pixels)[:, None], index.keys[rows], epoch))
            p = torch.sigmoid(logits)
            cross = -(targets * p.log() + (1 - targets) * (1 - p).log())
            weighted = -(pos_weight * targets * p.log() + (1 - targets) * (1 - p).log())
            loss = 0.7 * (0.25 * (1 - torch.exp(-cross)) ** 2 * cross).mean() + 0.3 * weighted.mean()
            optimizer.zero_grad()
            loss.backward()
            if recipe.clip_grad_norm:
                nn.utils.clip_grad_norm_([p for ps in by_row.values() for p in ps], recipe.clip_grad_norm)
            step = len(losses)
            factor = 1.0
            if recipe.lr_schedule == "cosine":
                warmup = recipe.warmup_steps
                factor = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (20 - warmup)))
                factor = (step + 1) / warmup if step < warmup else factor
            for group in optimizer.param_groups:
                group["lr"] = base[group["row"]] * factor
            optimizer.step()
            decay = min(recipe.ema_decay, (1 + step) / (10 + step)) if recipe.ema_ramp else recipe.ema_decay
            for name, parameter in model.named_parameters():
                if name in tracked:
                    tracked[name] = decay * tracked[name] + (1 - decay) * parameter.detach()
            losses.append(float(loss.detach()))
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    assert len(LABELS) == logits.shape[1]
    return Trace(losses, start_values, trained, tracked)


@pytest.fixture(scope="module", params=sorted(RECIPES))
def expected(request, uneven_shards) -> tuple[str, Trace]:
    return request.param, plain_loop(RECIPES[request.param], uneven_shards)


def check(run: Path, trace: Trace) -> None:
    losses = [row["loss"] for row in training_runs.rows(run)]
    assert trace.losses[-1] < trace.losses[0] - 0.01  # the trace moves, or equality would say little
    np.testing.assert_allclose(losses, trace.losses, rtol=0, atol=1e-6)
    epochs = [row["epoch_loss"] for row in training_runs.rows(run, "epoch")]
    np.testing.assert_allclose(epochs, np.reshape(trace.losses, (4, 5)).mean(axis=1), rtol=0, atol=1e-6)
    last = run / "checkpoints" / "epoch_04"
    for name, wanted in (("model", trace.weights), ("ema", trace.ema)):
        found = load_file(last / f"{name}.safetensors")
        for parameter, value in wanted.items():
            # Where a gradient is nearly zero (the key bias), Adam makes steps of its rounding: no value may be further
            # off than a tenth of what 20 steps can move, and a matrix as a whole no more than a hundredth of its move.
            torch.testing.assert_close(found[parameter], value, rtol=0, atol=2e-3)
            if "bias" not in parameter:
                moved = (value - trace.start[parameter]).norm()
                assert (found[parameter] - value).norm() <= 0.01 * moved, parameter


@pytest.mark.parametrize("device_batch_size", [pytest.param(10, marks=pytest.mark.slow), 3])
def test_one_process_follows_the_plain_loop(expected, uneven_shards, tmp_path, device_batch_size):
    model, trace = expected
    flags = ["--device-batch-size", str(device_batch_size), "--set", "drop_rate=0", "--wandb", "off"]
    train_entry.main(
        [*training_runs.FLAGS, "--model", model, "--shards", str(uneven_shards), "--out", str(tmp_path), *flags]
    )
    check(tmp_path, trace)


@pytest.mark.parametrize(
    "expected", [pytest.param("tiny_eva_x", marks=pytest.mark.slow), "tiny_chexfound"], indirect=True
)
@pytest.mark.parametrize("device_batch_size", [pytest.param(5, marks=pytest.mark.slow), 2])
def test_two_processes_follow_the_plain_loop(expected, uneven_shards, tmp_path, device_batch_size):
    model, trace = expected
    flags = ["--device-batch-size", str(device_batch_size), "--set", "drop_rate=0"]
    ended = training_runs.train(uneven_shards, tmp_path / "run", *flags, model=model)
    assert ended.code == 0, ended.output
    check(tmp_path / "run", trace)
