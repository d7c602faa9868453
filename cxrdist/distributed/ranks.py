"""The processes of a run as one: who we are, and the few things that are done together.

Each method here is called by all ranks, so that a collective is never under a condition that differs between them.
"""

import contextlib
import datetime
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from cxrdist.distributed import environment
from cxrdist.distributed.ends import local_problem
from cxrdist.distributed.pulse import Pulse
from cxrdist.errors import UserError

P = ParamSpec("P")
T = TypeVar("T")


class Ranks:
    """The processes of this run.

    Small messages go over a gloo group of their own, so that agreeing on the host never waits for a GPU; before each
    the ranks meet (see Pulse), so that one may come late.
    """

    def __init__(
        self,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        *,
        timeout: datetime.timedelta = datetime.timedelta(minutes=10),
        parallel: Callable[[nn.Module], nn.Module] | None = None,
    ) -> None:
        """timeout: of silence and of small messages; with more than one process torch's process group must be up.
        parallel: makes a model average its gradients over the ranks; None leaves it as it is.
        """
        self.rank, self.world_size, self.device = rank, world_size, torch.device(device)
        self.local_rank = environment.local_rank()  # 0: the first process of its machine
        self._parallel = parallel
        self.group: Any = None
        self._pulse: Pulse | None = None
        if world_size > 1:
            self._pulse = Pulse(rank, world_size, timeout.total_seconds())
            self._pulse.meet()
            self.group = dist.new_group(backend="gloo", timeout=timeout)

    def close(self, *, failed: bool) -> None:
        """Leave the others; after a failure they are told."""
        if self._pulse is not None:
            self._pulse.close(failed=failed)

    def beat(self) -> None:
        """Say that this rank goes on."""
        if self._pulse is not None:
            self._pulse.beat()

    def paced(self, items: Iterable[T]) -> Iterator[T]:
        """The items of a loop in which no collective shows that this rank goes on: each of them does."""
        for item in items:
            self.beat()
            yield item

    def working(self, what: str) -> contextlib.AbstractContextManager[None]:
        """Inside, this rank may take longer than the others wait for a silent one."""
        return contextlib.nullcontext() if self._pulse is None else self._pulse.working(what)

    def say(self, text: str) -> None:
        """Print on rank 0."""
        if self.rank == 0:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on every rank (small values: it is pickled)."""
        if self.world_size == 1:
            return [value]
        assert self._pulse is not None
        self._pulse.meet()
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

    def sum_with_gradient(self, values: Tensor) -> Tensor:
        """The sum over ranks, on the device; gradients are summed over ranks, too."""
        summed: Tensor = values if self.world_size == 1 else _Sum.apply(values)  # type: ignore[no-untyped-call]
        return summed

    @contextlib.contextmanager
    def agree(self, what: str = "") -> Iterator[None]:
        """All ranks reach the end of the block, or all end: a UserError on one is raised by rank 0 for all of them.

        So is what has a name in `ends`: memory, files, permissions. The other ranks leave with the same exit code and
        without a message. The block may take as long as it likes; `what` is shown to those who wait.
        """
        problem = None
        try:
            with self.working(what or "start-up"):
                yield
        except Exception as error:
            problem = local_problem(error)
            if problem is None:
                raise
        problems = self.gather(problem)
        first = next((rank for rank, text in enumerate(problems) if text is not None), None)
        if first is not None:
            if self.rank != 0:
                raise SystemExit(2)
            raise UserError(f"{problems[first]}" + (f" [rank {first}]" if first else ""))

    def on_main(self, act: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """`act(*args, **kwargs)` on rank 0 and its result, pickled, on all, which wait for it and end if it fails."""
        result: T | None = None
        with self.agree(getattr(act, "__name__", "")):
            if self.rank == 0:
                result = act(*args, **kwargs)
        if self._pulse is None:
            return result  # type: ignore[return-value]
        self._pulse.meet()
        sent: list[Any] = [result]
        dist.broadcast_object_list(sent, src=0, group=self.group)
        return sent[0]  # type: ignore[no-any-return]

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model with its gradients averaged over the ranks."""
        with warnings.catch_warnings():
            # torch 2.14 renames DDP's broadcast_buffers; accelerate and older torch know only this name
            warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
            prepared = model if self._parallel is None else self._parallel(model)
        # of 1 x 1 convolutions, whose strides have two names; each backward pass would say so
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        return prepared

    def accumulating(self, model: nn.Module, *, sync: bool) -> contextlib.AbstractContextManager[None]:
        """Average gradients in this backward pass only if `sync`."""
        if sync or self.world_size == 1:
            return contextlib.nullcontext()
        return model.no_sync()  # type: ignore[no-any-return, operator]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total
