"""Which images of a split a run is trained on, and which it is validated on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cxrdist.data.folds import assign_folds, rows_of_fold
from cxrdist.data.reader import NO_XXH3
from cxrdist.errors import UserError
from cxrdist.shards.index import ShardIndex

Rows = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Selection:
    """Rows of the index to train on and to validate on; fold_of: the fold of every row where it was drawn now."""

    train: Rows
    validation: Rows | None = None  # of the index, or of `valid` where there is one
    fold_of: Rows | None = None
    valid: ShardIndex | None = None


def targets_of(index: ShardIndex) -> NDArray[np.float32]:
    """The split's targets (N, K), NaN where masked. UserError without labels, or where every cell is masked."""
    if index.targets is None:
        raise UserError(f"{index.folder}: split {index.split!r} has no labels to train on")
    if bool(np.isnan(index.targets).all()):
        raise UserError(f"{index.folder}: every label of split {index.split!r} is masked: there is nothing to learn")
    return index.targets


def never_observed(targets: NDArray[np.float32], labels: Sequence[str]) -> list[str]:
    """The labels whose cells (N, K) are all masked."""
    return [label for place, label in enumerate(labels) if np.isnan(targets[:, place]).all()]


def positives_of(index: ShardIndex) -> dict[str, int | float]:
    """The sum of each label's observed cells."""
    sums = [float(np.nansum(column, dtype=np.float64)) for column in targets_of(index).T]
    return {label: int(n) if n.is_integer() else n for label, n in zip(index.task.labels, sums, strict=True)}


def select(
    index: ShardIndex, validate_fold: int | None, num_folds: int, seed: int, recorded: Mapping[str, int] | None = None
) -> Selection:
    """All rows, or those outside and inside one of `num_folds` patient-grouped folds: the `recorded` ones (by patient),
    else drawn now. UserError without labels, or for a fold that is not there.
    """
    targets = targets_of(index)
    everything = np.arange(len(index), dtype=np.int64)
    if validate_fold is None:
        return Selection(everything)
    if not 0 <= validate_fold < num_folds:
        raise UserError(f"--validate-fold {validate_fold} is not possible: folds run from 0 to {num_folds - 1}")
    if recorded is not None:
        return Selection(*rows_of_fold(index.patients, recorded, validate_fold))
    fold_of = assign_folds(index.patients, targets, num_folds, seed)
    inside = fold_of == validate_fold
    return Selection(everything[~inside], everything[inside], fold_of)


def describe_data(index: ShardIndex, rows: Selection) -> list[str]:
    """Lines that say what is validated on, which labels are never observed, and what format version 1 costs."""
    lines = [NO_XXH3] if index.checksums is None else []
    parts = {"trained": targets_of(index)[rows.train]}
    if rows.validation is None:
        lines.append("no validation: --validate-fold K holds out a fold by patient")
    else:
        parts["validated"] = targets_of(rows.valid or index)[rows.validation]
        where = "split valid" if rows.valid is not None else "a fold by patient"
        lines.append(f"validation: {len(rows.validation):,} images of {where}")
    for name, targets in parts.items():
        if labels := never_observed(targets, index.task.labels):
            lines.append(f"warning: never observed in the images {name} on: {', '.join(labels)}")
    return lines


def cell_counter(index: ShardIndex, partners: Callable[[Rows, int], Rows] | None) -> Callable[[Rows, int], int] | None:
    """For `order.train_batches`: how many label cells of some rows are observed; None where none of the set is masked.

    partners: the place of each image's partner among some keys in an epoch, if images are mixed: a cell that is masked
    in either image is masked.
    """
    observed = index.observed
    if observed is None:
        return None
    if partners is None:
        return lambda rows, epoch: int(observed[rows].sum())
    cells = ~np.isnan(targets_of(index))
    return lambda rows, epoch: int((cells[rows] & cells[rows][partners(index.keys[rows], epoch)]).sum())
