"""A shard set on S3, the web or the Hugging Face hub -> the same files in a local folder, each checked by its hash.

Only on request (`--shards-url`), only these three kinds of address, never a shell. Training reads the local copy: an
epoch touches every shard in random order, so all of it is needed at once anyway.
"""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec

from cxrdist import files
from cxrdist.errors import UserError
from cxrdist.shards.index import FileMeta, read_meta
from cxrdist.task import Task

PROTOCOLS = {"s3": "s3fs", "https": "aiohttp", "hf": "huggingface_hub"}  # and the package that fsspec needs for it
CHUNK = 2**23  # bytes of a read
DOWNLOADS = 4  # files at the same time


def fetch_shards(url: str, folder: Path, split: str, task: Task | None = None) -> None:
    """Copy one split from `url` (s3://bucket/path, https://host/path, hf://datasets/name/path) into `folder`.

    What lies there already is kept. The processes of a machine may call it together: one copies, the others wait.
    Raises UserError, naming URL and file, for another kind of address, a file that is missing or not what its hash
    says, another shard set or task, or too little disk space.
    """
    protocol, separator, rest = url.partition("://")
    if not separator or protocol not in PROTOCOLS or "::" in url:
        raise UserError(f"{url}: shards are fetched from {', '.join(f'{name}://' for name in PROTOCOLS)} only")
    if set("@?#") & set(rest):
        raise UserError("the shards' URL may not hold credentials or queries: use the environment of s3fs or the hub")
    try:
        source, root = fsspec.core.url_to_fs(url.rstrip("/"))
    except ImportError as error:
        raise UserError(f"{url}: needs a package that is not installed; pip install {PROTOCOLS[protocol]}") from error
    copy_shards(source, str(root), folder, split, task)


def copy_shards(source: Any, root: str, folder: Path, split: str, task: Task | None = None) -> None:
    """`fetch_shards` from the fsspec file system `source`, from its folder `root`."""
    folder.mkdir(parents=True, exist_ok=True)
    # The lock file stays: deleting it would part those who wait for it.
    with files.lock(folder / f".{split}.fetch.lock", wait=True, message=""):
        work = folder / f".{split}.fetch"
        work.mkdir(exist_ok=True)
        name = f"{split}.json"
        with _named(f"{root}/{name}"):
            content = source.cat_file(f"{root}/{name}")
        (work / name).write_bytes(content)
        meta = read_meta(work, split, task)  # it names no file outside the folder
        if (folder / name).is_file() and (folder / name).read_bytes() != content:
            raise UserError(f"{folder / name} is of another shard set than {root}/{name}; give another --shards folder")
        # A file gets its name only when its hash was right, so its size is enough.
        paths = [(file, folder / file.name) for file in (meta.index, *meta.shards)]
        missing = [file for file, path in paths if not path.is_file() or path.stat().st_size != file.bytes]
        needed, free = sum(file.bytes for file in missing), shutil.disk_usage(folder).free
        if needed > free:
            raise UserError(f"{folder}: {needed:,} bytes are to be fetched and {free:,} are free")
        with ThreadPoolExecutor(DOWNLOADS) as pool:
            list(pool.map(lambda file: _copy(source, root, file, work, folder), missing))
        files.replace(work / name, folder / name)  # last: a split without its JSON does not count
        shutil.rmtree(work)


def _copy(source: Any, root: str, file: FileMeta, work: Path, folder: Path) -> None:
    path, temporary = f"{root}/{file.name}", work / file.name
    digest, size = hashlib.sha256(), 0
    with _named(path), source.open(path, "rb") as remote, temporary.open("wb") as local:
        while size <= file.bytes and (chunk := remote.read(CHUNK)):
            local.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        local.flush()
        os.fsync(local.fileno())
    if size != file.bytes or digest.hexdigest() != file.sha256:
        temporary.unlink()
        what = f"not the {file.bytes:,} bytes that its JSON names (size or SHA-256 differs)"
        raise UserError(f"{path}: {what}; run again, and if it stays so, upload the shard set again")
    files.replace(temporary, folder / file.name)


@contextlib.contextmanager
def _named(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be fetched ({type(error).__name__}: {error}); run again to resume") from error
