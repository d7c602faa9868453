"""One image from anywhere (a file, bytes, an array) -> the pixels that a model sees of a stored one, bit for bit."""

import io
from pathlib import Path

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from cxrdist.errors import UserError
from cxrdist.files import read_bytes
from cxrdist.shards import dicom
from cxrdist.shards.convert import PUBLISHED, Pixels, convert_bytes, resized_to_store

Source = str | Path | bytes | NDArray[np.uint8] | NDArray[np.uint16]
Levels = NDArray[np.uint8]
__all__ = ["PUBLISHED", "Levels", "Pixels", "Source", "levels_of"]


def levels_of(source: Source, pixels: Pixels = PUBLISHED, *, as_jpeg: bool = True) -> Levels | str:
    """(S, S, 1 or 3) uint8 of an image as preprocessing with `pixels` makes and stores it; or why it cannot be read.

    source: a file's path or its bytes (JPEG, PNG, DICOM, TIFF, BMP, WebP, GIF), or (H, W) uint8 or uint16 levels, or
    (H, W, 3) uint8 RGB; UserError for another array. as_jpeg: through the JPEG that preprocessing stores; False: as an
    adopted tar's image is read.
    """
    if isinstance(source, str | Path):
        try:
            content = read_bytes(Path(source), dicom.MAX_BYTES)
        except UserError as error:
            return str(error).removeprefix(f"{source}: ")
    else:
        content = source if isinstance(source, bytes) else _as_png(source)
    if as_jpeg:
        made = convert_bytes(content, pixels)
        if isinstance(made, str):
            return made
        return np.asarray(simplejpeg.decode_jpeg(made.jpeg, "GRAY" if made.channels == 1 else "RGB"))
    try:
        levels = np.asarray(resized_to_store(content, pixels))
    except MemoryError:
        raise
    except Exception as error:  # each decoder has its own kinds
        return " ".join(str(error).split()) or type(error).__name__
    return levels[..., None] if levels.ndim == 2 else levels


def _as_png(levels: NDArray[np.uint8] | NDArray[np.uint16]) -> bytes:
    """An array as the file that would hold it, so that arrays and files take one path."""
    grey = levels.ndim == 2 and levels.dtype in (np.uint8, np.uint16)
    if not (grey or (levels.ndim == 3 and levels.shape[2] == 3 and levels.dtype == np.uint8)) or not levels.size:
        what = f"{levels.dtype} {levels.shape}"
        raise UserError(f"an array of {what} is no image; give (H, W) uint8 or uint16, or (H, W, 3) uint8 RGB")
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(levels)).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()
