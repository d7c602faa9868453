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
from cxrdist.distributed.precision import DTYPES, resolve_precision
from cxrdist.estimate.count import GB, Cost, Precision


@dataclass(frozen=True)
class Machine:
    """Hardware that a run is estimated for. Peak is dense, in the precision named, per device."""

    name: str
    num_devices: int
    memory_bytes: float  # of one device, usable
    peak_flops: float  # per second
    efficiency: float  # share of the peak that training reaches
    precision: Precision
    source: str  # where the efficiency comes from
    kind: Literal["cuda", "cpu"] = "cuda"

    @property
    def flops(self) -> float:
        """FLOP per second that all its devices reach."""
        return self.peak_flops * self.efficiency * self.num_devices

    def __str__(self) -> str:
        peak = f"{self.peak_flops / 1e12:.3g} TFLOP/s {self.precision}"
        return f"{self.efficiency:.0%} of {peak} ({self.source})"


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
        precision=cast(Precision, chosen),
        source="share of its measured matrix multiplication",
        kind="cuda" if on_gpu else "cpu",
    )


def _measured_flops(device: torch.device, dtype: torch.dtype) -> float:
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
    return 2 * size**3 * count / (time.perf_counter() - begun)
