"""Source images -> one split of a shard set: deterministic tars, then the index, then the JSON that commits the split.

A shard holds the rows of a fixed range of the source, so it depends on nothing but these rows: any number of processes
and nodes, and any interruption, give the same bytes. A tar gets its final name only when it is complete and on the
disk; a record in the split's work folder then lets a later run, or another node, take it as it is. The work folder is
removed when the split is finished.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from cxrdist import files
from cxrdist.documents import Document
from cxrdist.errors import UserError
from cxrdist.shards.convert import JPEG_QUALITY, SIZE_PX, Converted, Mode, convert, convert_in_order
from cxrdist.shards.index import (
    FORMAT_VERSION,
    Counts,
    FileMeta,
    LeftOut,
    Resize,
    ShardMeta,
    SplitMeta,
    arrow_bytes,
    check_split_name,
    found_version,
    index_rows,
    read_meta,
    read_rows,
    shard_name,
)
from cxrdist.task import Task

# About 100 MB a shard: few files, and an interruption costs at most this many images. The order of training comes from
# the index, so the number does not touch what is learned.
ROWS_PER_SHARD = 1000
TAR_OVERHEAD = 2560  # bytes a sample besides its JPEG: two headers, the JSON, padding
NUM_PROBES = 8  # images converted beforehand to estimate the space needed


@dataclass(frozen=True)
class Source:
    """One row of the source: a file to convert (`path`, `size` in bytes), or the `reason` why it is left out."""

    key: int  # row in the source CSV, from 0
    image_name: str
    path: str
    size: int
    reason: str
    patient: str
    study: str
    view: str = ""
    sex: str = ""
    age: str = ""
    targets: tuple[float, ...] | None = None  # in the order of the task's labels; NaN where masked


class Stored(NamedTuple):
    """Where an image lies in its tar, and its hashes."""

    key: int
    offset: int
    length: int
    sha256: str
    xxh3_64: int
    channels: int


@dataclass(frozen=True)
class ShardRecord(Document):
    """What is known of a written shard; `inputs` is the hash of all that determines its bytes."""

    inputs: str
    size: int  # bytes of the tar; 0 where every image was left out (then there is no tar)
    sha256: str
    images: tuple[Stored, ...]
    left_out: tuple[LeftOut, ...]


@dataclass(frozen=True)
class Outcome:
    """What a run did. While other nodes' shards are missing, `complete` is False and the counts are this node's."""

    complete: bool
    num_rows: int
    num_images: int
    left_out: list[LeftOut]
    shards_written: int
    shards_reused: int


@dataclass(frozen=True)
class SplitJob:
    """Everything that determines the bytes of a split: the same on every node.

    sources: all rows, in key order. provenance: what the JSON says of where they come from, as is.
    """

    out: Path
    task: Task
    split: str
    sources: list[Source]
    mode: Mode
    rows_per_shard: int
    provenance: dict[str, str | int | None]

    @property
    def work(self) -> Path:
        return self.out / f".{self.split}.work"

    def groups(self) -> dict[int, list[Source]]:
        """Shard number -> its rows."""
        groups: dict[int, list[Source]] = {}
        for source in self.sources:
            groups.setdefault(source.key // self.rows_per_shard, []).append(source)
        return groups

    def inputs_hash(self, group: list[Source]) -> str:
        """SHA-256 over rows, file sizes and settings of one shard (not over where the images lie)."""
        rows = [
            (s.key, s.image_name, s.size, s.reason, s.patient, s.study, s.view, s.sex, s.age, s.targets) for s in group
        ]
        settings = [FORMAT_VERSION, dataclasses.asdict(self.task), self.split, self.mode, self.rows_per_shard]
        return hashlib.sha256(json.dumps([settings, rows]).encode()).hexdigest()


def write_split(
    job: SplitJob,
    *,
    workers: int = 1,
    node_rank: int = 0,
    num_nodes: int = 1,
    overwrite: bool = False,
    on_start: Callable[[int, int, int], None] = lambda images, shards, reused: None,
    on_image: Callable[[], None] = lambda: None,
) -> Outcome:
    """Write this node's shards of a split, reuse those already written, and finish the split when none is missing.

    Args:
        on_start: called once with: images to convert, shards to write, shards reused.
        on_image: called after each image.
    Raises UserError for: a finished split of other inputs or format version in `out` (unless `overwrite`), another run
    at work there, too little disk beforehand, a disk that fills up on the way (finished shards stay and are reused).
    """
    check_split_name(job.split)
    groups = job.groups()
    inputs = {number: job.inputs_hash(group) for number, group in groups.items()}
    mine = [number for number in groups if number % num_nodes == node_rank]
    with files.disk_errors_named(job.out):
        job.out.mkdir(parents=True, exist_ok=True)
        finished = _finished_records(job)
        if finished is not None and _is_sound(job, finished, inputs):
            on_start(0, 0, len(mine))
            return _outcome(finished, len(job.sources), written=0, reused=len(mine))
        if not overwrite:
            _refuse_another(job, finished, inputs)
        if job.work.is_symlink():
            raise UserError(f"{job.work} is a symbolic link; remove it: nothing is written through links")
        job.work.mkdir(exist_ok=True)
        taken = f"{job.out}: another cxrdist.preprocess writes this split ({{holder}}); wait, or give another --out"
        with files.lock(job.work / f"node-{node_rank}.lock", wait=False, message=taken):
            for number, record in (finished or {}).items():
                _write_record(job, number, record)
            if not _is_sound(job, _finished_records(job), inputs):  # another node may have finished it since
                (job.out / f"{job.split}.json").unlink(missing_ok=True)
            suffix = f"{node_rank}-{num_nodes}"
            for stale in job.work.glob(f"*.{suffix}.tmp"):
                stale.unlink()
            records = {n: record for n, record in _work_records(job, inputs).items() if n in mine}
            todo = [number for number in mine if number not in records]
            convertible = [source for number in todo for source in groups[number] if not source.reason]
            _check_space(job, convertible)
            on_start(len(convertible), len(todo), len(records))
            paths = (source.path for source in convertible)
            with contextlib.closing(convert_in_order(paths, job.mode, workers)) as results:
                for number in todo:
                    write = (job, number, groups[number], inputs[number], results, suffix, on_image)
                    records[number] = _write_shard(*write)
                    _write_record(job, number, records[number])
        everything = _finish(job, groups, inputs)
    written, reused = len(todo), len(mine) - len(todo)
    if everything is not None:
        return _outcome(everything, len(job.sources), written=written, reused=reused)
    num_rows = sum(len(groups[number]) for number in mine)
    return _outcome(records, num_rows, written=written, reused=reused, complete=False)


def _refuse_another(job: SplitJob, finished: dict[int, ShardRecord] | None, inputs: dict[int, str]) -> None:
    """UserError when the finished split in `out` must not be replaced unasked."""
    path = job.out / f"{job.split}.json"
    version = found_version(path)[0]
    if version not in (None, FORMAT_VERSION):
        raise UserError(
            f"{path}: a finished split of format version {version} is here, made by another cxrdist; use it as it is, "
            "give another --out, or --overwrite to replace it"
        )
    if finished is not None and {number: record.inputs for number, record in finished.items()} != inputs:
        raise UserError(
            f"{path}: a finished split made from other images, labels or settings is here; give another --out, or "
            "--overwrite to replace it"
        )


def _outcome(
    records: dict[int, ShardRecord], num_rows: int, *, written: int, reused: int, complete: bool = True
) -> Outcome:
    left_out = [entry for record in records.values() for entry in record.left_out]
    num_images = sum(len(record.images) for record in records.values())
    return Outcome(complete, num_rows, num_images, left_out, written, reused)


class _Hashed:
    """A file that is written from start to end, and its SHA-256."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, content: bytes) -> int:
        self.sha256.update(content)
        return self.file.write(content)


