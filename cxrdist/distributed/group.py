"""One way into and out of the process group, for training and inference, with every failure on the way named."""

import contextlib
import datetime
import os
import re
import shutil
import sys
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


def use_cpu() -> bool:
    """Whether accelerate has to be told cpu=True.

    Else, without a GPU, each of two processes assumes that it is the only one.
    """
    return not torch.cuda.is_available() or environment.cpu_wanted()


def check_gpus_seen() -> None:
    """UserError where a machine has GPUs that torch does not see, unless accelerate was told to use the CPU."""
    if not environment.cpu_wanted() and not torch.cuda.is_available() and shutil.which("nvidia-smi") is not None:
        raise UserError(
            f"nvidia-smi is here, but torch {torch.__version__} sees no GPU: run cxrdist.doctor for the reasons; to "
            "run on the CPU set ACCELERATE_USE_CPU=true"
        )


@contextlib.contextmanager
def process_group(timeout_s: float, *, then: str) -> Iterator[Ranks]:
    """The ranks of this run, inside; every failure of the group in the block is named.

    Args:
        timeout_s: a process that sends nothing for so long counts as lost.
        then: what a user does after a failure, e.g. "run the same command with --resume".
    Raises UserError when the processes started do not form one group.
    """
    timeout = datetime.timedelta(seconds=timeout_s)
    # DDP rebuilds its buckets after a session's first step, and with three ranks or more a ring's sum depends on the
    # place in the bucket: a resumed run would differ in the last bit. Looking for unused parameters keeps the buckets.
    keep_buckets = use_cpu() and environment.world_size() > 2
    handlers = [
        # The gloo group of Ranks shall notice first: NCCL's watchdog ends the process without a word of ours.
        InitProcessGroupKwargs(timeout=timeout if use_cpu() else timeout + NCCL_EXTRA),
        DistributedDataParallelKwargs(
            broadcast_buffers=False, gradient_as_bucket_view=True, find_unused_parameters=keep_buckets
        ),
    ]
    with group_failures_named(then):
        # precision is resolved and applied by us, so accelerate is told not to
        accelerator = Accelerator(cpu=use_cpu(), mixed_precision="no", kwargs_handlers=handlers)
        started, joined = environment.world_size(), accelerator.num_processes
        if joined != started:
            raise UserError(
                f"{started} processes were started but each assumes that it is the only one: all would write into one "
                "folder; start with accelerate launch and a file of accel_configs/, or ./launch.sh"
            )
        ranks = Ranks(
            accelerator.process_index,
            joined,
            accelerator.device,
            timeout=timeout,
            parallel=accelerator.prepare_model,
        )
        try:
            yield ranks
        finally:
            if sys.exc_info()[0] is None:
                accelerator.end_training()


@contextlib.contextmanager
def group_failures_named(then: str) -> Iterator[None]:
    """Turn a lost, hung or unreachable process into a line that names the network settings and the next step."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        if not isinstance(error, dist.DistError) and not GROUP_ERRORS.search(str(error)):
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
