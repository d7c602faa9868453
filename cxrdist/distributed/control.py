"""When all ranks save a checkpoint or stop, agreed without waiting."""

import contextlib
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cxrdist.distributed.ranks import Ranks

STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SAME_SIGNAL_S = 1.0  # a terminal and the launcher may both deliver one Ctrl-C


@dataclass(frozen=True)
class Decision:
    """What all ranks do after a step."""

    save: bool = False
    stop: str = ""


class Control:
    """Saving and stopping, agreed by all ranks at the same step, one step after the cause.

    Each rank's wish travels in a small all-reduce on the host that is started after one step and read after the next,
    so it costs no waiting. max_steps: of this session; a resumed run counts from where it was resumed.
    """

    def __init__(self, ranks: Ranks, checkpoint_s: float, max_s: float | None, max_steps: int | None) -> None:
        self._ranks, self._checkpoint_s, self._max_s, self._max_steps = ranks, checkpoint_s, max_s, max_steps
        self._started = self._saved = self._last = time.monotonic()
        self._steps, self._signal, self._signalled, self._slowest_s = 0, 0, 0.0, 0.0
        self._pending: tuple[Any, Tensor] | None = None

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Inside, SIGTERM, SIGUSR1 and SIGINT mean: checkpoint at the next step boundary, then stop.

        A second SIGINT ends at once, as KeyboardInterrupt.
        """

        def note(number: int, _: object) -> None:
            now = time.monotonic()
            if number == signal.SIGINT and self._signal == number and now - self._signalled > SAME_SIGNAL_S:
                raise KeyboardInterrupt
            if self._signal != number:
                self._signal, self._signalled = number, now

        kept = {number: signal.signal(number, note) for number in STOPPING}
        try:
            yield
        finally:
            for number, handler in kept.items():
                signal.signal(number, handler)

    def after_step(self) -> Decision:
        """Send this rank's wishes and return what was agreed on the wishes sent one step ago."""
        self._ranks.beat()
        self._steps += 1
        if self._steps == self._max_steps:
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
