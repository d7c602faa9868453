"""How a training or inference is launched on this machine: which accelerate config, how many processes."""

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch

from cxrdist.distributed.environment import usable_cores
from cxrdist.distributed.precision import hardware_of

PACKAGE = Path(__file__).resolve().parents[1]
PROJECT = PACKAGE.parent
CONFIG = "CXRDIST_ACCEL_CONFIG"  # names another accelerate configuration than the machine's


@dataclass(frozen=True)
class LaunchPlan:
    """How `accelerate launch` is called on this machine."""

    config: str  # path of the YAML
    num_processes: int
    environment: dict[str, str] = field(hash=False)  # variables to set unless the user has
    reason: str


def plan_launch() -> LaunchPlan:
    """Two CPU processes (gloo) without a GPU, else one process for each GPU: fp16 where one of them has no bf16."""
    found = [hardware_of(device) for device in visible_gpus()]
    several = "gpu8_bf16" if all(gpu.has_bf16 for gpu in found) else "gpu2_fp16"
    name = {0: "cpu", 1: "gpu1"}.get(len(found), several)
    folder = Path("accel_configs") if Path("accel_configs").is_dir() else PACKAGE / "accel_configs"
    config = os.environ.get(CONFIG, str(folder / f"{name}.yaml"))
    on_cpu = not found or (Path(config).is_file() and "use_cpu: true" in Path(config).read_text())
    num_processes = int(os.environ.get("CXRDIST_PROCESSES", 2 if on_cpu else len(found)))
    # Two processes that each start a thread per core fight for the cores: several times slower on two of them.
    threads = str(max(usable_cores() // num_processes, 1))
    wanted = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    if on_cpu:
        wanted["ACCELERATE_USE_CPU"] = "true"  # accelerate itself sets it for a single process only
        reason = f"{num_processes} processes on the CPU (gloo), {threads} of {usable_cores()} cores each, {config}"
    else:
        reason = f"{num_processes} process{'es' * (num_processes > 1)}, one for each GPU (nccl), {config}"
    return LaunchPlan(config, num_processes, {k: v for k, v in wanted.items() if k not in os.environ}, reason)


def visible_gpus() -> list[torch.device]:
    """The GPUs that torch sees."""
    return [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
