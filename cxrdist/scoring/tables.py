"""Score tables (one row of probabilities per image) and how they are averaged into one.

A table is a CSV with a JSON beside it that says where it came from. All averaging happens here, in float32: views,
epochs and folds of a member, then members. The published float16 moved EVA-X's by up to 2.4e-4 and made ties.
"""

import csv
import dataclasses
import hashlib
import io
import itertools
import json
from array import array
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cxrdist.documents import Document, read_bounded
from cxrdist.errors import UserError
from cxrdist.files import open_to_read, write_output
from cxrdist.task import TASKS, Task

FORMAT_VERSION = 2
Average = Literal["prob", "logit", "rank"]
Weights = Sequence[float] | None
Probs = NDArray[np.float32]
Real = TypeVar("Real", np.float32, np.float64)
AGAIN = "score again, or delete it to use the table without its origin"


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Document):
    """One set of weights and how it is scored. Equal `sha256` means equal weights."""

    source: str  # for people: runs/eva_x_b@5
    model: str = ""  # an Architecture's name; '' in tables of version 1
    sha256: str  # of all its tensors
    backbone_sha256: str | None  # of the frozen backbone's tensors; None when there is none to share
    weights: Literal["", "ema", "raw"] = ""  # the averaged ones or those of the last step; '' where it is not known
    task: str = ""  # that the weights were trained for; '' where their file does not say it
    trained_on: str = ""  # fingerprint of the shards that they were trained on; '' where it is not known
    from_random: bool = False  # their training is known to have begun from random weights
    image_size: int
    views: dict[str, float]  # distinct canonical views with their shares in the mean
    num_views: int = 0  # views asked for, equal ones included


@dataclass(frozen=True, kw_only=True)
class TableMeta(Document):
    """What made a table; the defaults stand for unknown.

    labels: of the columns, where the task is unknown. shards: fingerprint. unreadable: image name -> reason, of images
    asked for and not scored. asked: images that were to be scored, these included. sha256: of the CSV.
    """

    format_version: int = FORMAT_VERSION
    member: str = "table"
    task: Task | None = None
    labels: tuple[str, ...] = ()
    split: str = ""
    shards: str = ""
    checkpoints: tuple[Checkpoint, ...] = ()
    weight: float = 1.0
    average: Average = "prob"
    precision: str = ""
    device_batch_size: int | None = None
    out_of_fold: bool = False  # no model behind a row was trained on its patient
    unreadable: dict[str, str] = field(default_factory=dict)
    members: dict[str, float] = field(default_factory=dict)  # of an average, with their weights
    study_averaged: bool = False
    asked: int = 0
    sha256: str = ""


def was_seen(meta: TableMeta) -> bool | None:
    """Whether a model behind a table was trained on the very shards that it scored; None where that is not known."""
    trained_on = {item.trained_on for item in meta.checkpoints}
    if meta.out_of_fold:
        return False
    if meta.shards in trained_on - {""}:
        return True
    return False if meta.shards and trained_on and "" not in trained_on else None


def may_be_seen(meta: TableMeta) -> bool:
    """Whether a model behind a table may have been trained on the images: where it is not known, of a split `train`."""
    seen = was_seen(meta)
    return meta.split == "train" if seen is None else seen


@dataclass(frozen=True, eq=False)
class ScoreTable:
    """Probabilities of one member, or of an average.

    image_names: (N,) object array of str, exact text, each once. probs: (N, K) float32 in [0, 1], columns as `labels`.
    """

    image_names: NDArray[np.object_]
    probs: Probs
    meta: TableMeta

    def __post_init__(self) -> None:
        if self.probs.shape != (len(self.image_names), len(self.labels)) or self.probs.dtype != np.float32:
            raise ValueError(f"probs must be ({len(self.image_names)}, {len(self.labels)}) float32")

    @property
    def name(self) -> str:
        return self.meta.member

    @property
    def labels(self) -> tuple[str, ...]:
        return self.meta.labels if self.meta.task is None else self.meta.task.labels

    @property
    def unsaid(self) -> list[str]:
        """What of its origin is not known, so that it could not be compared."""
        meta = self.meta
        said = {
            "task": meta.task,
            "split": meta.split,
            "shards": meta.shards,
            "models": meta.checkpoints or meta.members,
        }
        return [what for what, value in said.items() if not value]

    def without_score(self, image_names: Iterable[str]) -> list[str]:
        """Those of the images that have neither a score nor a reason for having none."""
        known = {*self.image_names, *self.meta.unreadable}
        return [name for name in image_names if name not in known]


