"""What is predicted, and from which table: a `Task`. No other module knows a label, a count of labels or a division.

A task travels with the data: shard set -> run -> checkpoint -> score table -> submission, and is compared there. The
competition's two divisions (tasks `a` and `b`, Grand X-Ray Slam) and five public datasets are built in; others come
from a TOML or JSON file.
"""

import dataclasses
import difflib
import json
import os
import re
import tomllib
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from cxrdist.documents import Document, read_bounded
from cxrdist.errors import UserError

Reading = Literal["error", "zero", "one", "masked"]
READINGS: tuple[Reading, ...] = get_args(Reading)
Readings = Reading | float | Mapping[str, Reading | float]  # for all labels, or by label
Format = Literal["table", "chexpert", "mimic", "nih", "padchest", "vindr"]
ALL = "*"  # in `blank` and `uncertain`: every label that is not named
MAX_LABELS = 1000
NUM_NAMED = 10  # labels that an error lists
MIN_CASES = 20  # positives, and negatives, of a label below which its own numbers say little
MAX_ID_CHARACTERS = 128
NAMES = {  # the part of an image's name, by rule, that says its patient and its study
    "patient_study_image": r"(?:.*/)?([0-9]{1,8})_([0-9]+)_[0-9]+\.[^/]*",
    "chexpert": r"(?:.*/)?(patient[0-9]+)/(study[0-9]+)/[^/]+",
    "mimic": r"(?:.*/)?p([0-9]+)/s([0-9]+)/[^/]+",
    "nih": r"(?:.*/)?0*([0-9]+)_0*([0-9]+)\.[^/]*",
}


@dataclass(frozen=True, kw_only=True)
class Columns(Document):
    """What the label CSV calls its columns; '' where it has none. Of `view` the first that is not blank counts.

    split: the table's own split of its rows, e.g. into train, valid and test.
    """

    image: str = "Image_name"
    patient: str = ""
    study: str = ""
    view: tuple[str, ...] = ()
    sex: str = ""
    age: str = ""
    split: str = ""


