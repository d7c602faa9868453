"""What a run needs before it starts: memory per device, FLOPs, hours, files. For `--dry-run` of `train` and `infer`.

FLOPs and activation memory are counted on the recipe's own model with fake tensors (shapes, no arithmetic), so they
follow every recipe field. Times divide counted FLOPs by peak speed times a stated efficiency: estimates, printed as
such. Efficiencies: T4, what the published EVA-X training reached (31.3 images/s on two); A100 and H100, assumed; the
CPU, half of the matrix-multiplication speed measured on the spot (0.48-0.56 seen for both models in bf16).
"""

import dataclasses
import functools
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from cxrdist.augment.views import distinct_views
from cxrdist.distributed.precision import resolve_precision
from cxrdist.errors import UserError
from cxrdist.models import build_model, trainable_names
from cxrdist.recipes import Recipe, chexfound, eva_x
from cxrdist.shards.index import open_index

GB = 1e9
RUNTIME_BYTES = {"cuda": 0.8 * GB, "cpu": 0.6 * GB}  # CUDA context and libraries; an imported torch
TRANSIENT = 1.15  # gradients of activations and workspaces on top of what the graph keeps
PUBLISHED_IMAGES = {"a": 107_374, "b": 108_491}
PUBLISHED_TEST_IMAGES = {"a": 46_233, "b": 47_927}
PUBLISHED_INFER_HOURS = {"a": 6.1, "b": 6.8}  # two T4s, 12 passes of EVA-X and 2 of CheXFound
PUBLISHED_INFER_PASSES = (12, 2)
DECODED_BATCHES = 3  # 600-px uint8 batches in flight
Precision = Literal["bf16", "fp16", "fp32"]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Hardware that a run is estimated for. Peak is dense, in the precision named, per device."""

    name: str
    kind: Literal["cuda", "cpu"] = "cuda"
    num_devices: int
    memory_bytes: float  # of one device, usable
    peak_flops: float  # per second
    efficiency: float  # share of the peak that training reaches
    precision: Precision
    source: str  # where the efficiency comes from


PUBLISHED_T4 = Machine(
    name="T4 x 2",
    num_devices=2,
    memory_bytes=14.6 * GB,
    peak_flops=65e12,
    efficiency=0.113,
    precision="fp16",
    source="efficiency of the published EVA-X run",
)
MACHINES = (
    PUBLISHED_T4,
    Machine(
        name="A100 80 GB",
        num_devices=1,
        memory_bytes=79 * GB,
        peak_flops=312e12,
        efficiency=0.35,
        precision="bf16",
        source="efficiency assumed",
    ),
    Machine(
        name="H100 x 8",
        num_devices=8,
        memory_bytes=79 * GB,
        peak_flops=989e12,
        efficiency=0.30,
        precision="bf16",
        source="efficiency assumed",
    ),
)


@dataclass(frozen=True)
class Cost:
    """What one image of a recipe costs; counted, not measured."""

    forward_flops: float  # a multiplication and an addition are two
    step_flops: float  # forward and backward
    activation_bytes: float  # kept for the backward pass, with autocast unless fp32
    num_parameters: int
    num_trained: int


@functools.cache
def count_cost(recipe: Recipe, precision: Precision = "bf16") -> Cost:
    """Count FLOPs and saved activations of one image on the recipe's model; takes seconds and no memory to speak of."""
    sizes: dict[str, Any] = dict(recipe.model_kwargs)
    with torch.device("meta"):
        model = build_model(recipe.model, recipe.image_size, drop_rate=recipe.drop_rate, **sizes)
    num_images = 2
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    formulas = {
        attention: _attention_flops,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    }
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage.nbytes()
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        images = torch.empty(num_images, 3, recipe.image_size, recipe.image_size)
        counter = FlopCounterMode(display=False, custom_mapping=formulas)
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp32")
        with counter, autocast, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = model(images)
            forward = counter.get_total_flops()
            logits.float().sum().backward()
        parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return Cost(
        forward_flops=forward / num_images,
        step_flops=counter.get_total_flops() / num_images,
        activation_bytes=sum(size for key, size in saved.items() if key not in parameters) / num_images,
        num_parameters=sum(counts.values()),
        num_trained=sum(counts[name] for name in trainable_names(model)),
    )


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]  # untyped in torch


def _attention_backward_flops(
    grad: Any, query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))  # type: ignore[no-untyped-call]  # untyped in torch


def memory_bytes(cost: Cost, device_batch_size: int, kind: str, num_devices: int) -> float:
    """Peak memory of one device: weights, gradients (twice under DDP, which copies them into buckets), two Adam
    moments and the EMA in float32, activations of a device batch, decoded images, and the runtime itself.
    """
    gradients = 2 if num_devices > 1 else 1
    weights = 4 * (cost.num_parameters + cost.num_trained * (gradients + 3))
    images = DECODED_BATCHES * device_batch_size * 600 * 600
    return weights + TRANSIENT * cost.activation_bytes * device_batch_size + images + RUNTIME_BYTES[kind]


