"""A WebDataset tar that somebody wrote -> its samples by webdataset's own rule, with the place of every member.

Where webdataset goes on in silence (a tar that ends early, a key cut at its first dot, a member without a key), this
raises. No member is decoded, unpickled or run, and none but the small ones that hold labels is read.
"""

import contextlib
import hashlib
import json
import os
import re
import tarfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple, Self

from cxrdist import files
from cxrdist.errors import UserError
from cxrdist.task import name_problem

IMAGES = ("jpg", "jpeg", "png")
LABELS = ("json", "cls")
MAX_LABEL_BYTES = 1 << 20  # of a json or cls member
MAX_MEMBER_BYTES = 1 << 29  # of any other, which webdataset reads into memory
MAX_HEADER_BYTES = 1 << 16  # of the records that carry a long name
SKIPPED = re.compile(r"__[^/]*__($|/)")  # webdataset's own: what writers say about a tar
UNPACK = "rename its members, or unpack it and give --images DIR instead of --adopt"


class Member(NamedTuple):
    name: str
    offset: int  # of its first byte in the tar
    length: int


class Sample(NamedTuple):
    """What webdataset makes one sample; image, with its `suffix`: None where it has none.

    cells: what its json says of the columns that are wanted. cls: the text of its cls member, '' where there is none.
    problem: why one of these cannot be read.
    """

    key: str
    suffix: str
    image: Member | None
    cells: dict[str, str]
    cls: str
    problem: str


@dataclass(frozen=True)
class Listing:
    """The samples of a tar, in its order.

    digest: SHA-256 of all names, places and sizes. ignored: members that webdataset leaves out, by name. first: all
    that the json of its first sample says.
    """

    samples: tuple[Sample, ...]
    size: int
    digest: str
    ignored: tuple[str, ...]
    first: dict[str, str]


