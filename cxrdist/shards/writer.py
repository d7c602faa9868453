"""Source images -> one split of a shard set: deterministic tars, then the index, then the JSON that commits the split.

A shard holds the rows of a fixed range of the source, so it depends on nothing but these rows: any number of processes
and nodes, and any interruption, give the same bytes. A tar gets its final name only when it is complete and on the
disk; a record in the split's work folder then lets a later run, or another node, take it as it is. Which node makes
which shard: `cxrdist.shards.board`. The work folder is removed when the split is finished. Only files that a record or
the split's JSON names are ever replaced or removed.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from tqdm import tqdm

from cxrdist import files
from cxrdist.documents import Document
from cxrdist.errors import UserError
from cxrdist.shards import index
from cxrdist.shards.board import Board
from cxrdist.shards.convert import JPEG_QUALITY, Converted, Pixels, convert, convert_in_order
from cxrdist.shards.index import FORMAT_VERSION, LeftOut, shard_name
from cxrdist.task import Task

# About 100 MB a shard: few files, and an interruption costs at most this many images. What is learned is the same.
TAR_OVERHEAD = 2560  # bytes a sample besides its JPEG: two headers, the JSON, padding
REUSED = "  reused: {:,} finished shards; to do: {:,} shards, {:,} images"
PUT_ASIDE = "superseded-"
LOCK = "split.lock"  # of the work folder: held by the node that takes over what is there, or finishes the split
NUM_PROBES = 8  # images converted beforehand to estimate the space needed


@dataclass(frozen=True)
class Source:
    """One row of the source: a file to convert (`path`, `size` in bytes), or the `reason` why it is left out.

    patient, study, view, sex, age: '' where the table does not say them; a DICOM's header may.
    """

    key: int  # row in the source CSV, from 0
    image_name: str
    path: str
    size: int
    reason: str
    patient: str = ""
    study: str = ""
    view: str = ""
    sex: str = ""
    age: str = ""
    targets: tuple[float, ...] | None = None  # in the order of the task's labels; NaN where masked


class Stored(NamedTuple):
    """Where an image lies in its tar, its hashes, and what table, file and header say about it."""

    key: int
    offset: int
    length: int
    sha256: str
    xxh3_64: int
    channels: int
    width: int
    height: int
    orientation: int
    patient: str
    study: str
    view: str
    sex: str
    age: str


@dataclass(frozen=True)
class ShardRecord(Document):
    """What is known of a written shard; `inputs` is the hash of all that determines its bytes."""

    inputs: str
    size: int  # bytes of the tar; 0 where every image was left out (then there is no tar)
    sha256: str
    images: tuple[Stored, ...]
    left_out: tuple[LeftOut, ...]


Records = dict[int, ShardRecord]  # by shard number


@dataclass(frozen=True)
class SplitJob:
    """Everything that determines the bytes of a split: the same on every node.

    sources: all rows, in key order. provenance: what the JSON says of where they come from, as is.
    """

    out: Path
    task: Task
    split: str
    sources: list[Source]
    pixels: Pixels
    rows_per_shard: int
    provenance: dict[str, str | int | None]

    @property
    def work(self) -> Path:
        return self.out / f".{self.split}.work"

    @property
    def json_path(self) -> Path:
        return self.out / f"{self.split}.json"

    @cached_property
    def groups(self) -> dict[int, list[Source]]:
        """Shard number -> its rows."""
        grouped = itertools.groupby(self.sources, lambda source: _shard_of(self, source))
        return {number: list(group) for number, group in grouped}

    @cached_property
    def inputs(self) -> dict[int, str]:
        """Shard number -> SHA-256 over its rows, file sizes and settings (not over where the images lie)."""
        made_with = (dataclasses.asdict(self.task), self.split, dataclasses.asdict(self.pixels), self.rows_per_shard)
        settings = [FORMAT_VERSION, *made_with]
        hashes = {}
        for number, group in self.groups.items():
            rows = [[value for name, value in vars(source).items() if name != "path"] for source in group]
            hashes[number] = hashlib.sha256(json.dumps([settings, rows]).encode()).hexdigest()
        return hashes

    def tar(self, number: int) -> Path:
        return self.out / shard_name(self.split, number)

    def record(self, number: int) -> Path:
        return self.work / f"{shard_name(self.split, number)}.json"


def write_split(
    job: SplitJob,
    *,
    workers: int = 1,
    node_rank: int = 0,
    num_nodes: int = 1,
    overwrite: bool = False,
    show: bool = False,
) -> Records:
    """Write a split together with whatever other nodes do so, reuse the shards already written, and finish the split.

    A node begins with its share, the shards whose number is `node_rank` modulo `num_nodes`, and helps the others after
    it. Only the ranks of nodes at work need to differ; they may come and go. show: print what is reused and who made
    what, and a progress bar over all nodes.
    Returns: all shards of the finished split.
    Raises UserError for: a finished split of other inputs or format version in `out` (unless `overwrite`), another run
    of this rank at work there, too little disk beforehand, a disk that fills up on the way (finished shards stay and
    are reused), a split of which no image can be stored, files under the split's names that no preprocessing recorded.
    """
    index.check_split_name(job.split)
    with files.disk_errors_named(job.out):
        job.out.mkdir(parents=True, exist_ok=True)
        finished = _finished_records(job)
        if _is_sound(job, finished):
            if show:
                print(REUSED.format(len(job.groups), 0, 0))
            return finished
        if not overwrite:
            _refuse_another(job, finished)
        refuse_foreign(job)
        try:
            return _write_together(job, workers, node_rank, num_nodes, show)
        except (UserError, FileNotFoundError):
            # Another node may have finished the split and removed the work folder, at any moment.
            if not _is_sound(job, finished := _finished_records(job)):
                raise
            with contextlib.suppress(UserError, FileNotFoundError):  # there may be nothing left to remove
                _finish(job, node_rank)
            return finished


def _write_together(job: SplitJob, workers: int, node_rank: int, num_nodes: int, show: bool) -> Records:
    job.work.mkdir(exist_ok=True)
    own = reused = 0
    if not _take_over(job):
        own, reused = _make_missing(job, workers, node_rank, num_nodes, show)
    records = _finish(job, node_rank)
    if show and num_nodes > 1:
        others = sum(len(record.images) for record in records.values()) - own - reused
        print(f"  images made by this node: {own:,}; by other nodes: {max(0, others):,}")
    return records


def _make_missing(job: SplitJob, workers: int, node_rank: int, num_nodes: int, show: bool) -> tuple[int, int]:
    """Make shards until none is missing. Returns: images that this node made; those found in finished shards."""
    taken = f"{job.out}: another cxrdist.preprocess writes this split ({{holder}}); wait, or give another --out"
    suffix = f"{node_rank}.tmp"
    with files.lock(job.work / f"node-{node_rank}.lock", wait=False, message=taken):
        for stale in job.work.glob(f"*.{suffix}"):
            stale.unlink()
        counts = {number: sum(not source.reason for source in group) for number, group in job.groups.items()}
        records = {number: job.record(number).name for number in job.groups}
        board = Board(job.work, job.json_path, job.inputs, records, counts)
        reused = {number: len(record.images) for number, record in _work_records(job).items()}
        for number in reused:
            board.add(number)
        todo = [number for number in job.groups if number not in reused]
        convertible = [source for number in todo for source in job.groups[number] if not source.reason]
        _check_space(job, convertible)
        if show and reused:
            print(REUSED.format(len(reused), len(todo), len(convertible)))
        options = {"desc": f"  {job.split}", "unit": " images", "mininterval": 0.1 if sys.stderr.isatty() else 10.0}
        options |= {"total": sum(counts.values()), "initial": board.images_done}
        planned = _planned(job, board, node_rank, num_nodes)
        own = 0
        with (
            tqdm(disable=not (show and convertible), **options) as bar,
            contextlib.closing(convert_in_order(planned, job.pixels, workers)) as results,
        ):
            for number, rows in itertools.groupby(results, lambda result: _shard_of(job, result[0])):
                if (record := _write_shard(job, number, rows, suffix, board, bar)) is not None:
                    _write_record(job, number, record, suffix)
                    own += len(record.images)
                board.finish(number)
                bar.update(board.images_done - bar.n)
    return own, sum(reused.values())


def _write_record(job: SplitJob, number: int, record: ShardRecord, suffix: str) -> None:
    path = job.record(number)
    unfinished = path.with_name(f"{path.name}.{suffix}")  # another node may write the same record at the same time
    try:
        with unfinished.open("xb") as file:  # makes no folder: that of a finished split stays removed
            file.write(record.to_json().encode())
            file.flush()
            os.fsync(file.fileno())
        files.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _planned(job: SplitJob, board: Board, node_rank: int, num_nodes: int) -> Iterator[Source]:
    """The rows of the shards that this node makes; those of a shard end when another node has made it."""
    for number in board.to_make(node_rank, num_nodes):
        for source in job.groups[number]:
            if number in board.done:
                break
            yield source


def _shard_of(job: SplitJob, source: Source) -> int:
    return source.key // job.rows_per_shard


def _take_over(job: SplitJob) -> bool:
    """Make the shards of a split that is written again known to all nodes; whether it is finished meanwhile."""
    with files.lock(job.work / LOCK, wait=True, message=""):
        finished = _finished_records(job)
        if _is_sound(job, finished):
            return True
        for number, record in finished.items():
            if record.inputs == job.inputs.get(number):
                files.write_atomically(job.record(number), record.to_json())
        _put_aside(job)
        return False


def _refuse_another(job: SplitJob, finished: Records) -> None:
    """UserError when the finished split in `out` must not be replaced unasked."""
    version = index.read_fields(job.json_path).get("format_version")
    remedy = "give another --out, or --overwrite to replace it"
    if version not in (None, FORMAT_VERSION):
        raise UserError(f"{job.json_path}: a split of format version {version} is here, of another cxrdist; {remedy}")
    if finished and {number: record.inputs for number, record in finished.items()} != job.inputs:
        raise UserError(f"{job.json_path}: a split made from other images, labels or settings is here; {remedy}")


def refuse_foreign(job: SplitJob) -> None:
    """UserError where `out` holds links or files under the split's names that no preprocessing recorded."""
    if not job.out.exists():
        return
    for path in (job.work, job.json_path):
        files.refuse_links(path)
    with files.disk_errors_named(job.out):
        there = os.listdir(job.out)  # before the records, which another node may write just now
    recorded = _recorded(job)
    foreign = [name for name in sorted(there) if _own(job, name) and name not in recorded]
    if job.json_path.exists() and "format_version" not in index.read_fields(job.json_path):
        foreign = [job.json_path.name]
    if foreign:
        more = f" (and {len(foreign) - 1:,} more)" if len(foreign) > 1 else ""
        raise UserError(
            f"{job.out / foreign[0]}{more}: is named as a file of split {job.split!r}, but no record says that "
            "cxrdist wrote it, or it is damaged; move it away, or give another --out"
        )


