"""The run folder while it is trained into: what is saved, and only where the run began."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cxrdist.errors import UserError
from cxrdist.runs import checkpoint
from cxrdist.runs.documents import EpochMeta, RunDocument, StepState

Tensors = Mapping[str, Mapping[str, Tensor]]


def run_id(path: Path) -> str:
    """The id in a run folder's run.json; '' of a run of version 1, which has none."""
    return RunDocument.read(path / "run.json").id if (path / "run.json").exists() else ""


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """Where a session saves. Methods run on rank 0.

    state, meta: what every step and epoch checkpoint says, but for `changes`, the fields in which one differs.
    """

    path: Path
    id: str
    state: StepState
    meta: EpochMeta
    keep_steps: int

    def require_same(self) -> None:
        """UserError unless the folder is still the one that this run began in."""
        if not (self.path / "recipe.json").exists() or run_id(self.path) != self.id:
            raise UserError(
                f"{self.path} was removed or replaced while the run was at work: nothing more is saved; restore it and "
                "use --resume, or start again"
            )

    def save_step(self, tensors: Tensors, **changes: Any) -> None:
        """Write all that resume needs as `step_<N>`."""
        self.require_same()
        state = dataclasses.replace(self.state, **changes)
        checkpoint.write_checkpoint(checkpoint.step_folder(self.path, state.global_step), tensors, {"state": state})
        checkpoint.keep_newest_steps(self.path, self.keep_steps)

    def save_epoch(self, tensors: Tensors, **changes: Any) -> None:
        """Write `epoch_<EE>`, what inference reads."""
        self.require_same()
        meta = dataclasses.replace(self.meta, **changes)
        checkpoint.write_checkpoint(checkpoint.epoch_folder(self.path, meta.epoch), tensors, {"meta": meta})