def _write_shard(
    job: SplitJob,
    number: int,
    group: list[Source],
    inputs: str,
    results: Iterator[Converted | str],
    suffix: str,
    on_image: Callable[[], None],
) -> ShardRecord:
    from webdataset import TarWriter  # imports torch (2.5 s), which no worker needs

    name = shard_name(job.split, number)
    temporary = job.work / f"{name}.{suffix}.tmp"
    images: list[Stored] = []
    left_out: list[LeftOut] = []
    try:
        with open(temporary, "xb") as file:
            hashed = _Hashed(file)
            # Nothing of this machine or moment: the same rows give the same bytes.
            with TarWriter(hashed, mtime=0, user="", group="", mode=0o644, encoder=False) as tar:
                for source in group:
                    converted = source.reason or next(results)
                    if not source.reason:
                        on_image()
                    if isinstance(converted, str):
                        left_out.append(LeftOut(key=source.key, image_name=source.image_name, reason=converted))
                        continue
                    offset = tar.tarstream.offset + tarfile.BLOCKSIZE
                    members = {"jpg": converted.jpeg, "json": _sample_json(job.task, source)}
                    tar.write({"__key__": f"{source.key:08d}", **members})
                    hashes = (converted.sha256, converted.xxh3_64)
                    images.append(Stored(source.key, offset, len(converted.jpeg), *hashes, converted.channels))
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        if not images:
            (job.out / name).unlink(missing_ok=True)
            return ShardRecord(inputs, 0, "", (), tuple(left_out))
        files.replace(temporary, job.out / name)
    finally:
        temporary.unlink(missing_ok=True)
    return ShardRecord(inputs, size, hashed.sha256.hexdigest(), tuple(images), tuple(left_out))


