"""What a run needs before it starts: memory per device, FLOPs, hours, files. For `--dry-run` of `train` and `infer`.

Times divide counted FLOPs by peak speed times a stated efficiency: estimates, printed as such. Efficiencies: T4, what
the published EVA-X training reached (31.3 images/s on two); A100 and H100, assumed; the CPU, half of the
matrix-multiplication speed measured on the spot (0.48-0.56 seen for both models in bf16).
"""

import dataclasses
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from cxrdist.augment.views import distinct_views
from cxrdist.distributed.environment import world_size
from cxrdist.distributed.precision import DTYPES, resolve_precision
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
TIMES = "times are arithmetic only, with {} and Python keeping up; expect to be off by a factor of two"


@dataclass(frozen=True)
class Machine:
    """Hardware that a run is estimated for: a known machine, or the one at hand, whose speed is measured."""

    name: str
    num_devices: int
    memory_bytes: float  # of one device, usable
    peak_flops: float  # per second and device, dense, in the precision named
    efficiency: float  # share of the peak that training reaches
    precision: str
    source: str  # where the efficiency comes from
    kind: str = "cuda"

    @property
    def flops(self) -> float:
        """FLOP per second that all its devices reach."""
        return self.peak_flops * self.efficiency * self.num_devices

    def __str__(self) -> str:
        return f"{self.efficiency:.0%} of {self.peak_flops / 1e12:.3g} TFLOP/s {self.precision} ({self.source})"


PUBLISHED_T4 = Machine("T4 x 2", 2, 14.6 * GB, 65e12, 0.113, "fp16", "efficiency of the published EVA-X run")
MACHINES = (
    PUBLISHED_T4,
    Machine("A100 80 GB", 1, 79 * GB, 312e12, 0.35, "bf16", "efficiency assumed"),
    Machine("H100 x 8", 8, 79 * GB, 989e12, 0.30, "bf16", "efficiency assumed"),
)


def train_hours(cost: Cost, num_images: int, epochs: int, machine: Machine) -> float:
    """Hours of arithmetic at the machine's stated efficiency."""
    return cost.step_flops * num_images * epochs / machine.flops / 3600


def this_machine(precision: str) -> Machine:
    """All GPUs, or the processes that were launched; its peak is what a matrix multiplication reaches for 0.5 s."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    chosen = resolve_precision(precision, device)[0]
    num_devices = max(world_size(), torch.cuda.device_count() if on_gpu else 2)
    if on_gpu:
        memory = float(torch.cuda.get_device_properties(0).total_memory)
    else:
        lines = Path("/proc/meminfo").read_text().splitlines()
        memory = next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / num_devices
    return Machine(
        name=f"this machine ({num_devices} {'GPUs' if on_gpu else 'CPU processes'})",
        num_devices=num_devices,
        memory_bytes=memory,
        peak_flops=_measured_flops(device, DTYPES[chosen]),
        efficiency=0.9 if chosen == "fp32" else 0.5,
        precision=chosen,
        source="share of its measured matrix multiplication",
        kind=device.type,
    )


def _measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    device_module = torch.get_device_module(device)
    left @ right
    device_module.synchronize()
    begun, count = time.perf_counter(), 0
    while time.perf_counter() - begun < 0.5:
        left @ right
        device_module.synchronize()
        count += 1
    return 2 * size**3 * count / (time.perf_counter() - begun)


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
        needed = f"about {disk / GB:.1f} GB, but {free_disk / GB:.1f} GB are free"
        raise UserError(f"the run's checkpoints need {needed}: give --out a folder on a larger disk")


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
    """The report of a training on this machine. UserError: it does not fit (`require_fit`), no images to count."""
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
