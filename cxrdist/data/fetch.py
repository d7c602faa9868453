"""A shard set on S3, the web or the Hugging Face hub -> the same files in a local folder, each checked by its hash.

Only on request (`--shards-url`), only these kinds of address, never a shell. Either all of a split is copied before the
work begins (here), or its shards are fetched one after the other while it goes on (`cxrdist.data.stream`).
"""

import contextlib
import functools
import hashlib
import os
import shutil
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import fsspec

from cxrdist import documents, files
from cxrdist.errors import UserError
from cxrdist.shards.index import FileMeta, read_meta
from cxrdist.shards.store import reason
from cxrdist.task import Task

# and what fsspec needs for it
PROTOCOLS = {"s3": "'cxrdist[s3]'", "gs": "'cxrdist[gs]'", "https": "", "hf": "huggingface_hub"}
CHUNK = 2**23  # bytes of a read
DOWNLOADS = 4  # files at the same time
READ_S = 120.0  # for one read of CHUNK bytes (70 kB/s), a connection or a response: whatever takes longer is given up
TRIES = 4
PAUSE_S = 1.0  # before the second try; twice as long before each further one
PASSING = (408, 425, 429)  # HTTP answers below 500 after which another try can help
T = TypeVar("T")


class Web:
    """Files on a web server, opened by their address."""

    def open(self, url: str, mode: str = "rb") -> Any:
        """The body of `url`. OSError where the server does not give it; FileNotFoundError where it says so (404)."""
        try:
            return urllib.request.urlopen(urllib.parse.quote(url, safe=":/%[]"), timeout=READ_S)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 404:
                raise FileNotFoundError("HTTP 404: no such file") from None
            raise


def fetch_shards(url: str, folder: Path, split: str, task: Task | None = None, *, optional: bool = False) -> None:
    """Copy one split from `url` (s3://bucket/path, gs://, https://host/path, hf://datasets/name/path) into `folder`.

    What lies there already is kept. The processes of a machine may call it together: one copies, the others wait.
    optional: a split that the address does not have is left out. What fails and may pass is tried again a few times.
    Raises UserError, naming URL and file, for another kind of address, a file that is missing or not what its hash
    says, a server that refuses, fails or gives no data in time, another shard set or task, or too little disk space.
    """
    remote = open_remote(url)
    copy_shards(remote.source, remote.root, folder, split, task, optional=optional)


@dataclass(frozen=True)
class Remote:
    """A folder at an address: `source` opens what lies below `root`; `url` is what people are told."""

    source: Any
    root: str
    url: str


def open_remote(url: str) -> Remote:
    """The folder at `url`; UserError for another kind of address, or one whose package is not installed."""
    protocol, separator, rest = url.partition("://")
    if not separator or protocol not in PROTOCOLS or "::" in url:
        raise UserError(f"{url}: shards are fetched from {', '.join(f'{name}://' for name in PROTOCOLS)} only")
    if set("@?#") & set(rest):
        raise UserError("the shards' URL may not hold credentials or queries: use the environment of s3fs or the hub")
    source: Any = Web()
    root = url = url.rstrip("/")
    try:
        if protocol != "https":
            source, root = fsspec.core.url_to_fs(root)
    except ImportError as error:
        raise UserError(f"{url}: needs a package that is not installed; pip install {PROTOCOLS[protocol]}") from error
    except Exception as error:  # of the package's own kind
        raise UserError(f"{url}: cannot be used ({reason(error)}); check the address") from error
    return Remote(source, str(root), url)


def copy_shards(
    source: Any, root: str, folder: Path, split: str, task: Task | None = None, *, optional: bool = False
) -> None:
    """`fetch_shards` from `source` (`Web`, or a file system of fsspec), from its folder `root`."""
    with contextlib.ExitStack() as stack:
        work = folder / f".{split}.fetch"
        with files.disk_errors_named(folder):
            folder.mkdir(parents=True, exist_ok=True)
            # The lock file stays: deleting it would part those who wait for it.
            stack.enter_context(files.lock(folder / f".{split}.fetch.lock", wait=True, message=""))
            files.refuse_links(work, flag="--shards")
            work.mkdir(exist_ok=True)
        name = f"{split}.json"
        content = read_json(source, f"{root}/{name}", optional)
        if content is None:
            shutil.rmtree(work)
            return
        with files.disk_errors_named(work / name, len(content)):
            files.write_atomically(work / name, content)
        meta = read_meta(work, split, task)
        if meta.tar_folder(folder) != folder:
            raise UserError(f"{root}/{name}: its tars lie in another folder; adopt them beside their index")
        if (folder / name).is_file() and (folder / name).read_bytes() != content:
            raise UserError(f"{folder / name} is of another shard set than {root}/{name}; give another --shards folder")
        # A file gets its name only when its hash was right, so its size is enough.
        paths = [(file, folder / file.name) for file in (meta.index, *meta.shards)]
        missing = [file for file, path in paths if not path.is_file() or path.stat().st_size != file.bytes]
        if not (folder / name).is_file():  # else its JSON says that they are of this set, and damaged
            for path in (folder / file.name for file in missing):
                if path.exists() or path.is_symlink():
                    raise UserError(f"{path}: is there, and not what {root} holds under this name; move it away")
        needed, free = sum(file.bytes for file in missing), shutil.disk_usage(folder).free
        if needed > free:
            raise UserError(
                f"{folder}: {needed:,} bytes are to be fetched and {free:,} are free; to stream: --cache-gb"
            )
        with ThreadPoolExecutor(DOWNLOADS) as pool:
            list(pool.map(lambda file: _copy(source, root, file, work, folder), missing))
        files.replace(work / name, folder / name)  # last: a split without its JSON does not count
        shutil.rmtree(work)


