"""Validation: loss and AUROC of the averaged weights on images that are not trained on, each once over all ranks."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cxrdist.data.loader import Loader
from cxrdist.data.order import eval_batches
from cxrdist.data.rows import Rows
from cxrdist.distributed.precision import autocast
from cxrdist.distributed.ranks import Ranks
from cxrdist.scoring import metrics
from cxrdist.training.losses import Criterion

MAX_CURVE_POINTS = 200
Curves = dict[str, tuple[list[float], list[float]]]  # x and y values by name
Prepare = Callable[[Tensor, Rows], Tensor]  # stored images (B, C, H, W) and their keys to the model's input


@dataclass(frozen=True, eq=False)
class Validation:
    """Scores of one pass over the validation images. losses: by part, `total` first; auroc: by label, nan without.

    rows: (N,) of the images; targets, logits: (N, K).
    """

    num_images: int
    losses: dict[str, float]
    auroc_macro: float
    num_labels: int  # that have an AUROC
    auroc: dict[str, float]
    roc: Curves  # false and true positive rates of at most 200 points
    rows: NDArray[np.int64]
    targets: NDArray[np.float32]
    logits: NDArray[np.float32]

    @property
    def labels_text(self) -> str:
        return f"{self.num_labels} of {len(self.auroc)}"

    def row(self) -> dict[str, Any]:
        """What metrics.jsonl and the dashboard show of it."""
        losses = {("loss" if name == "total" else name): value for name, value in self.losses.items()}
        aurocs = {f"auroc/{label}": value for label, value in self.auroc.items()}
        macro = {"auroc_macro": self.auroc_macro, "auroc_labels": self.labels_text}
        return {"images": self.num_images, **losses, **macro, **aurocs}

    def summary(self) -> dict[str, float | str | None]:
        """What a checkpoint keeps of it; None for what is non-finite."""
        numbers = {"loss": self.losses["total"], "auroc_macro": self.auroc_macro}
        finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        return {**finite, "auroc_labels": self.labels_text}


def validate(
    model: nn.Module,
    loader: Loader,
    rows: range | NDArray[np.int32],
    prepare: Prepare,
    criterion: Criterion,
    ranks: Ranks,
    device_batch_size: int,
    precision: str,
) -> Validation:
    """Score `rows` of the loader's split, which has targets, with the model as it is. Collective.

    Batches do not depend on the number of ranks; scores are merged once, by row. The model is left in eval mode.
    criterion: on the CPU.
    """
    labels = loader.index.task.labels
    own_rows, own_logits = [np.empty(0, np.int64)], [torch.empty(0, len(labels), device=ranks.device)]
    model.eval()
    with torch.inference_mode():
        for batch in loader.batches(eval_batches(rows, device_batch_size, ranks.rank, ranks.world_size)):
            with autocast(precision, ranks.device):
                logits = model(prepare(batch.images, batch.keys))
            own_rows.append(batch.rows)
            own_logits.append(logits.float())
    parts = ranks.gather((np.concatenate(own_rows), torch.cat(own_logits).cpu().numpy()))
    seen, logits_table = (np.concatenate(part) for part in zip(*parts, strict=True))
    by_row = np.argsort(seen, kind="stable")
    seen, logits_table = seen[by_row], logits_table[by_row]
    if loader.skipped == [] and not np.array_equal(seen, np.sort(rows)):
        raise AssertionError("validation did not see each image exactly once")
    assert loader.index.targets is not None
    targets = loader.index.targets[seen]
    loss = criterion(torch.from_numpy(logits_table), torch.from_numpy(targets))
    probs = 1.0 / (1.0 + np.exp(-logits_table.astype(np.float64)))
    per_label = metrics.auroc_per_label(targets, probs)
    macro, num_defined = metrics.macro(per_label)
    return Validation(
        num_images=len(seen),
        losses={name: float(value) for name, value in loss.items()},
        auroc_macro=macro,
        num_labels=num_defined,
        auroc={label: float(value) for label, value in zip(labels, per_label, strict=True)},
        roc=roc_curves(labels, targets, probs),
        rows=seen,
        targets=targets,
        logits=logits_table,
    )


def roc_curves(labels: Sequence[str], targets: NDArray[np.float32], probs: NDArray[np.float64]) -> Curves:
    """At most 200 points of each label's ROC, for labels that have one."""
    curves = {}
    for column, label in enumerate(labels):
        observed = ~np.isnan(targets[:, column])
        if 0 < targets[observed, column].sum() < observed.sum():
            false_positives, true_positives = metrics.roc_curve(targets[:, column], probs[:, column])
            chosen = np.unique(np.linspace(0, len(false_positives) - 1, MAX_CURVE_POINTS).astype(int))
            curves[label] = (false_positives[chosen].tolist(), true_positives[chosen].tolist())
    return curves
