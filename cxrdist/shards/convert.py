"""One source image -> the bytes stored for it: a square of 600 px, Pillow's bilinear, JPEG quality 95.

Runs in worker processes, so it imports no pandas and no torch. Whatever is wrong with a file becomes a reason, never an
exception: one bad image of a hundred thousand must not end the run.
"""

import ctypes
import hashlib
import io
import itertools
import multiprocessing
import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeVar

import numpy as np
import simplejpeg
import xxhash
from PIL import ExifTags, Image, UnidentifiedImageError

from cxrdist.errors import UserError
from cxrdist.shards import dicom, store

Mode = Literal["exact", "fast"]
Fit = Literal["squash", "pad"]
SIZE_PX = 600  # as published
MIN_SIZE_PX, MAX_SIZE_PX = 384, 2048
JPEG_QUALITY = 95
ROWS_AT_ONCE = 32  # of a 2,500-px image: 320 kB, stays in the cache (three times faster than all rows at once)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
AHEAD = 4  # images in flight per worker
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF")  # what Pillow decodes by itself, without helper programs
EXTENSIONS = (".png", ".jpg", ".jpeg", ".dcm", ".dicom", ".tif", ".tiff", ".bmp", ".webp", ".gif")


@dataclass(frozen=True)
class Pixels:
    """How an image becomes what is stored.

    mode: "exact", or "fast" (large JPEGs decoded at half size, 48 dB or more from exact). size_px: side of the square.
    fit: "squash" both sides to it, as published, or "pad": aspect kept, centred on black.
    Raises UserError for a size outside 384..2048.
    """

    mode: Mode = "exact"
    size_px: int = SIZE_PX
    fit: Fit = "squash"

    def __post_init__(self) -> None:
        if not MIN_SIZE_PX <= self.size_px <= MAX_SIZE_PX:
            raise UserError(f"images of {self.size_px} px are not stored; give --size {MIN_SIZE_PX} to {MAX_SIZE_PX}")

    def fitted(self, width: int, height: int) -> tuple[int, int]:
        """Width and height that a source of this size has within the square."""
        if self.fit == "squash":
            return self.size_px, self.size_px
        longer = max(width, height)
        return max(1, round(width * self.size_px / longer)), max(1, round(height * self.size_px / longer))


PUBLISHED = Pixels()


def as_mode(text: str) -> Mode:
    """The mode of that name; UserError where there is none."""
    if text not in ("exact", "fast"):
        raise UserError(f"{text!r} is not a mode of resizing")
    return "exact" if text == "exact" else "fast"


@dataclass(frozen=True)
class Converted:
    """The stored form of an image: JPEG bytes (or what came), 1 or 3 channels, two hashes of the bytes (SHA-256 in
    hex), its source.

    width, height: px of the source. orientation: 1 to 8, what EXIF says and nobody applied (as published); 1 where it
    says nothing. header: the five fields of a DICOM (`dicom.FIELDS`, '' where absent), {} for other files.
    """

    jpeg: bytes
    channels: int
    sha256: str
    xxh3_64: int
    width: int
    height: int
    orientation: int
    header: dict[str, str]


@dataclass(frozen=True)
class Decoded:
    """A source's pixels, mode L or RGB, perhaps at half the source's (width, height)."""

    image: Image.Image
    size: tuple[int, int]
    orientation: int = 1
    header: dict[str, str] = field(default_factory=dict)


def convert(path: str, pixels: Pixels = PUBLISHED) -> Converted | str:
    """The image at `path` (of a store: `cxrdist.shards.store`) as it is stored, or why (one line) it must be left out.

    Raises UserError when a store does not answer: that says nothing of the image.
    """
    try:
        if store.is_remote(path):
            size = len(content := store.read(path, dicom.MAX_BYTES + 1))
        else:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                content = file.read() if size <= dicom.MAX_BYTES else b""
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if size > dicom.MAX_BYTES:
        return f"larger than {dicom.MAX_BYTES >> 20} MiB"
    return convert_bytes(content, pixels)


