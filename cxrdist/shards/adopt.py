"""WebDataset tars that others wrote -> an index over them, so that they train as our own do; no byte is copied.

First the headers of all tars, the names and the labels: a mistake in the last one must not show hours later. Then each
tar once, through webdataset's own iterator: hashes, and a decode of each image. A record of every tar that is finished
lets a later run take it as it is.
"""

import collections
import dataclasses
import fnmatch
import functools
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import sys
import tarfile
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from cxrdist import files
from cxrdist.documents import Document
from cxrdist.errors import UserError
from cxrdist.shards import index
from cxrdist.shards.convert import AHEAD, Converted, Pixels, convert_bytes
from cxrdist.shards.index import ADOPTED_VERSION, AdoptedMeta, AdoptedTar, LeftOut
from cxrdist.shards.sources import (
    Folder,
    ImageFile,
    Row,
    by_split,
    files_of,
    image_column,
    rows_of_files,
    rows_of_labels,
    rows_of_table,
    sources_of,
)
from cxrdist.shards.tars import Listing, Sample, list_tar
from cxrdist.shards.writer import Source
from cxrdist.tables import Cells, about_columns, label_table
from cxrdist.task import Task

NO_LABEL = "no label: neither a json nor a cls member of its sample says one"
WORK = ".adopt.work"
TO_BE_SCORED = "images to be scored are a split of another name, such as test"


@dataclass(frozen=True)
class Tars:
    """The tars to adopt, all in one folder. pattern: of their names, '' where some of several were chosen."""

    folder: Path
    names: tuple[str, ...]
    pattern: str


class Place(NamedTuple):
    """A sample: number of its tar, position in it, and position among all samples, which is its key."""

    tar: int
    position: int
    key: int


class Seen(NamedTuple):
    """What the bytes of an image in a tar are; `reason`: why it is left out."""

    offset: int
    sha256: str
    xxh3_64: int
    channels: int
    width: int
    height: int
    orientation: int
    reason: str


@dataclass(frozen=True)
class TarRecord(Document):
    """What is known of a tar that was read; inputs: hash of all that it depends on."""

    inputs: str
    sha256: str
    images: tuple[Seen, ...]


@dataclass(frozen=True)
class Adoption:
    """Everything that determines the indexes. sources: by split, in the order of the tars, `path` the member's name."""

    out: Path
    task: Task
    tars: Tars
    listings: tuple[Listing, ...]
    places: dict[str, Place]  # by member's name
    sources: dict[str, list[Source]]
    pixels: Pixels
    provenance: dict[str, str | int | None]

    @property
    def work(self) -> Path:
        return self.out / WORK

    @functools.cached_property
    def wanted(self) -> list[set[int]]:
        """By tar, the offsets of the images of any split."""
        wanted: list[set[int]] = [set() for _ in self.listings]
        for source in itertools.chain.from_iterable(self.sources.values()):
            if not source.reason:
                place = self.places[source.path]
                wanted[place.tar].add(self.image(place).offset)
        return wanted

    @functools.cached_property
    def tar_inputs(self) -> list[str]:
        """By tar, the hash of what its record depends on."""
        settings = [ADOPTED_VERSION, dataclasses.asdict(self.pixels)]
        return [
            _hash([settings, listing.digest, listing.size, sorted(wanted)])
            for listing, wanted in zip(self.listings, self.wanted, strict=True)
        ]

    def inputs(self, split: str) -> dict[str, str]:
        """What the index of a split depends on: each tar, and its rows."""
        rows = [dataclasses.asdict(self.task), *(dataclasses.astuple(source) for source in self.sources[split])]
        return dict(zip(self.tars.names, self.tar_inputs, strict=True)) | {"rows": _hash(rows)}

    def image(self, place: Place) -> Any:
        return self.listings[place.tar].samples[place.position].image

    def record(self, number: int) -> Path:
        return self.work / f"{self.tars.names[number]}.json"


