"""What a run needs before it starts: memory per device, FLOPs, hours, files. For `--dry-run` of `train` and `infer`."""

import dataclasses
import math
import shutil
from pathlib import Path

from cxrdist.augment.views import distinct_views
from cxrdist.errors import UserError
from cxrdist.estimate.count import GB, Cost, best_device_batch, checkpoint_bytes, count_cost, memory_bytes
from cxrdist.estimate.machines import MACHINES, PUBLISHED_T4, Machine, this_machine, train_hours
from cxrdist.models import architecture_of
from cxrdist.recipes import Recipe, chexfound, eva_x
from cxrdist.shards.convert import SIZE_PX
from cxrdist.shards.index import open_index
from cxrdist.task import Task

PUBLISHED_IMAGES = {"a": {"train": 107_374, "test": 46_233}, "b": {"train": 108_491, "test": 47_927}}
PUBLISHED_INFER_HOURS = {"a": 6.1, "b": 6.8}  # two T4s, all test images, 12 passes of EVA-X and 2 of CheXFound
PUBLISHED_INFER_PASSES = (12, 2)
TIMES = "times are arithmetic only, with {} and Python keeping up; expect to be off by a factor of two"


def require_fit(cost: Cost, recipe: Recipe, machine: Machine, device_batch_size: int | None, free_disk: float) -> None:
    """Raises UserError naming the flag that helps when memory or disk cannot hold the run."""
    best = _best_batch(cost, recipe, machine)
    chosen = device_batch_size or best
    need = memory_bytes(cost, chosen if best else 1, machine.kind, machine.num_devices)
    if need > machine.memory_bytes:
        what = f"--device-batch-size {chosen} needs about {need / GB:.1f} GB per device"
        remedy = f"--device-batch-size {best} (the same images a step)"
        if best == 0:
            what = f"{recipe.name} needs about {need / GB:.1f} GB per device for one image"
            remedy = "a smaller --model or --set image_size=N"
        raise UserError(f"{what}, but {machine.name} has {machine.memory_bytes / GB:.1f} GB: use {remedy}")
    epoch, step = checkpoint_bytes(cost)
    disk = epoch * recipe.epochs + 2 * step
    if disk > free_disk:
        raise UserError(
            f"the run's checkpoints need about {disk / GB:.1f} GB, but {free_disk / GB:.1f} GB are free: "
            "give --out a folder on a larger disk"
        )


def report(
    recipe: Recipe, cost: Cost, num_images: int, here: Machine, device_batch_size: int | None, free_disk: float
) -> str:
    """The table `train --dry-run` prints; raises UserError (see `require_fit`) when the run cannot fit here."""
    require_fit(cost, recipe, here, device_batch_size, free_disk)
    epoch, step = checkpoint_bytes(cost)
    num_steps = math.ceil(num_images / recipe.global_batch_size) * recipe.epochs
    lines = [
        f"dry run: {recipe.name}, {num_images:,} images, {recipe.epochs} epochs, "
        f"{num_steps:,} steps of {recipe.global_batch_size} images",
        f"counted: {cost.forward_flops / 1e9:.3g} GFLOP an image forward, {cost.step_flops / 1e9:.3g} with backward; "
        f"{cost.num_parameters / 1e6:.1f} M parameters, {cost.num_trained / 1e6:.1f} M of them trained; "
        f"{cost.activation_bytes / 1e6:.0f} MB of activations an image",
        f"files: {epoch / GB:.2f} GB an epoch checkpoint, {step / GB:.2f} GB a step checkpoint; "
        f"{free_disk / GB:.0f} GB free",
        "",
        f"{'estimates':<30}{'batch/device':>13}{'GB/device':>10}{'images/s':>10}{'epoch':>9}{'all':>9}  efficiency",
    ]
    for machine in (here, *MACHINES):
        batch = device_batch_size if machine is here and device_batch_size else _best_batch(cost, recipe, machine)
        if batch == 0:
            lines.append(f"{machine.name:<30}does not fit in {machine.memory_bytes / GB:.0f} GB")
            continue
        need = memory_bytes(cost, batch, machine.kind, machine.num_devices) / GB
        total = train_hours(cost, num_images, recipe.epochs, machine)
        speed = f"{num_images * recipe.epochs / total / 3600:.3g}"
        times = f"{_duration(total / recipe.epochs):>9}{_duration(total):>9}"
        lines.append(f"{machine.name:<30}{batch:>13}{need:>10.1f}{speed:>10}{times}  {machine}")
    lines.append(TIMES.format("reading"))
    return "\n".join(lines)