def convert_bytes(content: bytes, pixels: Pixels = PUBLISHED, *, keep: bool = False) -> Converted | str:
    """`convert` of a file's content. keep: it is stored as it is, and made square whenever it is read."""
    try:
        source = decode(content, pixels)
        resized = _resized(source, pixels)
        jpeg = content if keep else encode(resized)
    except UnidentifiedImageError:
        return "cannot identify image file"
    except Exception as error:  # whatever a decoder says of a damaged file is the reason to leave it out
        return " ".join(str(error).split()) or type(error).__name__
    hashes = (hashlib.sha256(jpeg).hexdigest(), xxhash.xxh3_64_intdigest(jpeg))
    return Converted(jpeg, len(resized.getbands()), *hashes, *source.size, source.orientation, source.header)


def decode(content: bytes, pixels: Pixels = PUBLISHED) -> Decoded:
    """The pixels of a file's content, and what is recorded of it.

    Raises `dicom.Refused` for a DICOM that must be left out, and whatever Pillow raises for a file it cannot decode.
    """
    if dicom.is_dicom(content):
        radiograph = dicom.read(content)
        image = Image.fromarray(radiograph.pixels)
        return Decoded(image, image.size, header=radiograph.header)
    with warnings.catch_warnings():
        # Beyond 89 million pixels Pillow warns of a decompression bomb, beyond 179 it refuses; a radiograph has 20.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    decoded = _decode(image, content, pixels)
    return Decoded(decoded, image.size, _orientation(image))


def resized_to_store(content: bytes, pixels: Pixels = PUBLISHED) -> Image.Image:
    """The square of `size_px` pixels, mode L or RGB, before JPEG. Raises what `decode` raises."""
    return _resized(decode(content, pixels), pixels)


