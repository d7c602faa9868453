"""Files that are complete under their name or not there: the only atomic write, lock and disk-full message.

Plain `open(path, "w")` over an existing file destroys the old one when the disk is full.
"""

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from cxrdist.errors import UserError

LOCK_FILE = ".lock"
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # from file systems that cannot lock
NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)  # from file systems that cannot sync a folder
FULL = (errno.ENOSPC, errno.EDQUOT)


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write `content` (text as UTF-8) to a temporary name beside `path`, sync it and rename it; makes the folder.

    Raises UserError with the path and the free bytes when the disk is full, and with the reason when the folder cannot
    be written; what was at `path` is then still there.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with disk_errors_named(path, len(data)):
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def replace(temporary: Path, path: Path) -> None:
    """Give a file that is written and synced its name, for good: the folder is synced, too."""
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def lock(path: Path, *, wait: bool, message: str) -> Iterator[None]:
    """Hold the lock file `path`, which stays; without `wait`, UserError with `message` when another process holds it.

    The message may say {holder}. The lock is freed however the process ends; on a file system that cannot lock there
    is none.
    """
    with path.open("a+b", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(200).decode(errors="replace").strip() or "unknown"
            raise UserError(message.replace("{holder}", holder)) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        with contextlib.suppress(OSError):  # on a full disk the lock holds without the holder's name
            file.truncate(0)
            file.write(f"process {os.getpid()} on {os.uname().nodename}".encode())
        yield


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process, made where it is missing; UserError when another process has it."""
    taken = f"{folder} is in use by another run ({{holder}}); wait for it, or give this one its own folder with --out"
    with contextlib.ExitStack() as stack:
        with disk_errors_named(folder):
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock(folder / LOCK_FILE, wait=False, message=taken))
        try:
            yield
        finally:
            if folder.is_dir() and [path.name for path in folder.iterdir()] == [LOCK_FILE]:  # nothing was begun
                (folder / LOCK_FILE).unlink()
                folder.rmdir()


@contextlib.contextmanager
def disk_errors_named(path: Path, size: int | None = None) -> Iterator[None]:
    """Turn an OSError inside into a UserError that names the path, the cause and the remedy.

    path: what is written where the error itself names no path. size: bytes to write, where known.
    """
    try:
        yield
    except OSError as error:
        raise UserError(reason(path, size, error)) from error


def reason(path: Path, size: int | None, error: OSError) -> str:
    """The message for a failed write of `size` bytes: path, cause and remedy."""
    folder = next((parent for parent in (path, *path.absolute().parents) if parent.is_dir()), Path("/"))
    if error.errno in FULL:
        free = shutil.disk_usage(folder).free
        to_write = "" if size is None else f"{size:,} bytes to write, "
        return (
            f"{path}: the disk is full ({to_write}{free:,} bytes free in {folder}); "
            "make room and run the same command again"
        )
    return f"{path}: cannot be written ({error.strerror or error}); check the path and its permissions"
