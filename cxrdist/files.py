"""Files that are either whole under their name or not there: every result is written through here.

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


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write `content` (text as UTF-8) to a temporary name beside `path`, sync it and rename it; makes the folder.

    Raises UserError with the path and the free bytes when the disk is full, and with the reason when the folder cannot
    be written; what was at `path` is then still there.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(reason(path, len(data), error)) from error


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process, made where it is missing; UserError when another process has it.

    The lock is freed however the process ends. On a file system that cannot lock there is none.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK_FILE).open("a+b", buffering=0)
    except OSError as error:
        raise UserError(reason(folder, 0, error)) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().decode(errors="replace").strip() or "unknown"
            raise UserError(
                f"{folder} is in use by another run ({holder}); wait for it, or give this one its own folder with --out"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        with contextlib.suppress(OSError):  # on a full disk the lock holds without the holder's name
            file.truncate(0)
            file.write(f"process {os.getpid()} on {os.uname().nodename}".encode())
        try:
            yield
        finally:
            if [path.name for path in folder.iterdir()] == [LOCK_FILE]:  # nothing was begun
                (folder / LOCK_FILE).unlink()
                folder.rmdir()


def reason(path: Path, size: int, error: OSError) -> str:
    """The message for a failed write of `size` bytes: path, cause and remedy."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(path.parent).free
        return (
            f"{path}: the disk is full ({size:,} bytes to write, {free:,} free in {path.parent}); "
            "make room and run the same command again"
        )
    return f"{path}: cannot be written ({error.strerror}); check the path and its permissions"
