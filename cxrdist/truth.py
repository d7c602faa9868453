"""The labels of scored images: from a label CSV, or from the shard set that was scored."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cxrdist.errors import UserError
from cxrdist.published import read_labels
from cxrdist.scoring.tables import ScoreTable, check_shards
from cxrdist.shards.index import ShardIndex, open_index
from cxrdist.tables import LabelTable, MissingColumnError
from cxrdist.task import Task


def read_truth(
    csv: Path | None, shards: Path | None, task: Task, tables: Sequence[ScoreTable], *, remedy: str = "give --csv FILE"
) -> tuple[LabelTable, Path]:
    """The labels in `csv`, or else those in the shard set, and which it was. UserError where neither has any."""
    if csv is not None:
        try:
            truth = read_labels(csv, task)
        except MissingColumnError as error:
            remedy = "give the labels of the scored images, under the columns that the scores' task names"
            raise UserError(f"{error.what}; {remedy}") from None
        print("".join(f"{note}\n" for note in truth.notes), end="")
        return truth, csv
    if shards is None:
        raise UserError("give --csv FILE with the labels of the scored images, or --shards DIR that holds them")
    index = open_scored(shards, tables, task)
    if index.targets is None:
        raise UserError(f"{shards}: split {index.split!r} has no labels; {remedy}")
    return LabelTable(index.about().assign(split=index.split), index.targets[:]), shards


def open_scored(shards: Path, tables: Sequence[ScoreTable], task: Task | None) -> ShardIndex:
    """The split of the shard set that was scored; UserError where it is known to be of another shard set."""
    index = open_index(shards, next((table.meta.split for table in tables if table.meta.split), "test"))
    if task is not None and (found := task.differences(index.task)):
        told = f"{shards} holds split {index.split!r} of another task than the scores ({'; '.join(found)})"
        raise UserError(f"{told}; give the shards that were scored, or compare by name with evaluate --external")
    for table in tables:
        check_shards(table, index.fingerprint, shards)
    return index


def check_rows(table: ScoreTable, labelled: LabelTable, source: Path, *, allow_missing: bool) -> list[str]:
    """What to tell of labelled images without a score, one line each.

    UserError where the table lacks rows that it was to have, or does not say how many and labelled images have none.
    """
    splits, asked = labelled.about["split"].to_numpy(object), table.meta.asked
    there = np.isin(splits, ("", table.meta.split)) if table.meta.split else np.ones(len(labelled), dtype=bool)
    names = table.without_score(labelled.about["image_name"].to_numpy(object)[there])
    lost = asked - len(table.image_names) - len(table.meta.unreadable) if asked else len(names)
    first = f", e.g. {names[0]!r}" if names else ""
    told = f"{lost:,} of {asked or int(there.sum()):,} images of {table.name!r} have no score{first} (labels: {source})"
    if lost > 0 and not allow_missing:
        raise UserError(f"{told}; score them, or --allow-missing evaluates the others")
    if lost <= 0 and names:  # a fold, or a part of a larger CSV: all that was asked for
        held_out = ", of patients whom training held out" if table.meta.out_of_fold else ""
        counts = f"{len(table.image_names):,} of the {int(there.sum()):,} labelled images in {source}"
        told = f"the scores are of {counts}{held_out}"
    if names or lost > 0:
        print(f"{'warning: ' if lost > 0 else ''}{told}")
        return [f"{told[0].upper()}{told[1:]}."]
    return []
