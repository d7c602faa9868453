"""Label CSVs and sample submissions, read and checked by a task's rules: every cell is accounted for or named.

A table may hold its columns in any order and is read by name; what comes out is in the order of the task's labels.
"""

import csv
import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cxrdist.errors import UserError
from cxrdist.task import Reading, Task, name_problem

LABEL_TEXTS = {"0": 0.0, "1": 1.0, "0.0": 0.0, "1.0": 1.0}
BLANK_TEXTS = ("", "nan", "na", "n/a", "null", "none")
UNCERTAIN_TEXTS = ("-1", "-1.0")
VALUES = {"zero": 0.0, "one": 1.0, "masked": float("nan")}


@dataclass(frozen=True, eq=False)
class LabelTable:
    """The rows of a label CSV, in file order.

    about: columns image_name (exact text of the file), patient, study, view, sex, age; text, '' where unknown.
    targets: (N, K) float32 in [0, 1] in the order of the task's labels, NaN where a cell is masked.
    """

    about: pd.DataFrame
    targets: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.about)


@dataclass(frozen=True)
class Template:
    """A sample submission: its header, which a submission repeats, and its images in file order.

    labels: (name, place in the task's labels) of its label columns, in its order.
    """

    header: tuple[str, ...]
    image_column: str
    image_names: tuple[str, ...]
    labels: tuple[tuple[str, int], ...]

    def __len__(self) -> int:
        return len(self.image_names)


def read_label_csv(path: Path, task: Task) -> LabelTable:
    """The rows of a label CSV with every cell checked; cells that are blank or -1 are read as the task says.

    Args:
        path: CSV with a header (a BOM, any column order and further columns are fine). Needed: the image column, the
            labels, and the patient and study columns where the task names them; the others may be missing or blank.
    Raises UserError, with line (the header is line 1) and column, for: a missing, repeated or misspelt column; a row
    with too few or too many cells; a label that is no 0 or 1 and not covered by the task; a name that repeats, is blank
    or leaves the image folder; a patient id against the task's rule; no rows.
    """
    header, rows = _read_rows(path)
    named = task.columns
    ids = [name for name in (named.image, named.patient, named.study) if name]
    columns = _columns(path, header, (*ids, *task.labels))
    names = _checked_names(path, [(line, cells[columns[named.image]]) for line, cells in rows])
    about = {"image_name": names}
    from_names = [task.ids_in_name(name) or ("", "") for name in names]
    if named.patient:
        about["patient"] = [_patient(path, task, line, cells[columns[named.patient]]) for line, cells in rows]
    else:  # where nothing says the patient, every image is its own
        about["patient"] = [patient or name for (patient, _), name in zip(from_names, names, strict=True)]
    if named.study:
        about["study"] = [task.study(cells[columns[named.study]]) for _, cells in rows]
    else:
        about["study"] = [study for _, study in from_names]
    for field, candidates in (("view", named.view), ("sex", (named.sex,)), ("age", (named.age,))):
        there = [columns[name] for name in candidates if name in columns]
        about[field] = [next((cells[c].strip() for c in there if cells[c].strip()), "") for _, cells in rows]
    return LabelTable(pd.DataFrame(about, dtype=object), _targets(path, task, columns, rows))


def _targets(path: Path, task: Task, columns: dict[str, int], rows: list[tuple[int, list[str]]]) -> NDArray[np.float32]:
    targets = np.empty((len(rows), task.num_labels), dtype=np.float32)
    bad: list[tuple[int, str, str]] = []
    for place, label in enumerate(task.labels):
        meanings = dict(LABEL_TEXTS)
        for texts, reading in (
            (BLANK_TEXTS, task.reading("blank", label)),
            (UNCERTAIN_TEXTS, task.reading("uncertain", label)),
        ):
            if reading != "error":
                meanings |= dict.fromkeys(texts, _value(reading))
        column = columns[label]
        for row, (line, cells) in enumerate(rows):
            value = meanings.get(cells[column])
            if value is None:
                value = meanings.get(cells[column].strip().lower())
            if value is None:
                bad.append((line, label, cells[column]))
            else:
                targets[row, place] = value
    if bad:
        raise UserError(_bad_labels(path, bad))
    return targets


