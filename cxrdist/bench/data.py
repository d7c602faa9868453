"""The loader against bare decoding, and against webdataset, mosaicml-streaming, litdata and the published loader.

Stage "one core" counts images per CPU second of one process, so a thread that helps costs what it takes, and other
users of the machine do not matter; stage "all cores" counts wall-clock time. Each rival yields JPEG bytes, read in
order, that simplejpeg decodes; once in a torch DataLoader as it is used, and once into one batch that is overwritten
again and again, which no training could use: its best case, given for our reader too. The published loader is
re-created from the published solution: a torch Dataset over 600-px RGB JPEG files with OpenCV and albumentations 2.0.8.
Rivals that are not installed are named as skipped (`pip install '.[bench]' litdata mosaicml-streaming`).
"""

import argparse
import dataclasses
import gc
import importlib.util
import io
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image

from cxrdist.augment.pipeline import TrainingAugment
from cxrdist.bench.timing import Row, interleaved, median_ratio, rows_of
from cxrdist.data.loader import Loader
from cxrdist.data.order import MicroBatch, epoch_order, train_batches
from cxrdist.data.reader import ShardReader
from cxrdist.recipes import PUBLISHED_STEPS
from cxrdist.shards.convert import Pixels
from cxrdist.shards.index import ShardIndex, open_index
from cxrdist.shards.writer import Source, SplitJob, write_split
from cxrdist.task import TASKS

IMAGE_SIZE = 448  # px, EVA-X's
PLANNED_ROWS = 10_000_000
Variant = Callable[[], int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-images", type=int, default=384, metavar="N", help="synthetic images (default 384)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="images of a batch (default 64)")
    parser.add_argument("--epochs", type=int, default=2, metavar="N", help="times each turn reads all (default 2)")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="turns of each variant (default 15)")


def run(args: argparse.Namespace) -> list[Row]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="cxrdist-bench-") as temporary:
        folder = Path(temporary)
        index = _write_shards(folder, args.num_images)
        files = _write_published_files(index, folder / "published")
        rows, notes = _one_core(index, files, folder, args.batch_size, args.epochs, args.rounds)
        rows += _check(index, args.batch_size, args.rounds)
        rows += _end_to_end(index, files, args.batch_size, args.rounds)
        rows += _all_cores(index, files, args.batch_size, args.epochs, args.rounds)
        rows += [_memory(folder, args.batch_size), _planning()]
    return rows + [Row("one core", name, None, note=note) for name, note in notes.items()]


def _one_core(
    index: ShardIndex, files: list[Path], folder: Path, batch_size: int, epochs: int, rounds: int
) -> tuple[list[Row], dict[str, str]]:
    """Augmentation off. The published loader has to resize and normalise here, ours leaves that to the device.

    A turn lasts more than one epoch: a single one (0.25 s) suffers from the caches as the variant before it left them.
    """
    variants: dict[str, Variant] = {"bare decode": _bare_decode(index, batch_size)}
    skipped: dict[str, str] = {}
    with Loader(index, num_threads=1) as loader:
        variants["cxrdist loader"] = _loader(loader, batch_size)
        variants["cxrdist reader, one reused batch"] = _reader(index, batch_size)
        for name, package, make in (
            ("webdataset", "webdataset", _webdataset),
            ("mosaicml-streaming", "streaming", _streaming),
            ("litdata", "litdata", _litdata),
        ):
            if importlib.util.find_spec(package):
                samples = make(index, folder / package)
                variants[f"{name}, DataLoader"] = _data_loader(DecodedDataset(samples), batch_size)
                variants[f"{name}, one reused batch"] = _reused_batch(samples, batch_size)
            else:
                skipped[name] = f"skipped: {package} is not installed"
        published = "published loader"
        if importlib.util.find_spec("albumentations"):
            variants[published] = _published(files, batch_size, augment=False)
        else:
            skipped[published] = "skipped: albumentations is not installed"
        turns = {name: _repeated(variant, epochs) for name, variant in variants.items()}
        speeds = interleaved(turns, rounds=rounds, clock=time.process_time)
    return (
        rows_of("one core", speeds, baseline=published if published in variants else None, limit="bare decode"),
        skipped,
    )


