"""How random an epoch is in windows of shards (`shuffle_window`), against the order over all of its images.

Stage "neighbours": how far images that are neighbours in the source end up apart, as a share of the epoch (1/3 is
random), and how many images of a batch come from a shard that is there already. Stage "tiny run": logistic regression
on made-up images whose source drifts from shard to shard, as hospitals and years do, and its loss on images held out.
"""

import argparse
import time

import numpy as np
from numpy.typing import NDArray

from cxrdist.bench.timing import Row
from cxrdist.data.order import epoch_order

FEATURES, EPOCHS, SEEDS, RATE = 32, 2, 5, 0.05
HELD_OUT = 20_000  # images


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `cxrdist bench order`."""
    parser.add_argument("--shards", type=int, default=256, metavar="N", help="shards of the set (default %(default)s)")
    parser.add_argument("--per-shard", type=int, default=1000, metavar="N", help="images a shard (default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="images a batch (default %(default)s)")
    parser.add_argument(
        "--windows",
        type=int,
        nargs="+",
        default=[64, 16, 4, 1],
        metavar="N",
        help="of so many shards (default 64 16 4 1)",
    )


def run(args: argparse.Namespace) -> list[Row]:
    shards = np.repeat(np.arange(args.shards), args.per_shard)
    rows = np.arange(len(shards), dtype=np.int64)
    found = []
    for window in (None, *args.windows):
        begun = time.perf_counter()
        order = epoch_order(rows, 0, 0, shards, window)
        speed = len(rows) / (time.perf_counter() - begun)
        apart = np.abs(np.diff(np.argsort(order))).mean() / len(rows)
        batches = shards[order[: len(order) // args.batch_size * args.batch_size]].reshape(-1, args.batch_size)
        again = 1 - np.mean([len(np.unique(batch)) for batch in batches]) / args.batch_size
        name = "all shards" if window is None else f"windows of {window}"
        note = (
            f"source neighbours end up {apart:.4f} of an epoch apart; {again:.1%} of a batch from a shard twice in it"
        )
        found.append(Row("neighbours", name, speed, note=note))
        losses = [_loss(shards, seed, args.batch_size, window) for seed in range(SEEDS)]
        note = f"held-out loss {np.mean(losses):.5f} (standard error {np.std(losses) / np.sqrt(SEEDS):.5f} over seeds)"
        found.append(Row("tiny run", name, None, note=note))
    return sorted(found, key=lambda row: row.stage)


def _loss(shards: NDArray[np.int64], seed: int, batch_size: int, window: int | None) -> float:
    """The loss on images held out after EPOCHS epochs; the images and their labels are the same for all seeds."""
    drawn = np.random.default_rng(0)
    truth = drawn.normal(size=FEATURES) / np.sqrt(FEATURES)
    places = np.append(shards, drawn.integers(shards.max() + 1, size=HELD_OUT))
    drift = np.cumsum(drawn.normal(size=(shards.max() + 1, FEATURES)), axis=0)
    drift /= drift.std()
    images = drawn.normal(size=(len(places), FEATURES)) + drift[places]
    labels = drawn.random(len(places)) < 1 / (1 + np.exp(-images @ truth))
    weights = np.zeros(FEATURES)
    for epoch in range(EPOCHS):
        order = epoch_order(np.arange(len(shards)), seed, epoch, shards, window)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            wrong = 1 / (1 + np.exp(-images[batch] @ weights)) - labels[batch]
            weights -= RATE * images[batch].T @ wrong / len(batch)
    logits = images[len(shards) :] @ weights
    return float(np.mean(np.logaddexp(0, np.where(labels[len(shards) :], -logits, logits))))