@dataclass(frozen=True, kw_only=True)
class Task(Document):
    """Labels, columns and rules of one table. Raises UserError for values that are not valid.

    labels: in the order of every table and model output. metric: what a model is judged by.
    format: how the source table is laid out: one row an image (`table`), or a dataset's tables as published.
    names: what an image's name says where no column does: `patient_study_image`, as in the competition, whose patients
        are at most 8 digits and whose studies are at least 3, the names of a public dataset, or nothing ('').
    blank, uncertain: how an empty cell and a -1 are read, by label; `*` is every other label. A number in [0, 1] is
        a soft label.
    readers: what counts where several readers labelled an image (format `vindr`).
    unreadable: images known to be bad; they are left out by name.
    """

    name: str
    labels: tuple[str, ...]
    metric: Literal["macro_auroc"] = "macro_auroc"
    columns: Columns = Columns()
    format: Format = "table"
    names: Literal["", "patient_study_image", "chexpert", "mimic", "nih"] = ""
    blank: dict[str, Reading | float] = field(default_factory=lambda: dict[str, Reading | float]({ALL: "error"}))
    uncertain: dict[str, Reading | float] = field(default_factory=lambda: dict[str, Reading | float]({ALL: "error"}))
    readers: Literal["majority", "mean"] = "majority"
    unreadable: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", self.name) is None:
            raise UserError(f"task name {self.name!r} is not valid: use letters, digits, '_', '.' and '-'")
        if not 1 <= len(self.labels) <= MAX_LABELS:
            raise UserError(f"task {self.name}: {len(self.labels)} labels; use 1 to {MAX_LABELS}")
        seen: set[str] = set()
        for label in self.labels:
            if not label.strip() or re.search(r"[\x00-\x1f\x7f\u2028\u2029\ud800-\udfff]", label) or len(label) > 200:
                raise UserError(
                    f"task {self.name}: label {label[:50]!r} is blank, too long or holds a control character"
                )
            if label in seen:
                raise UserError(f"task {self.name}: label {label!r} is there twice; name it once")
            seen.add(label)
        for kind, readings in (("blank", self.blank), ("uncertain", self.uncertain)):
            for label, reading in readings.items():
                if label != ALL and label not in seen:
                    raise UserError(f"task {self.name}: {kind} names {label!r}, which is not one of its labels")
                if not isinstance(reading, str) and not 0.0 <= reading <= 1.0:
                    raise UserError(f"task {self.name}: {kind} {label}={reading} is not in [0, 1]")

    @property
    def num_labels(self) -> int:
        return len(self.labels)

    @property
    def folder(self) -> str:
        """The name of the task's folder below `shards/` and `predictions/`."""
        return f"div_{self.name}" if self.name in LAYOUTS else self.name

    def reading(self, kind: Literal["blank", "uncertain"], label: str) -> Reading | float:
        """How a blank or uncertain cell of `label` is read; error where nothing is said."""
        readings: dict[str, Any] = getattr(self, kind)
        found: Reading | float = readings.get(label, readings.get(ALL, "error"))
        return found

    def with_readings(self, blank: Readings | None, uncertain: Readings | None) -> "Task":
        """The task with blank or uncertain cells read in another way; None leaves the task's own.

        One value is for all labels. A dict (`parse_readings`) without `*` changes only the labels that it names.
        """

        def changed(own: dict[str, Reading | float], given: Readings | None) -> dict[str, Reading | float]:
            if not isinstance(given, Mapping):
                return own if given is None else {ALL: given}
            return dict(given) if ALL in given else {**own, **given}

        return dataclasses.replace(self, blank=changed(self.blank, blank), uncertain=changed(self.uncertain, uncertain))

    def differences(self, other: "Task") -> list[str]:
        """What keeps two tasks' data, models and tables from being used together; empty when nothing does."""
        found = []
        if self.name != other.name:
            found.append(f"task {self.name} and {other.name}")
        if self.labels != other.labels:
            pairs = enumerate(zip(self.labels, other.labels, strict=False), start=1)
            place = next((f"label {n}: {a!r} and {b!r}" for n, (a, b) in pairs if a != b), "")
            found.append(place or f"{len(self.labels)} and {len(other.labels)} labels")
        if self.metric != other.metric:
            found.append(f"metric {self.metric} and {other.metric}")
        return found

    def patient(self, text: str) -> str:
        """The patient's id in the form in which ids are compared. Raises ValueError that says what is wrong with it."""
        text = unicodedata.normalize("NFC", text.strip())
        if self.names == "patient_study_image":
            match = re.fullmatch(r"([0-9]{1,8})(\.0)?", text)
            if match is None:
                raise ValueError("is not a number of at most 8 digits")
            return match[1].zfill(8)
        return _checked_id(text)

    def study(self, text: str) -> str:
        """The study's id, '' where it is blank; digits are filled to three where the names rule says studies."""
        text = unicodedata.normalize("NFC", text.strip())
        match = re.fullmatch(r"([0-9]+)(\.0)?", text) if self.names == "patient_study_image" else None
        return str(int(match[1])).zfill(3) if match else text

    def ids_in_name(self, image_name: str) -> tuple[str, str] | None:
        """(patient, study) where the image's name says them, else None."""
        match = re.fullmatch(NAMES[self.names], image_name) if self.names else None
        return None if match is None else (self.patient(match[1]), self.study(match[2]))

    def to_toml(self) -> str:
        """The task as a TOML file that `load_task` reads."""
        lines, tables = [], []
        for name, value in dataclasses.asdict(self).items():
            if isinstance(value, dict):
                rows = (f"{json.dumps(key, ensure_ascii=False)} = {_toml(entry)}" for key, entry in value.items())
                tables.append("\n".join([f"\n[{name}]", *rows]))
            else:
                lines.append(f"{name} = {_toml(value)}")
        return "\n".join([*lines, *tables]) + "\n"


@dataclass(frozen=True)
class Layout:
    """Names inside the folder in which a task's source is published."""

    train_csv: str
    train_images: str
    test_images: str
    template_csv: str


