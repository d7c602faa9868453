"""What the launcher, Slurm and the machine say of this process, read from the environment here only. No torch."""

import contextlib
import os
import resource
import sys
from collections.abc import Mapping
from pathlib import Path

from cxrdist.errors import UserError

# A core decodes about 1,000 images/s and today's fastest GPU trains on 800: more threads only take cores from others.
MAX_DECODE_THREADS = 8
MOST_FILES = 2**16
LAUNCHER = "CXRDIST_LAUNCHER"  # set by `cxrdist train` and `infer` for the ranks that they start
SHARERS = (  # who may have started several processes that share the work: rank, count, first rank
    ("torchrun or accelerate", "RANK", "WORLD_SIZE", ""),
    ("a Slurm array", "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN"),
    ("a Slurm step", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", ""),
)


def is_launched() -> bool:
    """Whether a launcher (accelerate, torchrun, srun with one of them) started this process as a rank."""
    return "WORLD_SIZE" in os.environ


def rank() -> int:
    """This process's rank as the launcher set it; 0 without a launcher. UserError for what is no rank."""
    return _from_launcher("RANK", 0, least=0)


def rank_text() -> str:
    """The rank as it stands in the environment, for messages, also where it is the mistake."""
    return os.environ.get("RANK", "0")


def world_size() -> int:
    """The number of processes the launcher started; 1 without a launcher. UserError for what is no number of them."""
    return _from_launcher("WORLD_SIZE", 1, least=1)


def local_rank() -> int:
    """This process's place among those of its machine, as the launcher set it; 0 without a launcher: it is the first
    of its machine, or does what the first one does.
    """
    return _from_launcher("LOCAL_RANK", 0, least=0)


def local_world_size() -> int:
    """The number of processes that the launcher started on this node; 1 without a launcher."""
    return _from_launcher("LOCAL_WORLD_SIZE", 1, least=1)


def _from_launcher(name: str, without: int, least: int) -> int:
    text = os.environ.get(name, str(without))
    if not text.isdecimal() or int(text) < least:
        raise UserError(f"{name}={text} in the environment: it is at least {least}; unset it")
    return int(text)


def array_task() -> int | None:
    """The number of this task in a Slurm array; None outside one."""
    text = os.environ.get("SLURM_ARRAY_TASK_ID", "")
    return int(text) if text.isdecimal() else None


def cpu_wanted() -> bool:
    """Whether accelerate was told to use the CPU."""
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")


def usable_cores() -> int:
    """The cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine_memory() -> tuple[float, float | None]:
    """The bytes of memory of this machine, and those available; None where the system does not say it (macOS)."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")), None
    cells = {line.split(":")[0]: 1024.0 * int(line.split()[1]) for line in lines}
    return cells["MemTotal"], cells["MemAvailable"]


def peak_memory() -> int:
    """The most bytes of memory that this process held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # the unit is the system's


def decode_threads() -> int:
    """Decode threads for this rank: the cores it may use, shared with the node's other ranks, 1 to 8."""
    return max(1, min(MAX_DECODE_THREADS, usable_cores() // local_world_size()))


def raise_file_limit() -> None:
    """Let this process open as many files as the machine allows it: a set may have thousands of shards."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < (most := MOST_FILES if hard == resource.RLIM_INFINITY else hard):
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, MOST_FILES), hard))


def check_processes(expected: int | None) -> None:
    """UserError unless `expected` processes were started, and told so alike; before the process group, which would
    wait for the others.
    """
    local_world_size()
    local_rank()
    if rank() >= world_size():
        raise UserError(f"RANK={rank()} with WORLD_SIZE={world_size()} in the environment: unset both")
    if expected is not None and world_size() != expected:
        raise UserError(
            f"{world_size()} processes were started, {expected} expected (--expect-processes): use `cxrdist train`, or "
            "accelerate launch with a file of accel_configs/ (`launch --cpu` and MULTI_CPU start only one)"
        )


def node_of(
    node_rank: int | None, num_nodes: int | None, environ: Mapping[str, str] = os.environ
) -> tuple[int, int, str]:
    """(rank, count, who said so) of this process among those that share a work: flags, else a launcher or Slurm."""
    found = [sharer for sharer in SHARERS if sharer[1] in environ and sharer[2] in environ]
    source = "flags"
    if num_nodes is None and node_rank is None and found:
        source, own, count, first = found[0]
        node_rank, num_nodes = int(environ[own]) - int(environ.get(first, "0")), int(environ[count])
    node_rank, num_nodes = node_rank or 0, num_nodes or 1
    if not 0 <= node_rank < num_nodes:
        raise UserError(f"--node-rank {node_rank} with --num-nodes {num_nodes}: ranks run from 0 to {num_nodes - 1}")
    return node_rank, num_nodes, source
