"""One source image -> the bytes stored for it: 600x600, Pillow's bilinear, JPEG quality 95.

Runs in worker processes, so it imports no pandas and no torch. Whatever is wrong with a file becomes a reason, never an
exception: one bad image of a hundred thousand must not end the run.
"""

import hashlib
import io
import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Literal

from PIL import Image, UnidentifiedImageError

from cxrdist.errors import UserError

Mode = Literal["exact", "fast"]
SIZE_PX = 600
JPEG_QUALITY = 95
MAX_PIXELS = 100_000_000  # a radiograph has about 20 million; a bomb of 350 kB can claim 361 million
AHEAD = 4  # images in flight per worker
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF")  # what Pillow decodes by itself, without helper programs


@dataclass(frozen=True)
class Converted:
    """The stored form of an image: JPEG bytes, 1 or 3 channels, SHA-256 (hex) of the bytes."""

    jpeg: bytes
    channels: int
    sha256: str


def convert(path: str, mode: Mode = "exact") -> Converted | str:
    """The image at `path` as it is stored, or the reason (one line) why it must be left out."""
    try:
        with open(path, "rb") as file:
            content = file.read()
        return convert_bytes(content, mode)
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def convert_bytes(content: bytes, mode: Mode = "exact") -> Converted | str:
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except Exception as error:
        return _reason(error)
    width, height = image.size
    if width * height > MAX_PIXELS:
        return f"{width} x {height} px is beyond {MAX_PIXELS:,} pixels: refused without decoding"
    try:
        resized = image.convert("RGB").resize((SIZE_PX, SIZE_PX), Image.Resampling.BILINEAR)
    except Exception as error:
        return _reason(error)
    return encode(resized)


def encode(resized: Image.Image) -> Converted:
    """The 600x600 image (mode L or RGB) as JPEG; one channel where the three are equal."""
    if resized.mode == "RGB":
        red, green, blue = resized.split()
        if red.tobytes() == green.tobytes() == blue.tobytes():
            resized = red
    buffer = io.BytesIO()
    resized.save(buffer, "JPEG", quality=JPEG_QUALITY, optimize=True)
    jpeg = buffer.getvalue()
    return Converted(jpeg, len(resized.getbands()), hashlib.sha256(jpeg).hexdigest())


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "cannot identify image file"
    return " ".join(str(error).split()) or type(error).__name__


def convert_in_order(paths: Iterator[str], mode: Mode, workers: int) -> Generator[Converted | str, None, None]:
    """`convert` of each path, in order, by `workers` processes (1: in this one). Close the iterator to stop early.

    Reads ahead only a few images per worker, so memory stays bounded. Raises UserError when a worker dies.
    """
    if workers <= 1:
        yield from (convert(path, mode) for path in paths)
        return
    # A fork server rather than a fork: the parent may hold threads (progress bar, test runner) that a fork would break.
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["cxrdist.shards.convert"])
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    waiting: deque[Future[Converted | str]] = deque()
    try:
        for path in itertools.islice(paths, AHEAD * workers):
            waiting.append(pool.submit(convert, path, mode))
        while waiting:
            result = waiting.popleft().result()
            for path in itertools.islice(paths, 1):
                waiting.append(pool.submit(convert, path, mode))
            yield result
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed (out of memory?); give fewer --workers and run the same command again to go on"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent stops the workers
    parent = multiprocessing.parent_process()
    if parent is not None:
        # A killed parent closes no queue: without this its workers would wait for ever.
        threading.Thread(target=_exit_with, args=(parent,), daemon=True).start()


def _exit_with(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)
