"""Where the time of a CPU goes when every batch asks for fresh memory: page faults. Two ways around them."""

from functools import cache

import numpy as np
import torch
from torch import Tensor


def empty_batch(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """An uninitialised float32 tensor.

    On a CPU numpy asks for huge pages, and torch does not: filling 77 MB takes a third of the time.
    """
    return torch.empty(shape, device=device) if device.type != "cpu" else torch.from_numpy(np.empty(shape, np.float32))


@cache
def keep_freed_blocks() -> None:
    """Let the process keep blocks of up to 32 MB that it frees, instead of returning each to the kernel.

    glibc raises its threshold to the largest block (of at most 32 MB) that was freed so far, so one is, untouched. It
    halves the time of a chain of operations on 0.8 MB images; a no-op with another allocator.
    """
    torch.empty(2**25 - 2**14, dtype=torch.uint8)