def _own(job: SplitJob, name: str) -> bool:
    return re.fullmatch(rf"{job.split}(-\d{{6,}}\.tar|\.index\.(csv|arrow))", name) is not None


def _recorded(job: SplitJob) -> set[str]:
    """Names of the files in `out` that were written, or were about to be: by the split's JSON, those put aside, and
    the records of the work folder. Another node may put a JSON aside or finish: so the work folder is read twice.
    """
    names: set[str] = set()
    for folder, pattern in ((job.work, "*.json"), (job.out, job.json_path.name), (job.work, "*.json")):
        for path in folder.glob(pattern):
            names.add(path.name.removesuffix(".json"))
            if path == job.json_path or path.name.startswith(PUT_ASIDE):
                fields = index.read_fields(path)
                shards = fields.get("shards")
                entries = [*(shards if isinstance(shards, list) else ()), fields.get("index")]
                names |= {str(entry.get("name")) for entry in entries if isinstance(entry, dict)}
                names -= index.adopted_tars(fields)
    return names


def _put_aside(job: SplitJob) -> None:
    """Move the JSON of a split that is written again to the work folder: it says which files are to be removed."""
    with contextlib.suppress(FileNotFoundError):
        digest = hashlib.sha256(job.json_path.read_bytes()).hexdigest()
        job.json_path.rename(job.work / f"{PUT_ASIDE}{digest[:16]}.json")


