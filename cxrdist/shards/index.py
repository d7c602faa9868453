"""The index of a shard set: what every image is called, where its bytes lie and what is known about it.

Tars say nothing about how many samples they should hold, so everything that reads a shard set starts here. The index is
an Arrow file that stays on the disk and is mapped into memory: opening makes no Python object per image, and reads no
text. One process of a node checks it for the others.
"""

import bisect
import contextlib
import dataclasses
import fnmatch
import functools
import hashlib
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from numpy.typing import NDArray
from pydantic import Field

from cxrdist import files
from cxrdist.documents import Document, read_bounded
from cxrdist.errors import UserError
from cxrdist.shards.columns import (
    AGAIN,
    MASKED,
    TEXT,
    Targets,
    Texts,
    check_column,
    pieces,
    seal_of,
    sealed,
)
from cxrdist.shards.convert import Pixels, as_mode
from cxrdist.task import TASKS, Task, near

FORMAT_VERSION = 2
ADOPTED_VERSION = 3  # of tars that others wrote
COLUMNS = {
    "key": pa.int64(),
    "image_name": TEXT,
    "patient": TEXT,
    "study": TEXT,
    "shard": pa.int32(),
    "offset": pa.int64(),
    "length": pa.int64(),
    "sha256": pa.binary(32),
    "xxh3_64": pa.uint64(),
    "channels": pa.uint8(),
    "view": TEXT,
    "sex": TEXT,
    "age": TEXT,
    "width": pa.int32(),
    "height": pa.int32(),
    "orientation": pa.uint8(),
}
ABOUT = tuple(name for name, kind in COLUMNS.items() if kind == TEXT)
USED = ("key", "shard", "offset", "length", "xxh3_64", "channels")  # by training and inference, beside the labels
LABEL = "label:"  # before a label's name: the column of its cells
SPLIT_NAME = r"[A-Za-z0-9][A-Za-z0-9_-]*"
MAKE_AGAIN = "copy the shard again, or delete it and run cxrdist.preprocess again"  # for one that has its old size


Count = Annotated[int, Field(ge=0, lt=2**48)]  # sums of which stay in int64


@dataclass(frozen=True, kw_only=True)
class Counts(Document):
    rows: Count
    images: Count
    left_out: Count


@dataclass(frozen=True, kw_only=True)
class Resize(Document):
    mode: str
    filter: str
    jpeg_quality: int


@dataclass(frozen=True, kw_only=True)
class FileMeta(Document):
    name: str
    bytes: Count
    sha256: str


@dataclass(frozen=True, kw_only=True)
class ShardMeta(FileMeta):
    count: Count


@dataclass(frozen=True, kw_only=True)
class AdoptedTar(ShardMeta):
    """members: SHA-256 of the names, places and sizes of all that is in the tar."""

    members: str


@dataclass(frozen=True, kw_only=True)
class LeftOut(Document):
    key: Count
    image_name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class SplitMeta(Document):
    """A split's JSON, written last: without it the split does not count.

    fit: how an image becomes square; squash ignores the aspect ratio, pad adds black. source: where the rows come from,
    with the hash of the table. inputs: by shard number, the hash of all that determines its bytes.
    """

    format_version: Literal[1, 2, 3] = 2
    task: Task
    split: str
    counts: Counts
    size_px: int
    fit: Literal["squash", "pad"] = "squash"
    resize: Resize
    source: dict[str, str | int | None]
    rows_per_shard: int
    shards: tuple[ShardMeta, ...]
    index: FileMeta
    left_out: tuple[LeftOut, ...]
    inputs: dict[str, str]

    def __post_init__(self) -> None:
        check_split_name(self.split)
        _ = self.pixels  # a size or mode that there is not
        for shard in self.shards:
            if re.fullmatch(self._shard_names, shard.name) is None:
                raise UserError(f"{shard.name!r} is not a shard's file name")
        if self.index.name != f"{self.split}.index.{'csv' if self.format_version == 1 else 'arrow'}":
            raise UserError(f"{self.index.name!r} is not the index's file name")

    @property
    def _shard_names(self) -> str:
        return rf"{self.split}-\d{{6,}}\.tar"

    def tar_folder(self, folder: Path) -> Path:
        """Where the tars of a set whose JSON is in `folder` are."""
        return folder

    def is_extra(self, name: str) -> bool:
        """Whether a tar of this name beside those listed would be of this split, if it were listed."""
        return re.fullmatch(self._shard_names, name) is not None

    @property
    def make_again(self) -> str:
        """The remedy for a damaged tar."""
        return MAKE_AGAIN

    @property
    def stored_as(self) -> str:
        return f"JPEG {self.resize.jpeg_quality}"

    @property
    def as_jpeg(self) -> bool:
        """Whether an image was made square before it was stored, as JPEG, and not as it is read."""
        return True

    @property
    def pixels(self) -> Pixels:
        """How its images were, or are, made square."""
        return Pixels(as_mode(self.resize.mode), self.size_px, self.fit)


