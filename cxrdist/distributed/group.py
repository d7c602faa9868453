"""One way into and out of the process group, for training and inference, with every failure on the way named."""

import contextlib
import datetime
import os
import shutil
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

from cxrdist.distributed import ends, environment
from cxrdist.distributed.ranks import Ranks
from cxrdist.errors import UserError

NCCL_EXTRA = datetime.timedelta(minutes=5)
JOIN = datetime.timedelta(minutes=1)  # at least: processes import torch from one disk at the same time, and join late


def check_gpus_seen() -> None:
    """UserError where a machine has GPUs that torch does not see, unless accelerate was told to use the CPU."""
    if not environment.cpu_wanted() and not torch.cuda.is_available() and shutil.which("nvidia-smi") is not None:
        raise UserError(
            f"nvidia-smi is here, but torch {torch.__version__} sees no GPU: run `cxrdist doctor` for the reasons; to "
            "run on the CPU set ACCELERATE_USE_CPU=true"
        )


@contextlib.contextmanager
def process_group(timeout_s: float, *, then: str) -> Iterator[Ranks]:
    """The ranks of this run, inside, where every end that `ends` knows becomes one line that names the cause.

    Args:
        timeout_s: a process that is silent for so long counts as lost; one that works on may take longer.
        then: what a user does after a failure, e.g. "run the same command with --resume".
    Raises UserError when the processes started do not form one group.
    """
    timeout = datetime.timedelta(seconds=timeout_s)
    # accelerate has to be told: else, without a GPU, each of two processes assumes that it is the only one
    on_cpu = not torch.cuda.is_available() or environment.cpu_wanted()
    started = environment.world_size()
    # The gloo group of Ranks shall notice first: NCCL's watchdog ends the process without a word of ours.
    of_tensors = timeout if on_cpu else timeout + NCCL_EXTRA
    handlers = [
        InitProcessGroupKwargs(timeout=max(of_tensors, JOIN)),
        # DDP rebuilds its buckets after a session's first step, and with three ranks or more a ring's sum depends on
        # the place in the bucket: a resumed run would differ in the last bit. Looking for unused parameters keeps them.
        DistributedDataParallelKwargs(
            broadcast_buffers=False, gradient_as_bucket_view=True, find_unused_parameters=on_cpu and started > 2
        ),
    ]
    ranks = None
    try:
        # precision is resolved and applied by us, so accelerate is told not to
        # Slurm's --gpus-per-task=1 shows each process one GPU, cuda:0, and accelerate would hand DDP the local rank's
        # number; told nothing, DDP takes the device the model is on.
        os.environ["ACCELERATE_BYPASS_DEVICE_MAP"] = "true"
        accelerator = Accelerator(cpu=on_cpu, mixed_precision="no", kwargs_handlers=handlers)
        rank, joined, device = accelerator.process_index, accelerator.num_processes, accelerator.device
        if joined != started:
            raise UserError(
                f"{started} processes were started but each assumes that it is the only one: all would write into one "
                "folder; start with accelerate launch and a file of accel_configs/, or `cxrdist train`"
            )
        if joined > 1:
            _set_timeout(of_tensors)
        ranks = Ranks(rank, joined, device, timeout=timeout, parallel=accelerator.prepare_model)
        yield ranks
        ranks.close(failed=False)
        accelerator.end_training()
    except BaseException as error:
        if ranks is not None:
            ranks.close(failed=True)
        if isinstance(error, UserError) or not isinstance(error, Exception):
            raise
        if (text := ends.named(error, then)) is None:
            raise
        raise UserError(text) from error


@contextlib.contextmanager
def out_of_memory_named(device: torch.device, device_batch_size: int, remedy: str) -> Iterator[None]:
    """Turn a lack of memory into a line that names the flag. remedy: what follows the smaller batch size."""
    try:
        yield
    except Exception as error:
        if ends.out_of_memory(error) is None:
            raise
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"out of memory on {device} with {device_batch_size} images at once; use --device-batch-size "
            f"{max(1, device_batch_size // 2)} {remedy} ({first})"
        ) from error


def _set_timeout(timeout: datetime.timedelta) -> None:
    c10d: Any = dist.distributed_c10d
    change = getattr(c10d, "set_timeout", None) or c10d._set_pg_timeout  # its name before torch 2.14
    change(timeout)
