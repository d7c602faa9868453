"""What learns, as one thing: all that a step checkpoint holds, and all that resume needs to restore."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cxrdist.distributed.ranks import Ranks
from cxrdist.errors import UserError
from cxrdist.models import Architecture
from cxrdist.models.weights.layouts import WeightFile
from cxrdist.training.batch_norm import BatchNorms
from cxrdist.training.ema import Ema
from cxrdist.training.optim import COUNTERS, GuardedAdamW

Tensors = dict[str, Tensor]


class LoopState:
    """Where the run is and what has been summed since the last row; all that resume needs beside the weights.

    window, epoch_sums: (P + 1,) float64 on the device, this rank's share of each of the P `parts` of the loss and,
    last, the number of steps taken.
    """

    def __init__(self, parts: tuple[str, ...], device: torch.device) -> None:
        self.parts = parts
        self.epoch = 0
        self.step = 0  # optimizer steps done in this epoch
        self.global_step = 0  # since the start, skipped ones included
        self.window = torch.zeros(len(parts) + 1, dtype=torch.float64, device=device)
        self.epoch_sums = torch.zeros(len(parts) + 1, dtype=torch.float64, device=device)
        self._sums = torch.zeros(len(parts), dtype=torch.float64, device=device)  # of the step in work

    def add(self, loss: dict[str, Tensor], share: float) -> None:
        """Add a micro batch's loss to the step in work; share: its weight, times this rank's share."""
        self._sums += torch.stack([*loss.values()]).detach() * share

    def close_step(self, skipped: Tensor) -> None:
        """Add the step in work to both sums, unless `skipped` (0-dim) is 1.0."""
        taken = torch.where(skipped.bool(), 0.0, torch.cat([self._sums, torch.ones_like(self._sums[:1])]))
        self.window += taken
        self.epoch_sums += taken
        self._sums.zero_()


@dataclass(frozen=True, eq=False)
class Learner:
    """A model, its optimizer and average, and where the loop stands."""

    architecture: Architecture
    model: nn.Module
    optimizer: GuardedAdamW
    ema: Ema
    norms: BatchNorms
    state: LoopState

    def close_step(self) -> None:
        """Take or skip the optimizer step, and all that goes with it. No host sync."""
        skipped = self.optimizer.step()
        self.norms.close_step(skipped)
        self.ema.update(skipped)
        self.state.close_step(skipped)

    def weights(self) -> dict[str, Tensors]:
        """What inference reads: the trained weights and their average, by file."""
        weights = self.architecture.trained_state_dict(self.model)
        return {"model": weights, "ema": weights | self.ema.state_dict()}

    def tensors(self, ranks: Ranks) -> dict[str, Tensors]:
        """What resume reads, by file. Collective."""
        window, epoch_sums = zip(*ranks.gather((self.state.window.cpu(), self.state.epoch_sums.cpu())), strict=True)
        loop = {"window": torch.stack(window), "epoch_sums": torch.stack(epoch_sums)}
        return {
            "model": self.architecture.trained_state_dict(self.model),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "loop": loop | {"ema_num_updates": self.ema.num_updates},
        }

    def restore(self, read: Callable[[str], Tensors], source: object, ranks: Ranks) -> None:
        """Take what `tensors` gave; `read` returns one file's. UserError, naming `source`, when it does not fit."""
        loop = read("loop")
        try:
            self.architecture.load_trained_state_dict(self.model, read("model"), str(source))
            self.optimizer.load_state_dict(read("optimizer"))
            self.ema.load_state_dict(read("ema"), float(loop["ema_num_updates"]))
            self.state.window = _own_sums(loop["window"], ranks)
            self.state.epoch_sums = _own_sums(loop["epoch_sums"], ranks)
        except KeyError as error:
            raise UserError(f"{source} does not fit this recipe and model ({error}): of another version") from None

    def continue_from(self, found: WeightFile, source: object, epochs: int, num_steps: int) -> None:
        """Continue after the epoch of a published training file, whose weights are loaded already, with its EMA and
        optimizer state. UserError for a file without them, or of the last epoch.
        """
        parts = {"EMA": found.ema, "optimizer state": found.optimizer, "epoch": found.epoch}
        missing = [name for name, part in parts.items() if part is None]
        if found.ema is None or found.optimizer is None or found.epoch is None:
            raise UserError(f"--continue-init: {source} holds no {' and no '.join(missing)}; leave the flag out")
        if found.epoch >= epochs:
            raise UserError(f"--continue-init: {source} is of epoch {found.epoch} of {epochs}: --set epochs=N for more")
        num_updates = float(found.epoch * num_steps)
        moments = {f"{kind}/{name}": value for name, kinds in found.optimizer.items() for kind, value in kinds.items()}
        counters = dict.fromkeys(COUNTERS, 0.0) | {"num_applied": num_updates}
        stored = {f"counter/{name}": torch.tensor(value, dtype=torch.float64) for name, value in counters.items()}
        try:
            self.ema.load_state_dict({name: found.ema[name] for name in self.ema.state_dict()}, num_updates)
            self.optimizer.load_state_dict(moments | stored)
        except (KeyError, RuntimeError) as error:
            raise UserError(f"--continue-init: {source} does not fit this recipe ({error}); leave it out") from None
        self.state.epoch, self.state.global_step = found.epoch, found.epoch * num_steps


def _own_sums(by_rank: Tensor, ranks: Ranks) -> Tensor:
    """This rank's share of stored sums (R, P + 1) of R ranks, which may be another number than today's."""
    if len(by_rank) == ranks.world_size:
        return by_rank[ranks.rank].to(ranks.device)
    # sums over ranks are what counts; the last entry counts steps and is the same on every rank
    own = by_rank.sum(dim=0) if ranks.rank == 0 else torch.zeros_like(by_rank[0])
    own[-1] = by_rank[0, -1]
    return own.to(ranks.device)
