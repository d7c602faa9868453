"""Streaming through a link of given speed: how much of the time the loader waits, beside the same set on the disk.

A local web server sends a made-up set at so many MB/s in all; a pretended GPU takes so many images a second. The cache
holds two windows. Waiting is counted from the first batch on: the first window has to come first ("start").
"""

import argparse
import http.server
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from cxrdist.bench.timing import Row
from cxrdist.data import order
from cxrdist.data.cache import GB, Cache
from cxrdist.data.fetch import Remote, Web
from cxrdist.data.loader import Loader
from cxrdist.data.rows import windows
from cxrdist.data.stream import Stream, needed_bytes
from cxrdist.shards.convert import Pixels
from cxrdist.shards.index import ShardIndex, open_index
from cxrdist.shards.writer import Source, SplitJob, write_split
from cxrdist.task import TASKS

PIECE = 2**16  # bytes that the server sends at a time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `cxrdist bench stream`."""
    parser.add_argument(
        "--links",
        type=float,
        nargs="+",
        default=[10, 50, 200],
        metavar="MB/S",
        help="of so many MB/s (default 10 50 200)",
    )
    parser.add_argument("--images-per-s", type=float, default=300, metavar="N", help="that the GPU takes (default 300)")
    parser.add_argument("--num-shards", type=int, default=24, metavar="N", help="of the set (default %(default)s)")
    parser.add_argument("--per-shard", type=int, default=80, metavar="N", help="images a shard (default %(default)s)")
    parser.add_argument("--window", type=int, default=4, metavar="N", help="shards a window (default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="images a batch (default %(default)s)")


def run(args: argparse.Namespace) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="cxrdist-bench-") as temporary:
        folder = Path(temporary)
        _write_set(folder / "set", args.num_shards, args.per_shard)
        index = open_index(folder / "set", "train")
        size = sum(shard.bytes for shard in index.meta.shards)
        needed = size / len(index) * args.images_per_s / 1e6
        with Loader(index) as loader:
            wait_s, seconds = _epoch(loader, index, args)
        note = f"waiting {wait_s / seconds:.1%}; the GPU takes {needed:.3g} MB/s of a set of {size / 1e6:.4g} MB"
        rows = [Row("epoch", "local disk", len(index) / seconds, note=note)]
        for link in args.links:
            rows.append(_streamed(folder / f"cache-{link:g}", folder / "set", index, link, len(index) / seconds, args))
    return rows


def _streamed(
    cache_folder: Path, source: Path, whole: ShardIndex, link: float, local: float, args: argparse.Namespace
) -> Row:
    with _Server(source, link * 1e6) as server:
        remote = Remote(Web(), server.url, server.url)
        rows = np.arange(len(whole))
        passes = [windows(np.unique(whole.shard_ids), 0, 0, args.window)]
        sizes = np.array([shard.bytes for shard in whole.meta.shards])
        span = 2 * args.batch_size
        need = needed_bytes(passes, sizes, np.bincount(whole.shard_ids), span)
        cache = Cache(cache_folder, need + 2 * whole.meta.index.bytes + GB // 1000)
        folder = cache.fetch_index(remote, "train")
        assert folder is not None
        index = open_index(folder, "train", tars=False)
        before = server.sent
        begun = time.perf_counter()
        with Stream(cache, remote, index, rows, passes, span=span, use="bench", what="two windows") as stream:
            stream.start()
            stream.warm()
            start_s = time.perf_counter() - begun
            with Loader(index, stream=stream) as loader:
                awaited_s = loader.shards_wait_s
                wait_s, seconds = _epoch(loader, index, args)
                awaited_s = loader.shards_wait_s - awaited_s
        fetched = (server.sent - before) / sizes.sum()
    note = (
        f"waiting {wait_s / seconds:.1%} ({min(wait_s, awaited_s) / seconds:.1%} for shards), start {start_s:.1f} s; "
        f"fetched {fetched:.3f} of the set, cache {need / sizes.sum():.2f} of it"
    )
    return Row(
        "epoch", f"link of {link:g} MB/s", len(index) / seconds, ratio_to_limit=len(index) / seconds / local, note=note
    )


def _epoch(loader: Loader, index: ShardIndex, args: argparse.Namespace) -> tuple[float, float]:
    """Seconds of waiting, and in all, of an epoch in which each batch takes the GPU its time."""
    plan = order.train_batches(
        np.arange(len(index)),
        seed=0,
        epoch=0,
        global_batch_size=args.batch_size,
        device_batch_size=args.batch_size,
        rank=0,
        world_size=1,
        shards=index.shard_ids,
        window=args.window,
    )
    begun, waited = time.perf_counter(), loader.wait_s
    for batch in loader.batches(plan):
        time.sleep(len(batch.rows) / args.images_per_s)
    return loader.wait_s - waited, time.perf_counter() - begun


class _Server:
    """The files of a folder, at so many bytes a second in all."""

    def __init__(self, folder: Path, bytes_per_s: float) -> None:
        self.sent, self._free_at, self._lock = 0, 0.0, threading.Lock()
        outer = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def __init__(self, *more: object) -> None:
                super().__init__(*more, directory=str(folder))  # type: ignore[arg-type]

            def log_message(self, *_: object) -> None:
                pass

            def copyfile(self, source: object, outputfile: object) -> None:
                for piece in _pieces(source):
                    outer.wait_for(len(piece), bytes_per_s)
                    outputfile.write(piece)  # type: ignore[attr-defined]

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "_Server":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def wait_for(self, num_bytes: int, bytes_per_s: float) -> None:
        with self._lock:
            self.sent += num_bytes
            self._free_at = max(self._free_at, time.monotonic()) + num_bytes / bytes_per_s
            pause = self._free_at - time.monotonic()
        time.sleep(max(0.0, pause))


def _pieces(source: object) -> Iterator[bytes]:
    while piece := source.read(PIECE):  # type: ignore[attr-defined]
        yield piece


def _write_set(folder: Path, num_shards: int, per_shard: int) -> None:
    """Grey images of 600 px of about the size of real ones; a few different ones again and again."""
    drawn = np.random.default_rng(0)
    images = folder.parent / "images"
    images.mkdir()
    sources = []
    for number in range(num_shards * per_shard):
        path = images / f"{number % 50}.png"
        if not path.exists():
            smooth = Image.fromarray(drawn.integers(0, 255, (20, 20), dtype=np.uint8)).resize((600, 600))
            grain = drawn.normal(0, 1, (600, 600))
            Image.fromarray((np.asarray(smooth) + grain).clip(0, 255).astype(np.uint8)).save(path, compress_level=1)
        targets = (0.0,) * TASKS["b"].num_labels
        name = f"{number:08d}_001_000.png"
        sources.append(Source(number, name, str(path), path.stat().st_size, "", name[:8], "001", targets=targets))
    write_split(SplitJob(folder, TASKS["b"], "train", sources, Pixels(), per_shard, {}))