@dataclass(frozen=True, kw_only=True)
class AdoptedMeta(SplitMeta):
    """The JSON of a split of tars that others wrote, which hold their images as they came.

    size_px, fit, resize: how an image is made square as it is read. tars: the folder of the tars, '.' for the JSON's
    own. pattern: of the names of all tars there that belong to the set; '' where it was made of chosen ones.
    """

    format_version: Literal[1, 2, 3] = 3
    shards: tuple[AdoptedTar, ...]
    tars: str
    pattern: str

    def __post_init__(self) -> None:
        super().__post_init__()
        if re.search(r"[\x00-\x1f\x7f]", self.tars + self.pattern):
            raise UserError("the folder of the tars, or the pattern of their names, holds a control character")

    @property
    def _shard_names(self) -> str:
        return r"[^/\x00-\x1f\x7f]+\.tar"

    def tar_folder(self, folder: Path) -> Path:
        return folder / self.tars

    def is_extra(self, name: str) -> bool:
        return fnmatch.fnmatchcase(name, self.pattern)

    @property
    def make_again(self) -> str:
        return "copy the tar again, or adopt the set again (cxrdist.preprocess --adopt ... --overwrite)"

    @property
    def stored_as(self) -> str:
        return "as adopted"

    @property
    def as_jpeg(self) -> bool:
        return False


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """One split of a shard set; columns have one entry per image (N of them), in key order.

    keys: (N,) int64, the row of the image in the source CSV, counted from 0; gaps where an image was left out.
    image_names, patients, studies, views, sexes, ages: '' where unknown.
    shard_ids: (N,) int32 into `shards`; offsets, lengths: (N,) int64 bytes of the JPEG in its tar.
    digests: (N, 32) uint8, SHA-256 of the JPEG; checksums: (N,) uint64, its XXH3, or None in a set of version 1.
    channels: (N,) uint8, 1 or 3. widths, heights: (N,) int32 px of the source file; orientations: (N,) uint8, its EXIF
    orientation; 0 where unknown, as in sets of version 1.
    targets: (N, K) in the order of the task's labels, or None for a split without labels.
    The arrays are views of the mapped file. What of it has been used is in the page cache, once for all processes.
    """

    folder: Path
    meta: SplitMeta
    task: Task
    split: str
    shards: tuple[str, ...]
    keys: NDArray[np.int64]  # from here in the order of COLUMNS
    image_names: Texts
    patients: Texts
    studies: Texts
    shard_ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    lengths: NDArray[np.int64]
    digests: NDArray[np.uint8]
    checksums: NDArray[np.uint64] | None
    channels: NDArray[np.uint8]
    views: Texts
    sexes: Texts
    ages: Texts
    widths: NDArray[np.int32]
    heights: NDArray[np.int32]
    orientations: NDArray[np.uint8]
    targets: Targets | None

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def size_px(self) -> int:
        return self.meta.size_px

    def tar(self, number: int) -> Path:
        """The file of a shard."""
        return self.meta.tar_folder(self.folder) / self.shards[number]

    def shard_of(self, row: int) -> int:
        """The number of a row's shard, by the shards' counts: `shard_ids` would be read for it."""
        return bisect.bisect_right(self._ends, row)

    @cached_property
    def _ends(self) -> list[int]:
        return list(itertools.accumulate(shard.count for shard in self.meta.shards))

    @cached_property
    def num_channels(self) -> int:
        """Channels of a batch: 1 when every image of the split has one, else 3."""
        return 1 if all(bool((self.channels[piece] == 1).all()) for piece in pieces(len(self))) else 3

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the index file, which holds every image's hash: identifies the shard set."""
        return self.meta.index.sha256

    @property
    def masked(self) -> bool:
        """Whether any label cell is."""
        return self.targets is not None and self.targets.masked

    @cached_property
    def unique_names(self) -> Texts:
        """`image_names`; UserError where one is there twice."""
        self.check_names()
        return self.image_names

    def check_names(self) -> None:
        """UserError where an image name is there twice."""
        row = self.image_names.first_repeated()
        if row is not None:
            problem = f"row {row:,} ({self.image_names[row]!r}): its image name is there twice"
            raise UserError(f"{self.folder / self.meta.index.name}, {problem}; {AGAIN}")

    def about(self) -> pd.DataFrame:
        """What is known of each image, as a label table says it: text, '' where unknown."""
        columns = self.unique_names, self.patients, self.studies, self.views, self.sexes, self.ages
        cells = {name: c.to_objects() for name, c in zip(ABOUT[1:], columns[1:], strict=True)}
        return pd.DataFrame({"image_name": columns[0].to_list()} | cells, dtype=object)

    @cached_property
    def left_out(self) -> dict[str, str]:
        """Image name -> reason, for every image of the source that is not in the shards."""
        return {entry.image_name: entry.reason for entry in self.meta.left_out}

    def key_text(self, row: int) -> str:
        """The key as its tar members are called: 8 digits, more beyond 10^8."""
        return f"{self.keys[row]:08d}"

    def sha256(self, row: int) -> str:
        return bytes(self.digests[row]).hex()

    def xxh3(self, row: int) -> int | None:
        return None if self.checksums is None else int(self.checksums[row])

    def rows_of(self, names: Iterable[str] | Texts) -> NDArray[np.int64]:
        """The row of each image name, (n,) int64; -1 where the split has no such image."""
        wanted = names if isinstance(names, Texts) else Texts(names)
        found = pc.index_in(wanted.array, value_set=self.unique_names.array)
        return np.asarray(found.fill_null(-1).to_numpy(), np.int64)


