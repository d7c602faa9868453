"""The tables of public datasets as they are published -> the one-row-an-image form that `tables.py` reads.

Only what a dataset says in a way of its own is translated here, into cells of text; the columns, policies and checks
are those of every other table. Names of images come back exactly as the table has them.
"""

import ast
import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cxrdist.errors import UserError
from cxrdist.tables import (
    BLANK_TEXTS,
    Cells,
    LabelTable,
    about_columns,
    check_columns,
    label_table,
    read_cells,
    read_label_csv,
    read_targets,
)
from cxrdist.task import ALL, NIH_LABELS, NIH_NORMAL, PUBLISHED, Task, nearest

MAX_LIST = 10_000  # characters of a list of labels in one cell; PadChest's longest has 400


def read_labels(csv: Path, task: Task) -> LabelTable:
    """The labels of a dataset in the layout that the task names (`Task.format`).

    Args: csv: the table of labels, .csv or .csv.gz; further tables of the dataset are found beside it.
    Raises UserError as `read_label_csv` does, and for a table that is not the dataset's or not there.
    """
    if task.format == "table":
        return read_label_csv(csv, task)
    return label_table(FORMS[task.format].read(csv, task), task)


def _chexpert(csv: Path, task: Task) -> Cells:
    """train.csv, valid.csv: `Path` holds the split, the patient and the study; 14 labels of 1, 0, -1 or blank."""
    cells = _read(csv, task, [task.columns.image], task.labels)
    split = re.compile(r"(?:^|/)(train|valid|test)/patient[0-9]+/")
    found = [split.search(path) for path in cells.columns[task.columns.image]]
    return _with(cells, {"split": [match[1] if match else "" for match in found]})


def _mimic(csv: Path, task: Task) -> Cells:
    """MIMIC-CXR-JPG: labels by study, joined with the images of `-metadata` and the splits of `-split` beside it.

    A row is an image, named as its file is: files/p10/p10000032/s50414267/<dicom_id>.jpg. Images of a study without
    labels, studies without an image and images without a split are counted in the notes.
    """
    labels = _read(csv, task, ["study_id"], [*task.labels, "subject_id"])
    images = _read(_beside(csv, "metadata"), task, ["dicom_id", "subject_id", "study_id"], task.columns.view)
    splits = _read(_beside(csv, "split"), task, ["dicom_id", "split"])
    row_of = _row_by(labels, "study_id")
    _row_by(images, "dicom_id")  # none is there twice
    split_of = _row_by(splits, "dicom_id")
    rows = [row_of.get(study, -1) for study in images.columns["study_id"]]
    kept = [place for place, row in enumerate(rows) if row >= 0]
    if not kept:
        raise UserError(f"{csv}: no study of it is in {images.path.name}; are they of the same release?")
    taken = [rows[place] for place in kept]
    about = {name: [column[place] for place in kept] for name, column in images.columns.items()}
    for place, (row, subject) in enumerate(zip(taken, about["subject_id"], strict=True)):
        if "subject_id" in labels.columns and labels.columns["subject_id"][row].strip() != subject.strip():
            study = about["study_id"][place]
            raise UserError(
                f"{csv}, line {labels.lines[row]}: study {study} is of subject {subject} in {images.path.name}"
            )
    about[task.columns.image] = [
        f"files/p{subject[:2]}/p{subject}/s{study}/{dicom}.jpg"
        for subject, study, dicom in zip(about["subject_id"], about["study_id"], about["dicom_id"], strict=True)
    ]
    there = [split_of.get(dicom, -1) for dicom in about["dicom_id"]]
    about["split"] = [splits.columns["split"][row] if row >= 0 else "" for row in there]
    notes = [*labels.notes, *images.notes, *splits.notes]
    for count, told in (
        (len(rows) - len(kept), f"images of {images.path.name} are left out: their studies are not in {csv.name}"),
        (len(labels) - len(set(taken)), f"studies of {csv.name} have no image in {images.path.name}"),
        (there.count(-1), f"images are not in {splits.path.name}: no split"),
    ):
        notes += [f"{count:,} {told}"] if count else []
    table = {label: [labels.columns[label][row] for row in taken] for label in task.labels if label in labels.columns}
    lines = [labels.lines[row] for row in taken]
    return Cells(csv, about | table, lines, labels.first | dict.fromkeys(about, ""), tuple(notes))


