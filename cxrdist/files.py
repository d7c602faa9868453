"""Files that are complete under their name or not there: the only atomic write, lock and disk-full message.

Plain `open(path, "w")` over an existing file destroys the old one when the disk is full. What a command writes for
people is recorded in `.cxrdist` beside it (names and SHA-256, as `sha256sum` writes them): only a file that is there
as it was recorded is ever replaced. Nothing is read from a pipe or written through a link.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import io
import itertools
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from cxrdist.errors import UserError

LOCK_FILE = ".lock"
RECORD_FILE = ".cxrdist"  # what cxrdist wrote for people into the folder
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # from file systems that cannot lock
NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)  # from file systems that cannot sync a folder
FULL = (errno.ENOSPC, errno.EDQUOT)


def check_outputs(
    outputs: Iterable[Path], inputs: Iterable[Path] = (), *, flag: str = "--out", folder: Path | None = None
) -> None:
    """UserError, before any work, where a file must not be written.

    That is: over an input (the same file by any name), into an input folder, twice, over what is no regular file, over
    a file that cxrdist did not record as its own, through a link (the file itself; below `folder`, any part of its
    path), or where nothing can be written at all.
    """
    wanted, sources = [*outputs], [*inputs]
    for path, other in itertools.combinations(wanted, 2):
        if path == other:
            raise UserError(f"{flag} {path}: two files would be written under this name; give another")
    for path in wanted:
        with disk_errors_named(path):
            refuse_links(path, folder, flag)
            for source in sources:
                refuse_input(path, source, flag)
            _refuse_foreign(path, flag)


def refuse_links(path: Path, folder: Path | None = None, flag: str = "--out") -> None:
    """UserError when `path`, or a part of it below `folder`, is a symbolic link."""
    inside = [] if folder is None else [part for part in path.parents if part.is_relative_to(folder) and part != folder]
    for part in (path, *inside):
        if part.is_symlink():
            raise UserError(f"{flag} {part}: is a symbolic link, and nothing is written through links; remove it")


def refuse_input(path: Path, source: Path, flag: str = "--out") -> None:
    """UserError when `path` is the input `source` under any name, or lies in that folder."""
    real, place = Path(os.path.realpath(path)), Path(os.path.realpath(source))
    if real == place or (path.exists() and source.exists() and path.samefile(source)):
        raise UserError(f"{flag} {path}: is an input of this command ({source}); give another")
    if source.is_dir() and real.is_relative_to(place):
        raise UserError(f"{flag} {path}: lies in an input folder, which holds nothing else; give one outside {source}")


def _refuse_foreign(path: Path, flag: str) -> None:
    if path.exists():
        if not path.is_file():
            what = "a folder" if path.is_dir() else "not a regular file"
            raise UserError(f"{flag} {path}: is {what}; give another name")
        if not is_recorded(path):
            raise UserError(
                f"{flag} {path}: is there, and is not as cxrdist wrote it (see {path.parent / RECORD_FILE}); "
                "give another, or move it away"
            )
    place = next(part for part in path.absolute().parents if part.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        what = "no permission to write there" if place.is_dir() else "not a folder"
        raise UserError(f"{flag} {path}: cannot be written ({place}: {what}); give another")


def is_recorded(path: Path) -> bool:
    """Whether the regular file `path` is there as `write_output` wrote it."""
    record = path.with_name(RECORD_FILE)
    if not record.is_file() or record.is_symlink():
        return False
    lines = read_bytes(record).splitlines()
    hashes = {line[:64] for line in lines if line[64:] == b"  " + os.fsencode(path.name)}
    with open_to_read(path) as file:
        return bool(hashes) and hashlib.file_digest(file, "sha256").hexdigest().encode() in hashes


def own_files(folder: Path) -> set[str]:
    """The names of the files in `folder` that are there as `write_output` wrote them."""
    hashes: dict[bytes, set[bytes]] = {}
    for line in read_bytes(folder / RECORD_FILE).splitlines():
        hashes.setdefault(line[66:], set()).add(line[:64])
    found = set()
    for name, known in hashes.items():
        path = folder / os.fsdecode(name)
        if name and b"/" not in name and path.is_file() and not path.is_symlink():
            with open_to_read(path) as file:
                if hashlib.file_digest(file, "sha256").hexdigest().encode() in known:
                    found.add(path.name)
    return found


def write_output(path: Path, content: bytes | str) -> None:
    """`write_atomically`, recorded beforehand, so that a later command knows the file as cxrdist's own.

    The record is only ever appended to: wherever the process is killed, the file that is there is recorded.
    """
    data = _encoded(path, content)
    with disk_errors_named(path, len(data)):
        path.parent.mkdir(parents=True, exist_ok=True)
        line = hashlib.sha256(data).hexdigest().encode() + b"  " + os.fsencode(path.name) + b"\n"
        with open_to_append(path.with_name(RECORD_FILE)) as record:
            if line not in read_bytes(path.with_name(RECORD_FILE)):
                if record.write(line) < len(line):
                    raise OSError(errno.ENOSPC, "only a part fits")
                os.fsync(record.fileno())
    write_atomically(path, data)


def with_json(paths: Iterable[Path]) -> list[Path]:
    """Tables and the JSON beside each."""
    return [name for path in paths for name in (path, path.with_suffix(".json"))]


def open_to_read(path: Path) -> io.BufferedReader:
    """The regular file `path` at its begin; UserError that says why it cannot be read. Never waits for a pipe."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        why = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({_why(error)})"
        raise UserError(f"{path}: {why}; check the path and its permissions") from None
    if not stat.S_ISREG(mode := os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{path}: is {'a folder' if stat.S_ISDIR(mode) else 'not a regular file'}; give a file")
    return open(descriptor, "rb")


def read_bytes(path: Path, max_bytes: int | None = None) -> bytes:
    """The bytes of a regular file; UserError as `open_to_read`, and where there are more than `max_bytes`."""
    with open_to_read(path) as file:
        if max_bytes is not None and (size := os.fstat(file.fileno()).st_size) > max_bytes:
            raise UserError(f"{path}: {size:,} bytes are too many for such a file ({max_bytes:,} at most)")
        try:
            return file.read()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({_why(error)})") from None


def open_to_append(path: Path) -> io.FileIO:
    """The regular file `path` to read and append to, made where it is missing, on a new line even where a killed
    process left half of one. UserError for a link, a pipe, a folder, or where it cannot be written.
    """
    file = _open_own(path, os.O_APPEND)
    with disk_errors_named(path):
        if file.seek(0, os.SEEK_END) > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
    return file


def require_same(file: io.FileIO) -> None:
    """UserError when the open file is no longer the one under its name: what is written to it would be lost."""
    try:
        same = os.path.samestat(os.fstat(file.fileno()), os.stat(str(file.name)))
    except OSError:
        same = False
    if not same:
        raise UserError(f"{file.name} was removed or replaced while it was written; restore the folder, then --resume")


def _open_own(path: Path, flags: int) -> io.FileIO:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | flags, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserError(f"{path}: is a symbolic link, and nothing is written through links; remove it") from None
        raise UserError(reason(path, None, error)) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{path}: not a regular file; remove it, or give another folder")
    file = io.FileIO(descriptor, "a+" if flags & os.O_APPEND else "r+")
    file.name = str(path)
    return file


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write `content` (text as UTF-8) to a temporary name beside `path`, sync it and rename it; makes the folder.

    Raises UserError with the path and the free bytes when the disk is full, and with the reason when the folder cannot
    be written; what was at `path` is then still there.
    """
    data = _encoded(path, content)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with disk_errors_named(path, len(data)):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.unlink(missing_ok=True)
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def is_utf8(text: str) -> bool:
    """Whether a path or name, as Python decodes it, was UTF-8."""
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def _encoded(path: Path, content: bytes | str) -> bytes:
    try:
        return content.encode("utf-8") if isinstance(content, str) else content
    except UnicodeEncodeError as error:
        text = ascii(error.object[max(0, error.start - 40) : error.end + 40])
        raise UserError(f"{path}: cannot hold {text}, which is not UTF-8; rename that file or folder") from None


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
        warn_once("this file system cannot sync a folder: after a power cut the newest files may be missing")
    finally:
        os.close(descriptor)


@functools.cache
def warn_once(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def lock(path: Path, *, wait: bool, message: str) -> Iterator[str]:
    """Hold the lock file `path`, which stays; without `wait`, UserError with `message` when another process holds it.

    The message may say {holder}. The lock is freed however the process ends. Yields what the file then says: on a file
    system that cannot lock (a warning) another process may take it, and the file then says another thing; '' where it
    could not be written.
    """
    with _open_own(path, 0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = file.read(200).decode(errors="replace").rpartition(",")[0].strip() or "unknown"
            raise UserError(message.replace("{holder}", holder)) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            warn_once(f"{path.parent}: this file system cannot lock: start no second command in that folder")
        holder = f"process {os.getpid()} on {os.uname().nodename}, {secrets.token_hex(8)}"
        try:
            file.truncate(0)
            file.write(holder.encode())
        except OSError:  # on a full disk the lock holds without the holder's name
            holder = ""
        yield holder


def try_lock(file: io.IOBase, *, shared: bool) -> bool:
    """Lock an open file until it is closed, or change its lock; False where another process (or file) keeps it.

    Any number may share it, or one has it alone. UserError on a file system that cannot lock.
    """
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise UserError(f"{getattr(file, 'name', '')}: cannot be locked ({_why(error)}); use a local disk") from None
    return True


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[str]:
    """Hold `folder` for this process, made where it is missing; UserError when another process has it.

    Yields what `is_held` compares.
    """
    taken = f"{folder} is in use by another run ({{holder}}); wait for it, or give this one its own folder with --out"
    with contextlib.ExitStack() as stack:
        with disk_errors_named(folder):
            folder.mkdir(parents=True, exist_ok=True)
            holder = stack.enter_context(lock(folder / LOCK_FILE, wait=False, message=taken))
        try:
            yield holder
        finally:
            if folder.is_dir() and [path.name for path in folder.iterdir()] == [LOCK_FILE]:  # nothing was begun
                (folder / LOCK_FILE).unlink()
                folder.rmdir()


def is_held(folder: Path, holder: str) -> bool:
    """Whether the lock of `folder` is still the one that said `holder`: no other process took it or removed it."""
    try:
        return not holder or (folder / LOCK_FILE).read_text(errors="replace") == holder
    except OSError:
        return False


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
    folder = next((parent for parent in (path, *path.absolute().parents) if os.path.isdir(parent)), Path("/"))
    if error.errno in FULL:
        free = shutil.disk_usage(folder).free
        to_write = "" if size is None else f"{size:,} bytes to write, "
        return (
            f"{path}: the disk is full ({to_write}{free:,} bytes free in {folder}); "
            "make room and run the same command again"
        )
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        file = next((part for part in (path, *path.parents) if part.exists() and not part.is_dir()), path)
        return f"{path}: cannot be written, as {file} is a file; give another folder"
    return f"{path}: cannot be written ({_why(error)}); check the path and its permissions"


def _why(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)
