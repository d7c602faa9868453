"""A score table -> submission.csv: the template's columns and row order, each row once, probabilities in [0, 1]."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from cxrdist.errors import UserError
from cxrdist.files import write_atomically
from cxrdist.labels import LABELS
from cxrdist.scoring.tables import ScoreTable


def check_template(
    template: pd.DataFrame, image_names: Sequence[str], unreadable: dict[str, str], source: str = "the template"
) -> None:
    """Raise UserError unless every image of the template is to be scored or known as unreadable.

    Called before any compute: a template of the other division ends here, not after hours.
    """
    known = {*image_names, *unreadable}
    unknown = [name for name in template["image_name"] if name not in known]
    if unknown:
        raise UserError(
            f"{source} asks for {len(unknown):,} of {len(template):,} images that the shards do not hold, e.g. "
            f"{unknown[0]!r}; is it the template of this division and split?"
        )


def write_submission(table: ScoreTable, template: pd.DataFrame, path: Path) -> dict[str, str]:
    """Write `path` atomically from `table` in the columns and row order of `template` (from `read_template`).

    An image that the table lists as unreadable gets the mean of each label over the table's images: it then neither
    leads nor trails any ranking. Returns these images with their reasons.
    Raises UserError, writing nothing, for an image neither scored nor listed, or a value that is no probability.
    """
    check_template(template, list(table.image_names), table.unreadable)
    if not len(table.image_names):
        raise UserError("no image could be scored, so there are no class means to fall back on; check the shards")
    if not ((table.probs >= 0) & (table.probs <= 1)).all():
        raise UserError("the score table holds values outside [0, 1]; a submission needs probabilities")
    means = table.probs.mean(axis=0, dtype=np.float64).astype(np.float32)
    row_of = {name: row for row, name in enumerate(table.image_names)}
    labels = [column for column in template.columns if column != "image_name"]
    columns = [LABELS.index(label) for label in labels]
    fallback = {}
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    header = template.attrs.get("header", ["Image_name", *labels])
    place = header.index("Image_name")
    writer.writerow(header)
    for name in template["image_name"]:
        row = row_of.get(name)
        if row is None:
            fallback[name] = table.unreadable[name]
        probs = means if row is None else table.probs[row]
        cells = [str(probs[column]) for column in columns]
        cells.insert(place, name)
        writer.writerow(cells)
    write_atomically(path, buffer.getvalue())
    return fallback
