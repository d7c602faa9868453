"""The 14 findings in submission order, the divisions' file names, and the reading and checking of label CSVs.

Every table of the project orders its label columns as `LABELS`; a CSV may hold them in any order and is read by name.
Source: the competition's data description (Grand X-Ray Slam).
"""

import csv
import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from cxrdist.errors import UserError

LABELS = (
    "Atelectasis",
    "Cardiomegaly",
    "Consolidation",
    "Edema",
    "Enlarged Cardiomediastinum",
    "Fracture",
    "Lung Lesion",
    "Lung Opacity",
    "No Finding",
    "Pleural Effusion",
    "Pleural Other",
    "Pneumonia",
    "Pneumothorax",
    "Support Devices",
)
DIVISIONS = ("a", "b")
SPLITS = ("train", "test")


@dataclass(frozen=True)
class DivisionFiles:
    """Names inside the competition's folder, and the images known to be unreadable there."""

    train_csv: str
    train_images: str
    test_images: str
    template_csv: str
    unreadable: tuple[str, ...] = ()


DIVISION_FILES = {
    "a": DivisionFiles("train1.csv", "train1", "test1", "sample_submission_1.csv"),
    "b": DivisionFiles(
        "train2.csv",
        "train2",
        "test2",
        "sample_submission_2.csv",
        ("00043046_001_001.jpg", "00052495_001_001.jpg", "00056890_001_001.jpg"),
    ),
}

ID_COLUMNS = ("Image_name", "Patient_ID", "Study")
OPTIONAL_COLUMNS = ("Sex", "Age", "ViewCategory", "ViewPosition")
LABEL_TEXTS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1}
BLANK_TEXTS = ("", "nan", "na", "n/a", "null", "none")
UNCERTAIN_TEXTS = ("-1", "-1.0")


def read_label_csv(
    path: Path, *, blank: Literal["error", "zero"] = "error", uncertain: Literal["error", "zero", "one"] = "error"
) -> pd.DataFrame:
    """The rows of a label CSV, in file order, with every cell checked.

    Args:
        path: CSV with a header (a BOM, any column order and further columns are fine). Needed: Image_name, Patient_ID,
            Study and the 14 labels; Sex, Age, ViewCategory and ViewPosition may be missing or blank.
        blank: what an empty (or NaN, NA) label cell means; other entrants of the competition read it as 0.
        uncertain: what -1 means (CheXpert's "uncertain").
    Returns: columns image_name (exact text of the file), patient (8 digits), study (3 digits where it is a number),
    view (ViewPosition, else ViewCategory), sex, age (text, '' where missing), then LABELS as int8 in 0..1.
    Raises UserError, with line (the header is line 1) and column, for: a missing, repeated or misspelt column; a row
    with too few or too many cells; a label that is not 0 or 1; a name that repeats, is blank or leaves the image
    folder; a patient id that is not a number of at most 8 digits; no rows.
    """
    header, rows = _read_rows(path)
    columns = _columns(path, header, (*ID_COLUMNS, *LABELS))
    names = _checked_names(path, [(line, cells[columns["Image_name"]]) for line, cells in rows])
    table: dict[str, Any] = {"image_name": names}
    patients, studies = columns["Patient_ID"], columns["Study"]
    table["patient"] = [_patient(path, line, cells[patients]) for line, cells in rows]
    table["study"] = [_study(cells[studies]) for _, cells in rows]
    text = {
        name: [cells[columns[name]].strip() for _, cells in rows] if name in columns else [""] * len(rows)
        for name in OPTIONAL_COLUMNS
    }
    table["view"] = [
        position or category for position, category in zip(text["ViewPosition"], text["ViewCategory"], strict=True)
    ]
    table["sex"], table["age"] = text["Sex"], text["Age"]
    meanings = dict(LABEL_TEXTS)
    if blank == "zero":
        meanings |= dict.fromkeys(BLANK_TEXTS, 0)
    if uncertain != "error":
        meanings |= dict.fromkeys(UNCERTAIN_TEXTS, int(uncertain == "one"))
    bad: list[tuple[int, str, str]] = []
    for label in LABELS:
        column = columns[label]
        values = np.zeros(len(rows), dtype=np.int8)
        for row, (line, cells) in enumerate(rows):
            value = meanings.get(cells[column])
            if value is None:
                value = meanings.get(cells[column].strip().lower())
            if value is None:
                bad.append((line, label, cells[column]))
            else:
                values[row] = value
        table[label] = values
    if bad:
        raise UserError(_bad_labels(path, bad))
    return pd.DataFrame(table)


def read_template(path: Path) -> pd.DataFrame:
    """A sample submission's rows in file order: image_name (exact text), then its label columns (text) in its order.

    `attrs["header"]` of the result holds the file's own header, which a submission must repeat.
    Raises UserError for: no rows, no image name, a label that is unknown or repeated, no label column, names that
    repeat or leave the image folder.
    """
    header, rows = _read_rows(path)
    columns = _columns(path, header, ("Image_name",))
    for name in header:
        if name != "Image_name" and name not in LABELS:
            raise UserError(f"{path}: column {name!r} is not a label of the competition{_near(name, LABELS)}")
    if len(header) == 1:
        raise UserError(f"{path}: no label column; a template has Image_name and the labels to predict")
    table = {"image_name": _checked_names(path, [(line, cells[columns["Image_name"]]) for line, cells in rows])}
    for name in header:
        if name != "Image_name":
            table[name] = [cells[columns[name]] for _, cells in rows]
    frame = pd.DataFrame(table)
    frame.attrs["header"] = header
    return frame


def patient_of(image_name: str) -> str:
    """The patient's 8 digits from `<patient>_<study>_<image>.<ext>`; UserError when the name is not of that form."""
    match = re.match(r"(\d{1,8})_\d+_\d+\.", image_name)
    if match is None:
        raise UserError(f"image name {image_name!r} does not start with patient_study_image numbers; give a label CSV")
    return match[1].zfill(8)


def study_of(image_name: str) -> str:
    """The study's digits (at least 3) from the same form of name; UserError as in `patient_of`."""
    patient_of(image_name)
    return _study(image_name.split("_")[1])


def name_problem(name: str) -> str:
    """Why `name` cannot be the name of a file directly inside the image folder; '' when it can."""
    if not name.strip():
        return "is blank"
    if "/" in name or "\\" in name or name in (".", ".."):
        return "must be a plain file name, without a folder"
    if re.search(r"[\x00-\x1f\x7f]", name):
        return "holds a control character"
    if re.search(r"[\ud800-\udfff]", name):
        return "is not valid UTF-8"
    return ""


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


def _patient(path: Path, line: int, text: str) -> str:
    match = re.fullmatch(r"(\d{1,8})(\.0)?", text.strip())
    if match is None:
        raise UserError(f"{path}, line {line}: Patient_ID {text!r} is not a number of at most 8 digits")
    return match[1].zfill(8)


def _study(text: str) -> str:
    match = re.fullmatch(r"(\d+)(\.0)?", text.strip())
    return str(int(match[1])).zfill(3) if match else text.strip()


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