def infer_report(task: Task, num_images: int, here: Machine) -> str:
    """The table `infer --dry-run` prints: hours of the published members on `here` and other machines.

    T4: at the speed that the published inference reached, found from its counted FLOPs and its hours (of task b for a
    task that was not published).
    """
    members = (eva_x(task.name), chexfound(task.name))
    need, published, passes = 0.0, 0.0, []
    for recipe, published_passes in zip(members, PUBLISHED_INFER_PASSES, strict=True):
        flops = count_cost(recipe, task.num_labels, here.precision).forward_flops
        # views of every epoch, but one pass of a frozen backbone for all epochs
        epochs = 1 if architecture_of(recipe.model).features else len(recipe.inference.member_epochs)
        count = len(distinct_views(recipe.inference.views)) * epochs
        passes.append(f"{count} of {recipe.name}")
        need, published = need + count * flops, published + published_passes * flops
    division = task.name if task.name in PUBLISHED_INFER_HOURS else "b"
    hours, images = PUBLISHED_INFER_HOURS[division], PUBLISHED_IMAGES[division]["test"]
    reached = published * images / (hours * 3600) / (PUBLISHED_T4.peak_flops * PUBLISHED_T4.num_devices)
    t4 = dataclasses.replace(PUBLISHED_T4, efficiency=reached, source="efficiency of the published inference")
    lines = [
        f"dry run: inference of task {task.name}, {num_images:,} images, each decoded once; passes: "
        f"{', '.join(passes)}; {need / 1e9:,.0f} GFLOP an image",
        f"published: {PUBLISHED_INFER_PASSES[0]} and {PUBLISHED_INFER_PASSES[1]} passes, {published / 1e9:,.0f} GFLOP, "
        f"{hours} h on two T4s for {images:,} images",
        "",
        f"{'estimates':<30}{'images/s':>10}{'all':>10}  efficiency",
    ]
    for machine in (here, t4, *MACHINES[1:]):
        rate = machine.flops / need
        lines.append(f"{machine.name:<30}{rate:>10.3g}{_duration(num_images / rate / 3600):>10}  {machine}")
    return "\n".join([*lines, TIMES.format("decoding")])


def dry_run(
    recipe: Recipe, task: Task, shards: Path, out: Path, *, device_batch_size: int | None, precision: str
) -> str:
    """The report for a training as it would start here: on all GPUs, or on the processes that were launched.

    Raises UserError when the run cannot fit this machine (see `require_fit`), and where images cannot be counted.
    """
    num_images, size_px, note = _count_images(task, shards, "train")
    here = this_machine(precision)
    folder = next(path for path in (out, *out.absolute().parents) if path.exists())
    cost = count_cost(recipe, task.num_labels, here.precision, size_px)
    return report(recipe, cost, num_images, here, device_batch_size, float(shutil.disk_usage(folder).free)) + note


def infer_dry_run(task: Task, shards: Path, precision: str, split: str = "test") -> str:
    """The report of `infer_report` for this machine; images are counted as `dry_run` counts them."""
    num_images, _, note = _count_images(task, shards, split)
    return infer_report(task, num_images, this_machine(precision)) + note


def _count_images(task: Task, shards: Path, split: str) -> tuple[int, int, str]:
    """(images, their side in px, note): of the shard set where it is there, else of the published division."""
    if (shards / f"{split}.json").is_file():
        index = open_index(shards, split, task)
        return len(index), index.size_px, ""
    published = PUBLISHED_IMAGES.get(task.name, {}).get(split)
    if published is None:
        raise UserError(f"no {split} shards in {shards}: give --shards, or preprocess task {task.name} first")
    return published, SIZE_PX, f"\nno {split} shards in {shards} yet: counted the published {published:,} images"


def _best_batch(cost: Cost, recipe: Recipe, machine: Machine) -> int:
    return best_device_batch(cost, recipe.global_batch_size, machine.kind, machine.num_devices, machine.memory_bytes)


def _duration(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.1f} min"
