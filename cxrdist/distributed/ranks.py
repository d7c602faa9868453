"""The processes of a run as one: who we are, what is done together, and when all of them save or stop.

The one module below the entries that talks to the process group, so that a collective is never under a condition that
differs between ranks: each method here is called by all of them.
"""

import contextlib
import datetime
import os
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from cxrdist.errors import UserError

T = TypeVar("T")


def use_cpu() -> bool:
    """Whether accelerate has to be told cpu=True: else two processes without a GPU each take themselves for alone."""
    return not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")


def check_gpus_seen() -> None:
    """UserError where a machine has GPUs that torch does not see, unless accelerate was told to use the CPU."""
    told = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    if not told and not torch.cuda.is_available() and shutil.which("nvidia-smi") is not None:
        raise UserError(
            f"nvidia-smi is here, but torch {torch.__version__} sees no GPU: run cxrdist.doctor for the reasons; to "
            "run on the CPU set ACCELERATE_USE_CPU=true"
        )


def check_processes(expected: int | None) -> None:
    """UserError unless `expected` processes were started; before the process group, which would wait for the others."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if expected is not None and started != expected:
        raise UserError(
            f"{started} processes were started, {expected} expected (--expect-processes): start them with accelerate "
            "launch and a file of accel_configs/ (`launch --cpu` and MULTI_CPU start only one), or use ./launch.sh"
        )


def require_one_group(world_size: int) -> None:
    """UserError unless the process group has all processes that were started."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size != started:
        raise UserError(
            f"{started} processes were started but each works alone: all would write into one folder; start with "
            "accelerate launch and a file of accel_configs/, or ./launch.sh"
        )


class Ranks:
    """The processes of this run: who we are, and the few things that are done together.

    Small messages go over a gloo group of their own, so that agreeing on the host never waits for a GPU.
    """

    def __init__(self, accelerator: Any, timeout: datetime.timedelta) -> None:
        """accelerator: an accelerate.Accelerator, whose process group is up."""
        self._accelerator = accelerator
        self.rank: int = accelerator.process_index
        self.world_size: int = accelerator.num_processes
        self.device: torch.device = accelerator.device
        self.group: Any = dist.new_group(backend="gloo", timeout=timeout) if self.world_size > 1 else None

    def say(self, text: str) -> None:
        """Print on rank 0."""
        if self.rank == 0:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on every rank (small values: it is pickled)."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks, on the device."""
        if self.world_size == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total

    def together(self, act: Callable[[], T]) -> T:
        """act() on every rank. If one cannot, all end: rank 0 says why, the others leave quietly with the same code."""
        result, problem = None, None
        try:
            result = act()
        except UserError as error:
            problem = str(error)
        problems = self.gather(problem)
        first = next((rank for rank, text in enumerate(problems) if text is not None), None)
        if first is not None:
            if self.rank != 0:
                raise SystemExit(2)
            raise UserError(f"{problems[first]}" + (f" [rank {first}]" if first else ""))
        return result  # type: ignore[return-value]

    def first(self, act: Callable[[], T]) -> T:
        """act() on rank 0 and its (small) result on all, which wait for it and end together if it fails."""
        return self.gather(self.together(lambda: act() if self.rank == 0 else None))[0]  # type: ignore[return-value]

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model with its gradients averaged over the ranks."""
        with warnings.catch_warnings():
            # torch 2.14 renames DDP's broadcast_buffers; accelerate and older torch know only this name
            warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
            return self._accelerator.prepare_model(model)  # type: ignore[no-any-return]

    def accumulating(self, model: nn.Module, *, sync: bool) -> contextlib.AbstractContextManager[None]:
        """Average gradients in this backward pass only if `sync`."""
        if sync or self.world_size == 1:
            return contextlib.nullcontext()
        return model.no_sync()  # type: ignore[no-any-return, operator]


@dataclass(frozen=True)
class Decision:
    """What all ranks do after a step."""

    save: bool = False
    stop: str = ""


class Control:
    """Saving and stopping, agreed by all ranks at the same step, one step after the cause.

    Each rank's wish travels in a small all-reduce on the host that is started after one step and read after the next,
    so it costs no waiting.
    """

    def __init__(self, ranks: Ranks, checkpoint_s: float, max_s: float | None, max_steps: int | None) -> None:
        self._ranks = ranks
        self._max_steps = max_steps
        self._checkpoint_s = checkpoint_s
        self._max_s = max_s
        self._started = self._saved = time.monotonic()
        self._signal = 0
        self._slowest_s = 0.0
        self._last = self._started
        self._pending: tuple[Any, Tensor] | None = None

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Inside, SIGTERM and SIGUSR1 mean: checkpoint at the next step boundary, then stop."""

        def note(number: int, _: object) -> None:
            self._signal = number

        kept = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGUSR1)}
        try:
            yield
        finally:
            for number, handler in kept.items():
                signal.signal(number, handler)

    def after_step(self, global_step: int) -> Decision:
        """Send this rank's wishes and return what was agreed on the wishes sent one step ago."""
        if global_step == self._max_steps:
            return Decision(stop="--max-steps")
        now = time.monotonic()
        self._slowest_s, self._last = max(self._slowest_s, now - self._last), now
        due = self._ranks.rank == 0 and now - self._saved >= self._checkpoint_s
        over = self._max_s is not None and now + 2 * self._slowest_s - self._started >= self._max_s
        wishes = torch.tensor([float(due), float(self._signal), float(over)])
        if self._ranks.world_size == 1:
            return self._decide(wishes)
        agreed = self._pending
        self._pending = (dist.all_reduce(wishes, dist.ReduceOp.MAX, group=self._ranks.group, async_op=True), wishes)
        if agreed is None:
            return Decision()
        agreed[0].wait()
        return self._decide(agreed[1])

    def _decide(self, agreed: Tensor) -> Decision:
        due, signal_number, over = agreed.tolist()
        if due:
            self._saved = time.monotonic()
        stop = "--max-hours" if over else ""
        return Decision(bool(due), signal.Signals(int(signal_number)).name if signal_number else stop)
