"""Every end is named: an exception that a machine, a disk, a network or another rank causes -> one line with a remedy.

What is in no row of the table is a mistake of the program's own and keeps its traceback.
"""

import errno
import os
import re
import resource
from pathlib import Path

import torch
import torch.distributed as dist

from cxrdist.errors import UserError
from cxrdist.files import FULL, reason

INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "MASTER_ADDR")
LOST = re.compile(
    r"[Gg]loo|NCCL|TCPStore|[Cc]onnection (was )?(closed|reset|refused|aborted)|Broken pipe|[Tt]imed out|[Ss]ocket"
    r"|No route to host|recvValue failed|process group|failed to connect"
)
GPU_MEMORY = re.compile(r"(CUDA|HIP)( error:)? out of memory|CUDNN_STATUS_ALLOC_FAILED|CUBLAS_STATUS_ALLOC_FAILED")
MEMORY = re.compile(r"can't allocate memory|not enough memory|[Cc]annot allocate memory|bad_alloc|Unable to allocate")
FILES = re.compile(r"[Tt]oo many open files")
GPU = re.compile(r"CUDA error: (?!device-side assert|an illegal memory|invalid argument)|no NVIDIA driver|ECC error")


class LostRankError(RuntimeError):
    """Another rank ended or has been silent for too long."""


def lost(error: BaseException) -> bool:
    """Whether an exception of gloo, NCCL or the store says that another process cannot be reached."""
    return isinstance(error, LostRankError | dist.DistError) or (
        isinstance(error, RuntimeError | ConnectionError) and LOST.search(str(error)) is not None
    )


def out_of_memory(error: BaseException) -> str | None:
    """ "the GPU" or "this machine" when memory is what lacks."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and GPU_MEMORY.search(text)):
        return "the GPU"
    lacks = isinstance(error, RuntimeError) and MEMORY.search(text) is not None
    lacks = lacks or (isinstance(error, OSError) and error.errno == errno.ENOMEM) or isinstance(error, MemoryError)
    return "this machine" if lacks else None


def local_problem(error: BaseException) -> str | None:
    """One line for what this process alone ran into: memory, open files, a disk, a permission, its GPU; else None."""
    first = (str(error).splitlines() or [""])[0][:200]
    if isinstance(error, UserError):
        return str(error)
    if where := out_of_memory(error):
        remedy = "use a smaller --device-batch-size, fewer --threads or fewer processes"
        return f"out of memory on {where} ({first or type(error).__name__}); {remedy}"
    too_many = isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)
    if too_many or (isinstance(error, RuntimeError) and FILES.search(first)):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        return f"too many open files ({first}): this process may open {soft} of at most {hard}; raise `ulimit -n`"
    if isinstance(error, BrokenPipeError):
        return "whoever read the output closed it; write it to a file to keep it"
    if isinstance(error, OSError) and error.filename is not None:
        path = Path(os.fsdecode(error.filename))
        if error.errno in FULL:
            return reason(path, None, error)
        return f"{path}: {error.strerror or type(error).__name__}; check the path, its disk and its permissions"
    if isinstance(error, RuntimeError) and GPU.search(first):
        return f"the GPU failed ({first}); look at nvidia-smi and the kernel's log (dmesg)"
    return None


def named(error: BaseException, then: str) -> str | None:
    """One line with the cause and the remedy for an end that is not the program's own mistake; None for one that is.

    then: what a user does after another rank was lost, e.g. "run the same command with --resume".
    """
    if (problem := local_problem(error)) is not None:
        return problem
    if not lost(error):
        return f"{error.strerror or error}; then {then}" if isinstance(error, OSError) else None
    shown = ", ".join(f"{name} {os.environ.get(name, 'not set')}" for name in INTERFACES)
    first = (str(error).splitlines() or [""])[0][:200]
    what = first if isinstance(error, LostRankError) else f"another process ended or stopped responding ({first})"
    return (
        f"{what}; the first error of any rank is the cause; between machines check the network ({shown}); then {then}"
    )