class _Header(tarfile.TarInfo):
    """A header whose records, of a long name and the like, are bounded: tarfile reads them into memory."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        header = super().frombuf(buf, encoding, errors)
        if header.type not in tarfile.REGULAR_TYPES and header.size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header record of {header.size:,} bytes")
        return header


def list_tar(path: Path, wanted: Collection[str] = ()) -> Listing:
    """The samples of the tar at `path`, from its headers; where columns are `wanted`, json and cls members are read.

    Raises UserError, naming tar and member, for: a tar that is compressed, empty, cut (also at a header) or damaged; a
    link or device; two images in a sample, members of a sample apart from each other or repeated; an image whose key
    webdataset would cut at a dot or not see; a name that leaves the folder; an absurdly large member.
    """
    from webdataset.tariterators import base_plus_ext, group_by_keys  # imports torch, which listing folders needs not

    members, ignored = list[Member](), list[str]()
    digest = hashlib.sha256()
    with files.open_to_read(path) as file:
        for member in _members(path, file):
            digest.update(json.dumps(member).encode())
            if SKIPPED.match(member.name) or base_plus_ext(member.name)[0] is None:
                if member.name.lower().endswith(tuple(f".{suffix}" for suffix in IMAGES)):
                    raise UserError(f"{path}: member {member.name!r} has no key before its first dot; {UNPACK}")
                ignored.append(member.name)
            else:
                members.append(member)
        samples, seen = list[Sample](), dict[str, None]()
        try:
            for found in group_by_keys({"fname": member.name, "data": member, "__url__": ""} for member in members):
                key = str(found.pop("__key__"))
                del found["__url__"]
                if key in seen:
                    raise UserError(f"{path}: the members of sample {key!r} are not next to each other; {UNPACK}")
                seen[key] = None
                samples.append(_sample(path, file, key, found, wanted))
        except UserError:
            raise
        except ValueError as error:  # of webdataset: the same name twice
            what = str(error).partition(": duplicate")[0].partition("dict_keys")[0].strip("( ',\"")
            raise UserError(f"{path}: member {what!r} is there twice; {UNPACK}") from None
        size, first = os.fstat(file.fileno()).st_size, dict[str, str]()
        said = next((member for member in members if member.name.lower().endswith(".json")), None)
        if wanted and said is not None and said.length <= MAX_LABEL_BYTES:
            with contextlib.suppress(ValueError, RecursionError):
                first = _cells(_text(file, said))
        return Listing(tuple(samples), size, digest.hexdigest(), tuple(ignored), first)


def _members(path: Path, file: IO[bytes]) -> Iterator[Member]:
    """The regular members of a tar, and then a check that it ends where its end is marked."""

    def damaged(what: str) -> UserError:
        return UserError(f"{path}: damaged or cut: {what}; copy it again")

    start = file.read(6)
    if start[:2] == b"\x1f\x8b" or start[:3] == b"BZh" or start == b"\xfd7zXZ\0" or start[:4] == b"\x28\xb5\x2f\xfd":
        raise UserError(f"{path}: a compressed tar has no places to read from; unpack it to a plain .tar")
    file.seek(0)
    try:
        with tarfile.TarFile(fileobj=file, tarinfo=_Header) as tar:
            while (header := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # else it keeps every header
                where = f"member {header.name!r} at byte {header.offset:,}"
                if header.size < 0 or tar.offset < header.offset_data:  # tarfile would go back to it without end
                    raise damaged(f"{where} has the size {header.size:,}")
                if header.isdir():
                    continue
                if not header.isreg() or header.sparse is not None:
                    raise UserError(f"{path}: {where} is a link, a device or has holes, no plain file; {UNPACK}")
                if header.size > MAX_MEMBER_BYTES:
                    raise UserError(f"{path}: {where} has {header.size:,} bytes ({MAX_MEMBER_BYTES:,} at most)")
                yield Member(header.name, header.offset_data, header.size)
            end = tar.offset
    except (tarfile.TarError, RecursionError, OverflowError) as error:
        raise damaged(str(error)) from None
    file.seek(end)
    blocks = 0
    while block := file.read(1 << 20):
        if any(block):
            raise damaged(f"what follows byte {end:,} is no tar header")
        blocks += len(block)
    if blocks < 2 * tarfile.BLOCKSIZE:
        raise damaged(f"it ends at byte {end + blocks:,} without a tar's end mark, so what should follow is missing")


def _sample(path: Path, file: IO[bytes], key: str, found: dict[str, Member], wanted: Collection[str]) -> Sample:
    pictures = [suffix for suffix in found if suffix.rpartition(".")[2] in IMAGES]
    if cut := next((found[suffix] for suffix in pictures if "." in suffix), None):
        what = f"webdataset cuts the key of {cut.name!r} at its first dot, to {key!r}"
        raise UserError(f"{path}: {what}: images whose names begin so become one; {UNPACK}")
    if len(pictures) > 1:
        names = " and ".join(repr(found[suffix].name) for suffix in pictures[:2])
        raise UserError(f"{path}: sample {key!r} has several images, {names}: keep one; {UNPACK}")
    image = found[pictures[0]] if pictures else None
    if image is not None:
        image = image._replace(name=image.name.removeprefix("./"))
        if problem := name_problem(image.name):
            raise UserError(f"{path}: the name of member {image.name!r} {problem}; {UNPACK}")
    cells, cls, problem = dict[str, str](), "", ""
    for suffix in LABELS if wanted else ():
        if (member := found.get(suffix)) is None:
            continue
        try:
            if member.length > MAX_LABEL_BYTES:
                raise ValueError(f"{member.length:,} bytes are too many for labels")
            text = _text(file, member)
            if suffix == "cls":
                cls = text
            else:
                cells = {name: cell for name, cell in _cells(text).items() if name in wanted}
        except (ValueError, RecursionError) as error:
            problem = f"its {suffix} cannot be read: {' '.join(str(error).split())[:200]}"
    return Sample(key, pictures[0] if pictures else "", image, cells, cls, problem)


def _text(file: IO[bytes], member: Member) -> str:
    return os.pread(file.fileno(), member.length, member.offset).decode("utf-8-sig")


def _cells(text: str) -> dict[str, str]:
    """A sample's json as cells of a table: its values by name, those of an object `labels` in it, too."""
    fields = json.loads(text)
    if not isinstance(fields, dict):
        raise ValueError("not a JSON object")
    own = fields.get("labels")
    values = fields | own if isinstance(own, dict) else fields
    return {name: _cell(value) for name, value in values.items() if not isinstance(value, dict | list)}


def _cell(value: str | float | bool | None) -> str:
    return "" if value is None else str(int(value)) if isinstance(value, bool) else str(value)
