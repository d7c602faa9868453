"""What an inference is asked for: rows of the split, and the rows of the submission."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cxrdist.data.folds import inside_fold
from cxrdist.data.rows import in_pieces
from cxrdist.inference.members import Ensemble, common_split
from cxrdist.scoring.submission import check_template, template_of
from cxrdist.shards.index import ShardIndex
from cxrdist.tables import Template, read_template
from cxrdist.task import Task

SomeOf = range | NDArray[np.int32]


def choose_rows(index: ShardIndex, ensemble: Ensemble, task: Task, fold: int | None) -> SomeOf:
    """The rows to score: all, or those of a fold of the members' runs, which are of `task`."""
    if fold is None:
        return range(len(index))
    inside = inside_fold(index.patients, common_split(ensemble, task), fold)
    return np.flatnonzero(inside).astype(np.int32)


def hash_of(rows: SomeOf) -> str:
    """SHA-256 (hex) of the rows as int64."""
    digest = hashlib.sha256()
    for piece in in_pieces(rows):
        digest.update(piece.tobytes())
    return digest.hexdigest()


def choose_template(path: Path | None, index: ShardIndex, task: Task, *, submits: bool) -> Template | None:
    """The submission's rows: the template's, else the source CSV's own order; None where no submission is made."""
    names = index.unique_names  # looked at also where there is no submission: score tables go by name
    if path is not None:
        template = read_template(path, dataclasses.replace(task, columns=index.task.columns))
        check_template(template, names, index.left_out, str(path))
        return template
    if not submits:
        return None
    by_key = [(entry.key, entry.image_name) for entry in index.meta.left_out]
    by_key += zip(index.keys.tolist(), names, strict=True)
    return template_of(index.task, [name for _, name in sorted(by_key)])
