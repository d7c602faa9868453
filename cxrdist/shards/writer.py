"""Source images -> one split of a shard set: deterministic tars, then the index, then the JSON that makes it count.

A shard holds the rows of a fixed range of the source, so it depends on nothing but these rows: any number of processes
and nodes, and any interruption, give the same bytes. A tar gets its final name only when it is whole and on the disk; a
record in the split's work folder then lets a later run, or another node, take it as it is. The work folder goes when
the split is finished.
"""

import contextlib
import csv
import errno
import fcntl
import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cxrdist.errors import UserError
from cxrdist.files import NO_LOCKS
from cxrdist.labels import LABELS
from cxrdist.shards.convert import JPEG_QUALITY, SIZE_PX, Converted, Mode, convert, convert_in_order
from cxrdist.shards.index import COLUMNS, FORMAT_VERSION, shard_name

# About 100 MB a shard: few files, and an interruption costs at most this many images. The order of training comes from
# the index, so the number does not touch what is learned.
ROWS_PER_SHARD = 1000
TAR_OVERHEAD = 2560  # bytes a sample beside its JPEG: two headers, the JSON, padding
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
    targets: tuple[int, ...] | None = None  # 14 values in the order of LABELS


@dataclass(frozen=True)
class ShardRecord:
    """What is known of a written shard; `inputs` is the hash of all that determines its bytes."""

    inputs: str
    size: int  # bytes of the tar; 0 where every image was left out (then there is no tar)
    sha256: str
    images: list[tuple[int, int, int, str, int]]  # key, offset, length, sha256, channels
    left_out: list[tuple[int, str, str]]  # key, image_name, reason


@dataclass(frozen=True)
class Outcome:
    """What a run did. While other nodes' shards are missing, `complete` is False and the counts are this node's."""

    complete: bool
    num_rows: int
    num_images: int
    left_out: list[tuple[int, str, str]]
    shards_written: int
    shards_reused: int


