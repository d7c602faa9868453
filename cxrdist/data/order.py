"""Which image is used when: an epoch as a pure function of (seed, epoch, rows), and each rank's slice of it.

An epoch is a sequence of global batches. Every rank computes the same sequence and takes its slice of each batch, so
all ranks take equal numbers of steps, every image is used exactly once, and neither the world size nor threads nor
shards change what is learned. A cursor (epoch, step) is all that resuming needs. Planning costs some seconds for ten
million images.

Rows are in random order over the whole epoch, which needs all shards at hand; or within windows of some shards, which
follow one another in random order: then a shard is read in one window of each epoch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cxrdist.data.rows import EpochOrder, Rows, SomeRows, as_array
from cxrdist.errors import UserError


@dataclass(frozen=True)
class MicroBatch:
    """What one rank feeds through the model in one forward pass.

    rows: (n,) int64 positions in the index, n >= 1. Where `weight` is 0 it is one placeholder, not part of the slice.
    weight: multiply the micro-batch's MEAN loss by it. Summed over micro-batches and averaged over ranks (as DDP does),
        the gradient is the mean over the global batch, also when that is short and slices differ in size. Where cells
        are masked both means are over the observed ones, and a micro-batch without any weighs 0.
    last: closes the global batch, i.e. the optimizer steps after it. Every rank gets the same number of micro-batches.
    step: optimizer steps before this one in the epoch, from 0.
    """

    rows: Rows
    weight: float
    last: bool
    step: int
    epoch: int


def epoch_order(
    rows: SomeRows, seed: int, epoch: int, shards: NDArray[np.integer[Any]] | None = None, window: int | None = None
) -> Rows:
    """`rows` in the order in which `epoch` uses them, (N,) int64, all at once; see `EpochOrder`."""
    return EpochOrder(rows, seed, epoch, shards, window)[:]


def num_steps(num_rows: int, global_batch_size: int) -> int:
    """Optimizer steps of an epoch; the last one may be over a short global batch."""
    return -(-num_rows // global_batch_size)


def accum_steps(global_batch_size: int, device_batch_size: int, world_size: int) -> int:
    """Micro-batches that each rank needs for one global batch. No size has to divide another."""
    return -(-global_batch_size // (device_batch_size * world_size))


def train_batches(
    rows: SomeRows,
    *,
    seed: int,
    epoch: int,
    global_batch_size: int,
    device_batch_size: int,
    rank: int,
    world_size: int,
    start_step: int = 0,
    group: int = 1,
    count_cells: Callable[[Rows, int], int] | None = None,
    shards: NDArray[np.integer[Any]] | None = None,
    window: int | None = None,
) -> Iterator[MicroBatch]:
    """The micro-batches of `rank` from `start_step` to the end of `epoch`.

    group: images that stay together, counted from the beginning of a global batch.
    count_cells: of rows in an epoch, how many label cells are not masked; None where none is. Every rank counts those
    of the global batch by itself: no collective.
    shards, window: see `EpochOrder`.
    The global batches depend only on (rows, seed, epoch, global_batch_size) and the windows. Slices differ by at most
    one group.
    Raises UserError when a batch size would split a group, when there is no image, or when `start_step` lies behind the
    epoch (a checkpoint of another split).
    """
    _check_sizes(rows, device_batch_size, rank, world_size)
    if global_batch_size < 1:
        raise UserError(f"global batch size {global_batch_size} is not valid: use 1 or more")
    for name, size in (("global_batch_size", global_batch_size), ("--device-batch-size", device_batch_size)):
        if size % group:
            raise UserError(f"{name} {size} would split the groups of {group} images that are mixed: use a multiple")
    steps = num_steps(len(rows), global_batch_size)
    if not 0 <= start_step <= steps:
        there = f"an epoch of {len(rows)} images has {steps} steps of {global_batch_size}"
        remedy = "the checkpoint belongs to another split or batch size"
        raise UserError(f"cannot start at step {start_step}: {there}; {remedy}")
    order = EpochOrder(rows, seed, epoch, shards, window)

    def generate() -> Iterator[MicroBatch]:
        for step in range(start_step, steps):
            batch = order[step * global_batch_size : (step + 1) * global_batch_size]
            groups = -(-len(batch) // group)
            own = batch[groups * rank // world_size * group : groups * (rank + 1) // world_size * group]
            cells = None if count_cells is None else max(1, count_cells(batch, epoch))
            num_micro = accum_steps(groups, device_batch_size // group, world_size)
            for i in range(num_micro):
                micro = own[i * device_batch_size : (i + 1) * device_batch_size]
                if count_cells is None or cells is None:
                    weight = len(micro) * world_size / len(batch)
                else:
                    weight = count_cells(micro, epoch) * world_size / cells
                yield MicroBatch(micro if len(micro) else batch[:1], weight, i == num_micro - 1, step, epoch)

    return generate()


def eval_batches(
    rows: range | NDArray[np.integer[Any]], device_batch_size: int, rank: int, world_size: int
) -> Iterator[Rows]:
    """The batches of row positions that `rank` evaluates, each row once over all ranks.

    Batches are cut from `rows` before they are dealt out (batch i to rank i % world_size), so scores do not depend on
    the world size. Ranks may get different counts, or none: no collective per batch. UserError when there is no image.
    """
    _check_sizes(rows, device_batch_size, rank, world_size)
    starts = range(rank * device_batch_size, len(rows), world_size * device_batch_size)
    return (as_array(rows[start : start + device_batch_size]) for start in starts)


@dataclass(frozen=True, eq=False)
class EvalBatches(Mapping[int, Rows]):
    """The batches of `eval_batches` in one process by their numbers, each made when it is asked for.

    numbers: those that are meant.
    """

    rows: range | NDArray[np.integer[Any]]
    device_batch_size: int
    numbers: Sequence[int]

    def __getitem__(self, number: int) -> Rows:
        return as_array(self.rows[number * self.device_batch_size : (number + 1) * self.device_batch_size])

    def __iter__(self) -> Iterator[int]:
        return iter(self.numbers)

    def __len__(self) -> int:
        return len(self.numbers)


def _check_sizes(rows: SomeRows, device_batch_size: int, rank: int, world_size: int) -> None:
    if len(rows) == 0:
        raise UserError("there is no image to use: the split, or the part of it that was chosen, is empty")
    if device_batch_size < 1:
        raise UserError(f"--device-batch-size {device_batch_size} is not valid: use 1 or more")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not in a world of {world_size}")


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of torch's generator (dropout) for one optimizer step of one rank, in [0, 2^63)."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))
