"""Which images of a split a run is trained on, and which it is validated on."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cxrdist.data.folds import assign_folds
from cxrdist.errors import UserError
from cxrdist.shards.index import ShardIndex

Rows = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Selection:
    """Rows of the index to train on and to validate on; fold_of: the fold of every row where it was drawn now."""

    train: Rows
    validation: Rows | None = None
    fold_of: Rows | None = None


def select(index: ShardIndex, validate_fold: int | None, num_folds: int, seed: int) -> Selection:
    """All rows, or those outside and inside one of `num_folds` patient-grouped folds.

    Raises UserError without labels, for masked cells, or for a fold that is not there.
    """
    if index.targets is None:
        raise UserError(f"{index.folder}: split {index.split!r} has no labels to train on")
    if bool(np.isnan(index.targets).any()):
        raise UserError(f"{index.folder}: split {index.split!r} has masked cells, which cannot be trained on yet")
    everything = np.arange(len(index), dtype=np.int64)
    if validate_fold is None:
        return Selection(everything)
    if not 0 <= validate_fold < num_folds:
        raise UserError(f"--validate-fold {validate_fold} is not possible: folds run from 0 to {num_folds - 1}")
    fold_of = assign_folds(index.patients, index.targets, num_folds, seed)
    inside = fold_of == validate_fold
    return Selection(everything[~inside], everything[inside], fold_of)
