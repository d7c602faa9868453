"""BatchNorm in a training that must not depend on how its images are spread over processes.

By default the statistics stay as the weights brought them: those of a few X-rays a GPU are noise, and running averages
would differ from rank to rank. With `sync_bn` they are those of each pass over all processes.
"""

from collections.abc import Callable
from typing import Any

import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cxrdist.errors import UserError

Sum = Callable[[Tensor], Tensor]  # over ranks, with a gradient


class SyncedNorm(nn.BatchNorm2d):
    """A BatchNorm whose statistics are of the images of all ranks; `open` and `close` of `BatchNorms` drive it."""

    total: Sum
    place: tuple[int, int]  # rank and number of ranks
    counted = True  # whether this rank's images are any, and not a placeholder
    moving = True  # whether a forward pass moves the running averages

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) normalised, in the dtype of `x`; in eval mode by the running averages."""
        out: Tensor = _normalised(self, x) if self.training else super().forward(x)
        return out


class SyncedNormAct(BatchNormAct2d):
    """timm's BatchNorm with an activation, as `SyncedNorm`."""

    total: Sum
    place: tuple[int, int]
    counted = True
    moving = True

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) normalised and activated; in eval mode by the running averages."""
        if not self.training:
            return super().forward(x)  # type: ignore[no-any-return, no-untyped-call]
        out: Tensor = self.act(self.drop(_normalised(self, x)))
        return out


def _normalised(norm: Any, x: Tensor) -> Tensor:
    rank, num_ranks = norm.place
    values = x.float().transpose(0, 1).flatten(1)  # (C, images and places)
    count = torch.full((1,), float(values.shape[1] * norm.counted), device=x.device)
    rows = values.new_zeros(num_ranks, 2 * len(values) + 1)
    rows[rank] = torch.cat([values.mean(1), values.var(1, correction=0), count])
    rows = norm.total(rows)
    means, variances = rows[:, :-1].chunk(2, dim=1)
    counts, count = rows[:, -1:], rows[:, -1].sum()
    shares = counts / count.clamp(min=1.0)
    mean = (shares * means).sum(0)
    # deviations are squared, not a square taken from a mean of squares, which cancels
    variance = (shares * (variances + (means - mean) ** 2)).sum(0)
    if norm.moving:
        with torch.no_grad():
            norm.num_batches_tracked += (count > 0).long()
            momentum = 1.0 / norm.num_batches_tracked.clamp(min=1) if norm.momentum is None else norm.momentum
            step = momentum * (count > 0)
            norm.running_mean += step * (mean - norm.running_mean)
            norm.running_var += step * (variance * count / (count - 1.0).clamp(min=1.0) - norm.running_var)
    shape = (1, -1) + (1,) * (x.ndim - 2)
    scale = torch.rsqrt(variance + norm.eps) * (1.0 if norm.weight is None else norm.weight)
    shift = (0.0 if norm.bias is None else norm.bias) - mean * scale
    out: Tensor = (x.float() * scale.view(shape) + shift.view(shape)).to(x.dtype)
    return out


class BatchNorms:
    """The BatchNorms of a model in training.

    Synced ones move their running averages once for each forward pass, not in the second one that gradient
    checkpointing makes, nor by a placeholder; a skipped step leaves them as they were.
    """

    def __init__(self, model: nn.Module, sync: bool, place: tuple[int, int], total: Sum) -> None:
        """sync: statistics over ranks. place: (rank, number of ranks). total: sums over ranks, with a gradient.

        UserError where the model has none, or some of a kind that cannot be synced.
        """
        named = {name: norm for name, norm in model.named_modules() if isinstance(norm, _BatchNorm)}
        self.norms, self.sync = list(named.values()), sync
        self.buffers = [f"{name}.{kind}" for name, norm in named.items() for kind, _ in norm.named_buffers()]
        self.num_ranks = place[1]
        self._before: list[Tensor] = []
        if sync and not named:
            raise UserError("sync_bn=true: the model has no BatchNorm; leave it out")
        for name, norm in named.items() if sync else ():
            if type(norm) not in SYNCED:
                kind = type(norm).__name__
                raise UserError(f"sync_bn=true: {name} is a {kind}, which cannot be synced; leave it out")
            norm.__class__ = SYNCED[type(norm)]
            vars(norm).update(place=place, total=total)

    def train(self, model: nn.Module) -> None:
        """`model.train()`, with statistics that stay as they are unless they are synced."""
        model.train()
        for norm in () if self.sync else self.norms:
            norm.eval()

    def notes(self, device_batch_size: int) -> list[str]:
        """What to know of the statistics, in a line; nothing where there are none."""
        if not self.norms:
            return []
        if not self.sync:
            began = not any(bool(norm.running_mean.any()) for norm in self.norms if norm.running_mean is not None)
            how = "they began: mean 0, deviation 1, of no image" if began else "the weights brought them"
            return [f"BatchNorm: its statistics stay as {how} (--set sync_bn=true moves them)"]
        images = f"up to {device_batch_size * self.num_ranks} images, those of a pass"
        return [f"BatchNorm: by {images}; another --device-batch-size or number of processes learns something else"]

    def begin(self, *, first: bool, counted: bool) -> None:
        """Before a forward pass; first: of its step. counted: whether this rank has an image, not a placeholder."""
        if self.sync:
            if first:
                self._before = [buffer.clone() for buffer in self._running()]
            self._set(counted=counted, moving=True)

    def end(self) -> None:
        """After a forward pass, before its backward pass."""
        if self.sync:
            self._set(moving=False)

    def close_step(self, skipped: Tensor) -> None:
        """After a step; `skipped` (0-dim): 1.0 leaves the running averages as they were before it."""
        for buffer, before in zip(self._running() if self._before else (), self._before, strict=True):
            buffer.copy_(torch.where(skipped.bool(), before, buffer))

    def _running(self) -> list[Tensor]:
        return [buffer for norm in self.norms for buffer in norm.buffers(recurse=False)]

    def _set(self, **values: bool) -> None:
        for norm in self.norms:
            for name, value in values.items():
                setattr(norm, name, value)


SYNCED: dict[type, Any] = {nn.BatchNorm2d: SyncedNorm, BatchNormAct2d: SyncedNormAct}