def write_table(path: Path, table: ScoreTable) -> None:
    """Write `path` (CSV; every float32 survives the round trip) and then the JSON beside it, each atomically."""
    buffer = io.BytesIO()
    text = io.TextIOWrapper(buffer, encoding="utf-8", newline="")
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("image_name", *table.labels))
    rows.writerows((name, *map(str, probs)) for name, probs in zip(table.image_names, table.probs, strict=True))
    text.flush()
    content = buffer.getvalue()
    write_output(path, content)
    meta = dataclasses.replace(table.meta, sha256=hashlib.sha256(content).hexdigest())
    write_output(path.with_suffix(".json"), meta.to_json())


def read_table(path: Path, task: Task | None = None) -> ScoreTable:
    """The table at `path`. A submission CSV is a table too, and so is one that other software made, without a JSON.

    Args: task: of a table whose JSON is missing or does not say it; compared with the JSON where it does.
    Raises UserError, with file, line and column, for: another task, label columns in another order, a value that is
    not a number in [0, 1], a repeated image, a CSV changed since its JSON was written, another format version.
    """
    side = path.with_suffix(".json")
    meta = read_meta(side) if side.exists() else TableMeta(member=path.stem)
    if task is not None and meta.task is not None and (found := task.differences(meta.task)):
        raise UserError(f"{path} is of another task than --task: {found[0]}; give the tables' own task, or none")
    task = meta.task or task
    try:
        with open_to_read(path) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            rows = csv.reader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""))
            labels = _check_header(path, next(rows, []), task, meta.labels)
            names, probs = _read_probs(path, rows, labels)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        problem = error.strerror if isinstance(error, OSError) else "not a CSV file"
        raise UserError(f"{path}: {problem}; give a score table, e.g. OUT/scores/eva_x.csv") from None
    if len(bad := np.argwhere(~((probs >= 0) & (probs <= 1)))):
        label, value = labels[bad[0, 1]], probs[tuple(bad[0])]
        raise UserError(f"{path}: {names[bad[0, 0]]!r}, {label}: {value} is not a probability in [0, 1]")
    if not meta.sha256:
        print(f"{path}: no JSON beside it says its split, shards and models, so they cannot be compared")
    elif meta.sha256 != digest:
        raise UserError(f"{side}: {path.name} was changed after it was written, its hash is another; {AGAIN}")
    asked = meta.asked or (len(names) + len(meta.unreadable) if meta.sha256 else 0)  # the hash vouches for the rows
    meta = dataclasses.replace(meta, task=task, labels=labels if task is None else (), asked=asked)
    return ScoreTable(names, probs, meta)


def _read_probs(path: Path, rows: Iterator[list[str]], labels: tuple[str, ...]) -> tuple[NDArray[np.object_], Probs]:
    """The names and the numbers of a table's rows after its header."""
    names: dict[str, None] = {}  # in order
    numbers = array("f")
    for line, cells in enumerate(rows, start=2):
        if len(cells) != len(labels) + 1:
            raise UserError(f"{path}, line {line}: {len(cells)} cells instead of {len(labels) + 1}; make it again")
        if cells[0] in names:
            first = list(names).index(cells[0]) + 2
            raise UserError(f"{path}: image {cells[0]!r} is in line {first} and again in line {line}; keep one")
        names[cells[0]] = None
        try:
            numbers.extend(map(float, cells[1:]))
        except ValueError as error:
            cell = str(error).removeprefix("could not convert string to float: ")
            raise UserError(
                f"{path}, line {line}: {cell} is no number; a score table holds numbers in [0, 1]"
            ) from None
    image_names = np.empty(len(names), dtype=object)
    image_names[:] = list(names)
    return image_names, np.array(numbers, np.float32).reshape(len(names), len(labels))


def read_members(
    paths: list[Path], task: Task | None, weights: Weights = None, *, allow_missing: bool = False
) -> tuple[list[ScoreTable], list[float]]:
    """A table for each member in the files, its parts joined, and its weight: `weights`, else as it was scored with.

    Raises UserError as `read_table`, `join_parts` and `shares` do, and for another number of weights than of members.
    """
    tables = join_parts([read_table(path, task) for path in paths], allow_missing=allow_missing)
    if weights is not None and len(weights) != len(tables):
        raise UserError(f"--weights has {len(weights)} numbers for {len(tables)} members; give one per member")
    found = [table.meta.weight for table in tables] if weights is None else list(weights)
    shares(found)
    return tables, found