def best_device_batch(cost: Cost, recipe: Recipe, machine: Machine) -> int:
    """The largest device batch that fits and divides a device's share of the global batch; 0 when nothing fits."""
    share = math.ceil(recipe.global_batch_size / machine.num_devices)
    sizes = [share // parts for parts in range(1, share + 1) if share % parts == 0]
    for size in sizes:
        if memory_bytes(cost, size, machine.kind, machine.num_devices) <= machine.memory_bytes:
            return size
    return 0


def fitting_batch(recipe: Recipe, precision: str, free_bytes: float, world_size: int) -> int:
    """The largest device batch of a training that fits a GPU's free memory. Raises UserError when not even one does."""
    gpu = dataclasses.replace(PUBLISHED_T4, name="this GPU", num_devices=world_size, memory_bytes=free_bytes)
    cost = count_cost(recipe, cast(Precision, precision))
    batch = best_device_batch(cost, recipe, gpu)
    if batch == 0:
        need = memory_bytes(cost, 1, "cuda", world_size)
        raise UserError(
            f"{recipe.name} needs about {need / GB:.1f} GB for one image, and the GPU with the least free memory has "
            f"{free_bytes / GB:.1f} GB: end what else runs there, or try --grad-checkpointing --device-batch-size 1"
        )
    return batch


def train_hours(cost: Cost, num_images: int, epochs: int, machine: Machine) -> float:
    """Hours of arithmetic at the machine's stated efficiency."""
    speed = machine.peak_flops * machine.efficiency * machine.num_devices
    return cost.step_flops * num_images * epochs / speed / 3600


def checkpoint_bytes(cost: Cost) -> tuple[float, float]:
    """(one epoch checkpoint: model and EMA; one step checkpoint: with both Adam moments), float32."""
    return 8.0 * cost.num_trained, 16.0 * cost.num_trained


def measured_machine(device: torch.device, num_devices: int, precision: Precision, memory_available: float) -> Machine:
    """The machine at hand, its peak being the speed of a matrix multiplication on one device right now."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    synchronize: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    left @ right
    synchronize()
    begun, count = time.perf_counter(), 0
    while time.perf_counter() - begun < 0.5:
        left @ right
        synchronize()
        count += 1
    peak = 2 * size**3 * count / (time.perf_counter() - begun)
    return Machine(
        name=f"this machine ({num_devices} {'GPUs' if device.type == 'cuda' else 'CPU processes'})",
        kind="cuda" if device.type == "cuda" else "cpu",
        num_devices=num_devices,
        memory_bytes=memory_available,
        peak_flops=peak,
        efficiency=0.5 if precision != "fp32" else 0.9,
        precision=precision,
        source="share of its measured matrix multiplication",
    )


def require_fit(cost: Cost, recipe: Recipe, machine: Machine, device_batch_size: int | None, free_disk: float) -> None:
    """Raises UserError naming the flag that helps when memory or disk cannot hold the run."""
    best = best_device_batch(cost, recipe, machine)
    chosen = device_batch_size or best
    if best == 0:
        need = memory_bytes(cost, 1, machine.kind, machine.num_devices)
        raise UserError(
            f"{recipe.name} needs about {need / GB:.1f} GB per device for one image, but {machine.name} has "
            f"{machine.memory_bytes / GB:.1f} GB: use a smaller --model or --set image_size=N"
        )
    need = memory_bytes(cost, chosen, machine.kind, machine.num_devices)
    if need > machine.memory_bytes:
        raise UserError(
            f"--device-batch-size {chosen} needs about {need / GB:.1f} GB per device, but {machine.name} has "
            f"{machine.memory_bytes / GB:.1f} GB: use --device-batch-size {best} (the same images a step)"
        )
    epoch, step = checkpoint_bytes(cost)
    disk = epoch * recipe.epochs + 2 * step
    if disk > free_disk:
        raise UserError(
            f"the run's checkpoints need about {disk / GB:.1f} GB, but {free_disk / GB:.1f} GB are free: "
            "give --out a folder on a larger disk"
        )


def report(recipe: Recipe, num_images: int, here: Machine, device_batch_size: int | None, free_disk: float) -> str:
    """The table `train --dry-run` prints; raises UserError (see `require_fit`) when the run cannot fit here."""
    cost = count_cost(recipe, here.precision)
    require_fit(cost, recipe, here, device_batch_size, free_disk)
    epoch, step = checkpoint_bytes(cost)
    num_steps = math.ceil(num_images / recipe.global_batch_size) * recipe.epochs
    lines = [
        f"dry run: {recipe.name}, division {recipe.div.upper()}, {num_images:,} images, {recipe.epochs} epochs, "
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
        batch = device_batch_size if machine is here and device_batch_size else best_device_batch(cost, recipe, machine)
        if batch == 0:
            lines.append(f"{machine.name:<30}does not fit in {machine.memory_bytes / GB:.0f} GB")
            continue
        need = memory_bytes(cost, batch, machine.kind, machine.num_devices) / GB
        total = train_hours(cost, num_images, recipe.epochs, machine)
        speed = f"{num_images * recipe.epochs / total / 3600:.3g}"
        peak = f"{machine.efficiency:.0%} of {machine.peak_flops / 1e12:.3g} TFLOP/s {machine.precision}"
        lines.append(
            f"{machine.name:<30}{batch:>13}{need:>10.1f}{speed:>10}{_duration(total / recipe.epochs):>9}"
            f"{_duration(total):>9}  {peak} ({machine.source})"
        )
    lines.append("times are arithmetic alone, with reading and Python keeping up; expect to be off by a factor of two")
    return "\n".join(lines)


def infer_report(div: Literal["a", "b"], num_images: int, here: Machine) -> str:
    """The table `infer --dry-run` prints: hours of the published members on `here` and other machines.

    T4: at the speed that the published inference reached, found from its counted FLOPs and its hours.
    """
    recipes = (eva_x(div), chexfound(div))
    flops = [count_cost(recipe, here.precision).forward_flops for recipe in recipes]
    # views of every epoch, but one pass of a frozen backbone for all epochs
    passes = (len(distinct_views(recipes[0].views)) * len(recipes[0].member_epochs), len(recipes[1].views))
    need, published = (
        sum(count * cost for count, cost in zip(counts, flops, strict=True))
        for counts in (passes, PUBLISHED_INFER_PASSES)
    )
    hours = PUBLISHED_INFER_HOURS[div]
    speed = published * PUBLISHED_TEST_IMAGES[div] / (hours * 3600)
    t4 = dataclasses.replace(
        PUBLISHED_T4,
        efficiency=speed / (PUBLISHED_T4.peak_flops * PUBLISHED_T4.num_devices),
        source="efficiency of the published inference",
    )
    lines = [
        f"dry run: inference of division {div.upper()}, {num_images:,} images, each decoded once; "
        f"{passes[0]} passes of EVA-X and {passes[1]} of CheXFound: {need / 1e9:,.0f} GFLOP an image",
        f"published: {PUBLISHED_INFER_PASSES[0]} and {PUBLISHED_INFER_PASSES[1]} passes, {published / 1e9:,.0f} GFLOP, "
        f"{hours} h on two T4s for {PUBLISHED_TEST_IMAGES[div]:,} images",
        "",
        f"{'estimates':<30}{'images/s':>10}{'all':>10}  efficiency",
    ]
    for machine in (here, t4, *MACHINES[1:]):
        rate = machine.peak_flops * machine.efficiency * machine.num_devices / need
        lines.append(
            f"{machine.name:<30}{rate:>10.3g}{_duration(num_images / rate / 3600):>10}  {machine.efficiency:.0%} of "
            f"{machine.peak_flops / 1e12:.3g} TFLOP/s {machine.precision} ({machine.source})"
        )
    lines.append("times are arithmetic alone, with decoding and Python keeping up; expect to be off by a factor of two")
    return "\n".join(lines)


def infer_dry_run(div: Literal["a", "b"], shards: Path, precision: str) -> str:
    """The report of `infer_report` for this machine; images are counted in the shard set where it is there."""
    here = _this_machine(precision)
    there = (shards / "test.json").is_file()
    num_images = len(open_index(shards, "test", div)) if there else PUBLISHED_TEST_IMAGES[div]
    text = infer_report(div, num_images, here)
    return text if there else f"{text}\nno test shards in {shards} yet: counted the published {num_images:,} images"


def _duration(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.1f} min"


def dry_run(recipe: Recipe, shards: Path, out: Path, *, device_batch_size: int | None, precision: str) -> str:
    """The report for a training as it would start here: on all GPUs, or on the processes that were launched.

    Counts the images of the shard set where it is there, else those of the published division. Raises UserError when
    the run cannot fit this machine (see `require_fit`).
    """
    here = _this_machine(precision)
    there = (shards / "train.json").is_file()
    num_images = len(open_index(shards, "train", recipe.div)) if there else PUBLISHED_IMAGES[recipe.div]
    folder = next(path for path in (out, *out.absolute().parents) if path.exists())
    text = report(recipe, num_images, here, device_batch_size, float(shutil.disk_usage(folder).free))
    return (
        text if there else f"{text}\nno shards in {shards} yet: counted the {num_images:,} images of the published run"
    )


def _this_machine(precision: str) -> Machine:
    """All GPUs, or the processes that were launched; its speed is measured for half a second."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen, _ = resolve_precision(precision, device)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if device.type == "cuda":
        num_devices = max(launched, torch.cuda.device_count())
        memory = float(torch.cuda.get_device_properties(0).total_memory)
    else:
        num_devices = max(launched, 2)
        memory = _available_memory() / num_devices
    return measured_machine(device, num_devices, cast(Precision, chosen), memory)


def _available_memory() -> float:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
