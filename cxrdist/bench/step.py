"""Where the time of a training step goes: data, augmentation, forward, backward, optimizer, EMA; what the EMA saves.

With --count: the kernels and bytes of the step instead, counted and not run (see `cxrdist.estimate.counter`).
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
import unittest.mock
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from cxrdist import recipes
from cxrdist.augment.pipeline import TrainingAugment
from cxrdist.bench.timing import Row, interleaved, rows_of
from cxrdist.data.loader import Loader
from cxrdist.data.order import MicroBatch, train_batches
from cxrdist.distributed.precision import DTYPES, autocast
from cxrdist.estimate.count import GB
from cxrdist.estimate.counter import Counter, GpuNorms
from cxrdist.estimate.report import MACHINES
from cxrdist.models import architecture_of, recipe_for
from cxrdist.recipes import Recipe
from cxrdist.runs.member import build_model
from cxrdist.shards.convert import SIZE_PX, Pixels
from cxrdist.shards.index import ShardIndex, open_index
from cxrdist.shards.writer import Source, SplitJob, write_split
from cxrdist.task import TASKS
from cxrdist.training.ema import Ema
from cxrdist.training.losses import label_sums, make_criterion
from cxrdist.training.optim import INITIAL_LOSS_SCALE, GuardedAdamW, groups_of, lr_factors

NUM_IMAGES = 48
TASK = TASKS["b"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `cxrdist bench step`."""
    parser.add_argument("--model", default="eva_x_small", help="a model or recipe (default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=4, metavar="N", help="images a step (default %(default)s)")
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="measured steps (default %(default)s)")
    parser.add_argument("--precision", choices=("bf16", "fp16", "fp32"), default="fp32", help="of the step")
    parser.add_argument("--threads", type=int, metavar="N", help="decode threads")
    parser.add_argument("--no-ema", action="store_true", help="leave out the comparison of EMA updates")
    parser.add_argument("--count", action="store_true", help="count kernels, casts and bytes of a step; runs nothing")


def run(args: argparse.Namespace) -> list[Row]:
    """Rows of stage `step` with each part's share of the median step, and of stage `ema`; --count: of `count`."""
    if args.count:
        return count_rows(args)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        rows = step_rows(args, write_shards(Path(folder)), device)
    return rows if args.no_ema else rows + ema_rows(device)


def learning(recipe: Recipe, model: nn.Module, precision: str) -> tuple[GuardedAdamW, Ema]:
    """The optimizer and the EMA of a model as `cxrdist.train` makes them."""
    optimizer = GuardedAdamW(
        groups_of(architecture_of(recipe.model), model, recipe),
        betas=recipe.betas,
        factors=lr_factors(recipe.lr_schedule, 100, recipe.warmup_steps),
        clip_grad_norm=recipe.clip_grad_norm,
        loss_scale=INITIAL_LOSS_SCALE if precision == "fp16" else None,
    )
    frozen = frozenset(architecture_of(recipe.model).frozen_names(model))
    return optimizer, Ema(model, recipe.ema_decay, recipe.ema_ramp, frozen)


def count_step(recipe: Recipe, num_labels: int, batch_size: int, precision: str) -> Counter:
    """Forward, loss, backward, optimizer and EMA of one step of `batch_size` images, after the first one."""
    architecture, device = architecture_of(recipe.model), torch.device("cpu")
    with torch.device("meta"):
        model = architecture.build_for(recipe, num_labels)
        architecture.hold_frozen(model, DTYPES[precision])
    criterion = make_criterion(recipe, label_sums([np.zeros((2, num_labels), np.float32)]), device)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device=device).train()
        images = torch.empty(batch_size, 3, recipe.image_size, recipe.image_size)
        targets = torch.empty(batch_size, num_labels)
    optimizer, ema = learning(recipe, model, precision)
    with GpuNorms():
        for _ in range(2):  # the first one makes the optimizer's moments, too
            counter = Counter(model.parameters())
            with counter:
                with autocast(precision, device):
                    logits = model(images)
                optimizer.backward(criterion(logits, targets)["total"], 1.0)
                ema.update(optimizer.step())
    return counter


def count_augmentation(recipe: Recipe, batch_size: int) -> Counter:
    """The recipe's augmentation of `batch_size` grey images as stored, on a GPU."""
    augment = TrainingAugment(recipe.image_size, recipe.augment, recipe.seed)
    # on the last of eight: what the augmentation keeps for a device holds no values here
    device, pinning = torch.device("cuda", 7), unittest.mock.patch.object(Tensor, "pin_memory", lambda tensor: tensor)
    with FakeTensorMode(allow_non_fake_inputs=True), pinning:
        images = torch.empty((batch_size, 1, SIZE_PX, SIZE_PX), dtype=torch.uint8, device=device)
        for epoch in range(2):  # constants reach the device in the first one
            counter = Counter()
            with counter:
                augment(images, np.arange(batch_size), epoch)
    return counter


def count_rows(args: argparse.Namespace) -> list[Row]:
    """Kernels and bytes of each kind, their sum without matmul, what moves most of it, and the augmentation's."""
    recipe = recipe_for(args.model, TASK.name)
    step = count_step(recipe, TASK.num_labels, args.batch_size, args.precision)
    augmentation = count_augmentation(recipe, args.batch_size)
    rows = [
        Row("count", kind, None, note=f"{number:,} kernels, {step.traffic[kind] / GB:.2f} GB")
        for kind, number in step.kernels.items()
    ]
    most = ", ".join(f"{name} {size / GB:.1f}" for name, size in step.by_operator.most_common(6))
    about = f"{recipe.name} {recipe.image_size} px, {args.precision}, batch {args.batch_size}, without augmentation"
    rows.append(Row("count", "all but matmul", None, note=f"{step.memory_traffic / GB:.2f} GB ({most}); {about}"))
    gpu = dataclasses.replace(MACHINES[-1], num_devices=1)
    share = gpu.seconds(augmentation.flops, augmentation.memory_traffic)
    share /= gpu.seconds(step.flops, step.memory_traffic)
    told = f"{augmentation.kernels.total():,} kernels, {augmentation.memory_traffic / GB:.2f} GB"
    return [*rows, Row("count", "augmentation", None, note=f"{told}: {share:.1%} of the step on an H100 ({gpu})")]


