"""The building blocks of docs/scale.md: planning an epoch, opening an index, and folds, for many images."""

import argparse
import hashlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cxrdist.bench.timing import Row
from cxrdist.data.folds import assign_folds
from cxrdist.data.order import epoch_order, train_batches
from cxrdist.shards.columns import Texts
from cxrdist.shards.index import (
    Counts,
    FileMeta,
    Resize,
    ShardMeta,
    SplitMeta,
    arrow_bytes,
    index_rows,
    open_index,
    shard_name,
)
from cxrdist.task import TASKS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `python -m cxrdist.bench scale`."""
    parser.add_argument(
        "--images", type=int, default=10_000_000, metavar="N", help="images to plan (default %(default)s)"
    )
    parser.add_argument(
        "--index-images", type=int, default=1_000_000, metavar="N", help="rows of the index that is opened"
    )


def run(args: argparse.Namespace) -> list[Row]:
    """Images per second of each block, with seconds and bytes in the note."""
    rows = np.arange(args.images, dtype=np.int64)
    epoch: dict[str, Any] = dict(seed=0, epoch=1, global_batch_size=64, device_batch_size=8, world_size=8)

    def first_batch() -> None:
        next(train_batches(rows, rank=0, **epoch))

    def all_of_rank() -> None:
        for _ in train_batches(rows[: args.images // 10], rank=0, **epoch):
            pass

    order_s, first_s, plan_s = (_seconds(work) for work in (lambda: epoch_order(rows, 0, 1), first_batch, all_of_rank))
    with tempfile.TemporaryDirectory(prefix="cxrdist-bench-") as folder:
        size = _write_set(Path(folder), args.index_images)
        open_s = _seconds(lambda: open_index(Path(folder), "train"))
    num_patients = args.index_images // 3
    patients = Texts(f"{row % num_patients:08d}" for row in range(args.index_images))
    labels = (args.index_images, TASKS["b"].num_labels)
    targets = (np.random.default_rng(0).random(labels) < 0.1).astype(np.float32)
    folds_s = _seconds(lambda: assign_folds(patients, targets, 5, 0))
    return [
        Row("order", f"{args.images:,} images", args.images / order_s, note=f"{order_s:.2f} s an epoch"),
        Row("order", "until the first batch", args.images / first_s, note=f"{first_s:.2f} s"),
        Row("order", "all batches of rank 0 of 8", args.images / 10 / plan_s, note=f"{args.images // 10:,} images"),
        Row(
            "index",
            f"open {args.index_images:,} rows",
            args.index_images / open_s,
            note=f"{open_s:.1f} s, {size / args.index_images:.0f} bytes a row on disk",
        ),
        Row("folds", f"{num_patients:,} patients", args.index_images / folds_s, note=f"{folds_s:.1f} s"),
    ]


def _seconds(work: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def _write_set(folder: Path, num_images: int) -> int:
    """A split of that many images whose tars are holes; the size of its index."""
    number, per_shard = np.arange(num_images), 1000
    task = TASKS["b"]
    columns: dict[str, Any] = {
        "key": number,
        "image_name": [f"{row // 3:08d}_001_{row % 3:03d}.jpg" for row in range(num_images)],
        "patient": [f"{row // 3:08d}" for row in range(num_images)],
        "shard": number // per_shard,
        "offset": 512 + 100_000 * (number % per_shard),
        "length": np.full(num_images, 90_000),
        "sha256": [bytes(32)] * num_images,
        "xxh3_64": number,
        "channels": np.ones(num_images),
    }
    constant = {"study": "001", "view": "PA", "sex": "Female", "age": "55"}
    columns |= {name: [text] * num_images for name, text in constant.items()}
    content = arrow_bytes(index_rows(columns, task.labels, np.zeros((num_images, task.num_labels), np.float32)))
    shards = []
    for shard in range(-(-num_images // per_shard)):
        shards.append(ShardMeta(name=shard_name("train", shard), bytes=100_000 * per_shard, sha256="", count=per_shard))
        with (folder / shards[-1].name).open("wb") as file:
            file.truncate(shards[-1].bytes)
    meta = SplitMeta(
        task=task,
        split="train",
        counts=Counts(rows=num_images, images=num_images, left_out=0),
        size_px=600,
        resize=Resize(mode="exact", filter="", jpeg_quality=95),
        source={},
        rows_per_shard=per_shard,
        shards=tuple(shards),
        index=FileMeta(name="train.index.arrow", bytes=len(content), sha256=hashlib.sha256(content).hexdigest()),
        left_out=(),
        inputs={},
    )
    (folder / meta.index.name).write_bytes(content)
    (folder / "train.json").write_text(meta.to_json())
    return len(content)
