"""Preprocessing on one core: the published path against ours, exact and fast, on JPEGs of 2,500 px.

Published: Pillow's RGB conversion, bilinear resize to 600x600, JPEG quality 95 with optimize, one file per image.
The note says whether exact's stored pixels are the published ones, and the lowest PSNR of fast's against exact's (the
JPEG coding of both, about 50 dB each, is in it).
DICOMs of the same pixels in 12 bits, uncompressed and in lossless JPEG 2000: against pydicom's decoding and Pillow's
resize alone, without window, 8 bits or JPEG.
"""

import argparse
import io
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from PIL import Image

from cxrdist.bench.timing import Row, rows_of
from cxrdist.demo import phantoms
from cxrdist.errors import UserError
from cxrdist.shards.convert import SIZE_PX, Converted, Mode, Pixels, convert, keep_memory
from cxrdist.shards.dicom import dicom_available

SOURCES = {"grey": "L", "RGB of a grey image": "RGB", "colour": "RGB"}
DICOM_SOURCES = ("DICOM, uncompressed", "DICOM, JPEG 2000")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size-px", type=int, default=2500, metavar="N", help="side of the sources (default 2500)")
    parser.add_argument("--num-images", type=int, default=6, metavar="N", help="sources of each kind (default 6)")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="turns that each path takes (default 15)")


def run(args: argparse.Namespace) -> list[Row]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in SOURCES:
            paths = [write_source(Path(folder), kind, args.size_px, seed) for seed in range(args.num_images)]
            output = Path(folder) / "output.jpg"
            notes = {"exact": _identity(paths, output), "fast": _distance(paths)}
            notes["published"] = f"{sum(os.path.getsize(path) for path in paths) // len(paths) // 1000:,} kB a source"
            speeds = _speeds(("published", "exact", "fast"), paths, output, args.rounds)
            rows += rows_of(f"preprocess, {kind}, one core", speeds, baseline="published", notes=notes)
        for kind in DICOM_SOURCES:
            stage = f"preprocess, {kind}, one core"
            if remedy := dicom_available():
                rows.append(Row(stage, "skipped", None, note=remedy))
                continue
            paths = [write_dicom(Path(folder), kind, args.size_px, seed) for seed in range(args.num_images)]
            notes = {"pydicom": f"{sum(os.path.getsize(path) for path in paths) // len(paths) // 1000:,} kB a source"}
            speeds = _speeds(("pydicom", "exact"), paths, Path(folder) / "output.jpg", args.rounds)
            rows += rows_of(stage, speeds, baseline="pydicom", notes=notes)
    return rows


def _speeds(names: Sequence[str], paths: list[Path], output: Path, rounds: int) -> dict[str, list[float]]:
    """Images per CPU second of each path in each round, each path in a process of its own.

    As in use: how the allocator treats images of 25 MB depends on what else the process did.
    """
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(
                ProcessPoolExecutor(1, mp_context=context, initializer=keep_memory if name in OURS else None)
            )
            for name in names
        }
        speeds: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(rounds + 1):
            for name in sorted(names, key=lambda name: (names.index(name) + turn) % len(names)):
                seconds = workers[name].submit(_cpu_seconds, name, paths, output).result()
                if turn:  # the first is the warm-up
                    speeds[name].append(len(paths) / seconds)
    return speeds


def _cpu_seconds(name: str, paths: list[Path], output: Path) -> float:
    start = time.process_time()
    for path in paths:
        PATHS[name](path, output)
    return time.process_time() - start