def _sample_json(task: Task, source: Source) -> bytes:
    sample: dict[str, Any] = {
        name: getattr(source, name) for name in ("image_name", "patient", "study", "view", "sex", "age")
    }
    if source.targets is not None:
        values = [None if value != value else int(value) if value in (0, 1) else value for value in source.targets]
        sample["labels"] = dict(zip(task.labels, values, strict=True))
    return json.dumps(sample, ensure_ascii=False).encode()


def _write_record(job: SplitJob, number: int, record: ShardRecord) -> None:
    files.write_atomically(job.work / f"{shard_name(job.split, number)}.json", record.to_json())


def _work_records(job: SplitJob, inputs: dict[int, str]) -> dict[int, ShardRecord]:
    """The records whose shard is complete and was made from the same inputs."""
    records = {}
    for number, wanted in inputs.items():
        try:
            record = ShardRecord.read(job.work / f"{shard_name(job.split, number)}.json")
        except UserError:  # missing or damaged: this shard is made again
            continue
        if record.inputs == wanted and _is_complete(job, number, record):
            records[number] = record
    return records


def _is_complete(job: SplitJob, number: int, record: ShardRecord) -> bool:
    path = job.out / shard_name(job.split, number)
    try:
        return path.stat().st_size == record.size and not path.is_symlink()
    except OSError:
        return record.size == 0