def _write_shard(
    job: SplitJob,
    number: int,
    rows: Iterator[tuple[Source, Converted | str]],
    suffix: str,
    board: Board,
    bar: "tqdm[NoReturn]",
) -> ShardRecord | None:
    """Write a shard's tar; None as soon as another node has done so."""
    from webdataset import TarWriter  # imports torch (2.5 s), which no worker needs

    path = job.tar(number)
    temporary = job.work / f"{path.name}.{suffix}"
    images: list[Stored] = []
    left_out: list[LeftOut] = []
    num_converted = 0
    try:
        with open(temporary, "x+b") as file:
            # Nothing of this machine or moment: the same rows give the same bytes.
            with TarWriter(file, mtime=0, user="", group="", mode=0o644, encoder=False) as tar:
                for source, converted in rows:
                    board.look()
                    if number in board.done:
                        return None
                    num_converted += not source.reason
                    bar.update(board.images_done + num_converted - bar.n)
                    if isinstance(converted, str):
                        left_out.append(LeftOut(key=source.key, image_name=source.image_name, reason=converted))
                    else:
                        offset = tar.tarstream.offset + tarfile.BLOCKSIZE
                        about = _about(job.task, source, converted.header)
                        sample = {"jpg": converted.jpeg, "json": _sample_json(job.task, source, about)}
                        tar.write({"__key__": f"{source.key:08d}", **sample})
                        found = {n: getattr(converted, n) for n in Stored._fields if hasattr(converted, n)}
                        images.append(Stored(source.key, offset, len(converted.jpeg), **(found | about)))
                    if source is job.groups[number][-1]:
                        break  # to ask for another row is to wait for the next shard's first
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
            file.seek(0)
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if board.is_done(number):
            return None
        if not images:
            path.unlink(missing_ok=True)
            return ShardRecord(job.inputs[number], 0, "", (), tuple(left_out))
        with contextlib.suppress(FileExistsError):  # from here on `path` is known as written here
            job.record(number).touch(exist_ok=False)
        files.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return ShardRecord(job.inputs[number], size, sha256, tuple(images), tuple(left_out))