def find_tars(patterns: Sequence[str]) -> Tars:
    """The tars that paths, or patterns of names in a folder, mean: 'DIR/*.tar', DIR, or several files.

    Raises UserError for anything that is no local path (no command is run, nothing fetched), for none or no plain .tar,
    several folders, and links.
    """
    found: dict[Path, str] = {}
    for pattern in patterns:
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", pattern):
            raise UserError(f"--adopt {pattern}: takes local paths only; copy the tars to a folder first")
        path = Path(pattern, "*.tar") if Path(pattern).is_dir() else Path(pattern)
        if not path.parent.is_dir():
            raise UserError(f"--adopt {pattern}: {path.parent} is no folder (a pattern is of names in one folder)")
        names = [name for name in os.listdir(path.parent) if name == path.name or fnmatch.fnmatchcase(name, path.name)]
        if not names:
            raise UserError(f"--adopt {pattern}: no such file; check the path")
        found |= {path.parent / name: path.name for name in names}
    for path in found:
        if not re.fullmatch(r"[^/\x00-\x1f\x7f]+\.tar", path.name) or not files.is_utf8(path.name):
            raise UserError(f"--adopt {path}: not called NAME.tar; name the tars alone, unpacked where compressed")
        if path.is_symlink() or not path.is_file():
            raise UserError(f"--adopt {path}: is a link or no regular file; give the folder that holds the tars")
    folders = {path.parent for path in found}
    if len(folders) > 1:
        raise UserError(f"--adopt: the tars are in {len(folders)} folders ({', '.join(map(str, sorted(folders)[:3]))})")
    folder, chosen = folders.pop(), sorted(path.name for path in found)
    everything = len(chosen) == len([name for name in os.listdir(folder) if fnmatch.fnmatchcase(name, "*.tar")])
    given = set(found.values())
    return Tars(folder, tuple(chosen), given.pop() if len(given) == 1 else "*.tar" if everything else "")


def plan(
    task: Task, out: Path | None, split: str | None, patterns: Sequence[str], table: Path | None, pixels: Pixels
) -> Adoption:
    """Headers, names and labels of all tars; no image is read. out: None for the folder of the tars.

    Raises UserError as `find_tars`, `list_tar` and `read_label_csv` do, for a key that is in two tars, and where
    nothing says the labels of a split to train on.
    """
    index.check_split_name(split or "train")
    tars = find_tars(patterns)
    if table is None and task.format != "table":
        raise UserError(f"--adopt with task {task.name} needs --csv FILE: its published table")
    if out is None and not os.access(tars.folder, os.W_OK | os.X_OK):
        raise UserError(f"{tars.folder}: the index cannot be written beside the tars; give --out DIR")
    if table is None and not task.columns.image:
        task = dataclasses.replace(task, columns=dataclasses.replace(task.columns, image="image_name"))
    wanted = () if table else {*about_columns(task), *task.labels}
    where = f"{tars.folder}/{tars.pattern or tars.names[0]}"
    quiet = len(tars.names) < 2
    bar = tqdm(tars.names, "  headers", unit=" tars", mininterval=_often(), disable=quiet, delay=1)
    listings = tuple(list_tar(tars.folder / name, wanted) for name in bar)
    places = _places(tars, listings)
    _say_what_is_lost(tars, listings)
    images = {name: ImageFile(name, 1, "") for name in places}
    if not images:
        raise UserError(f"{where}: {len(tars.names):,} tars without a .jpg, .jpeg or .png member; give others")
    listed, sources = Folder(images, {}), dict[str, list[Source]]()
    unlabelled: list[tuple[str, str]] = []
    if table is not None:
        if task.format == "table" and not task.columns.image:
            task = dataclasses.replace(
                task, columns=dataclasses.replace(task.columns, image=image_column(table, listed, where))
            )
        rows = rows_of_table(task, split, table)
    else:
        rows, unlabelled = _rows_of_samples(task, split, listed, listings, where)
    found = files_of(rows, listed, where, [table or Path(where)])
    for name, part in by_split(rows, split, [table or where]).items():
        sources[name] = sources_of(task, name, part, found, listed, 0)
    first = split or next(iter(sources))
    sources[first] += [Source(0, name, name, 1, reason) for name, reason in unlabelled]
    unused = len(images) - len({*found.values(), *(name for name, _ in unlabelled)})
    if unused:
        print(f"  images there without a row, not used: {unused:,} (first: {min(images.keys() - set(found.values()))})")
    digest = None if table is None else hashlib.sha256(table.read_bytes()).hexdigest()
    provenance: dict[str, str | int | None] = {"csv": table.name if table else None, "csv_sha256": digest}
    provenance["images_not_in_csv"] = unused
    ordered = {name: _in_order(part, places, listings) for name, part in sources.items()}
    return Adoption(out or tars.folder, task, tars, listings, places, ordered, pixels, provenance)


