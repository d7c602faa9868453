"""One way into and out of the process group, for training and inference, with every failure on the way named."""

import contextlib
import datetime
import os
import re
import shutil
from collections.abc import Iterator

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

from cxrdist.distributed import environment
from cxrdist.distributed.ranks import Ranks
from cxrdist.errors import UserError

NCCL_EXTRA = datetime.timedelta(minutes=5)
GROUP_ERRORS = re.compile(r"gloo|NCCL|[Cc]onnection (was )?(closed|reset|refused)|[Tt]imed out|[Ss]ocket|process group")
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "MASTER_ADDR")


def check_gpus_seen() -> None:
    """UserError where a machine has GPUs that torch does not see, unless accelerate was told to use the CPU."""
    if not environment.cpu_wanted() and not torch.cuda.is_available() and shutil.which("nvidia-smi") is not None:
        raise UserError(
            f"nvidia-smi is here, but torch {torch.__version__} sees no GPU: run cxrdist.doctor for the reasons; to "
            "run on the CPU set ACCELERATE_USE_CPU=true"
        )


@contextlib.contextmanager
def process_group(timeout_s: float, *, then: str) -> Iterator[Ranks]:
    """The ranks of this run, inside, where a lost, hung or unreachable process becomes one line that names the cause.

    Args:
        timeout_s: a process that sends nothing for so long counts as lost.
        then: what a user does after a failure, e.g. "run the same command with --resume".
    Raises UserError when the processes started do not form one group.
    """
    timeout = datetime.timedelta(seconds=timeout_s)
    # accelerate has to be told: else, without a GPU, each of two processes assumes that it is the only one
    on_cpu = not torch.cuda.is_available() or environment.cpu_wanted()
    started = environment.world_size()
    handlers = [
        # The gloo group of Ranks shall notice first: NCCL's watchdog ends the process without a word of ours.
        InitProcessGroupKwargs(timeout=timeout if on_cpu else timeout + NCCL_EXTRA),
        # DDP rebuilds its buckets after a session's first step, and with three ranks or more a ring's sum depends on
        # the place in the bucket: a resumed run would differ in the last bit. Looking for unused parameters keeps them.
        DistributedDataParallelKwargs(
            broadcast_buffers=False, gradient_as_bucket_view=True, find_unused_parameters=on_cpu and started > 2
        ),
    ]
    try:
        # precision is resolved and applied by us, so accelerate is told not to
        accelerator = Accelerator(cpu=on_cpu, mixed_precision="no", kwargs_handlers=handlers)
        rank, joined, device = accelerator.process_index, accelerator.num_processes, accelerator.device
        if joined != started:
            raise UserError(
                f"{started} processes were started but each assumes that it is the only one: all would write into one "
                "folder; start with accelerate launch and a file of accel_configs/, or ./launch.sh"
            )
        yield Ranks(rank, joined, device, timeout=timeout, parallel=accelerator.prepare_model)
        accelerator.end_training()
    except RuntimeError as error:
        lost = isinstance(error, dist.DistError) or GROUP_ERRORS.search(str(error))
        if isinstance(error, torch.OutOfMemoryError) or not lost:
            raise
        shown = ", ".join(f"{name} {os.environ.get(name, 'not set')}" for name in INTERFACES)
        raise UserError(
            f"another process ended or stopped responding ({str(error).splitlines()[0][:200]}); the first error of any "
            f"rank is the cause; between machines check the network ({shown}); then {then}"
        ) from error


@contextlib.contextmanager
def out_of_memory_named(device: torch.device, device_batch_size: int, remedy: str) -> Iterator[None]:
    """Turn a GPU's lack of memory into a line that names the flag. remedy: what follows the smaller batch size."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of memory on {device} with {device_batch_size} images at once; use --device-batch-size "
            f"{max(1, device_batch_size // 2)} {remedy} ({str(error).splitlines()[0]})"
        ) from error