def shares(weights: Sequence[float]) -> NDArray[np.float64]:
    """The weights, scaled to sum 1. UserError unless all are finite and 0 or more, and their sum positive."""
    found = np.asarray(weights, dtype=np.float64)
    with np.errstate(over="ignore"):
        total = found.sum()
    if not (found >= 0).all() or not 0 < total < np.inf:
        told = ", ".join(f"{weight:g}" for weight in weights)
        raise UserError(f"weights {told}: each must be a number of 0 or more, and one of them positive; use --weights")
    return np.asarray(found / total, dtype=np.float64)


def check_shards(table: ScoreTable, fingerprint: str, source: object) -> None:
    """UserError where the shard set at `source` is known to be another than the one that was scored."""
    if table.meta.shards and table.meta.shards != fingerprint:
        both = f"{table.meta.shards[:12]}... and {fingerprint[:12]}..."
        raise UserError(f"{source} is not the shard set that {table.name!r} was scored on ({both}); give that one")


def task_of(table: ScoreTable, given: Task | None, flag: str = "--task") -> Task:
    """The task by which label CSVs and templates are read: `given`, the table's, or a built-in one of its labels.

    Raises UserError when it is unknown (`flag` names it), or its labels are not the table's.
    """
    task = given or table.meta.task or next((task for task in TASKS.values() if task.labels == table.labels), None)
    if task is None or task.labels != table.labels:
        raise UserError(f"the labels of table {table.name!r} are of no task that is known: name theirs with {flag}")
    return task


def average(probs: Sequence[Probs], weights: Weights = None, how: Average = "prob") -> Probs:
    """The weighted average (N, K) float32 of score arrays of equal shape, summed in the order given.

    prob: of probabilities (published). logit: of their logits, then the sigmoid (a geometric mean of odds).
    rank: of each label's ranks over these N images, scaled into (0, 1): only the order of a member counts.
    Weights are scaled to sum 1; UserError as in `shares`.
    """
    total = np.zeros_like(probs[0])
    for share, table in zip(shares([1.0] * len(probs) if weights is None else weights), probs, strict=True):
        total += np.float32(share) * summand(table, how)
    return np.clip(sigmoid(total) if how == "logit" else total, 0.0, 1.0)


def summand(probs: Probs, how: Average) -> Probs:
    """What `average` takes the mean of: (N, K) probabilities, their logits or their ranks."""
    if how == "logit":
        return logit(probs)
    if how == "rank":  # equal probs share the middle of their places
        return ((pd.DataFrame(probs).rank().to_numpy() - 0.5) / len(probs)).astype(np.float32)
    return probs


def sigmoid(logits: NDArray[np.float32]) -> Probs:
    """1 / (1 + exp(-x)) in float32, without overflow."""
    small = np.exp(-np.abs(logits.astype(np.float32, copy=False)))
    return np.asarray(np.where(logits >= 0, 1 / (1 + small), small / (1 + small)), dtype=np.float32)


def logit(probs: NDArray[Real]) -> NDArray[Real]:
    """log(p / (1 - p)) in the type of `probs`, which are first kept 1e-7 away from 0 and 1."""
    inside = np.clip(probs, 1e-7, 1 - 1e-7)
    return np.asarray(np.log(inside) - np.log1p(-inside), dtype=probs.dtype)


def average_tables(
    tables: Sequence[ScoreTable], weights: Weights = None, how: Average = "prob", *, allow_missing: bool = False
) -> ScoreTable:
    """One table from several over the same images, in the first one's row order.

    Raises UserError as `align` does; nothing is averaged then.
    """
    aligned = align(tables, allow_missing=allow_missing)
    given = [1.0] * len(tables) if weights is None else weights
    members = {table.name: weight for table, weight in zip(tables, given, strict=True)}
    asked = max(table.meta.asked for table in tables)
    meta = _together(tables, TableMeta(member="ensemble", average=how, members=members, asked=asked))
    return ScoreTable(aligned[0].image_names, average([table.probs for table in aligned], given, how), meta)