def _places(tars: Tars, listings: Sequence[Listing]) -> dict[str, Place]:
    """Where each image is, by its member's name. UserError where two tars have a sample of the same key."""
    places, tar_of, key = dict[str, Place](), dict[str, int](), itertools.count()
    for number, listing in enumerate(listings):
        for position, sample in enumerate(listing.samples):
            if tar_of.setdefault(sample.key, number) != number:
                both = f"{tars.names[tar_of[sample.key]]} and {tars.names[number]}"
                raise UserError(f"{tars.folder}: sample {sample.key!r} is in {both}; keep one, or give it another key")
            place = Place(number, position, next(key))
            if sample.image is not None:
                places[sample.image.name] = place
    return places


def _say_what_is_lost(tars: Tars, listings: Sequence[Listing]) -> None:
    """What webdataset and we leave out, counted, with the first by name."""
    without = [sample.key for listing in listings for sample in listing.samples if sample.image is None]
    ignored = [name for listing in listings for name in listing.ignored]
    empty = [name for name, listing in zip(tars.names, listings, strict=True) if not listing.samples]
    for what, names in (
        ("samples without a .jpg, .jpeg or .png member, not used", without),
        ("members without a key, which webdataset does not read", ignored),
        ("tars without a sample", empty),
    ):
        if names:
            print(f"  warning: {what}: {len(names):,} (first: {names[0]!r})")


def _rows_of_samples(
    task: Task, split: str | None, listed: Folder, listings: Sequence[Listing], where: str
) -> tuple[list[Row], list[tuple[str, str]]]:
    """The rows that json and cls members make, and the images, with the reason, of which they say nothing."""
    samples = [sample for listing in listings for sample in listing.samples if sample.image is not None]
    labelled = [sample for sample in samples if not sample.problem and _says_labels(task, sample)]
    if not labelled:
        if split not in (None, "train", "valid"):
            return rows_of_files(task, listed, where), []
        first = next((listing.first for listing in listings if listing.first), {})
        said = f"a json says {', '.join([*first][:20])}" if first else "there is no json or cls member"
        wanted = f"no sample of {where} says a label of {', '.join(task.labels[:5])} ({said})"
        raise UserError(f"{wanted}; give --csv FILE, or the names as --labels A,B; {TO_BE_SCORED}")
    table = [sample.cells | _cells_of_cls(task, sample) for sample in labelled]
    columns = {name for cells in table for name in cells}
    cells = {name: [row.get(name, "") for row in table] for name in columns}
    cells[task.columns.image] = [sample.image.name for sample in labelled if sample.image]
    first = next(listing.first for listing in listings if listing.samples) | dict.fromkeys(cells, "")
    numbers = list(range(1, len(labelled) + 1))
    rows = rows_of_labels(label_table(Cells(Path(where), cells, numbers, first), task), task)
    chosen = {id(sample) for sample in labelled}
    rest = [s for s in samples if id(s) not in chosen]
    return rows, [(sample.image.name, sample.problem or NO_LABEL) for sample in rest if sample.image]


