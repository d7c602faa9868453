"""Label CSVs and sample submissions, read and checked by a task's rules: every cell is accounted for or named.

A table may hold its columns in any order and is read by name; what comes out is in the order of the task's labels.
`published.py` brings the tables of public datasets into the form that is read here.
"""

import csv
import gzip
import io
import re
import shlex
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cxrdist.errors import UserError
from cxrdist.task import Reading, Task, name_problem, near, nearest

LABEL_TEXTS = {"0": 0.0, "1": 1.0, "0.0": 0.0, "1.0": 1.0}
BLANK_TEXTS = ("", "nan", "na", "n/a", "null", "none")
UNCERTAIN_TEXTS = ("-1", "-1.0")
SOFT_TEXT = r"[01]?\.[0-9]+(e-[0-9]+)?|[0-9]e-[0-9]+|[0-9]\.[0-9]+e-[0-9]+"  # at most 1 where the value is, too
VALUES = {"zero": 0.0, "one": 1.0, "masked": float("nan")}
BAD = -1.0  # a cell that has no meaning; no target is negative
SPLITS = {  # a table's word for a split, in any case; other words are names of their own
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("valid", "validate", "validation", "val"), "valid"),
    **dict.fromkeys(("test", "testing"), "test"),
}
# What a column is probably called, where none is near to the name that was asked for.
USUAL = {
    "--image-column": r"image|img|file|path|dicom",
    "--patient-column": r"patient|subject|person",
    "--study-column": r"study|exam|accession|visit|follow",
    "--split-column": r"split|partition|subset|fold",
}
IMAGE_TEXT = r".+\.(jpe?g|png|dcm|dicom|tiff?|bmp|webp)"
MOST = 0.5  # of the rows: a shifted column contradicts in nearly every one, a clerical error in few
MAX_BYTES = 2**31  # of a table, uncompressed; the largest public one has 100 MB
MAX_LINE = 2**24  # characters
MAX_COMPARED = 1000  # columns, for the nearest to one that is missing
MAX_RATIO = 200  # of a gzip file larger than 64 MB; the public tables have 5 to 20


class MissingColumnError(UserError):
    """A table lacks a column. what: the message without flags, which only some commands have."""

    def __init__(self, message: str, what: str) -> None:
        super().__init__(message)
        self.what = what


@dataclass(frozen=True, eq=False)
class LabelTable:
    """The rows of a label table, in file order.

    about: columns image_name (exact text of the file), patient, study, view, sex, age, split; text, '' where unknown.
    targets: (N, K) float32 in [0, 1] in the order of the task's labels, NaN where a cell is masked.
    notes: one line each to tell the user: what was left out, or read in another way than it is usually written.
    """

    about: pd.DataFrame
    targets: NDArray[np.float32]
    notes: tuple[str, ...] = ()

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


@dataclass(frozen=True, eq=False)
class Cells:
    """A table as text, before its cells are read.

    columns: (N,) text each, by name. lines: (N,) the line in `path` on which each row ends; the header's is 1.
    first: the first row's cells by column, those that were not kept, too: its keys are the header.
    """

    path: Path
    columns: dict[str, list[str]]
    lines: list[int]
    first: dict[str, str]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.lines)


def read_label_csv(path: Path, task: Task) -> LabelTable:
    """The rows of a label CSV with every cell checked; cells that are blank or -1 are read as the task says.

    Args:
        path: CSV (or .csv.gz) with a header; a BOM, any column order, further columns and ';' or tabs are fine. Needed:
            the image column, the labels, and the patient, study and split columns where the task names them; the others
            may be missing or blank.
    Raises UserError, with line (the header is line 1) and column, for: a missing, repeated or misspelt column, with the
    flags that say the right one; a row with too few or too many cells; a label that is no number in [0, 1] and not
    covered by the task; a name that repeats, is blank or leaves the image folder; a patient id against the task's rule;
    no rows; a file that is no UTF-8 text, a damaged gzip file, or absurdly large.
    """
    return label_table(read_cells(path, {*about_columns(task), *task.labels}), task)


def about_columns(task: Task) -> list[str]:
    """The columns that the task names, without its labels."""
    named = task.columns
    return [n for n in (named.image, named.patient, named.study, named.split, *named.view, named.sex, named.age) if n]