def check_split_name(split: str) -> None:
    if re.fullmatch(SPLIT_NAME, split) is None:
        raise UserError(f"split {split!r} is not valid: use letters, digits, '_' and '-'")


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:06d}.tar"


def splits_in(folder: Path) -> list[str]:
    """The splits of which the folder holds any file, `train` first; none in the folder of a run.

    Adopted tars are not a split for their names, nor is a JSON that says nothing of shards.
    """
    if (folder / "recipe.json").is_file():
        return []
    pattern = re.compile(rf"({SPLIT_NAME}?)(-\d{{6,}}\.tar|\.index\.(arrow|csv)|\.json)")
    matches = [match for path in folder.glob("*") if (match := pattern.fullmatch(path.name))]
    found = {match[1] for match in matches if ".index." in match[0]}
    alone = {match[1] for match in matches if match[0].endswith(".json")} - found
    fields = {split: read_fields(folder / f"{split}.json") for split in alone}
    found |= {split for split in alone if not fields[split] or "shards" in fields[split]}  # none: a damaged one
    if tars := {match[0]: match[1] for match in matches if match[1] not in found}:
        adopted = {name for split in found for name in adopted_tars(read_fields(folder / f"{split}.json"))}
        found |= {split for name, split in tars.items() if name not in adopted}
    return sorted(found, key=lambda split: (split != "train", split))