def _check(index: ShardIndex, batch_size: int, rounds: int) -> list[Row]:
    """What it takes to compare the bytes of every read with the index, as a share of the time of decoding them.

    A few images are checked again and again: bytes that were read a moment ago are in the core's cache.
    """

    def checked(index: ShardIndex) -> Variant:
        reader = ShardReader(index)
        jpegs = [(row, reader.read(row)) for row in range(min(8, len(index)))]

        def turn() -> int:
            for row, jpeg in jpegs:
                reader.check(row, jpeg)
            return len(jpegs)

        return _repeated(turn, 200)  # more than a few ticks of the clock

    limit, old = "bare decode", dataclasses.replace(index, checksums=None)
    variants = {limit: _bare_decode(index, batch_size)}
    variants |= {"XXH3": checked(index), "SHA-256, of format version 1": checked(old)}
    speeds = interleaved(variants, rounds=rounds, clock=time.process_time)
    shares = {name: f"{median_ratio(speeds[limit], values):.2%} of a decode" for name, values in speeds.items()}
    return rows_of("check of a read", speeds, limit=limit, notes=shares | {limit: ""})


def _end_to_end(index: ShardIndex, files: list[Path], batch_size: int, rounds: int) -> list[Row]:
    """JPEG to normalised float batch at model size: one core for everything, and with a GPU all cores and the GPU."""
    augment, resize = (TrainingAugment(IMAGE_SIZE, steps, seed=0) for steps in (PUBLISHED_STEPS, ()))
    rows = []
    for stage, ours in (("augmented", augment), ("resized", resize)):
        with Loader(index, num_threads=1) as loader:
            rows += _against_published(
                f"end to end {stage}, one core", loader, ours, files, batch_size, rounds, clock=time.process_time
            )
        if torch.cuda.is_available():
            with Loader(index, "cuda") as loader:
                rows += _against_published(
                    f"end to end {stage}, GPU", loader, ours, files, batch_size, rounds, num_workers=loader.num_threads
                )
    return rows


def _against_published(
    stage: str,
    loader: Loader,
    augment: TrainingAugment,
    files: list[Path],
    batch_size: int,
    rounds: int,
    *,
    num_workers: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Row]:
    def ours() -> int:
        for batch in loader.batches(_plan(len(loader.index), batch_size)):
            images = augment(batch.images, batch.keys, batch.epoch)
        images[-1, -1, -1, -1].item()  # a GPU has finished when its last value is here
        return len(loader.index)

    variants: dict[str, Variant] = {"cxrdist loader + augment": ours}
    baseline = None
    if importlib.util.find_spec("albumentations"):
        baseline = "published loader"
        is_augmented = bool(augment.stages)
        variants[baseline] = _published(files, batch_size, augment=is_augmented, num_workers=num_workers)
    return rows_of(stage, interleaved(variants, rounds=rounds, clock=clock), baseline=baseline)


def _all_cores(index: ShardIndex, files: list[Path], batch_size: int, epochs: int, rounds: int) -> list[Row]:
    """Wall-clock time with all cores: threads in one process against worker processes of a torch DataLoader."""
    cores = len(os.sched_getaffinity(0))
    limit = f"bare decode, {cores} threads"
    variants: dict[str, Variant] = {limit: _bare_decode_threads(index, batch_size, cores)}
    baseline = None
    with Loader(index, num_threads=cores) as loader:
        variants[f"cxrdist loader, {cores} threads"] = _loader(loader, batch_size)
        variants[f"worker processes, {cores}"] = _worker_processes(index, batch_size, cores)
        if importlib.util.find_spec("albumentations"):
            baseline = f"published loader, {cores} workers"
            variants[baseline] = _published(files, batch_size, augment=False, num_workers=cores)
        turns = {name: _repeated(variant, epochs) for name, variant in variants.items()}
        speeds = interleaved(turns, rounds=rounds)
    return rows_of("all cores", speeds, baseline=baseline, limit=limit)


def _repeated(variant: Variant, times: int) -> Variant:
    return lambda: sum(variant() for _ in range(times))


def _plan(num_rows: int, batch_size: int) -> Iterator[MicroBatch]:
    return train_batches(
        np.arange(num_rows),
        seed=0,
        epoch=0,
        global_batch_size=batch_size,
        device_batch_size=batch_size,
        rank=0,
        world_size=1,
    )


def _loader(loader: Loader, batch_size: int) -> Variant:
    def epoch() -> int:
        return sum(len(batch.rows) for batch in loader.batches(_plan(len(loader.index), batch_size)))

    return epoch


def _reader(index: ShardIndex, batch_size: int) -> Variant:
    reader, decode = ShardReader(index), _decode_into_batches(batch_size)
    return lambda: decode(reader.read(row) for micro in _plan(len(index), batch_size) for row in micro.rows.tolist())


