"""What a run needs before it starts: memory per device, FLOPs, hours, files. For `--dry-run` of `train` and `infer`.

Times are counted FLOPs over a share of the peak plus counted traffic over a share of the bandwidth: estimates, printed
with the shares. T4: all told, what the published EVA-X training reached (31.3 images/s on two); other GPUs: assumed;
the GPU at hand: measured on the spot; the CPU: half of its measured matrix multiplication, all told (0.48-0.56 seen for
both models in bf16).
"""

import dataclasses
import functools
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from cxrdist.augment.views import distinct_views
from cxrdist.distributed.environment import machine_memory, world_size
from cxrdist.distributed.precision import DTYPES, hardware_of, resolve_precision
from cxrdist.errors import UserError
from cxrdist.estimate.count import GB, Cost, best_device_batch, checkpoint_bytes, count_cost, memory_bytes
from cxrdist.models import architecture_of
from cxrdist.recipes import Recipe, chexfound, eva_x
from cxrdist.shards.convert import SIZE_PX
from cxrdist.shards.index import open_index
from cxrdist.task import Task

PUBLISHED_IMAGES = {"a": {"train": 107_374, "test": 46_233}, "b": {"train": 108_491, "test": 47_927}}
PUBLISHED_INFER_HOURS = {"a": 6.1, "b": 6.8}  # two T4s, all test images, 12 passes of EVA-X and 2 of CheXFound
PUBLISHED_INFER_PASSES = (12, 2)
TIMES = "times are the device's work only, with {} and Python keeping up; expect to be off by a factor of two"
Count = Callable[[str], Cost]  # by precision


@dataclass(frozen=True)
class Machine:
    """Hardware that a run is estimated for: a known machine, or the one at hand, whose speed is measured."""

    name: str
    num_devices: int
    memory_bytes: float  # of one device, usable
    peak_flops: float  # per second and device, dense, in the precision named
    efficiency: float  # share of the peak that training reaches
    precision: str
    source: str  # where the shares come from
    bandwidth: float = math.inf  # bytes per second and device that traffic reaches; infinite: within the efficiency
    kind: str = "cuda"

    def seconds(self, flops: float, traffic: float) -> float:
        """What all its devices together need for FLOPs and bytes."""
        return (flops / self.peak_flops / self.efficiency + traffic / self.bandwidth) / self.num_devices

    def __str__(self) -> str:
        moved = "" if math.isinf(self.bandwidth) else f" and {self.bandwidth / 1e12:.2g} TB/s"
        return f"{self.efficiency:.0%} of {self.peak_flops / 1e12:.3g} TFLOP/s {self.precision}{moved} ({self.source})"


PUBLISHED_T4 = Machine("T4 x 2", 2, 14.6 * GB, 65e12, 0.113, "fp16", "all told, of the published EVA-X run")
ASSUMED = 0.6, "bf16", "assumed, with 80 % of the bandwidth"
MACHINES = (
    PUBLISHED_T4,
    Machine("RTX 4090", 1, 24 * GB, 165e12, *ASSUMED, bandwidth=0.8 * 1.01e12),
    Machine("A100 80 GB", 1, 79 * GB, 312e12, *ASSUMED, bandwidth=0.8 * 2.04e12),
    Machine("H100 x 8", 8, 79 * GB, 989e12, *ASSUMED, bandwidth=0.8 * 3.35e12),
)


def train_hours(cost: Cost, num_images: int, epochs: int, machine: Machine, device_batch_size: int) -> float:
    """Hours of the device's work at the machine's stated shares."""
    traffic = cost.step_traffic + cost.update_traffic / device_batch_size
    return machine.seconds(cost.step_flops, traffic) * num_images * epochs / 3600