def _resized(source: Decoded, pixels: Pixels) -> Image.Image:
    box = None
    if source.image.size != source.size:  # halved: a last pixel that is half outside an odd side must count half,
        box = (0, 0, source.size[0] / 2, source.size[1] / 2)  # else the picture shifts and falls to 38 dB
    size = pixels.fitted(*source.size)
    resized = source.image.resize(size, Image.Resampling.BILINEAR, box)
    if resized.mode == "RGB":
        red, green, blue = resized.split()
        if red.tobytes() == green.tobytes() == blue.tobytes():
            resized = red
    if min(size) == pixels.size_px:
        return resized
    square = Image.new(resized.mode, (pixels.size_px, pixels.size_px))
    square.paste(resized, ((pixels.size_px - size[0]) // 2, (pixels.size_px - size[1]) // 2))
    return square


def encode(resized: Image.Image) -> bytes:
    """The pixels as JPEG, and nothing else: without the comment that Pillow would copy from the source."""
    buffer = io.BytesIO()
    # Without the published run's `optimize`: it changes no pixel, saves 1 % of the bytes and triples the encoding time.
    resized.save(buffer, "JPEG", quality=JPEG_QUALITY, comment=b"")
    return buffer.getvalue()


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation of a decoded image, 1 where it has none or Pillow has applied it (TIFF)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            value = image.getexif().get(ExifTags.Base.Orientation, 1)
        except Exception:  # damaged EXIF beside intact pixels
            return 1
    return value if value in range(1, 9) else 1


def _decode(image: Image.Image, content: bytes, pixels: Pixels) -> Image.Image:
    """The pixels of Pillow's `convert("RGB")`, in mode L where that is enough; scaled where it would clip 16 bits."""
    if image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB"):
        try:
            return _decode_jpeg(content, image.size, image.mode, pixels)
        except ValueError:
            pass  # simplejpeg is stricter than Pillow, which accepts some damage: Pillow decides, as published
    if image.mode in ("L", "LA", "La", "1"):
        return image.convert("L")
    if image.mode.startswith("I"):
        return _scaled_to_8_bits(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    return image.convert("RGB")


def _decode_jpeg(content: bytes, size: tuple[int, int], kind: str, pixels: Pixels) -> Image.Image:
    """Decode with simplejpeg: Pillow's pixels (both are libjpeg-turbo), without its copies."""
    options = {}
    # Half size where that leaves twice the target: 50 dB or more from the exact pixels. Shrinking more fell to 47 dB
    # and saves little: most of the time goes into the entropy code.
    target = pixels.fitted(*size)
    if pixels.mode == "fast" and size[0] >= 4 * target[0] and size[1] >= 4 * target[1]:
        options = {"min_factor": 2, "min_height": -(-size[1] // 2), "min_width": -(-size[0] // 2)}
    if kind == "L":
        return Image.fromarray(simplejpeg.decode_jpeg(content, "GRAY", **options)[..., 0])
    # Most radiographs saved as RGB are grey. Where no pixel has colour, how colour is upsampled makes no difference, so
    # the cheap way decides; decoding only the luma would be cheaper still, but could not tell.
    grey = _grey_of(simplejpeg.decode_jpeg(content, "RGBA", fastupsample=True, **options))
    if grey is not None:
        return Image.fromarray(grey)
    return Image.frombuffer("RGBX", size, simplejpeg.decode_jpeg(content, "RGBA"), "raw", "RGBX", 0, 1).convert("RGB")


def _grey_of(pixels: np.ndarray) -> np.ndarray | None:
    """One channel (H, W) of uint8 (H, W, 4) pixels if red, green and blue are equal in each of them, else None."""
    height, width, _ = pixels.shape
    words = pixels.reshape(height, width * 4).view("<u4")
    grey = np.empty((height, width), np.uint8)
    shifted = np.empty((ROWS_AT_ONCE, width), np.uint32)
    for top in range(0, height, ROWS_AT_ONCE):
        rows = words[top : top + ROWS_AT_ONCE]
        grey[top : top + ROWS_AT_ONCE] = rows  # keeps the lowest byte, red
        differ = np.right_shift(rows, 8, out=shifted[: len(rows)])
        np.bitwise_xor(differ, rows, out=differ)  # lowest two bytes: red ^ green, green ^ blue
        if np.bitwise_or.reduce(differ, axis=None) & 0xFFFF:
            return None
    return grey


def _scaled_to_8_bits(image: Image.Image) -> Image.Image:
    """Mode L of an image with 9 to 32 bits, scaled by the fewest bits (at least 8) that hold its largest value."""
    values = np.asarray(image)
    top = (1 << max(8, max(0, int(values.max())).bit_length())) - 1
    scaled = np.empty(values.shape, np.uint8)
    for start in range(0, len(values), ROWS_AT_ONCE):  # 64 bits for all of a small PNG's 89 million pixels take 1.6 GB
        rows = values[start : start + ROWS_AT_ONCE].astype(np.int64).clip(min=0)
        scaled[start : start + ROWS_AT_ONCE] = (rows * 255 + top // 2) // top
    return Image.fromarray(scaled)


class Planned(Protocol):
    """An image to convert: its `path`, or the `reason` why there is none."""

    @property
    def path(self) -> str: ...

    @property
    def reason(self) -> str: ...


P = TypeVar("P", bound=Planned)


def convert_in_order(
    images: Iterator[P], pixels: Pixels, workers: int
) -> Generator[tuple[P, Converted | str], None, None]:
    """Each image with its `convert`, or its reason, in order, by `workers` processes (1: in this one).

    Images are asked for when their turn comes: `AHEAD` a worker run ahead. Raises UserError when a worker dies, or the
    store of the images does not answer. Close the iterator to stop early.
    """
    if workers <= 1:
        yield from ((image, image.reason or convert(image.path, pixels)) for image in images)
        return
    # A fork server rather than a fork: the parent may hold threads (progress bar, test runner) that a fork would break.
    context = multiprocessing.get_context("forkserver")
    # What a worker imports with the parent's main module, most of it unused: once, and its memory shared.
    context.set_forkserver_preload(["cxrdist.tables", "cxrdist.shards.writer"])
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    submitted = ((image, image.reason or pool.submit(convert, image.path, pixels)) for image in images)
    try:
        waiting = deque(itertools.islice(submitted, AHEAD * workers))
        while waiting:
            image, result = waiting.popleft()
            converted = result if isinstance(result, str) else result.result()
            waiting.extend(itertools.islice(submitted, 1))
            yield image, converted
    except BrokenProcessPool:
        remedy = "give fewer --workers and run the same command again: finished shards are kept"
        raise UserError(f"a worker process was killed (out of memory?); {remedy}") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def keep_memory() -> None:
    """Let this process keep the memory of one image for the next: 1.3 ms of 12 an image in fast mode (glibc only)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 26)
        mallopt(M_TRIM_THRESHOLD, 1 << 28)


def _start_worker() -> None:
    keep_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the process group; the parent stops the workers
    parent = multiprocessing.parent_process()
    assert parent is not None

    def exit_with_parent() -> None:  # which closes no queue when it is killed: its workers would wait forever
        parent.join()
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()