def _says_labels(task: Task, sample: Sample) -> bool:
    return bool(sample.cls.strip()) or any(label in sample.cells for label in task.labels)


def _cells_of_cls(task: Task, sample: Sample) -> dict[str, str]:
    """What a cls member says where the json does not: the place of the one label that is there, or its name; of a task
    of one label its value.
    """
    said = sample.cls.strip()
    if not said or any(label in sample.cells for label in task.labels):
        return {}
    if task.num_labels == 1:
        return {task.labels[0]: said}
    number = int(said) if re.fullmatch(r"[0-9]{1,4}", said) else -1
    label = said if said in task.labels else task.labels[number] if 0 <= number < task.num_labels else None
    if label is None:
        known = f"a number from 0 to {task.num_labels - 1} or one of {', '.join(task.labels[:5])}"
        raise UserError(f"the cls of sample {sample.key!r} says {said[:80]!r}, which is not {known}; see --labels")
    return {name: str(int(name == label)) for name in task.labels}


def _in_order(sources: list[Source], places: dict[str, Place], listings: Sequence[Listing]) -> list[Source]:
    """The rows in the order of the tars, keyed by their samples; rows without an image after them."""
    after = itertools.count(sum(len(listing.samples) for listing in listings))
    keyed = [
        dataclasses.replace(source, key=places[source.path].key if source.path in places else next(after))
        for source in sources
    ]
    return sorted(keyed, key=lambda source: source.key)


def write_indexes(
    adoption: Adoption, *, workers: int, overwrite: bool = False, show: bool = False
) -> dict[str, AdoptedMeta]:
    """Read every tar that has no record yet, and write the index of each split; the splits' JSON.

    Raises UserError for a finished split of other inputs in `out` (unless `overwrite`), files under its names that no
    adoption wrote, a tar that changes while it is read, a split of which no image can be used, and a full disk.
    """
    out, work = adoption.out, adoption.work
    with files.disk_errors_named(out):
        out.mkdir(parents=True, exist_ok=True)
        done = {split: meta for split in adoption.sources if (meta := _finished(adoption, split, overwrite))}
        if len(done) == len(adoption.sources):
            if show:
                print(f"  reused: {len(adoption.tars.names):,} tars, of which the index is there")
            return done
        files.refuse_links(work)
        work.mkdir(exist_ok=True)
        taken = f"{out}: another cxrdist.preprocess adopts tars here ({{holder}}); wait, or give another --out"
        with files.lock(work / "lock", wait=False, message=taken):
            _read_tars(adoption, workers, show)
            metas = {split: done.get(split) or _write_index(adoption, split) for split in adoption.sources}
            shutil.rmtree(work, ignore_errors=True)
    return metas


def _finished(adoption: Adoption, split: str, overwrite: bool) -> AdoptedMeta | None:
    """The split's JSON where it is finished and of these inputs. UserError where something else is under its names."""
    out, remedy = adoption.out, "give another --out, or --overwrite to replace it"
    path = out / f"{split}.json"
    names = (path, out / f"{split}.index.arrow")
    for name in names:
        files.refuse_links(name)
    fields = index.read_fields(path)
    if path.exists() and fields.get("format_version") != ADOPTED_VERSION:
        raise UserError(f"{path}: is there, and not of an adopted set; give another --out, or another --split")
    if not path.exists():
        if names[1].exists() and not (adoption.work / f"{split}.index.arrow.written").exists():
            raise UserError(f"{names[1]}: no JSON says that cxrdist wrote it; move it away, or give another --out")
        return None
    if fields.get("inputs") != adoption.inputs(split):
        if not overwrite:
            raise UserError(f"{path}: a split made from other tars, labels or settings is here; {remedy}")
        return None
    try:
        meta = index.read_meta(out, split)
        index.read_rows(out, meta)
    except UserError:  # damaged: made again
        return None
    return meta if isinstance(meta, AdoptedMeta) else None