def label_table(cells: Cells, task: Task) -> LabelTable:
    """`read_label_csv` from cells: one row an image, columns as the task names them, a column for each label."""
    check_columns(cells, task)
    named, notes = task.columns, list(cells.notes)
    names = _checked_names(cells.path, cells.lines, cells.columns[named.image])
    about = {"image_name": names}
    from_names = [] if named.patient and named.study else [task.ids_in_name(name) for name in names]
    if named.patient:
        about["patient"] = _patients(cells, task)
        notes += _contradictions(cells, task, names, about["patient"])
    else:  # where nothing says the patient, every image is its own
        about["patient"] = [ids[0] if ids else name for ids, name in zip(from_names, names, strict=True)]
        if task.names and None in from_names:
            first = names[from_names.index(None)]
            notes.append(
                f"{from_names.count(None):,} image names do not say their patient (first: {first!r}): each is its own"
            )
    if named.study:
        meanings = {text: task.study(text) for text in set(cells.columns[named.study])}
        about["study"] = [meanings[text] for text in cells.columns[named.study]]
    else:
        about["study"] = [ids[1] if ids else "" for ids in from_names]
    for field, candidates in (("view", named.view), ("sex", (named.sex,)), ("age", (named.age,))):
        there = [cells.columns[name] for name in candidates if name in cells.columns]
        rows = zip(*there, strict=True) if there else [("",)] * len(cells)
        about[field] = [next(filter(None, map(str.strip, row)), "") for row in rows]
    splits = cells.columns[named.split] if named.split else [""] * len(cells)
    about["split"] = [SPLITS.get(text.strip().lower(), text.strip()) for text in splits]
    return LabelTable(pd.DataFrame(about, dtype=object), read_targets(cells, task), tuple(notes))


def read_targets(cells: Cells, task: Task) -> NDArray[np.float32]:
    """(N, K) float32 in [0, 1], NaN where masked, of the task's labels. UserError names a bad cell."""
    targets = np.empty((len(cells), task.num_labels), dtype=np.float32)
    for place, label in enumerate(task.labels):
        column = cells.columns[label]
        blank, uncertain = task.reading("blank", label), task.reading("uncertain", label)
        meanings = {text: _meaning(text, blank, uncertain) for text in set(column)}
        targets[:, place] = np.fromiter(map(meanings.__getitem__, column), np.float32, len(column))
    bad = targets == BAD
    if bad.any():
        row = int(bad.any(axis=1).argmax())
        label = task.labels[int(bad[row].argmax())]
        raise UserError(_bad_label(cells.path, cells.lines[row], label, cells.columns[label][row], int(bad.sum())))
    return targets


def _meaning(text: str, blank: Reading | float, uncertain: Reading | float) -> float:
    text = text.strip().lower()
    if text in BLANK_TEXTS:
        return _value(blank)
    if text in UNCERTAIN_TEXTS:
        return _value(uncertain)
    if text in LABEL_TEXTS:
        return LABEL_TEXTS[text]
    return float(text) if re.fullmatch(SOFT_TEXT, text) and float(text) <= 1 else BAD


def _value(reading: Reading | float) -> float:
    return VALUES.get(reading, BAD) if isinstance(reading, str) else float(reading)


def read_template(path: Path, task: Task) -> Template:
    """A sample submission of the task. Raises UserError for: no rows, no image name, a label that is unknown or
    repeated, no label column, names that repeat or leave the image folder.
    """
    image = task.columns.image
    cells = read_cells(path, {image})
    header = tuple(cells.first)
    if image not in header:
        close = near(image, header[:MAX_COMPARED])
        meant = f"; the nearest is {close!r}: rename it if that is meant" if close else ""
        raise UserError(f"{path}: column {image!r} is missing{meant}; add it to the CSV")
    for name in header:
        if name != image and name not in task.labels:
            meant = nearest(name, task.labels)
            remedy = f"{meant}: rename it if that is meant" if meant else f"; a template has {image} and labels alone"
            raise UserError(f"{path}: column {name!r} is not a label of task {task.name}{remedy}")
    if len(header) == 1:
        raise UserError(f"{path}: no label column; a template has {image} and the labels to predict")
    names = _checked_names(path, cells.lines, cells.columns[image])
    labels = tuple((name, task.labels.index(name)) for name in header if name != image)
    return Template(header, image, tuple(names), labels)


