"""JPEG bytes of a shard set by row: one `pread` at the offset the index knows, no tar parsing, from any thread.

What is read is compared with the index's hash: of the single bits in a JPEG four in five can flip without an error of
the decoder, to other pixels. Reading and decoding reach 0.98 of the speed of decoding, against 0.99 from a memory map;
but a map counts the page cache as memory of the process, and turns a cut file or a failing disk into a SIGBUS instead
of an error with a name.
"""

import hashlib
import os
import resource
import threading
import weakref
from pathlib import Path

import numpy as np
import simplejpeg
import xxhash
from numpy.typing import NDArray

from cxrdist.data.stream import Stream
from cxrdist.errors import UserError
from cxrdist.shards.convert import resized_to_store
from cxrdist.shards.index import AdoptedMeta, ShardIndex

# Files kept open, of a process's usual 1024; images of further shards cost an open and a close each, 20 us where
# decoding takes 1,000.
MAX_OPEN = 512
FILES_OF_OTHERS = 96  # of the process: libraries, sockets, the log, and images of shards that are not kept open
READERS = 2  # that a process has at once: training and validation
NO_XXH3 = (
    "this shard set is of format version 1, without XXH3: each image is compared with its SHA-256 as it is read, which "
    "takes about 5 % of the time of decoding it; preprocess again to take 0.3 %"
)


class ShardReader:
    """Reads images of `index`; thread-safe. Files are opened when needed and closed by `close` or with the reader.

    stream: where the shards come from, and are waited for; None: the index's own folder.
    """

    def __init__(self, index: ShardIndex, stream: Stream | None = None) -> None:
        self.index, self.stream = index, stream
        self._stopped = False
        self._files: dict[int, int] = {}
        self._max_open = _most_open()
        self._lock = threading.Lock()
        self._closer = weakref.finalize(self, _close_all, self._files)

    def read(self, row: int) -> bytes:
        """The JPEG at one row position, as it was preprocessed; UserError names shard, image and remedy otherwise."""
        data = self._bytes(row)
        self.check(row, data)
        return data

    def check(self, row: int, data: bytes) -> None:
        """UserError unless `data` has the row's XXH3, or in a set of version 1 its SHA-256."""
        expected = self.index.xxh3(row)
        if expected is None:
            intact = hashlib.sha256(data).digest() == self.index.digests[row].tobytes()
        else:
            intact = xxhash.xxh3_64_intdigest(data) == expected
        if not intact:
            what = "damaged: these are not the bytes that were preprocessed, their hash is not the index's"
            raise UserError(f"{self.where(row)}: {what}; {self._remedy}")

    def decode(self, data: bytes, target: NDArray[np.uint8]) -> None:
        """The pixels of an image's `data` into `target` (S, S, 1 or 3). Raises ValueError where they are not such.

        An adopted image that is no JPEG of that size is made square here as preprocessing would have, without JPEG.
        """
        kind = "GRAY" if target.shape[2] == 1 else "RGB"
        meta = self.index.meta
        if isinstance(meta, AdoptedMeta) and not _is_jpeg_of(data, target.shape[0]):
            try:
                pixels = np.asarray(resized_to_store(data, meta.pixels))
            except MemoryError:
                raise
            except Exception as error:  # each decoder has its own kinds
                raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error
            target[...] = pixels[..., None] if pixels.ndim == 2 else pixels
            return
        image = simplejpeg.decode_jpeg(data, kind, buffer=target)
        if image.shape != target.shape:
            raise ValueError(f"{image.shape[1]}x{image.shape[0]} px instead of {target.shape[1]}x{target.shape[0]}")

    def _bytes(self, row: int) -> bytes:
        index = self.index
        shard = index.shard_of(row)
        length, offset = int(index.lengths[row]), int(index.offsets[row])
        try:
            file = self._files.get(shard)
            if file is None:
                file = self._keep_open(shard)
            if file is not None:
                data = os.pread(file, length, offset)
            else:
                with open(self._awaited(shard), "rb", buffering=0) as once:
                    data = os.pread(once.fileno(), length, offset)
        except OSError as error:
            raise UserError(f"{self.where(row)}: {error.strerror}; check the shards with cxrdist.verify") from error
        if len(data) != length:
            what = f"only {len(data)} of {length} bytes are there, the shard was cut"
            raise UserError(f"{self.where(row)}: {what}; {self._remedy}")
        return data

    def where(self, row: int) -> str:
        """Shard file, key and name of a row, for messages."""
        about = f"key {self.index.key_text(row)} ({self.index.image_names[row]})"
        return f"{self._path(self.index.shard_of(row))}, {about}"

    def passed(self, rows: NDArray[np.int64]) -> None:
        """A batch of `rows` is read, as is every one before it, on this rank: a stream may go on."""
        if self.stream is not None:
            self.stream.passed(rows, self._forget)

    def next_pass(self) -> None:
        """All of a pass (an epoch) is read: a stream goes on with the next one."""
        if self.stream is not None:
            self.stream.next_pass(self._forget)

    def stop(self) -> None:
        """Threads that wait for a shard get an error."""
        self._stopped = True

    def close(self) -> None:
        """Close the files. Must not run while another thread reads."""
        self._closer()

    def _path(self, shard: int) -> Path:
        return self.index.tar(shard) if self.stream is None else self.stream.file(shard)

    @property
    def _remedy(self) -> str:
        """For a damaged tar."""
        again = "delete this file of the cache and run the same command again"
        return self.index.meta.make_again if self.stream is None else again

    def _awaited(self, shard: int) -> Path:
        return self._path(shard) if self.stream is None else self.stream.wait(shard, lambda: self._stopped)

    def _keep_open(self, shard: int) -> int | None:
        path = self._awaited(shard)
        with self._lock:
            if shard not in self._files and len(self._files) < self._max_open:
                self._files[shard] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            return self._files.get(shard)

    def _forget(self, shards: list[int]) -> None:
        for shard in shards:
            if (file := self._files.pop(shard, None)) is not None:
                os.close(file)


def _is_jpeg_of(data: bytes, size_px: int) -> bool:
    """Whether it is a grey or YCbCr JPEG of that size: then resizing changes nothing, and luma is the grey level."""
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return False
    return (height, width) == (size_px, size_px) and space in ("Gray", "YCbCr")


def _most_open() -> int:
    """Shards that one reader keeps open under this process's limit of open files; 0 where it is very low."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return MAX_OPEN
    return max(0, min(MAX_OPEN, (limit - FILES_OF_OTHERS) // READERS))


def _close_all(files: dict[int, int]) -> None:
    while files:
        os.close(files.popitem()[1])