def _nih(csv: Path, task: Task) -> Cells:
    """Data_Entry_2017*.csv: `Finding Labels` are findings with '|' between, or `No Finding`; splits from the lists."""
    findings = "Finding Labels"
    cells = _read(csv, task, [task.columns.image, findings], ["Patient Sex"])
    column = cells.columns[findings]
    known = {*NIH_LABELS, NIH_NORMAL, *task.labels}
    sets = {text: frozenset(part.strip() for part in text.split("|") if part.strip()) for text in set(column)}
    _check_labels(csv, task, set().union(*sets.values()) | {NIH_NORMAL})
    for text in dict.fromkeys(column):
        for part in sorted(sets[text] - known):
            line = cells.lines[column.index(text)]
            told = f"{part[:80]!r} is not one of its findings{nearest(part, sorted(known))}"
            raise UserError(f"{csv}, line {line}, column {findings!r}: {told}; --labels may add it")
    names = cells.columns[task.columns.image]
    splits, notes = _nih_splits(csv, names)
    new = _label_columns(column, sets, task.labels) | {"split": splits}
    if task.columns.sex not in cells.columns and "Patient Sex" in cells.columns:  # its name in some releases
        new[task.columns.sex] = cells.columns["Patient Sex"]
    if task.columns.age in cells.columns:
        new[task.columns.age] = [_years(text) for text in cells.columns[task.columns.age]]
    return _with(cells, new, notes)


def _nih_splits(csv: Path, names: list[str]) -> tuple[list[str], list[str]]:
    """(N,) `train`, `test` or '' by the official lists beside the table, and what to say about them."""
    split_of: dict[str, str] = {}
    absent = []
    for name, split in (("train_val_list", "train"), ("test_list", "test")):
        path = next((p for end in ("", "_NIH") if (p := csv.parent / f"{name}{end}.txt").is_file()), None)
        if path is None:
            absent.append(f"{name}.txt")
            continue
        try:
            listed = path.read_text(encoding="utf-8-sig").split()
        except UnicodeDecodeError:
            raise UserError(f"{path}: not UTF-8 text; download the official list again") from None
        if twice := next((image for image in listed if split_of.get(image, split) != split), ""):
            raise UserError(f"{path}: {twice} is in the other list, too; download both again")
        split_of |= dict.fromkeys(listed, split)
    splits = [split_of.get(name, "") for name in names]
    notes = []
    if absent:
        notes.append(f"no {' and no '.join(absent)} beside {csv.name}: its images have no official split")
    elif count := splits.count(""):
        notes.append(f"{count:,} images of {csv.name} are in neither official list: no split")
    return splits, notes


def _padchest(csv: Path, task: Task) -> Cells:
    """PADCHEST_*.csv: `Labels` is a Python list as text; without one, every label of the row is blank."""
    lists, dates = "Labels", ("PatientBirth", "StudyDate_DICOM")
    cells = _read(csv, task, [task.columns.image, lists], dates)
    column = cells.columns[lists]
    sets: dict[str, frozenset[str]] = {}
    for text in dict.fromkeys(column):
        try:
            sets[text] = _listed(text)
        except ValueError:
            line = cells.lines[column.index(text)]
            raise UserError(
                f"{csv}, line {line}, column {lists!r}: {text[:80]!r} is not a list of labels such as ['normal']"
            ) from None
    _check_labels(csv, task, set().union(*sets.values()))
    new = _label_columns(column, sets, task.labels)
    for name in {*task.columns.view, task.columns.sex} & cells.columns.keys():
        new[name] = ["" if text.strip().lower() in BLANK_TEXTS else text for text in cells.columns[name]]
    if all(name in cells.columns for name in dates) and task.columns.age not in cells.columns:
        pairs = list(zip(*(cells.columns[name] for name in dates), strict=True))
        ages = {pair: _age(*pair) for pair in set(pairs)}
        new[task.columns.age] = [ages[pair] for pair in pairs]
    return _with(cells, new)


def _listed(text: str) -> frozenset[str]:
    """The texts of a list literal; none for a blank cell. Raises ValueError for anything else."""
    if text.strip().lower() in BLANK_TEXTS:
        return frozenset()
    if len(text) > MAX_LIST:
        raise ValueError("too long")
    try:
        found = ast.literal_eval(text.strip())
    except (SyntaxError, TypeError, MemoryError, RecursionError):
        raise ValueError("not a literal") from None
    if not isinstance(found, list) or not all(isinstance(label, str) for label in found):
        raise ValueError("not a list of texts")
    return frozenset(label.strip() for label in found if label.strip())


