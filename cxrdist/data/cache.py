"""A folder of limited size for shards that are streamed: shared by all processes of a machine, and kept between runs.

A tar is called after its SHA-256, so sets, addresses and runs share what is equal. What is in use is locked, by file
locks that end with their process; what is not may be removed to make room, the longest unused first. All that changes
the folder's size is done under one lock, and room is taken before a byte is written: the limit holds at any time.
"""

import contextlib
import hashlib
import io
import math
import os
import re
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

from cxrdist import files
from cxrdist.data.fetch import Remote, download, read_json
from cxrdist.errors import UserError
from cxrdist.shards.index import FileMeta, SplitMeta, read_meta
from cxrdist.task import Task

TAR, PART = ".tar", ".part"  # complete; being fetched, of its final size already
NAME = re.compile(rf"[0-9a-f]{{64}}({TAR}|{PART})")
NEED = struct.Struct("<q")  # begins the file of a run in `uses`: bytes it may hold at once
GB = 10**9


class Cache:
    """`limit_bytes` of shards and indexes in `folder`. Every method may be called by several threads and processes."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        """Makes the folder; UserError where it cannot be written, or its disk is smaller than the limit."""
        self.folder, self.limit_bytes = folder, limit_bytes
        self._tars, self._sets, self._uses = folder / "tars", folder / "sets", folder / "uses"
        with files.disk_errors_named(folder):
            for part in (folder, self._tars, self._sets, self._uses):
                files.refuse_links(part, flag="--cache")
                part.mkdir(parents=True, exist_ok=True)
            with self._locked():
                room = self._used() + shutil.disk_usage(folder).free
        if room < limit_bytes:
            raise UserError(
                f"--cache {folder}: --cache-gb {limit_bytes / GB:.3g} is more than its disk has: {room / GB:.3g} GB; "
                "give less, or a folder on another disk"
            )

    def fetch_index(
        self, remote: Remote, split: str, task: Task | None = None, *, optional: bool = False
    ) -> Path | None:
        """Fetch a split's JSON and index. The folder where they are; None for an optional split that is not there.

        UserError as of `fetch.fetch_shards`, and where the limit leaves no room for an index.
        """
        name, folder = f"{split}.json", self.set_folder(remote)
        shown, work = f"{remote.url}/{name}", folder / f".{split}.fetch"
        with files.disk_errors_named(folder):
            folder.mkdir(exist_ok=True)
        with files.lock(folder / ".lock", wait=True, message=""):
            content = read_json(remote.source, f"{remote.root}/{name}", optional, shown)
            if content is None:
                (folder / name).unlink(missing_ok=True)
                return None
            with self._locked():
                if not self._make_room(len(content)):
                    raise self._too_small(len(content), shown)
                files.write_atomically(work / name, content)
            meta = read_meta(work, split, task)
            if meta.tar_folder(folder) != folder:
                raise UserError(f"{shown}: its tars lie in another folder; adopt them beside their index")
            if wrong := [file.name for file in meta.shards if not re.fullmatch("[0-9a-f]{64}", file.sha256)]:
                raise UserError(f"{shown}: {wrong[0]} has no SHA-256; upload the shard set again")
            path = folder / meta.index.name
            before = files.read_bytes(folder / name) if (folder / name).is_file() else b""
            if before != content or not path.is_file() or path.stat().st_size != meta.index.bytes:
                self._fetch_index(remote, meta, work / path.name, path)
            files.replace(work / name, folder / name)
            shutil.rmtree(work)
        return folder

    def set_folder(self, remote: Remote) -> Path:
        """Where the JSON and index of the splits at an address are."""
        return folder_of_set(self.folder, remote.url)

    def _fetch_index(self, remote: Remote, meta: SplitMeta, temporary: Path, path: Path) -> None:
        file = meta.index
        with self._locked():
            temporary.unlink(missing_ok=True)
            path.unlink(missing_ok=True)  # of another JSON; a run that reads it has it open
            if not self._make_room(file.bytes):
                raise self._too_small(file.bytes, f"the index of split {meta.split!r}")
            with files.disk_errors_named(temporary, file.bytes), temporary.open("xb") as empty:
                empty.truncate(file.bytes)
        with temporary.open("r+b") as local:
            download(remote.source, f"{remote.root}/{file.name}", file, local, shown=f"{remote.url}/{file.name}")
        with self._locked():
            files.replace(temporary, path)

    def register(self, name: str, need_bytes: int, num_numbers: int, what: str, remedy: str = "") -> io.BufferedRandom:
        """Begin a use that holds at most `need_bytes` of tars at a time; ends when the returned file is closed.

        The file, of that name in `uses`, begins with the need; `num_numbers` zeros of 8 bytes follow.
        what, remedy: the need is for, and what else helps than a larger cache.
        UserError where the cache is too small for that, beside other runs that use it now.
        """
        with self._locked():
            others = 0
            for path in self._uses.iterdir():
                with contextlib.suppress(FileNotFoundError), path.open("r+b") as file:
                    if files.try_lock(file, shared=False):  # of a process that ended
                        path.unlink()
                    elif len(text := file.read(NEED.size)) == NEED.size:
                        others += NEED.unpack(text)[0]
            if self._size_of_indexes() + others + need_bytes > self.limit_bytes:
                raise self._too_small(need_bytes, what, others, remedy)
            use = (self._uses / name).open("x+b")
            files.try_lock(use, shared=False)
            use.write(NEED.pack(need_bytes) + bytes(8 * num_numbers))
            use.flush()
        return use

    def use_file(self, name: str) -> Path:
        return self._uses / name

    def _too_small(self, num_bytes: int, what: str, others: int = 0, remedy: str = "") -> UserError:
        indexes = self._size_of_indexes()
        parts = [(num_bytes, what), (indexes, "for indexes"), (others, "for other runs that use it now")]
        needed = math.ceil((num_bytes + indexes + others) / GB * 1e4) / 1e4
        named = ", ".join(f"{size / GB:.4g} GB {why}" for size, why in parts if size)
        have = f"--cache-gb {self.limit_bytes / GB:.6g} is too small: {named}"
        return UserError(f"--cache {self.folder}: {have}; give --cache-gb {needed:.10g}{remedy}")

    def tar(self, file: FileMeta) -> Path:
        """Where a tar is while it is here."""
        return self._tars / f"{file.sha256}{TAR}"

    def take(self, file: FileMeta) -> io.BufferedRandom | None:
        """A tar, held: not removed until it is closed. An empty one (see `is_empty`) is to be filled by the caller.

        None where it cannot be had now: another process fetches it, or there is no room.
        """
        path = self.tar(file)
        part = path.with_suffix(PART)
        with self._locked(), contextlib.ExitStack() as stack:
            if path.exists():
                tar = stack.enter_context(path.open("r+b"))
                if os.fstat(tar.fileno()).st_size == file.bytes and files.try_lock(tar, shared=True):
                    os.utime(path)
                    stack.pop_all()
                    return tar
                path.unlink()
            if part.exists() and not _remove_unused(part):
                return None
            if not self._make_room(file.bytes):
                return None
            with files.disk_errors_named(part, file.bytes):
                tar = stack.enter_context(part.open("x+b"))
                tar.truncate(file.bytes)
            files.try_lock(tar, shared=False)
            stack.pop_all()
            return tar

    def is_empty(self, tar: io.BufferedRandom) -> bool:
        return str(tar.name).endswith(PART)

    def keep(self, file: FileMeta, tar: io.BufferedRandom) -> None:
        """An empty tar was filled with what it should hold: others may use it, too. It stays held."""
        with self._locked():
            files.replace(Path(tar.name), self.tar(file))
            files.try_lock(tar, shared=True)

    def drop(self, tar: io.BufferedRandom) -> None:
        """An empty tar could not be filled."""
        with self._locked():
            Path(tar.name).unlink(missing_ok=True)
            tar.close()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with files.lock(self.folder / ".lock", wait=True, message=""):
            yield

    def _used(self) -> int:
        return sum(size for _, size, _ in self._list()) + self._size_of_indexes()

    def _size_of_indexes(self) -> int:
        return sum(path.stat().st_size for path in self._sets.glob("**/*") if path.is_file())

    def _list(self) -> list[tuple[float, int, str]]:
        """Time of last use, size and path of each tar."""
        with os.scandir(self._tars) as entries:
            named = [(entry.stat(follow_symlinks=False), entry.path) for entry in entries if NAME.fullmatch(entry.name)]
        return [(stat.st_mtime, stat.st_size, path) for stat, path in named]

    def _make_room(self, num_bytes: int) -> bool:
        """Whether there is room for so many bytes, after removing what is not in use and no more than needed."""
        tars = sorted(self._list())
        used = sum(size for _, size, _ in tars) + self._size_of_indexes()
        for _, size, path in tars:
            if used + num_bytes <= self.limit_bytes:
                break
            if _remove_unused(Path(path)):
                used -= size
        return used + num_bytes <= self.limit_bytes


def folder_of_set(cache: Path, url: str) -> Path:
    """The folder in a cache's folder for the JSON and index of the splits at a URL."""
    return cache / "sets" / hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]


def _remove_unused(path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError), path.open("r+b") as file:
        if not files.try_lock(file, shared=False):
            return False
        path.unlink()
    return True