def with_ensemble(
    tables: list[ScoreTable], weights: list[float], how: Average, *, take_made: bool, allow_missing: bool = False
) -> list[ScoreTable]:
    """The tables over the same images, an ensemble of them first.

    take_made: it may be one of the tables, the one that says it is the average of all others. Raises as `align` does.
    """
    names = {table.name for table in tables}
    made = [table for table in tables if table.meta.members and {*table.meta.members, table.name} == names]
    if len(made) == 1 and take_made:
        return align([*made, *(table for table in tables if table is not made[0])], allow_missing=allow_missing)
    together = average_tables(tables, weights, how, allow_missing=allow_missing)
    return [together, *align(tables, allow_missing=allow_missing)]


def align(tables: Sequence[ScoreTable], *, allow_missing: bool = False) -> list[ScoreTable]:
    """Every table in the first one's row order.

    allow_missing: keep the images that all tables hold, and say how many others there are.
    Raises UserError where they differ in their task, split or shard set, or hold different images.
    """
    if found := _difference(tables):
        raise UserError(f"tables {found[0]!r} and {found[1]!r} differ in {found[2]}; score both with one shard set")
    first, names = tables[0], pd.Index(tables[0].image_names)
    kept = names
    for table in tables[1:]:
        own = pd.Index(table.image_names)
        missing, extra = names.difference(own), own.difference(names)
        if not len(missing) and not len(extra):
            continue
        counts = f"{len(missing):,} missing and {len(extra):,} extra in the second, e.g. {[*missing, *extra][0]!r}"
        told = f"tables {first.name!r} and {table.name!r} hold different images: {counts}"
        if not allow_missing:
            raise UserError(f"{told}; score both on the same images, or --allow-missing takes those in all tables")
        print(f"warning: {told}; only images in all tables are taken")
        kept = kept[kept.isin(own)]
    if not len(kept):
        raise UserError(f"the tables {', '.join(repr(table.name) for table in tables)} have no image in common")
    image_names = np.asarray(kept, dtype=object)
    places = [pd.Index(table.image_names).get_indexer(kept) for table in tables]
    return [ScoreTable(image_names, table.probs[rows], table.meta) for table, rows in zip(tables, places, strict=True)]


def join_parts(tables: Sequence[ScoreTable], *, allow_missing: bool = False) -> list[ScoreTable]:
    """Tables of the same member over disjoint images (its out-of-fold parts) become one; others stay as they are.

    Order: each member where it first appears. allow_missing: parts that do not say their split and shard set, too.
    Raises UserError when parts of a member overlap or differ in their task, split, shard set or kind of weights.
    """
    joined = []
    for name in dict.fromkeys(table.name for table in tables):
        parts = [table for table in tables if table.name == name]
        if len(parts) == 1:
            joined += parts
            continue
        names = np.concatenate([part.image_names for part in parts])
        if len(repeated := names[pd.Series(names).duplicated()]):
            both = f"two tables are named {name!r} and both hold image {repeated[0]!r}"
            raise UserError(f"{both}: name each table once, or score again under other names (infer --member NAME=RUN)")
        if found := _difference(parts) or _difference_of_weights(parts):
            raise UserError(f"two parts of member {name!r} differ in {found[2]}; score all with one shard set")
        unsaid = dict.fromkeys(what for part in parts for what in part.unsaid if what in ("split", "shards"))
        if unsaid and not allow_missing:
            told = f"{len(parts)} tables are named {name!r} and not all say their {' and '.join(unsaid)}"
            remedy = "give their JSON, or other file names, or --allow-missing to go on"
            raise UserError(f"{told}, so nothing says that they are parts of one; {remedy}")
        asked = [part.meta.asked for part in parts]
        behind = {item.sha256: item for part in parts for item in part.meta.checkpoints}
        total = sum(asked) if all(asked) else 0
        meta = dataclasses.replace(parts[0].meta, asked=total, checkpoints=tuple(behind.values()))
        meta = _together(parts, meta)
        joined.append(ScoreTable(names, np.concatenate([part.probs for part in parts]), meta))
    return joined


def _together(tables: Sequence[ScoreTable], meta: TableMeta) -> TableMeta:
    """`meta` with what is equal in all tables, or depends on all. What one table does not say is not known."""
    metas = [table.meta for table in tables]
    task = next((each.task for each in metas if each.task is not None), None)
    return dataclasses.replace(
        meta,
        task=task,
        labels=() if task is not None else tables[0].labels,
        split=metas[0].split if all(each.split for each in metas) else "",
        shards=metas[0].shards if all(each.shards for each in metas) else "",
        out_of_fold=all(each.out_of_fold for each in metas),
        unreadable={name: reason for each in metas for name, reason in each.unreadable.items()},
    )