def _about(task: Task, source: Source, header: dict[str, str]) -> dict[str, str]:
    """What is known of an image, from its table, else its header; else the image is its own patient."""
    about = {name: getattr(source, name) or header.get(name, "") for name in index.ABOUT if name != "image_name"}
    with contextlib.suppress(ValueError):  # what is no id in a header is no id
        return about | {"patient": task.patient(about["patient"])}
    return about | {"patient": source.image_name}


def _sample_json(task: Task, source: Source, about: dict[str, str]) -> bytes:
    sample: dict[str, Any] = {"image_name": source.image_name, **about}
    if source.targets is not None:
        values = [None if value != value else int(value) if value in (0, 1) else value for value in source.targets]
        sample["labels"] = dict(zip(task.labels, values, strict=True))
    return json.dumps(sample, ensure_ascii=False).encode()


def _work_records(job: SplitJob) -> Records:
    """The records whose shard is complete and was made from the same inputs."""
    records = {}
    for number, wanted in job.inputs.items():
        with contextlib.suppress(UserError):  # missing or damaged: this shard is made again
            record = ShardRecord.read(job.record(number))
            if record.inputs == wanted and _is_complete(job, number, record):
                records[number] = record
    return records


def _is_complete(job: SplitJob, number: int, record: ShardRecord) -> bool:
    try:
        return job.tar(number).stat().st_size == record.size and not job.tar(number).is_symlink()
    except OSError:
        return record.size == 0