def _read_tars(adoption: Adoption, workers: int, show: bool) -> None:
    """A record of every tar in the work folder."""
    todo = [number for number in range(len(adoption.listings)) if _record(adoption, number) is None]
    count = sum(len(adoption.wanted[number]) for number in todo)
    if show and len(todo) < len(adoption.listings):
        reused = len(adoption.listings) - len(todo)
        print(f"  reused: {reused:,} tars that were read; to do: {len(todo):,} tars, {count:,} images")
    pool = ThreadPoolExecutor(workers, "adopt")
    try:
        with tqdm(total=count, desc="  reading", unit=" images", mininterval=_often(), disable=not show) as bar:
            for number in todo:
                record = _read_tar(adoption, number, pool, AHEAD * workers, bar)
                files.write_atomically(adoption.record(number), record.to_json())
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _record(adoption: Adoption, number: int) -> TarRecord | None:
    try:
        record = TarRecord.read(adoption.record(number))
    except UserError:  # missing or damaged: the tar is read again
        return None
    return record if record.inputs == adoption.tar_inputs[number] else None


class _Hashed(io.RawIOBase):
    """A file that is read from begin to end, with the SHA-256 of what was read."""

    def __init__(self, file: io.BufferedReader) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(size)
        self.digest.update(data)
        return data


def _read_tar(adoption: Adoption, number: int, pool: ThreadPoolExecutor, most: int, bar: "tqdm[Any]") -> TarRecord:
    """A tar, once, as webdataset yields it: each image that is wanted is hashed and decoded, in threads."""
    path, wanted = adoption.tars.folder / adoption.tars.names[number], adoption.wanted[number]
    waiting, seen = collections.deque[tuple[int, Future[Converted | str]]](), list[Seen]()

    def finish(left: int) -> None:
        while len(waiting) > left:
            offset, future = waiting.popleft()
            seen.append(_seen(offset, future.result()))
            bar.update()

    with files.open_to_read(path) as file:
        hashed = _Hashed(file)
        for sample, data in _yielded(path, hashed, adoption.listings[number]):
            if sample.image is not None and sample.image.offset in wanted:
                waiting.append((sample.image.offset, pool.submit(_examine, data, adoption.pixels)))
                finish(most)
        finish(0)
        while hashed.read(1 << 20):
            pass
    return TarRecord(adoption.tar_inputs[number], hashed.digest.hexdigest(), tuple(seen))


def _yielded(path: Path, stream: _Hashed, listing: Listing) -> Iterator[tuple[Sample, bytes]]:
    """What webdataset's iterator yields of an open tar, beside what its headers said. UserError where they differ."""
    from webdataset.tariterators import group_by_keys, tar_file_expander  # imports torch

    changed = f"{path}: is not what it was a moment ago; run again when nothing writes to it"
    try:
        found = group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}]))
        for sample, fields in itertools.zip_longest(listing.samples, found):
            if sample is None or fields is None or fields["__key__"] != sample.key:
                raise UserError(changed)
            data = fields.get(sample.suffix, b"")
            if sample.image is not None and len(data) != sample.image.length:
                raise UserError(changed)
            yield sample, data
    except tarfile.TarError:
        raise UserError(changed) from None


def _examine(data: bytes, pixels: Pixels) -> Converted | str:
    """The hashes and size of an image, or why it cannot be used; its pixels are not kept."""
    found = convert_bytes(data, pixels, keep=True)
    return found if isinstance(found, str) else dataclasses.replace(found, jpeg=b"")


def _seen(offset: int, found: Converted | str) -> Seen:
    if isinstance(found, str):
        return Seen(offset, "", 0, 0, 0, 0, 0, found)
    size = (found.width, found.height, found.orientation)
    return Seen(offset, found.sha256, found.xxh3_64, found.channels, *size, "")


