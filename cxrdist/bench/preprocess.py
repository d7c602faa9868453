"""Preprocessing on one core: the published path against ours, exact and fast, on JPEGs of 2,500 px.

Published: Pillow's RGB conversion, bilinear resize to 600x600, JPEG quality 95 with optimize, one file per image.
The note says whether exact's stored pixels are the published ones, and the lowest PSNR of fast's against exact's (the
JPEG coding of both, about 50 dB each, is in it).
"""

import argparse
import io
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from PIL import Image

from cxrdist.bench.timing import Row, rows_of
from cxrdist.demo import phantoms
from cxrdist.errors import UserError
from cxrdist.shards.convert import SIZE_PX, Converted, Mode, convert, keep_memory

SOURCES = {"grey": "L", "RGB of a grey image": "RGB", "colour": "RGB"}


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
            speeds = _speeds(paths, output, args.rounds)
            rows += rows_of(f"preprocess, {kind}, one core", speeds, baseline="published", notes=notes)
    return rows


def _speeds(paths: list[Path], output: Path, rounds: int) -> dict[str, list[float]]:
    """Images per CPU second of each path in each round, each path in a process of its own.

    As in use: how the allocator treats images of 25 MB depends on what else the process did.
    """
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(
                ProcessPoolExecutor(1, mp_context=context, initializer=None if name == "published" else keep_memory)
            )
            for name in PATHS
        }
        speeds: dict[str, list[float]] = {name: [] for name in PATHS}
        for turn in range(rounds + 1):
            for name in sorted(PATHS, key=lambda name: (list(PATHS).index(name) + turn) % len(PATHS)):
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
    """An enlarged phantom with grain, as JPEG like real radiographs of that size: quality 75, 0.5 bits a pixel."""
    study = phantoms.sample_studies(8, seed)[0]
    phantom = Image.fromarray(phantoms.render(study, 0, seed)).resize((size_px, size_px), Image.Resampling.BICUBIC)
    grain = np.random.default_rng(seed).normal(0, 2, (size_px, size_px))
    pixels = (np.asarray(phantom) + grain).clip(0, 255).astype(np.uint8)
    image = Image.fromarray(pixels).convert(SOURCES[kind])
    if kind == "colour":
        image = Image.merge(
            "RGB", (Image.fromarray(pixels), Image.fromarray(pixels // 2), Image.fromarray(255 - pixels))
        )
    path = folder / f"{kind.split()[0]}-{seed}.jpg"
    image.save(path, "JPEG", quality=75)
    return path


def _published(path: Path, output: Path) -> None:
    image = Image.open(path).convert("RGB").resize((SIZE_PX, SIZE_PX), Image.Resampling.BILINEAR)
    image.save(output, "JPEG", quality=95, optimize=True)


def _exact(path: Path, output: Path) -> None:
    output.write_bytes(_converted(path, "exact").jpeg)


def _fast(path: Path, output: Path) -> None:
    output.write_bytes(_converted(path, "fast").jpeg)


PATHS: dict[str, Callable[[Path, Path], None]] = {"published": _published, "exact": _exact, "fast": _fast}


def _converted(path: Path, mode: Mode) -> Converted:
    converted = convert(str(path), mode)
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