def _bare_decode(index: ShardIndex, batch_size: int) -> Variant:
    reader = ShardReader(index)
    jpegs = [reader.read(row) for row in range(len(index))]
    decode = _decode_into_batches(batch_size)
    return lambda: decode(iter(jpegs))


def _bare_decode_threads(index: ShardIndex, batch_size: int, num_threads: int) -> Variant:
    reader = ShardReader(index)
    parts = [[reader.read(row) for row in range(first, len(index), num_threads)] for first in range(num_threads)]
    decoders = [_decode_into_batches(batch_size) for _ in parts]
    pool = ThreadPoolExecutor(num_threads)
    return lambda: sum(pool.map(lambda decode, jpegs: decode(iter(jpegs)), decoders, parts))


def _decode_into_batches(batch_size: int) -> Callable[[Iterator[bytes]], int]:
    """Decode grey images one after the other into one reused batch."""
    batch = np.empty((batch_size, 600, 600, 1), np.uint8)

    def decode(jpegs: Iterator[bytes]) -> int:
        count = 0
        for count, jpeg in enumerate(jpegs, start=1):
            simplejpeg.decode_jpeg(jpeg, "GRAY", buffer=batch[count % batch_size])
        return count

    return decode


def _webdataset(index: ShardIndex, folder: Path) -> Iterable[dict[str, Any]]:
    import webdataset as wds

    urls = [str(index.folder / shard) for shard in index.shards]
    return cast(Iterable[dict[str, Any]], wds.WebDataset(urls, shardshuffle=False, empty_check=False))


def _streaming(index: ShardIndex, folder: Path) -> Iterable[dict[str, Any]]:
    import streaming

    reader = ShardReader(index)
    with streaming.MDSWriter(columns={"jpg": "bytes", "key": "int"}, out=str(folder)) as writer:
        for row, key in enumerate(index.keys.tolist()):
            writer.write({"jpg": reader.read(row), "key": key})
    streaming.base.util.clean_stale_shared_memory()
    return cast(Iterable[dict[str, Any]], streaming.StreamingDataset(local=str(folder), batch_size=1, shuffle=False))


def _litdata(index: ShardIndex, folder: Path) -> Iterable[dict[str, Any]]:
    import litdata
    from litdata.streaming.cache import Cache

    reader = ShardReader(index)
    folder.mkdir()
    cache = Cache(str(folder), chunk_bytes="64MB")
    for row, key in enumerate(index.keys.tolist()):
        cache[row] = {"jpg": reader.read(row), "key": key}
    cache.done()
    cache.merge()
    return cast(Iterable[dict[str, Any]], litdata.StreamingDataset(str(folder)))


class DecodedDataset(torch.utils.data.IterableDataset[torch.Tensor]):
    """A rival's samples as decoded grey images."""

    def __init__(self, samples: Iterable[dict[str, Any]]) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[torch.Tensor]:
        for sample in self.samples:
            yield torch.from_numpy(simplejpeg.decode_jpeg(sample["jpg"], "GRAY"))


def _reused_batch(samples: Iterable[dict[str, Any]], batch_size: int) -> Variant:
    decode = _decode_into_batches(batch_size)
    return lambda: decode(sample["jpg"] for sample in samples)


class PublishedDataset(torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """The published solution's training Dataset: OpenCV reading, albumentations, one float tensor an image."""

    def __init__(self, files: list[Path], targets: NDArray[np.float32], augment: bool) -> None:
        os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # otherwise importing it looks for a newer version
        import albumentations as A
        import cv2
        from albumentations.pytorch import ToTensorV2

        cv2.setNumThreads(0)
        last = [A.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)), ToTensorV2()]
        if augment:
            first = [
                A.RandomResizedCrop(size=(IMAGE_SIZE, IMAGE_SIZE), scale=(0.85, 1.0), ratio=(0.9, 1.1)),
                A.HorizontalFlip(p=0.5),
                A.Rotate(limit=12, border_mode=cv2.BORDER_CONSTANT, p=0.4),
                A.CLAHE(clip_limit=(1, 4), tile_grid_size=(8, 8), p=0.3),
                A.RandomBrightnessContrast(brightness_limit=0.2, contrast_limit=0.2, p=0.3),
                A.CoarseDropout(
                    num_holes_range=(1, 2), hole_height_range=(0.1, 0.2), hole_width_range=(0.1, 0.2), fill=0, p=0.2
                ),
                A.Affine(scale=(0.95, 1.05), translate_percent=(-0.03, 0.03), rotate=0, p=0.25),
            ]
        else:
            first = [A.Resize(IMAGE_SIZE, IMAGE_SIZE)]
        self.files, self.targets, self.transform = files, targets, A.Compose([*first, *last])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, item: int) -> tuple[torch.Tensor, torch.Tensor]:
        import cv2

        image = cv2.cvtColor(cv2.imread(str(self.files[item])), cv2.COLOR_BGR2RGB)
        return self.transform(image=image)["image"], torch.from_numpy(self.targets[item])


