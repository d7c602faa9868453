"""The building blocks of docs/scale.md: planning an epoch, opening an index, and folds, for many images."""

import argparse
import csv
import io
import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from cxrdist.bench.timing import Row
from cxrdist.data.folds import assign_folds
from cxrdist.data.order import epoch_order, train_batches
from cxrdist.labels import LABELS
from cxrdist.shards.index import COLUMNS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `python -m cxrdist.bench scale`."""
    parser.add_argument(
        "--images", type=int, default=10_000_000, metavar="N", help="images to plan (default %(default)s)"
    )
    parser.add_argument(
        "--index-images", type=int, default=1_000_000, metavar="N", help="rows of the index that is parsed"
    )


def run(args: argparse.Namespace) -> list[Row]:
    """Images per second of each block, with seconds and bytes in the note."""
    rows = np.arange(args.images, dtype=np.int64)
    epoch: dict[str, Any] = dict(seed=0, epoch=1, global_batch_size=64, device_batch_size=8, world_size=8)

    def first_batch() -> None:
        next(train_batches(rows, rank=0, **epoch))

    def whole_rank() -> None:
        for _ in train_batches(rows[: args.images // 10], rank=0, **epoch):
            pass

    order_s, first_s, plan_s = (_seconds(work) for work in (lambda: epoch_order(rows, 0, 1), first_batch, whole_rank))
    text = _index_text(args.index_images)
    before = _resident()
    tables: list[pd.DataFrame] = []
    parse_s = _seconds(lambda: tables.append(_parse(text)))
    grown = _resident() - before
    num_patients = args.index_images // 3
    patients = np.char.zfill((np.arange(args.index_images) % num_patients).astype(str), 8).astype(object)
    targets = (np.random.default_rng(0).random((args.index_images, len(LABELS))) < 0.1).astype(np.float32)
    folds_s = _seconds(lambda: assign_folds(patients, targets, 5, 0))
    return [
        Row("order", f"{args.images:,} images", args.images / order_s, note=f"{order_s:.2f} s an epoch"),
        Row("order", "until the first batch", args.images / first_s, note=f"{first_s:.2f} s"),
        Row("order", "all batches of rank 0 of 8", args.images / 10 / plan_s, note=f"{args.images // 10:,} images"),
        Row(
            "index",
            f"parse {args.index_images:,} rows",
            args.index_images / parse_s,
            note=f"{parse_s:.1f} s, {len(text) / args.index_images:.0f} bytes a row on disk, "
            f"{grown / args.index_images:.0f} in memory",
        ),
        Row("folds", f"{num_patients:,} patients", args.index_images / folds_s, note=f"{folds_s:.1f} s"),
    ]


def _seconds(work: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def _resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _index_text(num_images: int) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    labels = [0] * len(LABELS)
    for row in range(num_images):
        name = f"{row // 3:08d}_001_{row % 3:03d}.jpg"
        shard = f"train-{row // 1000:06d}.tar"
        cells = (f"{row:08d}", name, f"{row // 3:08d}", "001", shard, 100_000 * (row % 1000), 90_000, f"{row:064x}")
        writer.writerow([*cells, 1, "PA", "Female", "55", *labels])
    return file.getvalue()


def _parse(text: str) -> pd.DataFrame:
    kinds: dict[str, Any] = dict.fromkeys(COLUMNS, object)
    kinds |= {"key": np.int64, "offset": np.int64, "length": np.int64}
    kinds |= {"channels": np.uint8} | dict.fromkeys(LABELS, np.int8)
    return pd.read_csv(io.StringIO(text), dtype=kinds, na_filter=False)