def write_shards(folder: Path) -> ShardIndex:
    """A training split of smooth noise; how an image looks does not change the time of a step."""
    rng = np.random.default_rng(0)
    sources = []
    for number in range(NUM_IMAGES):
        path = folder / f"{number:08d}_001_001.png"
        noise = Image.fromarray(rng.integers(0, 255, (40, 40), dtype=np.uint8))
        noise.resize((600, 600), Image.Resampling.BILINEAR).save(path, compress_level=1)
        targets = tuple(float(value) for value in rng.random(TASK.num_labels) < 0.3)
        sources.append(
            Source(number, path.name, str(path), path.stat().st_size, "", path.name[:8], "001", targets=targets)
        )
    write_split(SplitJob(folder / "shards", TASK, "train", sources, Pixels(), NUM_IMAGES, {}))
    return open_index(folder / "shards", "train", TASK)


def step_rows(args: argparse.Namespace, index: ShardIndex, device: torch.device) -> list[Row]:
    """Median seconds of each part of a step, as images/s and share of the step."""
    recipe = recipe_for(args.model, TASK.name)
    parts = _timed_parts(args, recipe, index, device)
    medians = {part: statistics.median(seconds[1:]) for part, seconds in parts.items()}  # the first step allocates
    step = sum(medians.values())
    outside = 1.0 - (medians["forward"] + medians["backward"]) / step
    rows = [
        Row("step", part, args.batch_size / seconds, None, step and seconds / step, f"{seconds / step:.1%} of the step")
        for part, seconds in medians.items()
    ]
    note = f"{recipe.name} {recipe.image_size} px, {args.precision}, batch {args.batch_size}; {outside:.1%} is overhead"
    return [*rows, Row("step", "all", args.batch_size / step, note=note)]


def _timed_parts(
    args: argparse.Namespace, recipe: Recipe, index: ShardIndex, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each part of a step, step by step: the loop of `cxrdist.train`, with the device waited for."""
    model = build_model(recipe, TASK)
    model.to(device).train()
    assert index.targets is not None
    criterion = make_criterion(recipe, label_sums([index.targets[:]]), device)
    optimizer, ema = learning(recipe, model, args.precision)
    architecture_of(recipe.model).hold_frozen(model, DTYPES[args.precision])
    augment = TrainingAugment(recipe.image_size, recipe.augment, recipe.seed)
    parts: dict[str, list[float]] = {}
    clock = time.perf_counter()

    def lap(part: str) -> None:
        nonlocal clock
        if device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        parts.setdefault(part, []).append(now - clock)
        clock = now

    with Loader(index, device, num_threads=args.threads) as loader:
        clock = time.perf_counter()
        for batch in loader.batches(_plan(args, len(index))):
            lap("data wait")
            images = augment(batch.images, batch.keys, batch.epoch)
            lap("augmentation")
            with autocast(args.precision, device):
                logits = model(images)
            assert batch.targets is not None
            loss = criterion(logits, batch.targets)
            lap("forward")
            optimizer.backward(loss["total"], batch.weight)
            lap("backward")
            skipped = optimizer.step()
            lap("optimizer")
            ema.update(skipped)
            lap("EMA")
    return parts


def _plan(args: argparse.Namespace, num_images: int) -> list[MicroBatch]:
    wanted: list[MicroBatch] = []
    for epoch in range(1 + args.steps * args.batch_size // NUM_IMAGES):
        options = {"global_batch_size": args.batch_size, "device_batch_size": args.batch_size}
        wanted += train_batches(np.arange(num_images), seed=0, epoch=epoch, rank=0, world_size=1, **options)
    return wanted[: args.steps + 1]


def _frozen(recipe: Recipe, model: nn.Module) -> frozenset[str]:
    return frozenset(architecture_of(recipe.model).frozen_names(model))


def ema_rows(device: torch.device) -> list[Row]:
    """Updates of CheXFound's EMA a second: over the complete state tensor by tensor, as published, and as done here."""
    recipe = recipes.chexfound(TASK.name)
    with torch.device(device):
        model = build_model(recipe, TASK)
    groups_of(architecture_of(recipe.model), model, recipe)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    copy = {name: tensor.clone() for name, tensor in state.items()}
    ema = Ema(model, recipe.ema_decay, frozen=_frozen(recipe, model))
    decay, skip = recipe.ema_decay, torch.zeros((), device=device)

    def synchronized(update: Callable[[], None]) -> Callable[[], int]:
        def once() -> int:
            update()
            if device.type == "cuda":
                torch.cuda.synchronize()
            return 1

        return once

    def published() -> None:
        for name, tensor in state.items():
            average: Tensor = copy[name]
            average.copy_(average * decay + tensor * (1.0 - decay))

    variants = {
        "the complete state, as published": synchronized(published),
        "trained values": synchronized(lambda: ema.update(skip)),
    }
    notes = dict.fromkeys(variants, "CheXFound; updates/s instead of images/s")
    return rows_of("ema", interleaved(variants, rounds=3), baseline="the complete state, as published", notes=notes)