def adopted_tars(fields: dict[str, Any]) -> set[str]:
    """Names of the tars in a split's JSON that others wrote: never to be replaced or removed."""
    shards = fields.get("shards") if fields.get("format_version") == ADOPTED_VERSION else None
    return (
        {str(shard.get("name")) for shard in shards if isinstance(shard, dict)} if isinstance(shards, list) else set()
    )


def absent(folder: Path, command: str = "cxrdist preprocess --task NAME") -> str:
    """What to say of a folder that is no shard set. command: what makes one."""
    if folder.is_file():
        return f"{folder}: is a file; give the folder of a shard set, such as {folder.parent}"
    if (folder / "recipe.json").is_file():
        return f"{folder}: is the folder of a run; give the shard set that it was trained on"
    what = "no shard set here" if folder.is_dir() else "no such folder"
    sets = [str(place) for place in sorted(folder.glob("*")) if place.is_dir() and splits_in(place)]
    if sets:
        return f"{folder}: {what}, but it holds some: give {', '.join(sets[:5])}"
    beside = [place.name for place in folder.parent.glob("*") if place.is_dir() and splits_in(place)]
    if meant := near(folder.name, beside):
        return f"{folder}: {what}; did you mean {folder.parent / meant}?"
    return f"{folder}: {what}; make it with `{command} ...`"


def task_of(folder: Path) -> Task:
    """The task of the shard set in `folder`, from any finished split; UserError where there is none."""
    finished = [split for split in splits_in(folder) if (folder / f"{split}.json").is_file()]
    return read_meta(folder, (finished or ["train"])[0]).task