def write_source(folder: Path, kind: str, size_px: int, seed: int) -> Path:
    """A source as JPEG like real radiographs of that size: quality 75, 0.5 bits a pixel."""
    pixels = _source_pixels(size_px, seed).astype(np.uint8)
    image = Image.fromarray(pixels).convert(SOURCES[kind])
    if kind == "colour":
        image = Image.merge(
            "RGB", (Image.fromarray(pixels), Image.fromarray(pixels // 2), Image.fromarray(255 - pixels))
        )
    path = folder / f"{kind.split()[0]}-{seed}.jpg"
    image.save(path, "JPEG", quality=75)
    return path


def write_dicom(folder: Path, kind: str, size_px: int, seed: int) -> Path:
    """A source as DICOM of 12 bits with a window."""
    from openjpeg.utils import encode_array
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.encaps import encapsulate
    from pydicom.uid import UID, DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian, JPEG2000Lossless

    values = (_source_pixels(size_px, seed) * 16).astype(np.uint16)
    compressed = kind == "DICOM, JPEG 2000"
    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = JPEG2000Lossless if compressed else ExplicitVRLittleEndian
    made.file_meta.MediaStorageSOPClassUID = made.SOPClassUID = DigitalXRayImageStorageForPresentation
    made.file_meta.MediaStorageSOPInstanceUID = made.SOPInstanceUID = UID(f"2.25.{seed}")
    made.Modality, made.PhotometricInterpretation, made.SamplesPerPixel = "DX", "MONOCHROME2", 1
    made.Rows, made.Columns, made.PixelRepresentation = *values.shape, 0
    made.BitsAllocated, made.BitsStored, made.HighBit = 16, 12, 11
    made.WindowCenter, made.WindowWidth = 2048, 4096
    made.PixelData = encapsulate([encode_array(values, bits_stored=12)]) if compressed else values.tobytes()
    made["PixelData"].is_undefined_length = compressed
    path = folder / f"{len(kind)}-{seed}.dcm"
    made.save_as(path, enforce_file_format=True)
    return path


def _source_pixels(size_px: int, seed: int) -> np.ndarray:
    """An enlarged phantom with grain: (size_px, size_px) float64 in 0..255."""
    study = phantoms.sample_studies(8, seed)[0]
    phantom = Image.fromarray(phantoms.render(study, 0, seed)).resize((size_px, size_px), Image.Resampling.BICUBIC)
    grain = np.random.default_rng(seed).normal(0, 2, (size_px, size_px))
    pixels: np.ndarray = (np.asarray(phantom) + grain).clip(0, 255)
    return pixels


def _published(path: Path, output: Path) -> None:
    image = Image.open(path).convert("RGB").resize((SIZE_PX, SIZE_PX), Image.Resampling.BILINEAR)
    image.save(output, "JPEG", quality=95, optimize=True)


def _exact(path: Path, output: Path) -> None:
    output.write_bytes(_converted(path, "exact").jpeg)


def _fast(path: Path, output: Path) -> None:
    output.write_bytes(_converted(path, "fast").jpeg)


def _pydicom(path: Path, output: Path) -> None:
    import pydicom

    pixels = pydicom.dcmread(path).pixel_array
    Image.fromarray(pixels).resize((SIZE_PX, SIZE_PX), Image.Resampling.BILINEAR)


PATHS: dict[str, Callable[[Path, Path], None]] = {
    "published": _published,
    "exact": _exact,
    "fast": _fast,
    "pydicom": _pydicom,
}
OURS = ("exact", "fast")


def _converted(path: Path, mode: Mode) -> Converted:
    converted = convert(str(path), Pixels(mode))
    if isinstance(converted, str):
        raise UserError(f"{path}: {converted}")
    return converted


def _pixels(jpeg: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))


def _identity(paths: list[Path], output: Path) -> str:
    same = 0
    for path in paths:
        _published(path, output)
        same += np.array_equal(_pixels(output.read_bytes()), _pixels(_converted(path, "exact").jpeg))
    return f"{same} of {len(paths)} images have the published pixels"


def _distance(paths: list[Path]) -> str:
    """The lowest PSNR in dB of fast against exact, each as stored."""
    errors = [
        np.mean((_pixels(_converted(path, "exact").jpeg).astype(float) - _pixels(_converted(path, "fast").jpeg)) ** 2)
        for path in paths
    ]
    return f"PSNR >= {10 * np.log10(255**2 / max(errors)):.1f} dB" if max(errors) else "the same as exact"