def read_cells(path: Path, wanted: Collection[str] | None = None, *, most: int | None = None) -> Cells:
    """A CSV's columns whose names are in `wanted` (None: all) as text, of the first `most` rows (None: of all); empty
    lines do not count.

    The separator is a comma, or ';' or a tab where the header holds more of them, which is noted. gzip is known by its
    first bytes. Raises UserError as `read_label_csv` does for what is wrong with the file itself.
    """
    if not path.is_file():
        what = "is a folder; give the CSV file in it" if path.is_dir() else "no such CSV file; check the path"
        raise UserError(f"{path}: {what}")
    notes: tuple[str, ...] = ()
    lines: list[int] = []
    kept: list[str] = []  # row after row in one list: millions of small ones keep Python's garbage collector busy
    sample: list[str] = []
    try:
        with path.open("rb") as file:
            text = _lines(path, file)
            first_line = next(text, "")
            delimiter = _delimiter(first_line)
            if delimiter != ",":
                notes = (f"{path}: read as separated by {'tabs' if delimiter == chr(9) else repr(delimiter)}",)
            reader = csv.reader(chain([first_line], text), delimiter=delimiter, strict=True)
            header = [name.strip() for name in next(reader, [])]
            places = [place for place, name in enumerate(header) if wanted is None or name in wanted]
            for cells in reader:
                if not cells:
                    continue
                if len(cells) != len(header):
                    told = f"{len(cells)} cells, but the header has {len(header)} columns; correct that line"
                    raise UserError(f"{path}, line {reader.line_num}: {told}")
                sample = sample or cells
                lines.append(reader.line_num)
                kept += [cells[place] for place in places]
                if len(lines) == most:
                    break
    except UnicodeDecodeError:
        raise UserError(f"{path}: {_encoding_problem(path)}") from None
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not readable as CSV ({error})") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: a damaged or incomplete gzip file ({error}); copy or download it again") from None
    if not header:
        raise UserError(f"{path}: the file is empty; a CSV with a header and one row per image is needed")
    if not lines:
        raise UserError(f"{path}: a header but no rows; is this the right file?")
    for name, times in Counter(header).items():
        if name and times > 1:
            raise UserError(f"{path}: column {name[:80]!r} appears {times} times; keep one")
    columns = {header[place]: kept[number :: len(places)] for number, place in enumerate(places)}
    return Cells(path, columns, lines, dict(zip(header, sample, strict=True)), notes)


def _lines(path: Path, file: io.BufferedReader) -> Iterator[str]:
    """The lines of a CSV or gzipped CSV, with a bound on its size, on that of a line, and on what gzip unpacks to."""
    size = path.stat().st_size
    start = file.peek(4)[:4]
    if start[:2] == b"PK":
        raise UserError(f"{path}: a ZIP or Excel file, not a CSV; unpack it, or save the sheet as CSV UTF-8")
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{path}: {_encoding_problem(path)}")
    packed = start[:2] == b"\x1f\x8b"
    limit = min(MAX_BYTES, max(2**26, MAX_RATIO * size)) if packed else MAX_BYTES
    source = gzip.GzipFile(fileobj=file) if packed else file
    total = 0
    with io.TextIOWrapper(source, encoding="utf-8-sig", newline="") as text:
        while line := text.readline(MAX_LINE):
            if total == 0 and "\0" in line:
                raise UserError(f"{path}: not UTF-8 text but UTF-16; save it as CSV UTF-8")
            total += len(line)
            if total > limit or len(line) == MAX_LINE:
                what = "a line" if len(line) == MAX_LINE else "the unpacked table" if packed else "the table"
                told = f"{what} has more than {min(total, limit):,} characters"
                raise UserError(f"{path}: {told}; is this the right file?")
            yield line


def _delimiter(header: str) -> str:
    outside = re.sub(r'"[^"]*"', "", header)
    return max(",;\t", key=outside.count)  # none: a table of one column


def _encoding_problem(path: Path) -> str:
    """What the text is instead of UTF-8."""
    with path.open("rb") as file:
        packed = file.peek(2)[:2] == b"\x1f\x8b"
        data = (gzip.GzipFile(fileobj=file) if packed else file).read(2**28)
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "not UTF-8 text but UTF-16 (Excel's 'Unicode Text'); save it as CSV UTF-8"
    try:
        data.decode()
    except UnicodeDecodeError as error:
        start = data.rfind(b"\n", 0, error.start) + 1
        number = data.count(b"\n", 0, error.start) + 1
        word = re.findall(rb"[^\s,;]*$", data[start : error.start])[0][-20:]
        word += re.match(rb"[^\s,;]{1,20}", data[error.start : error.start + 20])[0]  # type: ignore[index]
        try:
            meant = f", Windows-1252 by the look of it ({word.decode('cp1252')!r})"
        except UnicodeDecodeError:
            meant = ""
        return f"not UTF-8 text (line {number}{meant}); save it as CSV UTF-8"
    return "not UTF-8 text; save it as CSV UTF-8"