def _write_index(adoption: Adoption, split: str) -> AdoptedMeta:
    """The index of a split, then its JSON, which makes it count."""
    columns: dict[str, list[Any]] = {name: [] for name in index.COLUMNS}
    targets, left_out, tars = list[Any](), list[LeftOut](), list[AdoptedTar]()
    by_tar = itertools.groupby(
        adoption.sources[split],
        lambda source: adoption.places[source.path].tar if source.path in adoption.places else len(adoption.listings),
    )
    of_tar = {number: list(group) for number, group in by_tar}
    for number, listing in enumerate(adoption.listings):
        record, before = _record(adoption, number), len(columns["key"])
        assert record is not None
        seen = {image.offset: image for image in record.images}
        for source in of_tar.get(number, ()):
            image = adoption.image(adoption.places[source.path])
            found = seen.get(image.offset)
            if reason := source.reason or (found.reason if found else ""):
                left_out.append(LeftOut(key=source.key, image_name=source.image_name, reason=reason))
                continue
            assert found is not None
            about = {name: getattr(source, name) for name in index.ABOUT}
            row = found._asdict() | about | image._asdict() | {"key": source.key, "shard": number}
            row |= {"sha256": bytes.fromhex(found.sha256), "patient": source.patient or source.image_name}
            for name, column in columns.items():
                column.append(row[name])
            targets.append(source.targets)
        count = len(columns["key"]) - before
        shard = {"name": adoption.tars.names[number], "bytes": listing.size, "sha256": record.sha256, "count": count}
        tars.append(AdoptedTar(**shard, members=listing.digest))  # type: ignore[arg-type]
    for source in of_tar.get(len(adoption.listings), ()):
        left_out.append(LeftOut(key=source.key, image_name=source.image_name, reason=source.reason))
    if not targets:
        why = f"the first is {left_out[0].image_name}: {left_out[0].reason}"
        raise UserError(f"{split}: none of {len(left_out):,} images can be used; {why}")
    values = None if targets[0] is None else np.array(targets, np.float32)
    of = index.set_hash(split, adoption.inputs(split))
    content = index.arrow_bytes(index.index_rows(columns, adoption.task.labels, values), of)
    meta = _meta(adoption, split, content, tuple(tars), tuple(left_out), len(targets))
    (adoption.work / f"{meta.index.name}.written").touch()
    files.write_atomically(adoption.out / meta.index.name, content)
    files.write_atomically(adoption.out / f"{split}.json", meta.to_json())
    return meta


def _meta(
    adoption: Adoption,
    split: str,
    content: bytes,
    tars: tuple[AdoptedTar, ...],
    left_out: tuple[LeftOut, ...],
    num_images: int,
) -> AdoptedMeta:
    pixels, folder = adoption.pixels, Path(os.path.realpath(adoption.tars.folder))
    beside = folder == Path(os.path.realpath(adoption.out))
    digest = hashlib.sha256(content).hexdigest()
    return AdoptedMeta(
        task=adoption.task,
        split=split,
        counts=index.Counts(rows=num_images + len(left_out), images=num_images, left_out=len(left_out)),
        size_px=pixels.size_px,
        fit=pixels.fit,
        resize=index.Resize(mode=pixels.mode, filter="Pillow bilinear, as it is read", jpeg_quality=0),
        source=adoption.provenance,
        rows_per_shard=0,
        shards=tars,
        index=index.FileMeta(name=f"{split}.index.arrow", bytes=len(content), sha256=digest),
        left_out=left_out,
        inputs=adoption.inputs(split),
        tars="." if beside else str(folder),
        pattern=adoption.tars.pattern,
    )


def _hash(content: Collection[Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _often() -> float:
    return 0.1 if sys.stderr.isatty() else 10.0