@dataclass(frozen=True)
class SplitJob:
    """Everything that determines the bytes of a split: the same on every node.

    sources: all rows, in key order. provenance: what the JSON says of where they come from, as is.
    """

    out: Path
    div: str
    split: str
    sources: list[Source]
    mode: Mode
    rows_per_shard: int
    provenance: dict[str, Any]

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
        settings = [FORMAT_VERSION, self.div, self.split, self.mode, self.rows_per_shard]
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
    Raises UserError for: a finished split of other inputs in `out` (unless `overwrite`), another run at work there, too
    little disk beforehand, a disk that fills up on the way (finished shards stay and are reused).
    """
    groups = job.groups()
    inputs = {number: job.inputs_hash(group) for number, group in groups.items()}
    mine = [number for number in groups if number % num_nodes == node_rank]
    with _disk_errors_named(job.out):
        job.out.mkdir(parents=True, exist_ok=True)
        finished = _finished_records(job)
        if finished is not None:
            if _is_sound(job, finished, inputs):
                on_start(0, 0, len(mine))
                return _outcome(list(finished.values()), len(job.sources), written=0, reused=len(mine))
            if {number: record.inputs for number, record in finished.items()} != inputs and not overwrite:
                raise UserError(
                    f"{job.out / (job.split + '.json')}: a finished split made from other images, labels or settings "
                    "is here; give another --out, or --overwrite to replace it"
                )
        _refuse_link(job.work)
        job.work.mkdir(exist_ok=True)
        with _lock(job.work / f"node-{node_rank}.lock", wait=False):
            for number, record in (finished or {}).items():
                _write_record(job, number, record, f"{node_rank}-{num_nodes}")
            if not _is_sound(job, _finished_records(job), inputs):  # another node may have finished it since
                (job.out / f"{job.split}.json").unlink(missing_ok=True)
            for stale in job.work.glob(f"*.{node_rank}-{num_nodes}.tmp"):
                stale.unlink()
            records = {n: record for n, record in _work_records(job, inputs).items() if n in mine}
            todo = [number for number in mine if number not in records]
            convertible = [source for number in todo for source in groups[number] if not source.reason]
            _check_space(job, convertible)
            on_start(len(convertible), len(todo), len(records))
            paths = (source.path for source in convertible)
            with contextlib.closing(convert_in_order(paths, job.mode, workers)) as results:
                for number in todo:
                    suffix = f"{node_rank}-{num_nodes}"
                    record = _write_shard(job, number, groups[number], inputs[number], results, suffix, on_image)
                    _write_record(job, number, record, suffix)
                    records[number] = record
        everything = _finish(job, groups, inputs)
    written, reused = len(todo), len(mine) - len(todo)
    if everything is not None:
        return _outcome(everything, len(job.sources), written=written, reused=reused)
    num_rows = sum(len(groups[number]) for number in mine)
    return _outcome(list(records.values()), num_rows, written=written, reused=reused, complete=False)


def _outcome(records: list[ShardRecord], num_rows: int, *, written: int, reused: int, complete: bool = True) -> Outcome:
    left_out = [entry for record in records for entry in record.left_out]
    return Outcome(complete, num_rows, sum(len(record.images) for record in records), left_out, written, reused)


def _write_shard(
    job: SplitJob,
    number: int,
    group: list[Source],
    inputs: str,
    results: Iterator[Converted | str],
    suffix: str,
    on_image: Callable[[], None],
) -> ShardRecord:
    name = shard_name(job.split, number)
    temporary = job.work / f"{name}.{suffix}.tmp"
    images: list[tuple[int, int, int, str, int]] = []
    left_out: list[tuple[int, str, str]] = []
    hashed, size = hashlib.sha256(), 0
    try:
        with open(temporary, "xb") as file:

            def write(content: bytes) -> None:
                nonlocal size
                file.write(content)
                hashed.update(content)
                size += len(content)

            for source in group:
                converted = source.reason or next(results)
                if not source.reason:
                    on_image()
                if isinstance(converted, str):
                    left_out.append((source.key, source.image_name, converted))
                    continue
                offset = size + tarfile.BLOCKSIZE
                images.append((source.key, offset, len(converted.jpeg), converted.sha256, converted.channels))
                write(_member(f"{source.key:08d}.jpg", converted.jpeg))
                write(_member(f"{source.key:08d}.json", _sample_json(source)))
            write(bytes(2 * tarfile.BLOCKSIZE))
            file.flush()
            os.fsync(file.fileno())
        if not images:
            (job.out / name).unlink(missing_ok=True)
            return ShardRecord(inputs, 0, "", images, left_out)
        os.replace(temporary, job.out / name)
        _sync_folder(job.out)
    finally:
        temporary.unlink(missing_ok=True)
    return ShardRecord(inputs, size, hashed.hexdigest(), images, left_out)


def _member(name: str, content: bytes) -> bytes:
    member = tarfile.TarInfo(name)  # mtime 0, owner 0, mode 644: nothing of this machine or moment
    member.size = len(content)
    return member.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % tarfile.BLOCKSIZE)


def _sample_json(source: Source) -> bytes:
    sample: dict[str, Any] = {
        "image_name": source.image_name,
        "patient": source.patient,
        "study": source.study,
        "view": source.view,
        "sex": source.sex,
        "age": source.age,
    }
    if source.targets is not None:
        sample["labels"] = dict(zip(LABELS, source.targets, strict=True))
    return json.dumps(sample, ensure_ascii=False).encode()


def _write_record(job: SplitJob, number: int, record: ShardRecord, suffix: str) -> None:
    content = json.dumps(asdict(record), ensure_ascii=False).encode()
    name = f"{shard_name(job.split, number)}.json"
    _write_atomically(job.work / name, content, job.work / f"{name}.{suffix}.tmp")


def _write_atomically(path: Path, content: bytes, temporary: Path) -> None:
    temporary.unlink(missing_ok=True)
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _work_records(job: SplitJob, inputs: dict[int, str]) -> dict[int, ShardRecord]:
    """The records whose shard is whole and was made from the same inputs."""
    records = {}
    for number, wanted in inputs.items():
        try:
            fields = json.loads((job.work / f"{shard_name(job.split, number)}.json").read_text(encoding="utf-8"))
            for name in ("images", "left_out"):
                fields[name] = [tuple(entry) for entry in fields[name]]
            record = ShardRecord(**fields)
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if record.inputs == wanted and _is_whole(job, number, record):
            records[number] = record
    return records


def _is_whole(job: SplitJob, number: int, record: ShardRecord) -> bool:
    path = job.out / shard_name(job.split, number)
    try:
        return path.stat().st_size == record.size and not path.is_symlink()
    except OSError:
        return record.size == 0


def _finished_records(job: SplitJob) -> dict[int, ShardRecord] | None:
    """The records of the finished split in `out`, from its JSON and index; None without a sound one."""
    try:
        meta = json.loads((job.out / f"{job.split}.json").read_text(encoding="utf-8"))
        content = (job.out / f"{job.split}.index.csv").read_bytes()
        if hashlib.sha256(content).hexdigest() != meta["index"]["sha256"]:
            return None
        per_shard = int(meta["rows_per_shard"])
        made_from = {int(number): str(value) for number, value in meta["inputs"].items()}
        tars = {shard["name"]: shard for shard in meta["shards"]}
        images: dict[int, list[tuple[int, int, int, str, int]]] = {number: [] for number in made_from}
        for row in csv.DictReader(io.StringIO(content.decode(), newline="")):
            key = int(row["key"])
            entry = (key, int(row["offset"]), int(row["length"]), row["sha256"], int(row["channels"]))
            images[key // per_shard].append(entry)
        left_out: dict[int, list[tuple[int, str, str]]] = {number: [] for number in made_from}
        for entry in meta["left_out"]:
            left_out[entry["key"] // per_shard].append((entry["key"], entry["image_name"], entry["reason"]))
        records = {}
        for number, value in made_from.items():
            tar = tars.get(shard_name(job.split, number), {"bytes": 0, "sha256": ""})
            records[number] = ShardRecord(value, tar["bytes"], tar["sha256"], images[number], left_out[number])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return records


def _is_sound(job: SplitJob, records: dict[int, ShardRecord] | None, inputs: dict[int, str]) -> bool:
    """Whether these are the records of a finished split, made from `inputs`, whose tars are all there."""
    return (
        records is not None
        and {number: record.inputs for number, record in records.items()} == inputs
        and all(_is_whole(job, number, record) for number, record in records.items())
    )


def _finish(job: SplitJob, groups: dict[int, list[Source]], inputs: dict[int, str]) -> list[ShardRecord] | None:
    """Write index and JSON once every node's shards are there; None while some are missing."""
    try:
        with _lock(job.work / "finish.lock", wait=True):
            finished = _finished_records(job)
            if finished is not None and _is_sound(job, finished, inputs):  # by another node, a moment ago
                shutil.rmtree(job.work, ignore_errors=True)
                return list(finished.values())
            records = _work_records(job, inputs)
            if len(records) < len(groups):
                return None
            listed = {shard_name(job.split, number) for number, record in records.items() if record.size}
            for stale in job.out.glob(f"{job.split}-*.tar"):
                if stale.name not in listed:
                    stale.unlink()
            _write_index_and_json(job, groups, records)
            shutil.rmtree(job.work, ignore_errors=True)
            return list(records.values())
    except FileNotFoundError:
        finished = _finished_records(job)
        return None if finished is None else list(finished.values())