def read_json(source: Any, path: str, optional: bool = False, shown: str = "") -> bytes | None:
    """The content of a split's JSON; None where it is optional and not there, or may not be read."""

    def get() -> bytes:
        content = b"".join(_chunks(source, path, documents.MAX_BYTES))
        if len(content) > documents.MAX_BYTES:
            raise UserError(
                f"{shown or path}: more than {documents.MAX_BYTES:,} bytes are too many for the JSON of a split"
            )
        return content

    try:
        return _tried(shown or path, get)
    except UserError as error:
        # S3 answers 403 for a file that is not there to those who may not list the folder.
        if optional and (isinstance(error.__cause__, FileNotFoundError) or _status(error.__cause__) == 403):
            print(f"{shown or path}: not there, so this split is not fetched", flush=True)
            return None
        raise


def _copy(source: Any, root: str, file: FileMeta, work: Path, folder: Path) -> None:
    temporary = work / file.name
    with contextlib.ExitStack() as stack:
        with files.disk_errors_named(temporary, file.bytes):
            temporary.unlink(missing_ok=True)
            local = stack.enter_context(temporary.open("x+b"))
        try:
            download(source, f"{root}/{file.name}", file, local)
        except UserError:
            temporary.unlink()
            raise
    files.replace(temporary, folder / file.name)


def download(
    source: Any,
    path: str,
    file: FileMeta,
    local: BinaryIO,
    *,
    shown: str = "",
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Write what is at `path` of `source` into `local`, synced; UserError, naming `shown` or path, unless it is `file`.

    What fails and may pass is tried again. Never more than the file's bytes are written. `stopped`: end soon.
    """
    name = Path(str(local.name))

    def get() -> str:
        digest, size = hashlib.sha256(), 0
        local.seek(0)
        for chunk in _chunks(source, path, file.bytes):
            if stopped():
                raise UserError(f"{shown or path}: stopped")
            size += len(chunk)
            if size > file.bytes:
                return ""
            with files.disk_errors_named(name, file.bytes):
                local.write(chunk)
            digest.update(chunk)
        with files.disk_errors_named(name, file.bytes):
            local.flush()
            os.fsync(local.fileno())
        if size < file.bytes:
            raise EOFError(f"ended after {size:,} of {file.bytes:,} bytes")
        return digest.hexdigest()

    if _tried(shown or path, get) != file.sha256:
        what = f"not the {file.bytes:,} bytes that its JSON names (size or SHA-256 differs)"
        raise UserError(f"{shown or path}: {what}; run again, and if it stays so, upload the shard set again")


def _chunks(source: Any, path: str, most: int) -> Iterator[bytes]:
    """The bytes of a remote file as they come, each read within READ_S; ends soon after `most` bytes."""
    remote = _within(READ_S, lambda: source.open(path, "rb"))
    try:
        left = most + 1
        while left > 0 and (chunk := _within(READ_S, functools.partial(remote.read, min(CHUNK, left)))):
            left -= len(chunk)
            yield chunk
    finally:
        with contextlib.suppress(Exception):  # nothing is lost with a connection that cannot be closed
            _within(1.0, remote.close)


def _within(seconds: float, call: Callable[[], T]) -> T:
    """What `call` returns; TimeoutError when it takes longer. A timeout of the socket does not end a slow drip."""
    done: Future[T] = Future()

    def work() -> None:
        try:
            done.set_result(call())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        return done.result(seconds)
    except TimeoutError:
        raise TimeoutError(f"no answer, or too slow a one, in {seconds:.3g} s") from None


def _tried(path: str, get: Callable[[], T]) -> T:
    """What `get` returns, in at most TRIES tries; UserError, with its cause, when none succeeds or none can."""
    for number in range(1, TRIES + 1):
        try:
            return get()
        except UserError:
            raise
        except Exception as error:  # each package has its own kinds
            status = _status(error)
            final = isinstance(error, FileNotFoundError | PermissionError | ImportError)
            final |= status is not None and status < 500 and status not in PASSING
            if final or number == TRIES:
                tries = "" if number == 1 else f", {number} tries"
                hint = "check the address and your access" if final else "run again to resume"
                raise UserError(f"{path}: cannot be fetched ({reason(error)}{tries}); {hint}") from error
            time.sleep(PAUSE_S * 2 ** (number - 1))
    raise AssertionError


def _status(error: BaseException | None) -> int | None:
    """The HTTP status of an error; 403 for a permission that is missing, None where there is none."""
    if isinstance(error, urllib.error.HTTPError):
        return int(error.code)
    return 403 if isinstance(error, PermissionError) else None