def check_columns(cells: Cells, task: Task) -> None:
    """UserError for columns that are missing: one line with the flags that say what they are called in this table."""
    named, header = task.columns, cells.first
    flags = {
        "--image-column": named.image,
        "--patient-column": named.patient,
        "--study-column": named.study,
        "--split-column": named.split,
    }
    roles = {flag: name for flag, name in flags.items() if name and name not in cells.columns}
    lost = [label for label in task.labels if label not in cells.columns]
    missing = [*roles.values(), *lost]
    if not missing:
        return
    free = [name for name in header if name and name not in {*flags.values(), *task.labels}][:MAX_COMPARED]
    remedies, sure = [], True
    for flag, name in roles.items():
        column = near(name, free) or _usual(flag, free, header)
        remedies.append(f"{flag} {shlex.quote(column) if column else 'NAME'}")
        sure = sure and bool(column)
    if lost:
        columns = [label if label in header else near(label, free) for label in task.labels]
        known = all(columns) and len(set(columns)) == len(columns)
        if any("," in label for label in columns):
            remedies.append("--labels @FILE (a label a line)")
        else:
            remedies.append(f"--labels {shlex.quote(','.join(columns)) if known else 'A,B,C'}")
        sure = sure and known
    more = f" (and {len(missing) - 1} more: {_some(missing[1:], 4)})" if len(missing) > 1 else ""
    there = "" if sure else f"; its columns: {_some(header)}"
    rename = ", or rename the column" if sure else ""
    close = nearest(missing[0], free)
    raise MissingColumnError(
        f"{cells.path}: column {missing[0]!r} is missing{close}{more}; give {' '.join(remedies)}{rename}{there}",
        f"{cells.path}: column {missing[0]!r} is missing{close}{more}; its columns: {_some(header)}",
    )


def _usual(flag: str, free: list[str], first: dict[str, str]) -> str:
    if flag == "--image-column":
        for name in free:
            if re.fullmatch(IMAGE_TEXT, first[name].strip().lower()):
                return name
    return next((name for name in free if re.search(USUAL[flag], name.lower())), "")


def _some(names: Iterable[str], count: int = 20) -> str:
    names = [name for name in names if name]
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def _checked_names(path: Path, lines: list[int], names: list[str]) -> list[str]:
    first: dict[str, int] = {}
    for line, name in zip(lines, names, strict=True):
        problem = name_problem(name)
        if problem:
            raise UserError(f"{path}, line {line}: image name {name!r} {problem}")
        if name in first:
            raise UserError(f"{path}: image name {name!r} is in line {first[name]} and again in line {line}; keep one")
        first[name] = line
    return list(first)


def _patients(cells: Cells, task: Task) -> list[str]:
    column = cells.columns[task.columns.patient]
    ids: dict[str, str] = {}
    for text in dict.fromkeys(column):
        try:
            ids[text] = task.patient(text)
        except ValueError as error:
            line = cells.lines[column.index(text)]
            raise UserError(f"{cells.path}, line {line}: {task.columns.patient} {text!r} {error}") from None
    return [ids[text] for text in column]


def _contradictions(cells: Cells, task: Task, names: list[str], patients: list[str]) -> list[str]:
    """A note on patients that contradict what the image's name says by the task's rule, where there are some.

    UserError where most do: then the column is another one, or shifted against the names.
    """
    if not task.names:
        return []
    told = [None if (ids := task.ids_in_name(name)) is None else ids[0] for name in names]
    both = list(zip(told, patients, strict=True))
    other = [row for row, (one, two) in enumerate(both) if one is not None and one.lstrip("0") != two.lstrip("0")]
    if not other:
        return []
    row, num_told = other[0], sum(one is not None for one in told)
    problem = (
        f"{cells.path}, line {cells.lines[row]}: {task.columns.patient} is {patients[row]!r}, but the image's name "
        f"{names[row]!r} says {told[row]!r}; so in {len(other):,} of {num_told:,} rows"
    )
    if len(other) > num_told * MOST:
        raise UserError(f"{problem}; correct the table, or give a task whose names say nothing")
    return [f"warning: {problem}; find out which is right"]


def _bad_label(path: Path, line: int, label: str, text: str, count: int) -> str:
    kind = text.strip().lower()
    choices = "zero|one|masked|0.5 says how to read it"
    if kind in BLANK_TEXTS:
        remedy = f"is blank; --blank {choices}"
    elif kind in UNCERTAIN_TEXTS:
        remedy = f"means uncertain; --uncertain {choices}"
    elif re.fullmatch(r"[01],[0-9]+", kind):
        remedy = "has a decimal comma; write it with a point"
    else:
        remedy = "is neither 0 nor 1 nor a number between; correct the file, or take another column"
    more = f" ({count - 1:,} more such cells)" if count > 1 else ""
    return f"{path}, line {line}, column {label!r}: {text[:80]!r} {remedy}{more}"
