"""Files that are either whole under their name or not there: every result is written through here.

Plain `open(path, "w")` over an existing file destroys the old one when the disk is full.
"""

import errno
import os
import shutil
from pathlib import Path

from cxrdist.errors import UserError


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
        raise UserError(_reason(path, len(data), error)) from error


def _reason(path: Path, size: int, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(path.parent).free
        return (
            f"{path}: the disk is full ({size:,} bytes to write, {free:,} free in {path.parent}); "
            "make room and run the same command again"
        )
    return f"{path}: cannot be written ({error.strerror}); check the path and its permissions"