# Source: the competition's data description (Grand X-Ray Slam), order of the sample submission.
COMPETITION_LABELS = (
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
COMPETITION_COLUMNS = Columns(
    patient="Patient_ID", study="Study", view=("ViewPosition", "ViewCategory"), sex="Sex", age="Age"
)
LAYOUTS = {
    "a": Layout("train1.csv", "train1", "test1", "sample_submission_1.csv"),
    "b": Layout("train2.csv", "train2", "test2", "sample_submission_2.csv"),
}
# Each in the order of its published table.
CHEXPERT_LABELS = (
    "No Finding",
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
)
NIH_LABELS = (
    "Atelectasis",
    "Cardiomegaly",
    "Effusion",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pneumonia",
    "Pneumothorax",
    "Consolidation",
    "Edema",
    "Emphysema",
    "Fibrosis",
    "Pleural_Thickening",
    "Hernia",
)
NIH_NORMAL = "No Finding"  # what its table says where none of them is there
# The 14 boxed findings of its training set, which the consensus of its test set has, too.
VINDR_LABELS = (
    "Aortic enlargement",
    "Atelectasis",
    "Calcification",
    "Cardiomegaly",
    "Consolidation",
    "ILD",
    "Infiltration",
    "Lung Opacity",
    "Nodule/Mass",
    "Other lesion",
    "Pleural effusion",
    "Pleural thickening",
    "Pneumothorax",
    "Pulmonary fibrosis",
)
# Of PadChest's 193 the common ones, and those that the other datasets know; each is its own name, not a group of names.
PADCHEST_LABELS = (
    "cardiomegaly",
    "pleural effusion",
    "pneumonia",
    "interstitial pattern",
    "alveolar pattern",
    "infiltrates",
    "consolidation",
    "atelectasis",
    "laminar atelectasis",
    "nodule",
    "pulmonary mass",
    "pneumothorax",
    "pulmonary edema",
    "emphysema",
    "pulmonary fibrosis",
    "pleural thickening",
    "hiatal hernia",
    "callus rib fracture",
    "granuloma",
    "bronchiectasis",
    "tuberculosis",
    "air trapping",
    "flattened diaphragm",
    "hemidiaphragm elevation",
    "hilar enlargement",
    "costophrenic angle blunting",
    "aortic elongation",
    "aortic atheromatosis",
    "scoliosis",
    "pacemaker",
)
COMPETITION = {
    name: Task(
        name=name,
        labels=COMPETITION_LABELS,
        columns=COMPETITION_COLUMNS,
        names="patient_study_image",
        unreadable=unreadable,
    )
    for name, unreadable in {
        "a": (),
        "b": ("00043046_001_001.jpg", "00052495_001_001.jpg", "00056890_001_001.jpg"),
    }.items()
}
# The columns are those of the published table or, where it says a thing in another way, of the plain form into which
# `published.py` brings it. Policies: a finding that a report does not mention is not there (CheXpert, MIMIC-CXR); -1
# and a tie between readers are masked, and so is every label of an image to which PadChest gives none at all.
PUBLISHED = {
    task.name: task
    for task in (
        Task(
            name="chexpert",
            labels=CHEXPERT_LABELS,
            columns=Columns(image="Path", view=("AP/PA", "Frontal/Lateral"), sex="Sex", age="Age", split="split"),
            format="chexpert",
            names="chexpert",
            blank={ALL: "zero"},
            uncertain={ALL: "masked"},
        ),
        Task(
            name="mimic",
            labels=COMPETITION_LABELS,
            columns=Columns(patient="subject_id", study="study_id", view=("ViewPosition",), split="split"),
            format="mimic",
            names="mimic",
            blank={ALL: "zero"},
            uncertain={ALL: "masked"},
        ),
        Task(
            name="nih",
            labels=NIH_LABELS,
            columns=Columns(
                image="Image Index",
                patient="Patient ID",
                study="Follow-up #",
                view=("View Position",),
                sex="Patient Gender",
                age="Patient Age",
                split="split",
            ),
            format="nih",
            names="nih",
        ),
        Task(
            name="padchest",
            labels=PADCHEST_LABELS,
            columns=Columns(
                image="ImageID",
                patient="PatientID",
                study="StudyID",
                view=("Projection", "ViewPosition_DICOM"),
                sex="PatientSex_DICOM",
                age="age",
            ),
            format="padchest",
            blank={ALL: "masked"},
        ),
        Task(
            name="vindr",
            labels=VINDR_LABELS,
            columns=Columns(image="image_id", split="split"),
            format="vindr",
            uncertain={ALL: "masked"},
        ),
    )
}
TASKS = COMPETITION | PUBLISHED


def load_task(text: str, of_shards: str = "--shards shards/") -> Task:
    """The built-in task of that name, or the one in a .toml or .json file. UserError for anything else.

    The competition's divisions may be written as A and B, too, as the competition does.
    """
    if text in TASKS or text.lower() in COMPETITION:
        return TASKS[text if text in TASKS else text.lower()]
    path = Path(text)
    if path.suffix not in (".toml", ".json"):
        meant = f" (a shard set says its task: {of_shards}{text})" if os.path.isdir(f"shards/{text}") else ""
        raise UserError(f"--task {text}: no such task{meant}; one of {', '.join(TASKS)}, or a .toml or .json file")
    content = read_bounded(path)
    if path.suffix == ".toml":
        try:
            content = json.dumps(tomllib.loads(content.decode("utf-8"))).encode()
        except (ValueError, TypeError, RecursionError) as error:  # a date in TOML has no JSON
            raise UserError(
                f"{path}: not readable as TOML ({error}); correct it there (text stands in quotes)"
            ) from None
    return Task.from_json(content, path)


def parse_readings(text: str, labels: Iterable[str], flag: str = "") -> dict[str, Reading | float]:
    """`--blank` or `--uncertain` as a task holds it: `masked`, `0.6`, `Edema=zero,Mass=one` or `masked,Edema=zero`.

    A label may hold ',' and '=': the longest of `labels` that the text goes on with, before a '=', is meant; the values
    hold neither. Raises UserError, with `flag` and the text, for an unknown label or value and for one said twice.
    """
    readings: dict[str, Reading | float] = {}
    start = f"{flag} {text}".strip()
    known = sorted(labels, key=len, reverse=True)
    rest = text
    while rest := rest.strip():
        label = next((name for name in known if rest.startswith(f"{name}=")), None)
        item, comma, after = (rest if label is None else rest[len(label) + 1 :]).partition(",")
        if label is None and "=" in item:
            unknown = item.rpartition("=")[0].strip()
            there = nearest(unknown, known) or f"; the labels are {', '.join(known[:NUM_NAMED])}"
            raise UserError(f"{start}: there is no label {unknown!r}{there}")
        key, reading = label or ALL, _reading(item.strip(), start, known)
        if key in readings:
            raise UserError(f"{start}: {'a value for all labels' if key == ALL else repr(key)} is there twice")
        readings[key] = reading
        rest = after
        if comma and not rest.strip():
            break
    if not readings:
        raise UserError(f"{start}: say how to read such a cell: {', '.join(READINGS)} or a number from 0 to 1")
    return readings


def _reading(text: str, start: str, labels: Iterable[str]) -> Reading | float:
    for reading in READINGS:
        if text.lower() == reading:
            return reading
    if re.fullmatch(r"0*(0|1|[01]?\.[0-9]+)", text) and float(text) <= 1:
        return float(text)
    meant = nearest(text, [*READINGS, *labels])
    raise UserError(f"{start}: {text!r} is none of {', '.join(READINGS)} or a number from 0 to 1{meant}")


def nearest(name: str, candidates: Iterable[str]) -> str:
    """`; the nearest is 'X'`, or '' where nothing is close; names are compared `folded`."""
    close = near(name, candidates)
    return f"; the nearest is {close!r}" if close else ""


def near(name: str, candidates: Iterable[str]) -> str:
    """The candidate that `name` was probably meant to be; '' for none."""
    spelt: dict[str, str] = {}
    for candidate in candidates:
        spelt.setdefault(folded(candidate), candidate)
    close = difflib.get_close_matches(folded(name), spelt, n=1, cutoff=0.75)
    return spelt[close[0]] if close else ""


def folded(name: str) -> str:
    """The name without regard to case, and with one space for any spaces, '_' and '-'."""
    return re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFC", name).casefold()).strip()


# Most names, in a third of the time: a public table has 200,000 of them.
PLAIN_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*(?:/[A-Za-z0-9_-][A-Za-z0-9_.-]*)*")


def name_problem(name: str) -> str:
    """Why `name` cannot be an image's name, a relative path below the image folder; '' when it can."""
    if PLAIN_NAME.fullmatch(name):
        return ""
    if not name.strip():
        return "is blank"
    if name.startswith("/") or "\\" in name or any(part in ("", ".", "..") for part in name.split("/")):
        return "must be a relative path inside the image folder"
    if re.search(r"[\x00-\x1f\x7f]", name):
        return "holds a control character"
    if re.search(r"[\ud800-\udfff]", name):
        return "is not valid UTF-8"
    return ""


def _checked_id(text: str) -> str:
    if not text:
        raise ValueError("is blank")
    if len(text) > MAX_ID_CHARACTERS:
        raise ValueError(f"has more than {MAX_ID_CHARACTERS} characters")
    if re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", text):
        raise ValueError("holds a control character")
    if not text.isascii():  # they look like others, so one patient would be two
        if any(character.isdecimal() and not character.isascii() for character in text):
            raise ValueError("holds digits other than 0 to 9; write them so")
        if any(unicodedata.category(character) == "Cf" for character in text):
            raise ValueError("holds an invisible character")
    return text


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value, ensure_ascii=False)
