"""The machines that a run is estimated for: three known ones, and the one at hand, whose speed is measured.

Times divide counted FLOPs by peak speed times a stated efficiency: estimates, printed as such. Efficiencies: T4, what
the published EVA-X training reached (31.3 images/s on two); A100 and H100, assumed; the CPU, half of the
matrix-multiplication speed measured on the spot (0.48-0.56 seen for both models in bf16).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch

from cxrdist.distributed.environment import world_size
from cxrdist.distributed.precision import resolve_precision
from cxrdist.estimate.count import GB, Cost, Precision


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


def train_hours(cost: Cost, num_images: int, epochs: int, machine: Machine) -> float:
    """Hours of arithmetic at the machine's stated efficiency."""
    speed = machine.peak_flops * machine.efficiency * machine.num_devices
    return cost.step_flops * num_images * epochs / speed / 3600


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


def this_machine(precision: str) -> Machine:
    """All GPUs, or the processes that were launched; its speed is measured for half a second."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen, _ = resolve_precision(precision, device)
    launched = world_size()
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
