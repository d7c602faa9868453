"""The run folder while it is trained into: what is saved, and only where the run began."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from cxrdist.errors import UserError
from cxrdist.recipes import Recipe
from cxrdist.runs import checkpoint
from cxrdist.runs.documents import Environment, EpochMeta, Facts, Frozen, RunDocument, StepState
from cxrdist.task import Task

Tensors = Mapping[str, Mapping[str, Tensor]]


def run_id(path: Path) -> str:
    """The id in a run folder's run.json; '' of a run of version 1, which has none."""
    return RunDocument.read(path / "run.json").id if (path / "run.json").exists() else ""


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """Where a session saves, and what every checkpoint of it says. Methods run on rank 0."""

    path: Path
    id: str
    recipe: Recipe
    task: Task
    facts: Facts
    frozen: Frozen | None
    session: Environment
    keep_steps: int

    def require_same(self) -> None:
        """UserError unless the folder is still the one that this run began in."""
        if not (self.path / "recipe.json").exists() or run_id(self.path) != self.id:
            raise UserError(
                f"{self.path} was removed or replaced while the run was at work: nothing more is saved; restore it and "
                "use --resume, or start again"
            )

    def save_step(
        self,
        tensors: Tensors,
        *,
        epoch: int,
        step: int,
        global_step: int,
        parts: tuple[str, ...],
        metrics_bytes: int,
    ) -> None:
        """Write all that resume needs as `step_<N>`."""
        self.require_same()
        document = StepState(
            epoch=epoch,
            step=step,
            global_step=global_step,
            metrics_bytes=metrics_bytes,
            world_size=self.session.world_size,
            device_batch_size=self.session.device_batch_size,
            precision=self.session.precision,
            parts=parts,
            data=self.facts,
            frozen=self.frozen,
        )
        checkpoint.write_checkpoint(checkpoint.step_folder(self.path, global_step), tensors, {"state": document})
        checkpoint.keep_newest_steps(self.path, self.keep_steps)

    def save_epoch(
        self, tensors: Tensors, *, epoch: int, global_step: int, validation: Mapping[str, float | str] | None
    ) -> None:
        """Write `epoch_<EE>`, what inference reads. epoch: from 1. validation: may be non-finite."""
        self.require_same()
        scores = None if validation is None else {name: _finite(value) for name, value in validation.items()}
        meta = EpochMeta(
            epoch=epoch,
            global_step=global_step,
            recipe=self.recipe.name,
            model=self.recipe.model,
            task=self.task,
            data=self.facts,
            validation=scores,
            frozen=self.frozen,
        )
        checkpoint.write_checkpoint(checkpoint.epoch_folder(self.path, epoch), tensors, {"meta": meta})


def _finite(value: float | str) -> float | str | None:
    return None if isinstance(value, float) and not math.isfinite(value) else value