def read_fields(path: Path) -> dict[str, Any]:
    """The fields of a split's JSON, unchecked; none when nothing is readable."""
    try:
        fields = json.loads(read_bounded(path))
    except (ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def read_meta(folder: Path, split: str, task: Task | None = None) -> SplitMeta:
    """The split's JSON, of version 1, too. Raises UserError when it is missing, damaged, of an unknown format version,
    of another split or, where `task` is given, of another task.
    """
    check_split_name(split)
    path = folder / f"{split}.json"
    command = f"cxrdist preprocess --task {task.name if task else 'NAME'}"
    if not path.is_file() and not splits_in(folder):
        raise UserError(absent(folder, command))
    if not path.is_file():
        there = ", ".join(each for each in splits_in(folder) if (folder / f"{each}.json").is_file()) or "none"
        raise UserError(
            f"{folder} has no split {split!r} ({path.name} is missing; finished: {there}); take another, or make or "
            f"finish it: cxrdist preprocess --out {folder} --split {split} ..."
        )
    fields = read_fields(path)
    version = fields.get("format_version")
    if isinstance(version, int) and version not in (1, FORMAT_VERSION, ADOPTED_VERSION):
        raise UserError(f"{path}: format version {version}, this cxrdist reads 1 to 3; run cxrdist.preprocess again")
    try:
        content = json.dumps(_from_version_1(path, fields)) if version == 1 else read_bounded(path)
        meta = (AdoptedMeta if version == ADOPTED_VERSION else SplitMeta).from_json(content, path)
    except UserError as error:
        raise UserError(f"{error}; the file is damaged: delete it and run cxrdist.preprocess again") from None
    if meta.split != split:
        raise UserError(f"{path} is of split {meta.split!r}; it was renamed, copy the shard set again")
    if task is not None and (differences := task.differences(meta.task)):
        what = f"split {split!r} of another task ({'; '.join(differences)})"
        raise UserError(f"{folder} holds {what}; give the shards of the task that you name with --task")
    return meta


def _from_version_1(path: Path, fields: dict[str, Any]) -> dict[str, Any]:
    task, labels = TASKS.get(str(fields.pop("div", None))), fields.pop("labels", None)
    if task is None or labels != list(task.labels):
        raise UserError(f"{path}: its labels are not those of its task, in order")
    return fields | {"task": dataclasses.asdict(task), "fit": "squash"}


def open_index(
    folder: Path, split: str, task: Task | None = None, *, checked: bool = False, tars: bool = True
) -> ShardIndex:
    """Open one split after checking that its tars are the ones the index was written for, by name and size, and that
    the columns which training uses are as they were written. Text is checked when it is first used. An index without
    hashes of its columns, from before there were any, is read and checked as a whole.

    checked: another process of this machine has just opened the split so; nothing of this is done again.
    tars: whether they are there; not where they are streamed.
    No image is read. Raises UserError, naming the file, what was expected and the remedy, when anything is missing,
    extra, damaged, unfinished or of another task.
    """
    meta = read_meta(folder, split, task)
    if tars and not checked:
        _check_tars(folder, meta)
    path = folder / meta.index.name
    if meta.counts.images == 0:
        raise UserError(f"{folder}: split {split!r} holds no image; see left_out in {split}.json")
    batch, hashes = (read_rows(folder, meta), {}) if meta.format_version == 1 else map_rows(folder, meta)
    if not checked:
        if not hashes and meta.format_version > 1:
            read_rows(folder, meta)
        # By a map of its own, which ends here: what is only checked does not stay in this process.
        _check_columns(path, meta, batch if meta.format_version == 1 else map_rows(folder, meta)[0], hashes)

    def column(name: str) -> Any:
        array = batch.column(name)
        if name in ABOUT:
            return _texts(path, name, array, hashes)
        if name == "sha256":
            return np.frombuffer(array.buffers()[1], np.uint8)[: 32 * len(batch)].reshape(-1, 32)
        return None if name == "xxh3_64" and meta.format_version == 1 else array.to_numpy()

    labels = [LABEL + label for label in meta.task.labels]
    targets = Targets([batch.column(name).to_numpy() for name in labels]) if labels[0] in batch.schema.names else None
    fields = [*map(column, COLUMNS), targets]
    return ShardIndex(folder, meta, meta.task, split, tuple(shard.name for shard in meta.shards), *fields)


def _check_tars(folder: Path, meta: SplitMeta) -> None:
    """UserError for the first tar that differs from `meta` by name or size."""
    folder = meta.tar_folder(folder)
    for shard in meta.shards:
        expected = f"{shard.count:,} images in {shard.bytes:,} bytes"
        try:
            found = (folder / shard.name).stat().st_size
        except OSError as error:
            raise UserError(f"{folder / shard.name}: {error.strerror}; it should hold {expected}; {AGAIN}") from None
        if found != shard.bytes:
            raise UserError(f"{folder / shard.name}: {found:,} bytes instead of {expected}; {AGAIN}")
    listed = {shard.name for shard in meta.shards}
    extra = sorted(path.name for path in folder.glob("*.tar") if meta.is_extra(path.name) and path.name not in listed)
    if extra:
        raise UserError(
            f"{folder / extra[0]} is not of this set of {len(listed)} shards ({len(extra)} extra); remove it"
        )


def index_rows(
    columns: Mapping[str, Any], labels: tuple[str, ...], targets: NDArray[np.float32] | None
) -> pa.RecordBatch:
    """The index as Arrow: `columns` (those of COLUMNS, as lists or arrays) and a column per label.

    targets: (N, K) float32, NaN where masked. A split with no value but 0, 1 and NaN stores them as uint8.
    """
    content, kinds = dict(columns), dict(COLUMNS)
    if targets is not None:
        hard = bool((np.isnan(targets) | (targets == 0) | (targets == 1)).all())
        values = np.where(np.isnan(targets), MASKED, targets).astype(np.uint8) if hard else targets
        for place, label in enumerate(labels):
            kinds[LABEL + label] = pa.uint8() if hard else pa.float32()
            content[LABEL + label] = np.ascontiguousarray(values[:, place])
    fields = [pa.field(name, kind, nullable=False) for name, kind in kinds.items()]
    return pa.record_batch([pa.array(content[field.name], field.type) for field in fields], pa.schema(fields))


def set_hash(split: str, inputs: Mapping[str, str]) -> str:
    """What ties an index to the JSON beside it: SHA-256 (hex) of all that the shards were made from."""
    return hashlib.sha256(json.dumps([split, dict(inputs)]).encode()).hexdigest()


def arrow_bytes(batch: pa.RecordBatch, of: str = "") -> bytes:
    """The index file, with the hashes of its columns. of: the `set_hash` of its set (default: what the batch says);
    where neither is known the file gets no hashes.
    """
    of = of or seal_of(batch)[0]
    batch = sealed(batch, of) if of else batch
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue())


