"""What is predicted, and from which table: a `Task`. No other module knows a label, a count of labels or a division.

A task travels with the data: shard set -> run -> checkpoint -> score table -> submission, and is compared there. The
competition's two divisions are built in as tasks `a` and `b` (Grand X-Ray Slam); others come from a TOML or JSON file.
"""

import dataclasses
import json
import re
import tomllib
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cxrdist.documents import Document, read_bounded
from cxrdist.errors import UserError

Reading = Literal["error", "zero", "one", "masked"]
ALL = "*"  # in `blank` and `uncertain`: every label that is not named
MAX_LABELS = 1000
MAX_ID_CHARACTERS = 128


@dataclass(frozen=True, kw_only=True)
class Columns(Document):
    """What the label CSV calls its columns; '' where it has none. Of `view` the first that is not blank counts."""

    image: str = "Image_name"
    patient: str = ""
    study: str = ""
    view: tuple[str, ...] = ()
    sex: str = ""
    age: str = ""


@dataclass(frozen=True, kw_only=True)
class Task(Document):
    """Labels, columns and rules of one table. Raises UserError for values that are not valid.

    labels: in the order of every table and model output. metric: what a model is judged by.
    names: what an image's name says where no column does: `patient_study_image`, as in the competition, whose patients
        are at most 8 digits and whose studies are at least 3, or nothing ('').
    blank, uncertain: how an empty cell and a -1 are read, by label; `*` is every other label. `uncertain` may be a
        number in [0, 1].
    unreadable: images known to be bad; they are left out by name.
    """

    name: str
    labels: tuple[str, ...]
    metric: Literal["macro_auroc"] = "macro_auroc"
    columns: Columns = Columns()
    names: Literal["", "patient_study_image"] = ""
    blank: dict[str, Reading] = field(default_factory=lambda: dict[str, Reading]({ALL: "error"}))
    uncertain: dict[str, Reading | float] = field(default_factory=lambda: dict[str, Reading | float]({ALL: "error"}))
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
                raise UserError(f"task {self.name}: label {label!r} is there twice")
            seen.add(label)
        for kind, readings in (("blank", self.blank), ("uncertain", self.uncertain)):
            for label, reading in readings.items():
                if label != ALL and label not in seen:
                    raise UserError(f"task {self.name}: {kind} names {label!r}, which is not one of its labels")
                if isinstance(reading, float) and not 0.0 <= reading <= 1.0:
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

    def with_readings(self, blank: Reading | None, uncertain: Reading | float | None) -> "Task":
        """The task with all blank or uncertain cells read in one way; None leaves the task's own."""
        return dataclasses.replace(
            self,
            blank=self.blank if blank is None else {ALL: blank},
            uncertain=self.uncertain if uncertain is None else {ALL: uncertain},
        )

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
        if self.names != "patient_study_image":
            return None
        match = re.match(r"([0-9]{1,8})_([0-9]+)_[0-9]+\.", image_name.rpartition("/")[2])
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
TASKS = {
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


def load_task(text: str) -> Task:
    """The built-in task of that name, or the one in a .toml or .json file. UserError for anything else."""
    if text in TASKS:
        return TASKS[text]
    path = Path(text)
    if path.suffix not in (".toml", ".json"):
        raise UserError(f"--task {text}: no such task; one of {', '.join(TASKS)}, or a .toml or .json file")
    content = read_bounded(path)
    if path.suffix == ".toml":
        try:
            content = json.dumps(tomllib.loads(content.decode("utf-8"))).encode()
        except (ValueError, TypeError, RecursionError) as error:  # a date in TOML has no JSON
            raise UserError(f"{path}: not readable as TOML ({error})") from None
    return Task.from_json(content, path)


def name_problem(name: str) -> str:
    """Why `name` cannot be an image's name, a relative path below the image folder; '' when it can."""
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
    return text


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value, ensure_ascii=False)
