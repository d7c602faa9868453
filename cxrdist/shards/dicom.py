"""A DICOM radiograph -> 8-bit grey pixels as a radiologist would first see them, and the five header fields kept.

Privacy: only the elements of `NEEDED` are ever parsed, and of these only `FIELDS` leave this module. Reasons quote
nothing of a header but numbers and words of a fixed list, and no exception's text: libraries quote values in theirs.

Files are untrusted: element count, value lengths, inflated size, number of pixels and the codestream's own dimensions
are bounded before anything is decoded. pydicom and the codecs (`pip install 'cxrdist[dicom]'`) are imported only when a
DICOM is met.
"""

import contextlib
import importlib.util
import io
import logging
import os
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from pydicom.dataset import Dataset
    from pydicom.uid import UID

FIELDS = {  # what is kept of a header: our name, DICOM's keyword
    "patient": "PatientID",
    "study": "StudyInstanceUID",
    "view": "ViewPosition",
    "sex": "PatientSex",
    "age": "PatientAge",
}
LUTS = ("ModalityLUTSequence", "VOILUTSequence")
NEEDED = (
    *FIELDS.values(),
    *LUTS,
    *("Modality", "BodyPartExamined", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation"),
    *("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PlanarConfiguration"),
    *("RescaleSlope", "RescaleIntercept", "WindowCenter", "WindowWidth", "VOILUTFunction"),
    *("PixelPaddingValue", "PixelPaddingRangeLimit", "PixelData"),
)
MODALITIES = ("", "CR", "DX", "RG", "DR", "OT")  # blank: de-identified sets such as VinDr-CXR keep no modality
OTHER_MODALITIES = "CT MR US NM PT MG XA RF IO PX ES XC SM OP OPT ECG SR PR SC KO SEG DOC RTIMAGE RTSTRUCT"
CHEST = ("CHEST", "THORA", "TORAX", "LUNG")  # any of these within the body part
OTHER_PARTS = (
    "ABDOMEN ANKLE ARM BREAST CLAVICLE CSPINE ELBOW EXTREMITY FEMUR FINGER FOOT FOREARM HAND HEAD HIP HUMERUS JAW KNEE "
    "LEG LSPINE NECK PELVIS RIBS SHOULDER SKULL SPINE TSPINE TOE WRIST"
)
COLOURS = ("RGB", "PALETTE COLOR", "YBR_FULL", "YBR_FULL_422", "YBR_PARTIAL_420", "YBR_ICT", "YBR_RCT", "HSV")
DEFLATED = "1.2.840.10008.1.2.1.99"
MAX_BYTES = 1 << 29  # of a file, inflated; the largest radiograph that passes MAX_IMAGE_PIXELS has 180 MB
MAX_READS = 100_000  # of an element or a piece of one, at any depth: a radiograph's header has some hundred
MAX_VALUE_BYTES, MAX_LUT_BYTES = 1 << 12, 1 << 18
MAX_AGE = 120  # years; de-identified sets hold 148 and 331
AGE_UNITS = {"Y": 1.0, "M": 12.0, "W": 365.25 / 7, "D": 365.25}  # in a year
EXTRA = ("pydicom", "gdcm", "openjpeg")
ROWS_AT_ONCE = 32  # of the lookup: numpy widens its indices, twice as fast within the cache
_QUIET = threading.Lock()  # the process has one standard error


class Refused(ValueError):
    """Why this DICOM is left out, in one line that quotes nothing of the patient."""


@dataclass(frozen=True)
class Radiograph:
    """pixels: (H, W) uint8, 0 black. header: the keys of `FIELDS`, '' where the file does not say."""

    pixels: np.ndarray
    header: dict[str, str]


def is_dicom(content: bytes) -> bool:
    """Whether a file's content has the DICM prefix behind its 128-byte preamble (PS3.10, 7.1)."""
    return content[128:132] == b"DICM"


def dicom_available() -> str:
    """'' where DICOM can be read, else what to do about it."""
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    return "DICOM needs: pip install 'cxrdist[dicom]'" if missing else ""


def read(content: bytes) -> Radiograph:
    """The displayed pixels and header of a DICOM file's content.

    Modality LUT, then VOI LUT or first window (without either: the full range of what is not padding), MONOCHROME1
    inverted, padding black, rounded to 8 bits: the grayscale pipeline of PS3.4, N.2.
    Raises `Refused` for whatever cannot be, or must not be, taken as a chest radiograph.
    """
    if remedy := dicom_available():
        raise Refused(remedy)
    _silence()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's, on values of which a patient's may be one
        step = "its header cannot be read"
        try:
            dataset = parsed(content)
            _check(dataset)
            step = "its pixels cannot be decoded"
            stored = stored_values(dataset)
            step = "its window or lookup table cannot be applied"
            with np.errstate(all="ignore"):
                pixels = displayed(dataset, stored)
            step = "its header cannot be read"
            return Radiograph(pixels, header_of(dataset))
        except Refused:
            raise
        except Exception as error:  # whatever the libraries raise for a damaged file; the text may quote the header
            raise Refused(f"damaged DICOM: {step} ({type(error).__name__})") from None


def parsed(content: bytes) -> "Dataset":
    """The elements of `NEEDED`, with the transfer syntax in `file_meta`; the rest of the file is skipped unread."""
    from pydicom.datadict import tag_for_keyword
    from pydicom.dataset import FileMetaDataset
    from pydicom.filereader import read_dataset
    from pydicom.uid import UID, ImplicitVRLittleEndian

    file = _Bounded(content)
    file.seek(132)
    syntax_tag = [0x00020010]
    meta = read_dataset(file, False, True, stop_when=lambda tag, *_: tag.group != 2, specific_tags=syntax_tag)
    syntax = UID(str(meta.get("TransferSyntaxUID") or ImplicitVRLittleEndian))
    if syntax == DEFLATED:
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        file = _Bounded(inflater.decompress(file.getbuffer()[file.tell() :], MAX_BYTES))
        if inflater.unconsumed_tail:
            raise Refused(f"DICOM that inflates to more than {MAX_BYTES >> 20} MiB")
    wanted = {tag: name for name in NEEDED if (tag := tag_for_keyword(name)) is not None}

    def check(tag: int, vr: str | None, length: int) -> bool:
        name = wanted.get(tag, "PixelData")  # others are skipped
        limit = MAX_LUT_BYTES if name in LUTS else MAX_VALUE_BYTES
        if name != "PixelData" and limit < length != 0xFFFFFFFF:
            raise Refused(f"damaged DICOM: {length:,} bytes of {name}")
        return False

    implicit = not syntax.is_private and syntax.is_transfer_syntax and syntax.is_implicit_VR
    big = syntax == "1.2.840.10008.1.2.2"
    dataset = read_dataset(file, implicit, not big, stop_when=check, specific_tags=list(wanted))
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    return dataset


def stored_values(dataset: "Dataset") -> np.ndarray:
    """The pixels as stored, before any lookup: (H, W), int32 sign extended from the bits in use, or unsigned.

    Each codestream goes to the decoder that survived damaged ones: OpenJPEG for JPEG 2000 and HTJ2K, Pillow for lossy
    JPEG, GDCM for lossless JPEG and JPEG-LS, ours for RLE, pydicom for uncompressed pixels.
    """
    from pydicom.encaps import get_frame
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.uid import RLELossless

    syntax: UID = dataset.file_meta.TransferSyntaxUID
    size, bits = (dataset.Rows, dataset.Columns), dataset.BitsStored
    if not syntax.is_transfer_syntax or syntax.is_private:
        raise Refused("DICOM in an unknown transfer syntax")
    if not syntax.is_encapsulated:
        decoded, _ = get_decoder(syntax).as_array(dataset, raw=True, index=0)
    elif not syntax.name.startswith(("JPEG", "High-Throughput JPEG", "RLE")):
        raise Refused(f"DICOM in {syntax.name}, which is not decoded")
    else:
        frame = get_frame(dataset.PixelData, 0, number_of_frames=1)
        if syntax == RLELossless:
            decoded = _rle(frame, *size, dataset.BitsAllocated // 8)
        else:
            stream = _codestream(frame)
            if (stream.height, stream.width, stream.channels) != (*size, 1) or stream.bits > dataset.BitsAllocated:
                raise Refused("damaged DICOM: its compressed pixels are of another size than its header says")
            bits = stream.bits
            decoded = _decoded(stream, dataset)
    if decoded.shape != size:
        raise Refused("damaged DICOM: its pixels are of another size than its header says")
    return _signed(decoded, bits, dataset.PixelRepresentation)


def displayed(dataset: "Dataset", stored: np.ndarray) -> np.ndarray:
    """Stored values (H, W) as (H, W) uint8: worked out once for each value that occurs, at most 65,536."""
    from pydicom.pixels.processing import apply_modality_lut, apply_voi

    lowest, highest = int(stored.min()), int(stored.max())
    values = np.arange(lowest, highest + 1, dtype=np.int32)
    index = (stored - stored.dtype.type(lowest)).astype(np.uint16)
    padding = _padding(dataset, values)
    grey = np.asarray(apply_modality_lut(values, dataset), np.float64)
    if not np.isfinite(grey).all():
        raise Refused("damaged DICOM: its rescale gives no finite number")
    window = _window(dataset)
    lut = (dataset.get("VOILUTSequence") or [None])[0]
    if lut is not None and lut.get("LUTData") and lut.get("LUTDescriptor"):
        grey = apply_voi(np.rint(grey).astype(np.int64), dataset) / ((1 << int(lut.LUTDescriptor[2])) - 1)
    elif window is not None:
        grey = window(grey)
    else:
        used = grey[(np.bincount(index.ravel(), minlength=len(values)) > 0) & ~padding]
        low, high = (used.min(), used.max()) if used.size else (0, 0)
        grey = (grey - low) / (high - low) if high > low else np.zeros_like(grey)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        grey = 1 - grey
    grey[padding] = 0  # the background, also of an inverted image
    table = np.rint(grey.clip(0, 1) * 255).astype(np.uint8)
    pixels = np.empty(index.shape, np.uint8)
    for top in range(0, len(index), ROWS_AT_ONCE):
        rows = slice(top, top + ROWS_AT_ONCE)
        np.take(table, index[rows], out=pixels[rows], mode="clip")
    return pixels


def header_of(dataset: "Dataset") -> dict[str, str]:
    """The fields that may be kept; the age in years ('' where it is none, or none that a person reaches)."""
    header = {name: _text(dataset, keyword) for name, keyword in FIELDS.items()}
    header["age"] = years(header["age"])
    return header


def years(age: str) -> str:
    """DICOM's age string (045Y, 018M, 006W, 010D) or a bare number of years, as years: 45, 1.5, 0.11, 0.03."""
    found = re.fullmatch(r"(\d{1,3})([YMWD]?)", age.strip().upper(), re.ASCII)
    if not found:
        return ""
    number = int(found[1]) / AGE_UNITS[found[2] or "Y"]
    return f"{number:.2f}".rstrip("0").rstrip(".") if number <= MAX_AGE else ""


def _check(dataset: "Dataset") -> None:
    """`Refused` for a file that is no single grey chest radiograph of a size and depth we read."""
    modality, part = (_text(dataset, name).upper() for name in ("Modality", "BodyPartExamined"))
    if modality not in MODALITIES:
        named = modality if modality in OTHER_MODALITIES.split() else "of an unknown kind"
        raise Refused(f"DICOM of modality {named}; chest radiographs are {', '.join(MODALITIES[1:])}")
    if part and not any(word in part for word in CHEST):
        known = [word for word in OTHER_PARTS.split() if word in part.replace(" ", "")]
        named = max(known, key=len, default="of an unknown kind")
        raise Refused(f"DICOM of body part {named}, not the chest")
    if not dataset.get("PixelData"):
        raise Refused("DICOM without pixel data")
    if int(dataset.get("NumberOfFrames") or 1) != 1:
        raise Refused(f"multi-frame DICOM ({int(dataset.NumberOfFrames):,} frames)")
    colour = str(dataset.get("PhotometricInterpretation", "")).upper()
    if dataset.get("SamplesPerPixel", 1) != 1 or colour not in ("MONOCHROME1", "MONOCHROME2"):
        raise Refused(f"DICOM in colour ({colour if colour in COLOURS else 'unknown photometric interpretation'})")
    rows, columns = int(dataset.Rows), int(dataset.Columns)
    if min(rows, columns) < 1 or rows * columns > (Image.MAX_IMAGE_PIXELS or np.inf):
        raise Refused(f"DICOM of {columns} x {rows} pixels")
    allocated, stored = int(dataset.BitsAllocated), int(dataset.BitsStored)
    high, signed = int(dataset.get("HighBit", stored - 1)), dataset.get("PixelRepresentation", 0)
    if allocated not in (8, 16) or not 8 <= stored <= allocated or high != stored - 1 or signed not in (0, 1):
        raise Refused(f"DICOM of {stored} bits in {allocated}, highest {high}; 8 to 16 bits, right-aligned, are read")
    dataset.PixelRepresentation, dataset.SamplesPerPixel = signed, 1


def _window(dataset: "Dataset") -> Any:
    """The first window as a function of float64 values to 0..1, or None (PS3.3, C.11.2.1.2 and C.11.2.1.3)."""
    center, width = (_first(dataset.get(name)) for name in ("WindowCenter", "WindowWidth"))
    kind = _text(dataset, "VOILUTFunction").upper() or "LINEAR"
    if center is None or width is None or not np.isfinite([center, width]).all() or width <= (kind == "LINEAR"):
        return None
    if kind == "SIGMOID":
        return lambda values: 1 / (1 + np.exp(-4 * (values - center) / width))
    if kind == "LINEAR_EXACT":
        return lambda values: (values - center) / width + 0.5
    return lambda values: (values - (center - 0.5)) / (width - 1) + 0.5


def _padding(dataset: "Dataset", values: np.ndarray) -> np.ndarray:
    """Which stored values are padding: bool like `values`."""
    ends = [_first(dataset.get(name)) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    if ends[0] is None:
        return np.zeros(len(values), bool)
    # Signed like the pixels, whatever value representation the writer chose.
    words = np.array([int(end) & 0xFFFF for end in ends if end is not None], np.uint16)
    first, last = np.sort(_signed(words, 16, dataset.PixelRepresentation))[[0, -1]]
    inside: np.ndarray = (values >= first) & (values <= last)
    return inside


def _signed(words: np.ndarray, bits: int, signed: int) -> np.ndarray:
    """The lowest `bits` of each value, unsigned or, where `signed`, as two's complement in int32."""
    if not signed and words.dtype.kind == "u":
        unsigned: np.ndarray = words & words.dtype.type((1 << bits) - 1)
        return unsigned
    values = words.astype(np.int32) & ((1 << bits) - 1)
    return (values ^ (1 << (bits - 1))) - (1 << (bits - 1)) if signed else values


@dataclass(frozen=True)
class _Codestream:
    """One compressed image and what it declares of itself: the decoders allocate by it, not by the DICOM header."""

    kind: Literal["jpeg 2000", "lossy", "lossless", "jpeg-ls"]
    height: int
    width: int
    bits: int
    channels: int
    content: bytes


def _codestream(frame: bytes) -> _Codestream:
    """The JPEG, JPEG-LS or JPEG 2000 codestream of a frame, a JPEG without its application segments and comments.

    The header must have segment after segment up to the scan: at bytes between them, and at an odd version in an APP0,
    libjpeg warns, and at any warning GDCM 3.2 aborts the process.
    """
    if frame[:4] == b"\xff\x4f\xff\x51":  # SOC, SIZ (ISO 15444-1, A.5.1)
        right, bottom, left, top = struct.unpack_from(">4I", frame, 8)
        channels, depth = struct.unpack_from(">HB", frame, 40)
        return _Codestream("jpeg 2000", bottom - top, right - left, (depth & 0x7F) + 1, channels, frame)
    at, kept, declared = 2, [frame[:2]], None
    while frame[:2] == b"\xff\xd8" and at + 4 < len(frame):  # SOI, then segments (ISO 10918-1, B; 14495-1, C)
        marker, length = struct.unpack_from(">HH", frame, at)
        if marker == 0xFFDA and declared:
            bits, height, width, channels = struct.unpack(">BHHB", declared[4:10])
            kind = {0xC3: "lossless", 0xF7: "jpeg-ls"}.get(declared[1], "lossy")
            return _Codestream(kind, height, width, bits, channels, b"".join(kept) + frame[at:])  # type: ignore[arg-type]
        segment = frame[at : at + 2 + length]
        if marker == 0xFFF7 or (0xFFC0 <= marker <= 0xFFCF and marker not in (0xFFC4, 0xFFC8, 0xFFCC)):
            if declared:
                break
            declared = segment
        elif marker not in (0xFFC4, 0xFFCC, 0xFFDB, 0xFFDD, 0xFFF8, 0xFFFE) and marker >> 4 != 0xFFE:
            break
        if marker != 0xFFFE and marker >> 4 != 0xFFE:
            kept.append(segment)
        at += 2 + length
    raise Refused("damaged DICOM: its compressed pixels are no JPEG codestream")


def _decoded(stream: _Codestream, dataset: "Dataset") -> np.ndarray:
    """The values of a grey codestream of checked size."""
    from openjpeg.utils import decode
    from pydicom.encaps import encapsulate
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.uid import JPEGLossless, JPEGLSLossless

    if stream.kind == "jpeg 2000":
        return np.asarray(decode(stream.content))
    if stream.kind == "lossy":
        if stream.bits != 8:
            raise Refused(f"DICOM in lossy JPEG of {stream.bits} bits: it has no free decoder")
        return np.asarray(Image.open(io.BytesIO(stream.content), formats=["JPEG"]))
    syntax = JPEGLossless if stream.kind == "lossless" else JPEGLSLossless
    dataset.PixelData = encapsulate([stream.content])
    dataset.file_meta.TransferSyntaxUID = syntax
    with _QUIET, _stderr_silenced():
        decoded, _ = get_decoder(syntax).as_array(dataset, raw=True, index=0, decoding_plugin="gdcm")
    return np.asarray(decoded)


@contextlib.contextmanager
def _stderr_silenced() -> Iterator[None]:
    """For GDCM's libjpeg, which writes to the process's standard error past all settings."""
    kept = os.dup(2)
    nothing = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def _rle(frame: bytes, rows: int, columns: int, num_planes: int) -> np.ndarray:
    """DICOM's PackBits, most significant byte first (PS3.5, G): (rows, columns) of 1 or 2 unsigned bytes.

    Not pydicom's, which expands each plane without a bound, up to 64 times the file.
    """
    header = struct.unpack_from("<16I", frame)
    if header[0] != num_planes:
        raise Refused("damaged DICOM: its RLE planes do not fit its bits")
    size = rows * columns
    value: np.ndarray = np.zeros(size, np.uint16)
    for start, end in zip(header[1 : num_planes + 1], (*header[2 : num_planes + 1], len(frame)), strict=True):
        plane, at = bytearray(), start
        while at < end and len(plane) < size:
            control = frame[at]
            if control < 128:
                plane += frame[at + 1 : at + 2 + control]
                at += 2 + control
            else:
                plane += frame[at + 1 : at + 2] * (257 - control if control > 128 else 0)
                at += 2 if control > 128 else 1
        if len(plane) < size:
            raise Refused("damaged DICOM: its RLE pixels end early")
        value = value << 8 | np.frombuffer(plane, np.uint8, size)
    return value.reshape(rows, columns)


def _text(dataset: "Dataset", keyword: str) -> str:
    value = dataset.get(keyword)
    parts = [value] if isinstance(value, str) or value is None else value  # several values: written with \ between
    text = "\\".join(str(part) for part in parts) if value is not None else ""
    return " ".join(text.replace("\0", " ").split())


def _first(value: Any) -> float | None:
    """The first of one or several numbers, or None."""
    if value is None or isinstance(value, str | bytes):
        return None
    try:
        return float(value)
    except TypeError:
        return float(value[0]) if len(value) else None


class _Bounded(io.BytesIO):
    """A file's content that may be read so many times: elements cost memory, however small and deep they are."""

    reads = 0

    def read(self, size: int | None = -1) -> bytes:
        self.reads += 1
        if self.reads > MAX_READS:
            raise Refused("damaged DICOM: its header has too many elements")
        return super().read(size)


@cache
def _silence() -> None:
    """No word of pydicom's and gdcm's on the terminal: they quote values, and a reason says what is wrong."""
    import gdcm
    import pydicom  # noqa: F401  sets up its logger

    logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
    for switch_off in (gdcm.Trace.WarningOff, gdcm.Trace.ErrorOff, gdcm.Trace.DebugOff):
        switch_off()