def map_rows(folder: Path, meta: SplitMeta) -> tuple[pa.RecordBatch, Mapping[str, str]]:
    """The index as Arrow, mapped from the disk, of which little more than its end has been read, and the hashes of its
    columns by name; none where the file does not hold them.

    Raises UserError when the file is missing, cannot be an index, is of another set, or its columns or number of rows
    are not what they should be.
    """
    path = folder / meta.index.name
    _open(path).close()
    with _readable(path):
        content = pa.memory_map(str(path)).read_buffer()
        batch = pa.ipc.open_file(content).get_batch(0)
        for column in batch.columns:
            if column.type != TEXT:  # which would be read for it
                column.validate()
        _check_kinds(path, meta, batch)
    of, hashes = seal_of(batch)
    if of and of != set_hash(meta.split, meta.inputs):
        raise UserError(f"{path} is not of the set in {meta.split}.json, which was made from other inputs; {AGAIN}")
    return batch, hashes if hashes.keys() == set(batch.schema.names) else {}


def read_rows(folder: Path, meta: SplitMeta) -> pa.RecordBatch:
    """The index as Arrow, mapped from the disk (version 1: read from CSV), after comparing its hash with the JSON's.

    Raises UserError as `map_rows`, and when any byte of the file is damaged.
    """
    path = folder / meta.index.name
    with _open(path) as file:
        intact = hashlib.file_digest(file, "sha256").hexdigest() == meta.index.sha256
    if not intact:
        raise UserError(f"{path} is damaged: its SHA-256 is not the one in {meta.split}.json; {AGAIN}")
    with _readable(path):
        if meta.format_version == 1:
            batch = _read_csv(pa.memory_map(str(path)).read_buffer(), meta)
            _check_kinds(path, meta, batch)
        else:
            batch = map_rows(folder, meta)[0]
        batch.validate(full=True)
    return batch