def _published(files: list[Path], batch_size: int, *, augment: bool, num_workers: int = 0) -> Variant:
    targets = np.zeros((len(files), TASKS["b"].num_labels), np.float32)
    return _data_loader(PublishedDataset(files, targets, augment), batch_size, num_workers)


class GreyDataset(torch.utils.data.Dataset[torch.Tensor]):
    """Our reading and decoding as a torch Dataset, to see what worker processes cost."""

    def __init__(self, index: ShardIndex) -> None:
        self.reader = ShardReader(index)

    def __len__(self) -> int:
        return len(self.reader.index)

    def __getitem__(self, item: int) -> torch.Tensor:
        return torch.from_numpy(simplejpeg.decode_jpeg(self.reader.read(item), "GRAY"))


def _worker_processes(index: ShardIndex, batch_size: int, num_workers: int) -> Variant:
    return _data_loader(GreyDataset(index), batch_size, num_workers)


def _data_loader(dataset: torch.utils.data.Dataset[Any], batch_size: int, num_workers: int = 0) -> Variant:
    shuffle = None if isinstance(dataset, torch.utils.data.IterableDataset) else True
    loader: torch.utils.data.DataLoader[Any] = torch.utils.data.DataLoader(
        dataset, batch_size, shuffle=shuffle, num_workers=num_workers, persistent_workers=num_workers > 0
    )

    def epoch() -> int:
        return sum(len(batch[0] if isinstance(batch, list) else batch) for batch in loader)

    return epoch


def _memory(folder: Path, batch_size: int) -> Row:
    """Resident memory of a fresh process that runs the loader, above the same process after its imports."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        before, after = pool.apply(_resident_mb, (folder, batch_size))
    note = f"+{after - before:.0f} MB resident, batches of {batch_size}, {before:.0f} MB after the imports"
    return Row("memory", "cxrdist loader", None, note=note)


def _resident_mb(folder: Path, batch_size: int) -> tuple[float, float]:
    def resident() -> float:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    gc.collect()
    before, highest = resident(), 0.0
    index = open_index(folder / "div_b", "train")
    with Loader(index) as loader:
        for _ in range(4):
            for _ in loader.batches(_plan(len(index), batch_size)):
                highest = max(highest, resident())
    return before, highest


def _planning() -> Row:
    rows = np.arange(PLANNED_ROWS)
    seconds = []
    for epoch in range(3):
        start = time.perf_counter()
        epoch_order(rows, seed=0, epoch=epoch)
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    return Row("plan an epoch", f"{PLANNED_ROWS:,} rows", PLANNED_ROWS / median, note=f"{median:.2f} s an epoch")


def _write_shards(folder: Path, num_images: int) -> ShardIndex:
    """A training split of grey images whose JPEGs have the size of chest X-rays' (60-70 kB; real ones 49-69 kB)."""
    rng = np.random.default_rng(0)
    (folder / "source").mkdir()
    sources = []
    for key in range(num_images):
        path = folder / "source" / f"{key:08d}_001_001.png"
        smooth = Image.fromarray(rng.integers(0, 255, (30, 30), dtype=np.uint8)).resize(
            (600, 600), Image.Resampling.BICUBIC
        )
        noisy = np.asarray(smooth, np.float32) + rng.normal(0, 0.7, (600, 600))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, compress_level=1)
        size = path.stat().st_size
        targets = (0.0,) * TASKS["b"].num_labels
        sources.append(Source(key, path.name, str(path), size, "", f"{key:08d}", "001", targets=targets))
    write_split(SplitJob(folder / "div_b", TASKS["b"], "train", sources, Pixels(), 128, {}))
    return open_index(folder / "div_b", "train")


def _write_published_files(index: ShardIndex, folder: Path) -> list[Path]:
    """The same images as the published preprocessing stored them: three equal channels, JPEG quality 95."""
    folder.mkdir()
    reader = ShardReader(index)
    files = []
    for row, name in enumerate(index.image_names):
        files.append(folder / f"{Path(name).stem}.jpg")
        image = Image.open(io.BytesIO(reader.read(row))).convert("RGB")
        image.save(files[-1], "JPEG", quality=95, optimize=True)
    return files