def _finished_records(job: SplitJob) -> Records:
    """The records of the finished split in `out`, from its JSON and index; none unless intact and of this format."""
    try:
        meta = index.read_meta(job.out, job.split)
        if meta.format_version != FORMAT_VERSION:
            return {}
        rows = index.read_rows(job.out, meta)
        images: dict[int, list[Stored]] = {int(number): [] for number in meta.inputs}
        left_out: dict[int, list[LeftOut]] = {int(number): [] for number in meta.inputs}
        for row in zip(*(rows.column(name).to_pylist() for name in Stored._fields), strict=True):
            images[row[0] // meta.rows_per_shard].append(Stored(*row)._replace(sha256=row[3].hex()))
        for entry in meta.left_out:
            left_out[entry.key // meta.rows_per_shard].append(entry)
        tars = {shard.name: (shard.bytes, shard.sha256) for shard in meta.shards}
        records = {}
        for number, made_from in zip(images, meta.inputs.values(), strict=True):
            tar = tars.get(shard_name(job.split, number), (0, ""))
            records[number] = ShardRecord(made_from, *tar, tuple(images[number]), tuple(left_out[number]))
        return records
    except (ValueError, KeyError, ZeroDivisionError):
        return {}


def _is_sound(job: SplitJob, records: Records) -> bool:
    """Whether these are the records of a finished split, made from the job's inputs, whose tars are all there."""
    same = {number: record.inputs for number, record in records.items()} == job.inputs
    return bool(records) and same and all(_is_complete(job, *item) for item in records.items())


def _finish(job: SplitJob, node_rank: int) -> Records:
    """Write index and JSON, unless another node has, and remove the work folder. Returns the split's records."""
    with files.lock(job.work / LOCK, wait=True, message=""):
        records = _finished_records(job)
        if not _is_sound(job, records):
            records = _work_records(job)
            if missing := [number for number in job.groups if number not in records]:
                what = "was removed or changed while the split was made"
                raise UserError(f"{job.tar(missing[0])}: {what}; run the same command again")
            listed = {job.tar(number).name for number, record in records.items() if record.size}
            for name in _recorded(job) - listed - {f"{job.split}.index.arrow"}:
                if _own(job, name):
                    (job.out / name).unlink(missing_ok=True)
            _refuse_empty(job, records)
            _write_index_and_json(job, records, node_rank)
        shutil.rmtree(job.work, ignore_errors=True)
        return records


def _refuse_empty(job: SplitJob, records: Records) -> None:
    """UserError, with nothing left of the split, when not one image could be stored."""
    if any(record.images for record in records.values()):
        return
    shutil.rmtree(job.work, ignore_errors=True)
    first = next(entry for record in records.values() for entry in record.left_out)
    why = f"{first.image_name}: {first.reason}"
    raise UserError(f"{job.split}: none of {len(job.sources):,} images can be stored; the first is {why}")


def _write_index_and_json(job: SplitJob, records: Records, node_rank: int) -> None:
    numbers = [number for number, record in records.items() if record.size]  # a shard's place here is in the index
    source_of = {source.key: source for source in job.sources}
    rows = [(place, source_of[image.key], image) for place, n in enumerate(numbers) for image in records[n].images]
    columns: dict[str, list[Any]] = {name: [getattr(image, name) for *_, image in rows] for name in Stored._fields}
    columns["image_name"] = [source.image_name for _, source, _ in rows]
    columns["sha256"] = [bytes.fromhex(digest) for digest in columns["sha256"]]
    columns["shard"] = [place for place, *_ in rows]
    targets = None
    if any(source.targets is not None for source in job.sources):
        values = [source.targets for _, source, _ in rows]
        targets = np.array(values, np.float32).reshape(len(rows), job.task.num_labels)
    left_out = tuple(entry for record in records.values() for entry in record.left_out)
    of_tars = [(job.tar(number).name, records[number]) for number in numbers]
    shards = tuple(index.ShardMeta(name=n, bytes=r.size, sha256=r.sha256, count=len(r.images)) for n, r in of_tars)
    inputs = {str(number): record.inputs for number, record in records.items()}
    of = index.set_hash(job.split, inputs)
    content = index.arrow_bytes(index.index_rows(columns, job.task.labels, targets), of)
    name = f"{job.split}.index.arrow"
    meta = index.SplitMeta(
        task=job.task,
        split=job.split,
        counts=index.Counts(rows=len(job.sources), images=len(rows), left_out=len(left_out)),
        size_px=job.pixels.size_px,
        fit=job.pixels.fit,
        resize=index.Resize(mode=job.pixels.mode, filter="Pillow bilinear", jpeg_quality=JPEG_QUALITY),
        source=job.provenance,
        rows_per_shard=job.rows_per_shard,
        shards=shards,
        index=index.FileMeta(name=name, bytes=len(content), sha256=hashlib.sha256(content).hexdigest()),
        left_out=left_out,
        inputs=inputs,
    )
    for path, text in ((job.out / name, content), (job.json_path, meta.to_json())):
        unfinished = job.work / f"{path.name}.{node_rank}.new"  # what a killed process leaves is in the work folder
        files.write_atomically(unfinished, text)
        (job.work / f"{path.name}.json").touch()  # the record, as of a shard
        files.replace(unfinished, path)


def _check_space(job: SplitJob, sources: list[Source]) -> None:
    """UserError when the images to come will not fit on the disk, judged by a few of them."""
    probes = (
        convert(source.path, job.pixels) for source in sources[:: max(1, len(sources) // NUM_PROBES)][:NUM_PROBES]
    )
    sizes = [len(result.jpeg) for result in probes if isinstance(result, Converted)]
    needed = len(sources) * (sum(sizes) // len(sizes) + TAR_OVERHEAD) if sizes else 0
    free = shutil.disk_usage(job.out).free
    if needed > free:
        counts = f"about {needed:,} bytes are needed for {len(sources):,} images, {free:,} are free"
        raise UserError(f"{job.out}: {counts}; free some space or give --out on another disk")