def _value(reading: Reading | float) -> float:
    return reading if isinstance(reading, float) else VALUES[reading]


def read_template(path: Path, task: Task) -> Template:
    """A sample submission of the task. Raises UserError for: no rows, no image name, a label that is unknown or
    repeated, no label column, names that repeat or leave the image folder.
    """
    header, rows = _read_rows(path)
    image = task.columns.image
    columns = _columns(path, header, (image,))
    for name in header:
        if name != image and name not in task.labels:
            raise UserError(f"{path}: column {name!r} is not a label of task {task.name}{_near(name, task.labels)}")
    if len(header) == 1:
        raise UserError(f"{path}: no label column; a template has {image} and the labels to predict")
    names = _checked_names(path, [(line, cells[columns[image]]) for line, cells in rows])
    labels = tuple((name, task.labels.index(name)) for name in header if name != image)
    return Template(tuple(header), image, tuple(names), labels)


def _read_rows(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Header and (line number, cells) of each row that is not empty."""
    if not path.is_file():
        raise UserError(f"{path}: no such CSV file; check the path")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip() for name in next(reader, [])]
            rows = [(reader.line_num, cells) for cells in reader if cells]
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as CSV UTF-8") from None
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not readable as CSV ({error})") from None
    if not header:
        raise UserError(f"{path}: the file is empty; a CSV with a header and one row per image is needed")
    if not rows:
        raise UserError(f"{path}: a header but no rows; is this the right file?")
    for line, cells in rows:
        if len(cells) != len(header):
            raise UserError(f"{path}, line {line}: {len(cells)} cells, but the header has {len(header)} columns")
    return header, rows


def _columns(path: Path, header: list[str], needed: Iterable[str]) -> dict[str, int]:
    for name in header:
        if header.count(name) > 1:
            raise UserError(f"{path}: column {name!r} appears {header.count(name)} times; keep one")
    missing = [name for name in needed if name not in header]
    if missing:
        more = f" (and {len(missing) - 1} more: {', '.join(missing[1:])})" if len(missing) > 1 else ""
        raise UserError(f"{path}: column {missing[0]!r} is missing{_near(missing[0], header)}{more}; add it to the CSV")
    return {name: column for column, name in enumerate(header)}


def _near(name: str, candidates: Iterable[str]) -> str:
    folded = {candidate.lower().replace("_", " "): candidate for candidate in candidates}
    close = difflib.get_close_matches(name.lower().replace("_", " "), folded, n=1, cutoff=0.75)
    return f"; the nearest is {folded[close[0]]!r}: rename it if that is meant" if close else ""


def _checked_names(path: Path, names: list[tuple[int, str]]) -> list[str]:
    first: dict[str, int] = {}
    for line, name in names:
        problem = name_problem(name)
        if problem:
            raise UserError(f"{path}, line {line}: image name {name!r} {problem}")
        if name in first:
            raise UserError(f"{path}: image name {name!r} is in line {first[name]} and again in line {line}; keep one")
        first[name] = line
    return list(first)


def _patient(path: Path, task: Task, line: int, text: str) -> str:
    try:
        return task.patient(text)
    except ValueError as error:
        raise UserError(f"{path}, line {line}: {task.columns.patient} {text!r} {error}") from None


def _bad_labels(path: Path, bad: list[tuple[int, str, str]]) -> str:
    line, label, text = min(bad)
    kind = text.strip().lower()
    if kind in BLANK_TEXTS:
        remedy = "is blank; --blank zero reads blanks as 0"
    elif kind in UNCERTAIN_TEXTS:
        remedy = "means uncertain; --uncertain zero (or one) says how to read it"
    else:
        remedy = "is neither 0 nor 1; correct the file"
    more = f" ({len(bad) - 1:,} more such cells)" if len(bad) > 1 else ""
    return f"{path}, line {line}, column {label!r}: {text!r} {remedy}{more}"
