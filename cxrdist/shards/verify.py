"""A shard set against its index: sizes, then every tar header, then every hash."""

import csv
import hashlib
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import numpy as np

from cxrdist.errors import UserError
from cxrdist.shards.columns import MASKED
from cxrdist.shards.index import COLUMNS, LABEL, AdoptedMeta, ShardIndex, open_index, read_rows
from cxrdist.shards.tars import list_tar
from cxrdist.task import Task

if TYPE_CHECKING:
    from cxrdist.distributed.ranks import Ranks  # imports torch

ROWS_AT_ONCE = 4096  # of a printed table, whose size then does not matter


def verify(
    folder: Path,
    split: str,
    task: Task | None = None,
    hashes: bool = False,
    progress: Callable[[range], Iterable[int]] = iter,
) -> ShardIndex:
    """The index of one split, checked; UserError names the first shard, and the key, that is not what it says.

    Without `hashes`: every byte of the index, tar names and sizes, and every tar header (no image is read). With: also
    the SHA-256 of every image and tar. `progress` may wrap the range of shards in a progress bar.
    """
    index = open_index(folder, split, task)
    read_rows(folder, index.meta)
    index.check_names()
    for number in progress(range(len(index.shards))):
        _check_readable_shard(index, number, hashes)
    return index


def open_together(
    ranks: "Ranks", folder: Path, split: str, task: Task | None = None, *, tars: bool = True
) -> ShardIndex:
    """`open_index` on every rank, where one process of each node reads and checks for the others, then `check_headers`.
    Collective: a UserError on one rank ends all. tars: whether they are there; a streamed one's hash is compared as it
    comes.
    """
    index = None
    for checks in (True, False):
        with ranks.agree(f"opening {folder}"):
            if (ranks.local_rank == 0) == checks:
                index = open_index(folder, split, task, checked=not checks, tars=tars)
    assert index is not None
    with ranks.agree(f"checking {folder}"):
        if tars:
            check_headers(index, ranks.rank, ranks.world_size)
    return index


def check_headers(index: ShardIndex, rank: int, world_size: int) -> None:
    """Every header of this rank's share of the tars; UserError as of `verify`.

    A header is checked in 80 us: 10 million on one rank would take 13 minutes.
    """
    for number in range(rank, len(index.shards), world_size):
        _check_readable_shard(index, number, hashes=False)


def write_table(index: ShardIndex, file: TextIO) -> None:
    """The index as CSV, a row per image: the columns of the format, then the labels, blank where masked."""
    batch = read_rows(index.folder, index.meta)
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(name.removeprefix(LABEL) for name in batch.schema.names)
    for start in range(0, len(batch), ROWS_AT_ONCE):
        columns = batch.slice(start, ROWS_AT_ONCE).to_pydict()
        columns["key"] = [f"{key:08d}" for key in columns["key"]]
        columns["shard"] = [index.shards[number] for number in columns["shard"]]
        columns["sha256"] = [digest.hex() for digest in columns["sha256"]]
        if index.checksums is None:
            columns["xxh3_64"] = [""] * len(columns["key"])
        for name in columns.keys() - COLUMNS.keys():
            columns[name] = ["" if cell == MASKED or cell != cell else cell for cell in columns[name]]
        writer.writerows(zip(*columns.values(), strict=True))


def _check_readable_shard(index: ShardIndex, number: int, hashes: bool) -> None:
    try:
        _check_shard(index, number, hashes)
    except OSError as error:
        what = f"cannot be read ({error.strerror}); {index.meta.make_again}"
        raise UserError(f"{index.tar(number)}: {what}") from None


def _check_adopted(index: ShardIndex, number: int, hashes: bool, damaged: Callable[[str], UserError]) -> None:
    """An adopted tar holds what it held: every member by name, place and size, with `hashes` every byte."""
    meta, path = index.meta, index.tar(number)
    assert isinstance(meta, AdoptedMeta)
    listing = list_tar(path)
    images = {sample.image.offset: sample.image for sample in listing.samples if sample.image is not None}
    with path.open("rb") as file:
        for row in range(*np.searchsorted(index.shard_ids, (number, number + 1)).tolist()):
            about = f"{index.key_text(row)} ({index.image_names[row]})"
            image = images.get(int(index.offsets[row]))
            if image is None or image.length != index.lengths[row]:
                raise damaged(f"key {about} is not where the index says")
            if hashes:
                file.seek(image.offset)
                if hashlib.sha256(file.read(image.length)).hexdigest() != index.sha256(row):
                    raise damaged(f"the bytes of key {about} do not have their SHA-256")
        if listing.digest != meta.shards[number].members:
            raise damaged("its members are not those that were adopted, by name, place and size")
        if hashes:
            file.seek(0)
            if hashlib.file_digest(file, "sha256").hexdigest() != meta.shards[number].sha256:
                raise damaged("its SHA-256 is not the recorded one, though every image's is")


def _check_shard(index: ShardIndex, number: int, hashes: bool) -> None:
    path = index.tar(number)

    def damaged(what: str) -> UserError:
        return UserError(f"{path}: damaged: {what}; {index.meta.make_again}")

    with path.open("rb") as file:
        if isinstance(index.meta, AdoptedMeta):
            _check_adopted(index, number, hashes, damaged)
            return
        position = 0
        for row in range(*np.searchsorted(index.shard_ids, (number, number + 1)).tolist()):
            key = index.key_text(row)
            for name in (f"{key}.jpg", f"{key}.json"):
                file.seek(position)
                try:
                    member = tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "strict")
                except (tarfile.HeaderError, UnicodeError) as error:
                    raise damaged(f"{name} should be at byte {position:,} ({error})") from None
                if member.name != name or not member.isreg():
                    raise damaged(f"member {member.name!r} at byte {position:,} instead of {name}")
                position += tarfile.BLOCKSIZE
                if name.endswith(".jpg"):
                    if (position, member.size) != (index.offsets[row], index.lengths[row]):
                        raise damaged(f"{name} is not where the index says")
                    if hashes and hashlib.sha256(file.read(member.size)).hexdigest() != index.sha256(row):
                        raise damaged(f"the bytes of key {key} ({index.image_names[row]}) do not have their SHA-256")
                position += -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        file.seek(position)
        if any(file.read()):
            raise damaged(f"something follows its last image at byte {position:,}")
        if hashes:
            file.seek(0)
            if hashlib.file_digest(file, "sha256").hexdigest() != index.meta.shards[number].sha256:
                raise damaged("its SHA-256 is not the recorded one, though every image's is")