def _write_index_and_json(job: SplitJob, groups: dict[int, list[Source]], records: dict[int, ShardRecord]) -> None:
    table = io.StringIO(newline="")
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(COLUMNS)
    for number, record in records.items():
        rows = {source.key: source for source in groups[number]}
        for key, offset, length, sha256, channels in record.images:
            source = rows[key]
            where = (shard_name(job.split, number), offset, length, sha256, channels)
            about = (source.view, source.sex, source.age)
            targets = source.targets if source.targets is not None else ("",) * len(LABELS)
            writer.writerow((f"{key:08d}", source.image_name, source.patient, source.study, *where, *about, *targets))
    index = table.getvalue().encode()
    left_out = [entry for record in records.values() for entry in record.left_out]
    num_images = sum(len(record.images) for record in records.values())
    meta = {
        "format_version": FORMAT_VERSION,
        "div": job.div,
        "split": job.split,
        "counts": {"rows": len(job.sources), "images": num_images, "left_out": len(left_out)},
        "size_px": SIZE_PX,
        "resize": {"mode": job.mode, "filter": "Pillow bilinear", "jpeg_quality": JPEG_QUALITY},
        "labels": list(LABELS),
        "source": job.provenance,
        "rows_per_shard": job.rows_per_shard,
        "shards": [
            {
                "name": shard_name(job.split, number),
                "bytes": record.size,
                "count": len(record.images),
                "sha256": record.sha256,
            }
            for number, record in records.items()
            if record.size
        ],
        "index": {"name": f"{job.split}.index.csv", "bytes": len(index), "sha256": hashlib.sha256(index).hexdigest()},
        "left_out": [{"key": key, "image_name": name, "reason": reason} for key, name, reason in left_out],
        "inputs": {str(number): record.inputs for number, record in records.items()},
    }
    _write_atomically(job.out / f"{job.split}.index.csv", index, job.work / "index.csv.tmp")
    content = json.dumps(meta, indent=1, ensure_ascii=False).encode()
    _write_atomically(job.out / f"{job.split}.json", content, job.work / "split.json.tmp")


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


@contextlib.contextmanager
def _disk_errors_named(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        path = error.filename or out
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(out).free
            raise UserError(
                f"{path}: the disk is full ({free:,} bytes free); finished shards stay: free some space and run the "
                "same command again"
            ) from None
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
            raise UserError(f"{path}: {error.strerror}; give --out a folder that can be written") from None
        raise


@contextlib.contextmanager
def _lock(path: Path, wait: bool) -> Iterator[None]:
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{path.parent.parent}: another cxrdist.preprocess writes this split; wait, or give another --out"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:  # without locks, writing is still atomic
                raise
        yield


def _refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise UserError(f"{path} is a symbolic link; remove it: nothing is written through links")