def _finished_records(job: SplitJob) -> dict[int, ShardRecord] | None:
    """The records of the finished split in `out`, from its JSON and index; None unless intact and of this format."""
    try:
        meta = read_meta(job.out, job.split)
        if meta.format_version != FORMAT_VERSION:
            return None
        rows = read_rows(job.out, meta)
        images: dict[int, list[Stored]] = {int(number): [] for number in meta.inputs}
        left_out: dict[int, list[LeftOut]] = {int(number): [] for number in meta.inputs}
        for row in zip(*(rows.column(name).to_pylist() for name in Stored._fields), strict=True):
            stored = Stored(*row)
            images[stored.key // meta.rows_per_shard].append(stored._replace(sha256=row[3].hex()))
        for entry in meta.left_out:
            left_out[entry.key // meta.rows_per_shard].append(entry)
        tars = {shard.name: (shard.bytes, shard.sha256) for shard in meta.shards}
        return {
            int(number): ShardRecord(
                made_from,
                *tars.get(shard_name(job.split, int(number)), (0, "")),
                tuple(images[int(number)]),
                tuple(left_out[int(number)]),
            )
            for number, made_from in meta.inputs.items()
        }
    except (ValueError, KeyError, ZeroDivisionError):
        return None


def _is_sound(job: SplitJob, records: dict[int, ShardRecord] | None, inputs: dict[int, str]) -> bool:
    """Whether these are the records of a finished split, made from `inputs`, whose tars are all there."""
    return (
        records is not None
        and {number: record.inputs for number, record in records.items()} == inputs
        and all(_is_complete(job, number, record) for number, record in records.items())
    )


def _finish(job: SplitJob, groups: dict[int, list[Source]], inputs: dict[int, str]) -> dict[int, ShardRecord] | None:
    """Write index and JSON once every node's shards are there; None while some are missing."""
    try:
        with files.lock(job.work / "finish.lock", wait=True, message=""):
            finished = _finished_records(job)
            if finished is not None and _is_sound(job, finished, inputs):  # by another node, a moment ago
                shutil.rmtree(job.work, ignore_errors=True)
                return finished
            records = _work_records(job, inputs)
            if len(records) < len(groups):
                return None
            listed = {shard_name(job.split, number) for number, record in records.items() if record.size}
            own = rf"{job.split}(-\d{{6,}}\.tar|\.index\.csv)|\.{job.split}\..*\.tmp"
            for path in job.out.iterdir():
                if re.fullmatch(own, path.name) and path.name not in listed:
                    path.unlink()
            _write_index_and_json(job, groups, records)
            shutil.rmtree(job.work, ignore_errors=True)
            return records
    except FileNotFoundError:
        return _finished_records(job)


def _write_index_and_json(job: SplitJob, groups: dict[int, list[Source]], records: dict[int, ShardRecord]) -> None:
    rows = [
        (number, source_of[stored.key], stored)
        for number, record in records.items()
        for source_of in [{source.key: source for source in groups[number]}]
        for stored in record.images
    ]
    columns: dict[str, list[Any]] = {
        name: [getattr(source, name) for _, source, _ in rows]
        for name in ("image_name", "patient", "study", "view", "sex", "age")
    }
    columns |= {name: [getattr(stored, name) for *_, stored in rows] for name in Stored._fields}
    columns["sha256"] = [bytes.fromhex(digest) for digest in columns["sha256"]]
    shards = [
        ShardMeta(name=shard_name(job.split, n), bytes=record.size, sha256=record.sha256, count=len(record.images))
        for n, record in records.items()
        if record.size
    ]
    place = {shard.name: place for place, shard in enumerate(shards)}
    columns["shard"] = [place[shard_name(job.split, number)] for number, *_ in rows]
    targets = None
    if any(source.targets is not None for source in job.sources):
        values = [source.targets for _, source, _ in rows]
        targets = np.array(values, np.float32).reshape(len(rows), job.task.num_labels)
    content = arrow_bytes(index_rows(columns, job.task.labels, targets))
    name = f"{job.split}.index.arrow"
    left_out = tuple(entry for record in records.values() for entry in record.left_out)
    meta = SplitMeta(
        task=job.task,
        split=job.split,
        counts=Counts(rows=len(job.sources), images=len(rows), left_out=len(left_out)),
        size_px=SIZE_PX,
        resize=Resize(mode=job.mode, filter="Pillow bilinear", jpeg_quality=JPEG_QUALITY),
        source=job.provenance,
        rows_per_shard=job.rows_per_shard,
        shards=tuple(shards),
        index=FileMeta(name=name, bytes=len(content), sha256=hashlib.sha256(content).hexdigest()),
        left_out=left_out,
        inputs={str(number): record.inputs for number, record in records.items()},
    )
    files.write_atomically(job.out / name, content)
    files.write_atomically(job.out / f"{job.split}.json", meta.to_json())


def _check_space(job: SplitJob, sources: list[Source]) -> None:
    """UserError when the images to come will not fit on the disk, judged by a few of them."""
    if not sources:
        return
    step = max(1, len(sources) // NUM_PROBES)
    sizes = [
        len(result.jpeg)
        for result in (convert(source.path, job.mode) for source in sources[::step][:NUM_PROBES])
        if isinstance(result, Converted)
    ]
    if not sizes:
        return
    needed = len(sources) * (sum(sizes) // len(sizes) + TAR_OVERHEAD)
    free = shutil.disk_usage(job.out).free
    if needed > free:
        raise UserError(
            f"{job.out}: about {needed:,} bytes are needed for {len(sources):,} images, {free:,} are free; free some "
            "space or give --out on another disk"
        )
