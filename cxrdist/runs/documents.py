"""What a run folder says: documents that training writes, and that resume, inference and averaging read.

Version 1 named its task by the division alone; `upgraded` turns its documents into today's.
"""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field

from cxrdist.documents import Document, read_bounded
from cxrdist.errors import UserError
from cxrdist.task import TASKS, Task

FORMAT_VERSION = 2
READABLE = (1, FORMAT_VERSION)
D = TypeVar("D", bound=Document)


@dataclass(frozen=True, kw_only=True)
class StoredImages(Document):
    """How the images of a shard set were made of their files: what a new image needs to be seen as they were.

    jpeg: stored as JPEG before they were read; those of adopted tars were not.
    """

    size_px: int
    fit: Literal["squash", "pad"]
    mode: Literal["exact", "fast"]
    jpeg: bool = True


@dataclass(frozen=True, kw_only=True)
class Facts(Document):
    """The data that a run is trained on: what resume and out-of-fold scoring compare.

    stored: None in runs of versions that did not write it; not compared, the fingerprint depends on it.
    """

    task: str
    split: str
    shards: str  # fingerprint of the shard set
    images: int
    positives: dict[str, int | float]  # by label; a soft label counts as its value, a masked one as nothing
    folds: int | None
    validate_fold: int | None
    valid_shards: str = ""  # fingerprint of the split `valid`, where that is validated on
    stored: StoredImages | None = field(default=None, compare=False)


@dataclass(frozen=True, kw_only=True)
class Frozen(Document):
    """A frozen backbone: the SHA-256 (hex) of its file, and where that was last seen (relative: to the run folder)."""

    sha256: str
    file: str


@dataclass(frozen=True, kw_only=True)
class OwnRecipe(Document):
    """The user's Python file that a recipe was made by, its function, and the SHA-256 (hex) of its bytes."""

    file: str
    function: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class RunDocument(Document):
    """`run.json`: an id drawn at the start, which ties everything written later to this folder, and the data.

    init: the weights that it began with: random, timm, official or the names of files; '' of versions without it.
    """

    format_version: int = FORMAT_VERSION
    id: str
    data: Facts
    init: str = ""
    own_recipe: OwnRecipe | None = None


@dataclass(frozen=True, kw_only=True)
class Environment(Document):
    """Where one session of a run took place."""

    cxrdist: str
    commit: str
    python: str
    packages: dict[str, str]
    device: str
    world_size: int
    device_batch_size: int
    precision: str
    started: str


@dataclass(frozen=True, kw_only=True)
class Sessions(Document):
    """`environment.json`: every session of a run, oldest first."""

    format_version: int = FORMAT_VERSION
    sessions: tuple[Environment, ...] = ()


@dataclass(frozen=True, kw_only=True)
class StepState(Document):
    """`state.json` of a step checkpoint: where the run stood, and on what."""

    format_version: int = FORMAT_VERSION
    epoch: int = 0
    step: int = 0
    global_step: int = 0
    metrics_bytes: int = 0
    world_size: int
    device_batch_size: int
    precision: str
    parts: tuple[str, ...] = ("total", "focal", "bce")  # of the loss, in the order of the stored sums
    data: Facts
    frozen: Frozen | None


@dataclass(frozen=True, kw_only=True)
class EpochMeta(Document):
    """`meta.json` of an epoch checkpoint: what the weights are of. averaged: the checkpoints they are the mean of."""

    format_version: int = FORMAT_VERSION
    epoch: int = 0
    global_step: int = 0
    recipe: str = ""
    model: str = ""
    task: Task
    data: Facts | None = None
    validation: dict[str, float | str | None] | None = None
    frozen: Frozen | None
    averaged: tuple[str, ...] = ()
    weights: Literal["model", "ema"] = "ema"  # of the averaged checkpoints


@dataclass(frozen=True, kw_only=True)
class FileEntry(Document):
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest(Document):
    """`manifest.json`, written last: a checkpoint counts when every file listed is there with its hash."""

    format_version: int = FORMAT_VERSION
    files: dict[Annotated[str, Field(max_length=100)], FileEntry]


def read_versioned(kind: type[D], path: Path) -> D:
    """The document at `path`, of version 1, too; UserError that names the path and what is wrong."""
    content = read_bounded(path)
    try:
        data = json.loads(content)
        version = data.get("format_version", 1) if isinstance(data, dict) else 1
        if version == 1:
            content = json.dumps(upgraded(kind, data), allow_nan=False).encode()
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not the document it should be ({type(error).__name__}: {error})") from None
    if version not in READABLE:
        raise UserError(f"{path}: format version {version!r}, this cxrdist reads {FORMAT_VERSION}")
    return kind.from_json(content, path)


def upgraded(kind: type[Document], data: Any) -> Any:
    """A version-1 document's JSON value in the form of today's `kind`."""
    if kind is Sessions:
        return {"sessions": data}
    if kind is Facts:
        return {("task" if name == "div" else name): value for name, value in data.items()}
    found = {name: value for name, value in data.items() if name not in ("div", "labels")}
    found["format_version"] = FORMAT_VERSION
    if found.get("data") is not None:
        found["data"] = upgraded(Facts, found["data"])
    if kind is EpochMeta:
        task = TASKS[data["div"]]
        if tuple(data.get("labels", task.labels)) != task.labels:
            raise ValueError(f"its outputs are {', '.join(data['labels'])}, not the labels of task {task.name}")
        found["task"] = dataclasses.asdict(task)
        scores = found.get("validation") or {}
        unknown = [name for name, value in scores.items() if isinstance(value, float) and not math.isfinite(value)]
        scores |= dict.fromkeys(unknown)
    return found