def _open(path: Path) -> io.BufferedReader:
    try:
        return files.open_to_read(path)
    except UserError as error:
        raise UserError(f"{error}; {AGAIN}") from None


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """UserError where Arrow cannot read what is in the file."""
    try:
        yield
    except UserError:
        raise
    except (pa.ArrowException, ValueError, OSError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is damaged: not readable as an index ({first}); {AGAIN}") from None


def _check_kinds(path: Path, meta: SplitMeta, batch: pa.RecordBatch) -> None:
    """UserError unless the columns and the number of rows are those of the format, the task and the JSON."""
    found = [(field.name, field.type) for field in batch.schema]  # a name may be no UTF-8: a ValueError
    labels = [LABEL + label for label in meta.task.labels]
    known = [COLUMNS, *(COLUMNS | dict.fromkeys(labels, kind) for kind in (pa.uint8(), pa.float32()))]
    if found not in [list(kinds.items()) for kinds in known] or any(column.null_count for column in batch.columns):
        raise UserError(f"{path}: its columns are not those of the format and task; {AGAIN}")
    if len(batch) != meta.counts.images:
        raise UserError(f"{path}: {len(batch):,} rows, but {meta.counts.images:,} in {meta.split}.json; {AGAIN}")


def _read_csv(content: pa.Buffer, meta: SplitMeta) -> pa.RecordBatch:
    """The index of a set of version 1, in the columns of today; it has labels except in its test split."""
    labels = meta.task.labels if meta.split != "test" else ()
    kinds = COLUMNS | {"shard": TEXT, "sha256": TEXT} | dict.fromkeys(labels, pa.uint8())
    for name in (new := ("xxh3_64", "width", "height", "orientation")):
        del kinds[name]
    table = pyarrow.csv.read_csv(
        pa.BufferReader(content),
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(column_types=kinds, include_columns=list(kinds)),
    )
    columns = {name: table.column(name).combine_chunks() for name in kinds}
    targets = [columns.pop(label).to_numpy(zero_copy_only=False).astype(np.float32) for label in labels]
    columns["shard"] = pc.index_in(columns["shard"], value_set=Texts(shard.name for shard in meta.shards).array)
    columns["sha256"] = [bytes.fromhex(digest) for digest in columns["sha256"].to_pylist()]
    columns |= {name: np.zeros(len(table), np.uint64) for name in new}
    return index_rows(columns, labels, np.stack(targets, axis=1) if labels else None)


def _texts(path: Path, name: str, column: pa.Array, hashes: Mapping[str, str]) -> Texts:
    return Texts(column, functools.partial(check_column, path, name, hashes[name]) if hashes else None)


def _check_columns(path: Path, meta: SplitMeta, batch: pa.RecordBatch, hashes: Mapping[str, str]) -> None:
    """UserError for the first column that training uses and that is damaged, or has a row that cannot be right."""
    labels = [name for name in batch.schema.names if name not in COLUMNS]
    for name in (*USED, *labels) if hashes else ():
        check_column(path, name, hashes[name], batch.column(name))
    counts = np.array([shard.count for shard in meta.shards], np.int64)
    size = np.array([shard.bytes for shard in meta.shards], np.int64)
    last_key, last_shard, found = -1, 0, np.zeros(len(counts), np.int64)
    for piece in pieces(len(batch)):
        key, shard, offset, length, _, channels = (batch.column(name)[piece].to_numpy() for name in USED)
        known = (shard >= 0) & (shard < len(counts))
        end = size[np.where(known, shard, 0)]
        problems = {
            "its key is not larger than the one before": np.diff(key, prepend=last_key) <= 0,
            "its shard is not one of the split": ~known,
            "its shard comes after a later one": np.diff(shard, prepend=np.int32(last_shard)) < 0,
            "its image lies outside its tar": (offset <= 0) | (length <= 0) | (offset > end) | (length > end - offset),
            "its channels are not 1 or 3": (channels != 1) & (channels != 3),
        }
        for problem, bad in problems.items():
            if bad.any():
                row = piece.start + int(bad.argmax())
                name = _texts(path, "image_name", batch.column("image_name"), hashes)[row]
                raise UserError(f"{path}, row {row:,} ({name!r}): {problem}; {AGAIN}")
        found += np.bincount(shard, minlength=len(counts))
        last_key, last_shard = key[-1], shard[-1]
        for column in labels:
            cells = batch.column(column)[piece].to_numpy()
            bad = (cells < 0) | (cells > 1)
            if cells.dtype == np.uint8:
                bad &= cells != MASKED
            if bad.any():
                row = int(bad.argmax())
                told = f"label {column.removeprefix(LABEL)!r}: {cells[row]} is not a label"
                raise UserError(f"{path}, row {piece.start + row:,}, {told}; {AGAIN}")
    if len(wrong := np.flatnonzero(found != counts)):
        what = (
            f"{meta.shards[wrong[0]].name} has {found[wrong[0]]:,} rows, but {counts[wrong[0]]:,} in {meta.split}.json"
        )
        raise UserError(f"{path}: {what}; {AGAIN}")
