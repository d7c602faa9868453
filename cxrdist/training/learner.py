"""What learns, as one thing: all that a step checkpoint holds, and all that resume needs to restore."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cxrdist.distributed.ranks import Ranks
from cxrdist.errors import UserError
from cxrdist.models import Architecture
from cxrdist.models.weights.layouts import WeightFile
from cxrdist.training.ema import Ema
from cxrdist.training.meter import LoopState
from cxrdist.training.optim import COUNTERS, GuardedAdamW

Tensors = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Learner:
    """A model, its optimizer and average, and where the loop stands."""

    architecture: Architecture
    model: nn.Module
    optimizer: GuardedAdamW
    ema: Ema
    state: LoopState

    def weights(self) -> dict[str, Tensors]:
        """What inference reads: the trained weights and their average, by file."""
        weights = self.architecture.trained_state_dict(self.model)
        return {"model": weights, "ema": weights | self.ema.state_dict()}

    def tensors(self, ranks: Ranks) -> dict[str, Tensors]:
        """What resume reads, by file. Collective."""
        sums = ranks.gather((self.state.window.cpu(), self.state.epoch_sums.cpu()))
        return {
            "model": self.architecture.trained_state_dict(self.model),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "loop": {
                "window": torch.stack([own[0] for own in sums]),
                "epoch_sums": torch.stack([own[1] for own in sums]),
                "ema_num_updates": self.ema.num_updates,
            },
        }

    def restore(self, read: Callable[[str], Tensors], source: object, ranks: Ranks) -> None:
        """Take what `tensors` gave; `read` returns one file's. UserError, naming `source`, when it does not fit."""
        loop = read("loop")
        try:
            self.architecture.load_trained_state_dict(self.model, read("model"), str(source))
            self.optimizer.load_state_dict(read("optimizer"))
            self.ema.load_state_dict(read("ema"), float(loop["ema_num_updates"]))
            for name in ("window", "epoch_sums"):
                self.state.load_sums(name, loop[name], ranks)
        except KeyError as error:
            raise UserError(
                f"{source} does not fit this recipe and model ({error}); it is of another version"
            ) from None

    def continue_from(self, found: WeightFile, source: object, epochs: int, num_steps: int) -> None:
        """Continue after the epoch of a published training file, whose weights are loaded already, with its EMA and
        optimizer state. UserError for a file without them, or of the last epoch.
        """
        parts = {"EMA": found.ema, "optimizer state": found.optimizer, "epoch": found.epoch}
        missing = [name for name, part in parts.items() if part is None]
        if found.ema is None or found.optimizer is None or found.epoch is None:
            raise UserError(
                f"--continue-init: {source} holds no {' and no '.join(missing)}; leave the flag out to start from it"
            )
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
