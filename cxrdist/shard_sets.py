"""Where an entry's shards are: a folder, a copy of an address in it, or an address that they are streamed from."""

import argparse
import secrets
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cxrdist.cli import STREAMING, shards_of
from cxrdist.data.cache import GB, Cache, folder_of_set
from cxrdist.data.fetch import DOWNLOADS, Remote, fetch_shards, open_remote
from cxrdist.data.order import EvalBatches
from cxrdist.data.rows import SomeRows, count_rows, windows
from cxrdist.data.selection import Selection
from cxrdist.data.stream import Groups, Node, Stream, shards_in_order
from cxrdist.distributed import environment
from cxrdist.distributed.ranks import Ranks
from cxrdist.errors import UserError
from cxrdist.recipes import Recipe
from cxrdist.shards.index import ShardIndex, open_index
from cxrdist.shards.verify import open_together
from cxrdist.task import Task


@dataclass(frozen=True, eq=False)
class ShardSet:
    """folder: of JSON and index and, unless there is a cache, of the tars. url: that it is a copy of."""

    folder: Path
    url: str | None = None
    cache: Cache | None = None
    remote: Remote | None = None

    def fetch(self, split: str, task: Task | None, *, optional: bool = False) -> None:
        """Fetch a split, or what is not streamed of it. UserError as of `fetch_shards`."""
        if self.cache is not None and self.remote is not None:
            self.cache.fetch_index(self.remote, split, task, optional=optional)
        elif self.url is not None:
            fetch_shards(self.url, self.folder, split, task, optional=optional)

    def open(self, split: str, task: Task | None = None) -> ShardIndex:
        return open_index(self.folder, split, task, tars=self.cache is None)

    def open_together(self, ranks: Ranks, split: str, task: Task | None = None) -> ShardIndex:
        """The index of a split on every rank; what can be checked is shared by them. Collective."""
        return open_together(ranks, self.folder, split, task, tars=self.cache is None)

    def stream(
        self, index: ShardIndex, rows: SomeRows, passes: Sequence[Groups], ranks: Ranks, node: Node, **options: Any
    ) -> Stream:
        """A stream of this set's shards, with the `options` of Stream."""
        assert self.cache is not None
        assert self.remote is not None
        return Stream(self.cache, self.remote, index, rows, passes, node=node, say=ranks.say, **options)


def find_shards(args: argparse.Namespace) -> ShardSet:
    """The shard set that the flags name; nothing is fetched yet."""
    given = [name for name, value in zip(STREAMING, (args.shards_url, args.cache, args.cache_gb), strict=True) if value]
    if not set(given) & {"--cache", "--cache-gb"}:
        return ShardSet(shards_of(args), None if args.dry_run else args.shards_url)
    if len(given) < len(STREAMING):
        raise UserError(f"{given[-1]}: streaming takes {', '.join(STREAMING)}; give all three")
    if args.shards is not None:
        raise UserError("--shards is a folder to copy into, and what is streamed lies in --cache: leave --shards out")
    if args.dry_run:
        return ShardSet(folder_of_set(args.cache, args.shards_url))
    remote, cache = open_remote(args.shards_url), Cache(args.cache, round(args.cache_gb * GB))
    return ShardSet(cache.set_folder(remote), args.shards_url, cache, remote)


@dataclass(frozen=True)
class Streams:
    """Of a training: of the images that are learned from, and of those that are validated on; None where local."""

    train: Stream | None = None
    valid: Stream | None = None

    def start(self, epoch: int, row: int, ranks: Ranks) -> None:
        """Begin at a row of an epoch's order, and wait for the first window. Collective."""
        with ranks.agree("fetching the first shards"):
            if self.train is not None:
                self.train.start(epoch, row)
            if self.valid is not None:
                self.valid.start(epoch)
            if self.train is not None:
                self.train.warm()


def training_streams(
    at: ShardSet,
    index: ShardIndex,
    valid: ShardIndex | None,
    rows: Selection,
    recipe: Recipe,
    device_batch_size: int,
    ranks: Ranks,
    stack: ExitStack,
) -> Streams:
    """The streams of a training whose shards are streamed, with room reserved in the cache; they end with `stack`.

    Collective. UserError where the cache is too small.
    """
    if at.cache is None:
        return Streams()
    node = node_of(ranks)
    shards, window = np.flatnonzero(count_rows(index.shard_ids, rows.train)), recipe.shuffle_window
    orders = [windows(shards, recipe.seed, epoch, window or len(shards)) for epoch in range(recipe.epochs)]
    what = f"all {len(shards)} shards, as their images come in random order (shuffle_window=none)"
    if window is not None and window < len(shards):
        what = f"two windows of {window} shards, or as many as two batches reach over"
    with ranks.agree():
        sizes = np.cumsum(sorted((index.meta.shards[shard].bytes for shard in shards), reverse=True))
        fits = int(np.searchsorted(sizes, at.cache.limit_bytes, side="right")) // 2
        smaller = f", or --set shuffle_window={fits}, another order of the images"
        remedy = smaller if 0 < fits < (window or len(shards)) else ""
        about = {"what": what, "remedy": remedy, "use": "train"}
        train = at.stream(index, rows.train, orders, ranks, node, span=2 * recipe.global_batch_size, **about)
        stack.enter_context(train)
        if rows.validation is None:
            return Streams(train)
        held_out = index if valid is None else valid
        validation = in_order(at, held_out, rows.validation, device_batch_size, "valid", ranks, node, recipe.epochs)
        return Streams(train, stack.enter_context(validation))


def scoring_stream(
    at: ShardSet, index: ShardIndex, batches: EvalBatches, ranks: Ranks, stack: ExitStack
) -> Stream | None:
    """The stream of batches that are scored, dealt out to the ranks; it ends with `stack`. None where local.

    Collective; comes back with the first shards here.
    """
    if at.cache is None or not batches:
        return None
    node = node_of(ranks)
    with ranks.agree():
        rows = np.concatenate([*batches.values()])
        stream = in_order(at, index, rows, batches.device_batch_size, "score", ranks, node)
        stack.enter_context(stream)
    with ranks.agree("fetching the first shards"):
        stream.start()
        stream.warm()
    return stream


def in_order(
    at: ShardSet,
    index: ShardIndex,
    rows: SomeRows,
    device_batch_size: int,
    use: str,
    ranks: Ranks,
    node: Node,
    num_passes: int = 1,
) -> Stream:
    """The stream of rows that are read in their order, in batches that are dealt out to the ranks."""
    passes = [shards_in_order(count_rows(index.shard_ids, rows))] * num_passes
    what = f"the shards of split {index.split!r} that are read at a time"
    span = (ranks.world_size + 1) * device_batch_size
    return at.stream(index, rows, passes, ranks, node, span=span, ahead=DOWNLOADS, use=use, what=what)


def node_of(ranks: Ranks) -> Node:
    """This process among those of its node. Collective."""
    run, local_rank = ranks.on_main(secrets.token_hex, 8), environment.local_rank()
    return Node(
        name=f"{run}-{ranks.rank - local_rank}",
        local_rank=local_rank,
        local_world_size=environment.local_world_size(),
    )
