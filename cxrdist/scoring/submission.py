"""A score table -> submission.csv: the template's columns and row order, each row once, probabilities in [0, 1]."""

import csv
import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from cxrdist.errors import UserError
from cxrdist.files import write_output
from cxrdist.scoring.tables import ScoreTable
from cxrdist.tables import Template
from cxrdist.task import Task


def template_of(task: Task, image_names: Iterable[str]) -> Template:
    """The template of all labels over these images."""
    places = tuple((label, place) for place, label in enumerate(task.labels))
    return Template((task.columns.image, *task.labels), task.columns.image, tuple(image_names), places)


def check_template(
    template: Template, image_names: Iterable[str], unreadable: dict[str, str], source: str = "the template"
) -> None:
    """UserError, before any compute, unless each image of the template is to be scored or known as unreadable."""
    known = {*image_names, *unreadable}
    if unknown := [name for name in template.image_names if name not in known]:
        count = f"{len(unknown):,} of {len(template):,} images that the shards do not hold, e.g. {unknown[0]!r}"
        raise UserError(f"{source} asks for {count}; is it the template of this task and split?")


def check_unreadable(unreadable: dict[str, str], most: int, num_images: int) -> None:
    """UserError where more than `most` of the images are unreadable. unreadable: image name -> reason."""
    if len(unreadable) > most:
        name, reason = next(iter(unreadable.items()))
        found = (
            f"{len(unreadable):,} of {num_images:,} images are unreadable, more than {most:,}, e.g. {name}: {reason}"
        )
        raise UserError(f"{found}; mend them and preprocess again, or allow more with --max-unreadable")


def unreadable_note(unreadable: dict[str, str], fallback: str = "") -> str:
    """How many images are unreadable, for the last line of a command; the first three are named."""
    if not unreadable:
        return ""
    more = f" and {len(unreadable) - 3:,} more" if len(unreadable) > 3 else ""
    return f"; {len(unreadable):,} unreadable{fallback}: {', '.join(list(unreadable)[:3])}{more}"


def write_submission(table: ScoreTable, template: Template, path: Path, most: int) -> dict[str, str]:
    """Write `path` atomically from `table` in the columns and row order of `template`.

    An image that the table lists as unreadable gets the mean of each label over the table's images: it then neither
    leads nor trails any ranking. Returns these images with their reasons.
    Raises UserError, writing nothing, for an image neither scored nor listed, for more than `most` unreadable ones, or
    a value that is no probability.
    """
    check_template(template, table.image_names, table.meta.unreadable)
    scored = set(table.image_names)
    fallback = {name: table.meta.unreadable[name] for name in template.image_names if name not in scored}
    check_unreadable(fallback, most, len(template))
    if not len(table.image_names):
        raise UserError("no image could be scored, so there are no class means to fall back on; check the shards")
    if not ((table.probs >= 0) & (table.probs <= 1)).all():
        raise UserError("the score table holds values outside [0, 1]; a submission needs probabilities")
    means = table.probs.mean(axis=0, dtype=np.float64).astype(np.float32)
    row_of = {name: row for row, name in enumerate(table.image_names)}
    buffer, place = io.StringIO(), template.header.index(template.image_column)
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(template.header)
    for name in template.image_names:
        probs = table.probs[row_of[name]] if name in row_of else means
        cells = [str(probs[column]) for _, column in template.labels]
        writer.writerow([*cells[:place], name, *cells[place:]])
    write_output(path, buffer.getvalue())
    return fallback