def _difference(tables: Sequence[ScoreTable]) -> tuple[str, str, str] | None:
    """Two tables' names and what they say differently of themselves; None where nothing is known to differ."""
    by_task = next((table for table in tables if table.meta.task is not None), None)
    for table in tables:
        if by_task is not None and by_task.meta.task is not None and table.meta.task is not None:
            if found := by_task.meta.task.differences(table.meta.task):
                return by_task.name, table.name, "; ".join(found)
        elif table.labels != tables[0].labels:
            pairs = itertools.zip_longest(tables[0].labels, table.labels)
            one, other = next(pair for pair in pairs if pair[0] != pair[1])
            return tables[0].name, table.name, f"their labels ({one!r} and {other!r})"
    for key in ("split", "shards"):
        said: dict[str, str] = {}
        for table in tables:
            if value := getattr(table.meta, key):
                said.setdefault(value, table.name)
        if len(said) > 1:
            (one, first), (other, second) = list(said.items())[:2]
            return first, second, f"{key}: {one} and {other}"
    return None


def _difference_of_weights(parts: Sequence[ScoreTable]) -> tuple[str, str, str] | None:
    kinds = {item.weights for part in parts for item in part.meta.checkpoints if item.weights}
    return (parts[0].name, parts[0].name, "weights: EMA and raw ones") if len(kinds) > 1 else None


def study_ids(patients: Iterable[str], studies: Iterable[str]) -> list[tuple[str, str] | None]:
    """An id per image for `average_studies`; None where the study is not known."""
    return [(patient, study) if study else None for patient, study in zip(patients, studies, strict=True)]


def average_studies(table: ScoreTable, studies: Sequence[Hashable | None]) -> ScoreTable:
    """Give every image of a study the mean probability of the study's images: they carry the same labels.

    Args: studies: (N,) the study of each image. Raises UserError where it is None: not known.
    """
    ids, distinct = pd.factorize(pd.Series(list(studies), dtype=object))
    if len(unknown := table.image_names[ids < 0]):
        raise UserError(f"the study of image {unknown[0]!r} is not known; shard sets and label CSVs say it")
    sums = np.zeros((len(distinct), table.probs.shape[1]), dtype=np.float64)
    np.add.at(sums, ids, table.probs)
    means = (sums / np.bincount(ids)[:, None]).astype(np.float32)
    return ScoreTable(table.image_names, means[ids], dataclasses.replace(table.meta, study_averaged=True))


def _check_header(path: Path, header: list[str], task: Task | None, wanted: tuple[str, ...]) -> tuple[str, ...]:
    """The table's labels, in the task's order; where neither task nor `wanted` is known, a built-in task's counts."""
    labels = tuple(header[1:])
    wanted = wanted if task is None else task.labels
    wanted = wanted or next((task.labels for task in TASKS.values() if set(task.labels) == set(labels)), labels)
    first = ("image_name", "Image_name" if task is None else task.columns.image)
    if not labels or len(labels) != len(wanted) or header[0] not in first or len(set(labels)) < len(labels):
        there = ", ".join(header[:8])[:80] or "none"
        needed = "image_name and the labels, each once"
        raise UserError(f"{path} is not a score table (its columns: {there}; wanted: {needed}); give one of infer's")
    for place, (found, label) in enumerate(zip(labels, wanted, strict=True), start=2):
        if found != label:
            problem = f"column {place} is {found!r} where {label!r} belongs"
            raise UserError(f"{path}: {problem}; put the labels in the task's order, or score again")
    return wanted


def read_meta(path: Path) -> TableMeta:
    """The JSON beside a table, of format version 1, too."""
    try:
        data = json.loads(read_bounded(path))
        if data["format_version"] == 1:
            task = TASKS[data.pop("div")] if "div" in data else None
            data |= {"format_version": FORMAT_VERSION, "task": task and dataclasses.asdict(task)}
            data["members"] = {item["member"]: item["weight"] for item in data.get("members", [])}
        if data["sha256"] and data["format_version"] == FORMAT_VERSION:
            return TableMeta.from_json(json.dumps(data), path)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{error if isinstance(error, UserError) else f'{path} is damaged'}; {AGAIN}") from None
    raise UserError(f"{path}: format version {data['format_version']}, this cxrdist reads {FORMAT_VERSION}; {AGAIN}")