def _vindr(csv: Path, task: Task) -> Cells:
    """VinDr-CXR by reader -> a row an image: what most readers say, or (`Task.readers` = mean) their share.

    Kaggle's train.csv has a row for each box (`class_name`), PhysioNet's image_labels_train.csv one for each reader and
    image_labels_test.csv the consensus, without `rad_id`. A tie is an uncertain cell.
    """
    image = task.columns.image
    cells = _read(csv, task, [image], ["class_name", "rad_id", *task.labels])
    known = re.match(r"image_labels_(train|test)\.csv", csv.name)
    cells = _with(cells, {"split": [known[1] if known else ""] * len(cells)})
    names, first, place = _grouped(cells.columns[image])
    count = _votes_by_box if "class_name" in cells.columns else _votes_by_row
    votes, voters = count(cells, task, place, len(names))
    columns = {label: _verdict(votes[:, k], voters[:, k], task.readers) for k, label in enumerate(task.labels)}
    rows = first.tolist()
    columns |= {image: names, "split": [cells.columns["split"][row] for row in rows]}
    return dataclasses.replace(_with(cells, columns), columns=columns, lines=[cells.lines[row] for row in rows])


def _votes_by_box(
    cells: Cells, task: Task, place: NDArray[np.int64], num_images: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(num_images, K) readers who drew a box of a label, and readers of the image; `place`: the image of each row."""
    if "rad_id" not in cells.columns:
        raise UserError(f"{cells.path}: column 'rad_id' is missing; {FORMS[task.format].told}")
    classes = np.array([text.strip() for text in cells.columns["class_name"]], dtype=object)
    _check_labels(cells.path, task, set(classes.tolist()))
    readers = zip(place.tolist(), cells.columns["rad_id"], strict=True)
    _, first, reading = _grouped([f"{image} {reader.strip()}" for image, reader in readers])
    voters = np.bincount(place[first], minlength=num_images).astype(np.float64)
    votes = np.zeros((num_images, task.num_labels))
    for column, label in enumerate(task.labels):
        positive = first[np.unique(reading[classes == label])]  # a reader's several boxes of a label count once
        votes[:, column] = np.bincount(place[positive], minlength=num_images)
    return votes, voters[:, None].repeat(task.num_labels, axis=1)


def _votes_by_row(
    cells: Cells, task: Task, place: NDArray[np.int64], num_images: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The same from 0/1 columns, a row for each reader of an image; who left a cell blank did not read that label."""
    check_columns(cells, task)
    seen: dict[tuple[str, str], int] = {}
    readers = cells.columns.get("rad_id", [""] * len(cells))
    for line, image, reader in zip(cells.lines, cells.columns[task.columns.image], readers, strict=True):
        if seen.setdefault((image, reader), line) != line:
            told = f"image {image!r} is in line {seen[image, reader]} and again in line {line}"
            raise UserError(f"{cells.path}: {told}{f' for reader {reader!r}' if reader else ''}; keep one")
    targets = read_targets(cells, dataclasses.replace(task, blank={ALL: "masked"}, uncertain={ALL: "error"}))
    votes, voters = np.zeros((num_images, task.num_labels)), np.zeros((num_images, task.num_labels))
    np.add.at(votes, place, np.nan_to_num(targets))
    np.add.at(voters, place, ~np.isnan(targets))
    return votes, voters


def _verdict(votes: NDArray[np.float64], voters: NDArray[np.float64], readers: str) -> list[str]:
    """(N,) cells of one label: blank where no reader read it."""
    with np.errstate(invalid="ignore"):
        shares = votes / voters
    texts = {
        share: "" if share != share else repr(share) if readers == "mean" else "1" if share > 0.5 else "0"
        for share in set(shares.tolist())
    }
    if readers == "majority" and 0.5 in texts:
        texts[0.5] = "-1"
    return ["" if share != share else texts[share] for share in shares.tolist()]


class Form(NamedTuple):
    """How a dataset is read, and what to say where a table is not of it."""

    read: Callable[[Path, Task], Cells]
    told: str


FORMS = {
    "chexpert": Form(_chexpert, "train.csv or valid.csv of CheXpert is needed"),
    "mimic": Form(_mimic, "mimic-cxr-2.0.0-chexpert.csv, -metadata.csv and -split.csv of MIMIC-CXR-JPG are needed"),
    "nih": Form(_nih, "Data_Entry_2017_v2020.csv of NIH ChestX-ray14 is needed"),
    "padchest": Form(_padchest, "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv is needed"),
    "vindr": Form(
        _vindr, "train.csv of Kaggle, or image_labels_train.csv or image_labels_test.csv of VinDr-CXR is needed"
    ),
}


def _read(csv: Path, task: Task, needed: Sequence[str], optional: Iterable[str] = ()) -> Cells:
    """The columns of a published table; UserError says which table is needed where one of `needed` is missing."""
    cells = read_cells(csv, {*about_columns(task), *needed, *optional})
    for name in needed:
        if name not in cells.columns:
            raise UserError(
                f"{csv}: column {name!r} is missing{nearest(name, cells.first)}; {FORMS[task.format].told}, "
                "or another --task (give your own table with --labels and --image-column)"
            )
    return cells


def _with(cells: Cells, columns: dict[str, list[str]], notes: Iterable[str] = ()) -> Cells:
    first = cells.first | {name: column[0] for name, column in columns.items()}
    return dataclasses.replace(cells, columns=cells.columns | columns, first=first, notes=(*cells.notes, *notes))


def _beside(csv: Path, what: str) -> Path:
    """The MIMIC table of that kind beside the labels: of the same release, or the only one there."""
    folder = csv.parent
    release = re.match(r"mimic-cxr-[0-9.]+", csv.name)
    for pattern in (f"{release[0] if release else 'mimic-cxr'}-{what}.csv", f"mimic-cxr-*-{what}.csv"):
        found = sorted([*folder.glob(pattern), *folder.glob(f"{pattern}.gz")])
        if found and (len(found) == 1 or len({path.name.removesuffix(".gz") for path in found}) == 1):
            return found[0]
        if found:
            raise UserError(f"{folder}: {found[0].name} and {found[1].name} fit {csv.name}; keep one of them there")
    raise UserError(
        f"{csv}: there is no mimic-cxr-2.0.0-{what}.csv[.gz] beside it; put that table of MIMIC-CXR-JPG there"
    )


def _row_by(cells: Cells, column: str) -> dict[str, int]:
    """Row by the text of a column. UserError where a text is there twice."""
    rows: dict[str, int] = {}
    for row, text in enumerate(cells.columns[column]):
        if rows.setdefault(text, row) != row:
            told = f"{column} {text!r} is in line {cells.lines[rows[text]]} and again in line {cells.lines[row]}"
            raise UserError(f"{cells.path}: {told}; keep one")
    return rows


def _grouped(texts: list[str]) -> tuple[list[str], NDArray[np.int64], NDArray[np.int64]]:
    """The different texts in order of appearance, the first row of each (M,), and the place of each row's text (N,)."""
    places: dict[str, int] = {}
    first: list[int] = []
    place = np.empty(len(texts), dtype=np.int64)
    for row, text in enumerate(texts):
        place[row] = places.setdefault(text, len(places))
        if len(places) > len(first):
            first.append(row)
    return list(places), np.array(first, dtype=np.int64), place


def _label_columns(column: list[str], sets: dict[str, frozenset[str]], labels: Iterable[str]) -> dict[str, list[str]]:
    """A column of '1' and '0' for each label; '' where a row lists nothing."""
    texts, _, place = _grouped(column)
    columns = {}
    for label in labels:
        cells = ["1" if label in sets[text] else "0" if sets[text] else "" for text in texts]
        columns[label] = np.array(cells, dtype=object)[place].tolist()
    return columns


def _check_labels(csv: Path, task: Task, there: set[str]) -> None:
    """UserError for a label that no row has, unless it is one of the dataset's common ones."""
    for label in task.labels:
        if label not in there and label not in PUBLISHED[task.format].labels:
            meant = nearest(label, [*PUBLISHED[task.format].labels, *sorted(there)])
            raise UserError(f"{csv}: no row has the label {label!r}{meant}; give --labels that it has")


def _years(text: str) -> str:
    """`058Y` of older releases as 58; months and days are 0 years."""
    match = re.fullmatch(r"0*([0-9]+)([YMD])", text.strip())
    return text if match is None else match[1] if match[2] == "Y" else "0"


def _age(birth: str, date: str) -> str:
    """Years between a year of birth (`1930.0`) and a date (20140915); '' where one is not known."""
    born, year = re.match(r"[0-9]{4}", birth), re.match(r"[0-9]{4}", date)
    years = int(year[0]) - int(born[0]) if born and year else -1
    return str(years) if 0 <= years < 130 else ""
