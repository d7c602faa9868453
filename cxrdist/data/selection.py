"""Which images of a split a run is trained on, and which it is validated on."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cxrdist.data.folds import assign_folds, inside_fold
from cxrdist.data.reader import NO_XXH3
from cxrdist.data.rows import Chosen, Rows, SomeRows, in_pieces
from cxrdist.errors import UserError
from cxrdist.shards.columns import Targets
from cxrdist.shards.index import ShardIndex
from cxrdist.task import LAYOUTS, Task


@dataclass(frozen=True, eq=False)
class Selection:
    """Rows of the index to train on and to validate on; fold_of: the fold of every row where it was drawn now, which
    stays in the process that drew it.
    """

    train: range | Chosen
    validation: range | NDArray[np.int32] | None = None  # of the index, or of split `valid` where there is one
    fold_of: NDArray[np.int16] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"fold_of": None}


def validates_on_split(fold: int | None, task: Task, shards: Path | None = None) -> bool:
    """Whether a run with this --validate-fold validates on split `valid` where there is one; in `shards`, if given."""
    there = shards is None or (shards / "valid.json").is_file()
    return there and fold is None and task.name not in LAYOUTS


def targets_of(index: ShardIndex) -> Targets:
    """The split's targets (N, K), NaN where masked. UserError without labels, or where every cell is masked."""
    if index.targets is None:
        raise UserError(f"{index.folder}: split {index.split!r} has no labels to train on")
    if index.masked and len(never_observed(index, range(len(index)))) == index.task.num_labels:
        raise UserError(f"{index.folder}: every label of split {index.split!r} is masked: there is nothing to learn")
    return index.targets


def targets_in_pieces(index: ShardIndex, rows: SomeRows) -> Iterator[NDArray[np.float32]]:
    """(n, K) of the rows, some at once."""
    assert index.targets is not None
    return (index.targets[piece] for piece in in_pieces(rows))


def never_observed(index: ShardIndex, rows: SomeRows) -> list[str]:
    """The labels whose cells are masked in all of the rows."""
    if not index.masked:
        return []
    seen = np.zeros(index.task.num_labels, np.bool_)
    for targets in targets_in_pieces(index, rows):
        seen |= (~np.isnan(targets)).any(axis=0)
    return [label for label, one in zip(index.task.labels, seen, strict=True) if not one]


def positives_of(index: ShardIndex) -> dict[str, int | float]:
    """The sum of each label's observed cells."""
    targets = targets_of(index)
    sums = [float(np.nansum(targets.label(place), dtype=np.float64)) for place in range(index.task.num_labels)]
    return {label: int(n) if n.is_integer() else n for label, n in zip(index.task.labels, sums, strict=True)}


def select(
    index: ShardIndex, validate_fold: int | None, num_folds: int, seed: int, recorded: Mapping[str, int] | None = None
) -> Selection:
    """All rows, or those outside and inside one of `num_folds` patient-grouped folds: the `recorded` ones (by patient),
    else drawn now. UserError without labels, or for a fold that is not there.
    """
    targets = targets_of(index)
    if validate_fold is None:
        return Selection(range(len(index)))
    if not 0 <= validate_fold < num_folds:
        raise UserError(f"--validate-fold {validate_fold} is not possible: folds run from 0 to {num_folds - 1}")
    if recorded is None:
        fold_of = assign_folds(index.patients, targets, num_folds, seed)
        inside = fold_of == validate_fold
    else:
        fold_of, inside = None, inside_fold(index.patients, recorded, validate_fold)
    return Selection(Chosen(~inside), np.flatnonzero(inside).astype(np.int32), fold_of)


def describe_data(index: ShardIndex, rows: Selection, valid: ShardIndex | None) -> list[str]:
    """Lines that say what is validated on, which labels are never observed, and what format version 1 costs.

    valid: the split that is validated on, where it is no fold.
    """
    lines = [NO_XXH3] if index.checksums is None else []
    parts: dict[str, tuple[ShardIndex, SomeRows]] = {"trained": (index, rows.train)}
    if rows.validation is None:
        lines.append("no validation: --validate-fold K holds out a fold by patient")
    else:
        parts["validated"] = valid or index, rows.validation
        where = "a fold by patient" if valid is None else "split valid"
        lines.append(f"validation: {len(rows.validation):,} images of {where}")
    for name, part in parts.items():
        if labels := never_observed(*part):
            lines.append(f"warning: never observed in the images {name} on: {', '.join(labels)}")
    return lines


def cell_counter(index: ShardIndex, partners: Callable[[Rows, int], Rows] | None) -> Callable[[Rows, int], int] | None:
    """For `order.train_batches`: how many label cells of some rows are observed; None where none of the set is masked.

    partners: the place of each image's partner among some keys in an epoch, if images are mixed: a cell that is masked
    in either image is masked.
    """
    if not index.masked:
        return None
    targets = targets_of(index)

    def count(rows: Rows, epoch: int) -> int:
        cells = ~np.isnan(targets[rows])
        if partners is not None:
            cells &= cells[partners(index.keys[rows], epoch)]
        return int(cells.sum())

    return count