def this_machine(precision: str) -> Machine:
    """All GPUs, or the processes that were launched; its peak is what a matrix multiplication reaches for 0.5 s."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    chosen = resolve_precision(precision, [hardware_of(device)])[0]
    num_devices = max(world_size(), torch.cuda.device_count() if on_gpu else 2)
    if on_gpu:
        memory = float(torch.cuda.get_device_properties(0).total_memory)
    else:
        total, available = machine_memory()
        memory = (total if available is None else available) / num_devices
    return Machine(
        name=f"this machine ({num_devices} {'GPUs' if on_gpu else 'CPU processes'})",
        num_devices=num_devices,
        memory_bytes=memory,
        peak_flops=_measured_flops(device, DTYPES[chosen]),
        efficiency=0.8 if on_gpu else 0.9 if chosen == "fp32" else 0.5,
        precision=chosen,
        source="of what it was measured to reach",
        bandwidth=_measured_bandwidth(device) if on_gpu else math.inf,
        kind=device.type,
    )


def _measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 * _per_second(lambda: left @ right, device)


def _measured_bandwidth(device: torch.device) -> float:
    numbers = torch.zeros(2**27, device=device)  # larger than any cache
    return 2 * numbers.nbytes * _per_second(lambda: numbers.mul_(1.0), device)


def _per_second(work: Callable[[], object], device: torch.device) -> float:
    device_module = torch.get_device_module(device)
    work()
    device_module.synchronize()
    begun, count = time.perf_counter(), 0
    while time.perf_counter() - begun < 0.5:
        work()
        device_module.synchronize()
        count += 1
    return count / (time.perf_counter() - begun)


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
    if (disk := disk_bytes(cost, recipe)) > free_disk:
        needed = f"about {disk / GB:.1f} GB, but {free_disk / GB:.1f} GB are free"
        raise UserError(f"the run's checkpoints need {needed}: give --out a folder on a larger disk, or fewer --epochs")


def disk_bytes(cost: Cost, recipe: Recipe) -> float:
    """A checkpoint of each epoch, and two of steps."""
    epoch, step = checkpoint_bytes(cost)
    return epoch * recipe.epochs + 2 * step


def report(
    recipe: Recipe, count: Count, num_images: int, here: Machine, device_batch_size: int | None, free_disk: float
) -> str:
    """The table `train --dry-run` prints."""
    cost = count(here.precision)
    epoch, step = checkpoint_bytes(cost)
    num_steps = math.ceil(num_images / recipe.global_batch_size) * recipe.epochs
    lines = [
        f"dry run: {recipe.name}, {num_images:,} images, {recipe.epochs} epochs, "
        f"{num_steps:,} steps of {recipe.global_batch_size} images",
        f"counted: {cost.forward_flops / 1e9:.3g} GFLOP an image forward, {cost.step_flops / 1e9:.3g} with backward; "
        f"{cost.num_parameters / 1e6:.1f} M parameters, {cost.num_trained / 1e6:.1f} M of them trained; "
        f"{cost.activation_bytes / 1e6:.0f} MB of activations an image and {cost.step_traffic / GB:.2g} GB of traffic "
        f"({here.precision})",
        f"files: {epoch / GB:.2f} GB an epoch checkpoint, {step / GB:.2f} GB a step checkpoint, "
        f"{disk_bytes(cost, recipe) / GB:.1f} GB in all; {free_disk / GB:.0f} GB free",
        "",
        f"{'estimates':<30}{'batch/device':>13}{'GB/device':>10}{'images/s':>10}{'epoch':>9}{'all':>9}  at",
    ]
    for machine in (here, *MACHINES):
        cost = count(machine.precision)
        batch = device_batch_size if machine is here and device_batch_size else _best_batch(cost, recipe, machine)
        if batch == 0:
            lines.append(f"{machine.name:<30}does not fit in {machine.memory_bytes / GB:.0f} GB")
            continue
        need = memory_bytes(cost, batch, machine.kind, machine.num_devices) / GB
        total = train_hours(cost, num_images, recipe.epochs, machine, batch)
        speed, times = num_images * recipe.epochs / total / 3600, (_duration(total / recipe.epochs), _duration(total))
        row = f"{machine.name:<30}{batch:>13}{need:>10.1f}{speed:>10.3g}{times[0]:>9}{times[1]:>9}"
        lines.append(f"{row}  {machine}")
    lines.append(TIMES.format("reading"))
    return "\n".join(lines)


def infer_report(task: Task, num_images: int, here: Machine) -> str:
    """The table `infer --dry-run` prints: hours of the published members on `here` and other machines.

    T4: at the published inference's speed, from its counted FLOPs and its hours (task b's for an unpublished task).
    """
    members = (eva_x(task.name), chexfound(task.name))
    need, traffic, published, passes = 0.0, 0.0, 0.0, []
    for recipe, published_passes in zip(members, PUBLISHED_INFER_PASSES, strict=True):
        cost = count_cost(recipe, task.num_labels, here.precision)
        # views of every epoch, but one pass of a frozen backbone for all epochs
        epochs = 1 if architecture_of(recipe.model).features else len(recipe.inference.member_epochs)
        count = len(distinct_views(recipe.inference.views)) * epochs
        passes.append(f"{count} of {recipe.name}")
        need, traffic = need + count * cost.forward_flops, traffic + count * cost.forward_traffic
        published += published_passes * cost.forward_flops
    division = task.name if task.name in PUBLISHED_INFER_HOURS else "b"
    hours, images = PUBLISHED_INFER_HOURS[division], PUBLISHED_IMAGES[division]["test"]
    reached = published * images / (hours * 3600) / (PUBLISHED_T4.peak_flops * PUBLISHED_T4.num_devices)
    t4 = dataclasses.replace(PUBLISHED_T4, efficiency=reached, source="all told, of the published inference")
    lines = [
        f"dry run: inference of task {task.name}, {num_images:,} images, each decoded once; passes: "
        f"{', '.join(passes)}; {need / 1e9:,.0f} GFLOP and {traffic / GB:.3g} GB of traffic an image",
        f"published: {PUBLISHED_INFER_PASSES[0]} and {PUBLISHED_INFER_PASSES[1]} passes, {published / 1e9:,.0f} GFLOP, "
        f"{hours} h on two T4s for {images:,} images",
        "",
        f"{'estimates':<30}{'images/s':>10}{'all':>10}  at",
    ]
    for machine in (here, t4, *MACHINES[1:]):
        rate = 1 / machine.seconds(need, traffic)
        lines.append(f"{machine.name:<30}{rate:>10.3g}{_duration(num_images / rate / 3600):>10}  {machine}")
    return "\n".join([*lines, TIMES.format("decoding")])


def dry_run(
    recipe: Recipe,
    task: Task,
    shards: Path,
    out: Path,
    *,
    device_batch_size: int | None,
    precision: str,
    grad_checkpointing: bool = False,
) -> None:
    """Print the report of a training on this machine. UserError: no images to count; then, that it does not fit."""
    num_images, size_px, note = _count_images(task, shards, "train")
    here = this_machine(precision)
    folder = next(path for path in (out, *out.absolute().parents) if path.exists())
    options = {"size_px": size_px, "grad_checkpointing": grad_checkpointing}
    count = functools.partial(count_cost, recipe, task.num_labels, **options)
    free_disk = float(shutil.disk_usage(folder).free)
    print(report(recipe, count, num_images, here, device_batch_size, free_disk) + note)
    require_fit(count(here.precision), recipe, here, device_batch_size, free_disk)


def infer_dry_run(task: Task, shards: Path, precision: str, split: str = "test") -> str:
    """The report of `infer_report` for this machine; images are counted as `dry_run` counts them."""
    num_images, _, note = _count_images(task, shards, split)
    return infer_report(task, num_images, this_machine(precision)) + note


def _count_images(task: Task, shards: Path, split: str) -> tuple[int, int, str]:
    """(images, their side in px, note): of the shard set where it is there, else of the published division."""
    if (shards / f"{split}.json").is_file():
        index = open_index(shards, split, task, tars=False)
        return len(index), index.size_px, ""
    published = PUBLISHED_IMAGES.get(task.name, {}).get(split)
    if published is None:
        raise UserError(f"no {split} shards in {shards}: give --shards, or preprocess task {task.name} first")
    return published, SIZE_PX, f"\nno {split} shards in {shards} yet: counted the published {published:,} images"


def _best_batch(cost: Cost, recipe: Recipe, machine: Machine) -> int:
    return best_device_batch(cost, recipe.global_batch_size, machine.kind, machine.num_devices, machine.memory_bytes)


def _duration(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.1f} min"
