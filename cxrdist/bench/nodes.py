"""Preprocessing shared by nodes of which one is slow and one is killed, beside a fixed split of the work.

Nodes are processes here, and an image takes a time that is waited out, so that a few cores can stand for any number of
nodes. Real are the shards, the claims and the end. The fixed split (shard number modulo nodes) is computed from the
same times: each node makes its part, and the rest of the killed one's part is begun by the first node that is free.
"""

import argparse
import hashlib
import importlib
import multiprocessing
import tempfile
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from cxrdist.bench.timing import Row
from cxrdist.errors import UserError
from cxrdist.shards import convert, writer
from cxrdist.shards.convert import Converted, Pixels
from cxrdist.shards.writer import Source, SplitJob, write_split
from cxrdist.task import TASKS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=int, default=4, metavar="N", help="number 1 is slow, 2 is killed (default 4)")
    parser.add_argument("--num-images", type=int, default=800, metavar="N", help="of the split (default 800)")
    parser.add_argument("--rows-per-shard", type=int, default=16, metavar="N", help="rows a tar covers (default 16)")
    parser.add_argument("--image-s", type=float, default=0.05, metavar="S", help="of a fast node (default 0.05)")
    parser.add_argument("--slower", type=float, default=10.0, metavar="X", help="the slow node (default 10 times)")
    parser.add_argument("--kill-s", type=float, default=2.0, metavar="S", help="after the start (default 2)")


def run(args: argparse.Namespace) -> list[Row]:
    if args.nodes < 3:
        raise UserError("--nodes: at least 3, of which one is slow and one is killed")
    image_s = [args.image_s * (args.slower if rank == 1 else 1) for rank in range(args.nodes)]
    with tempfile.TemporaryDirectory() as folder:
        made = write_images(Path(folder) / "images", args.num_images)
        job = SplitJob(Path(folder) / "one", TASKS["b"], "train", made, Pixels(), args.rows_per_shard, {})
        write_split(job)
        ready = {source.path: convert.convert(source.path) for source in made}
        shared = SplitJob(Path(folder) / "nodes", TASKS["b"], "train", made, Pixels(), args.rows_per_shard, {})
        together = run_nodes(shared, image_s, killed=2, kill_s=args.kill_s, ready=ready)
        if bytes_of(job.out) != bytes_of(shared.out):
            raise UserError("the shards of several nodes differ from those of one: please report this")
    fixed_s = fixed_split_s(job, image_s, killed=2, kill_s=args.kill_s)
    limit_s = args.kill_s + (
        (args.num_images - sum(args.kill_s / one for one in image_s))
        / sum(1 / one for rank, one in enumerate(image_s) if rank != 2)
    )
    counts = ", ".join(f"{count:,}" for _, count in sorted(together.converted.items()))
    shard_s = args.rows_per_shard * args.image_s
    stage = f"preprocess, {args.nodes} nodes: 1 of them {args.slower:g} x slower, 1 killed after {args.kill_s:g} s"
    speeds = [args.num_images / seconds for seconds in (fixed_s, together.seconds, limit_s)]
    notes = (
        f"{fixed_s:.1f} s, computed",
        f"{together.seconds:.1f} s; same bytes as one node; images converted by each survivor: {counts}",
        f"{limit_s:.1f} s, computed: all speeds added up; a shard takes a fast node {shard_s:.2g} s",
    )
    variants = ("fixed split", "work stealing", "no image twice, no waiting")
    rows = zip(variants, speeds, notes, strict=True)
    return [Row(stage, name, speed, speed / speeds[0], speed / speeds[2], note) for name, speed, note in rows]


@dataclass(frozen=True)
class Together:
    """seconds: from the start of all nodes until the split is finished. exit_codes: of the nodes, in order.
    converted: images that a node converted (once for nothing where another was faster), by rank; none of a killed one.
    """

    seconds: float
    exit_codes: list[int | None]
    converted: dict[int, int]


def run_nodes(
    job: SplitJob, image_s: list[float], *, killed: int, kill_s: float, ready: dict[str, Converted | str]
) -> Together:
    """Make a split by a process for each of `image_s`, of which `killed` gets SIGKILL `kill_s` after the start.

    ready: images, by path, that are not converted but only waited for.
    """
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in image_s]
    nodes = [
        context.Process(target=run_node, args=(job, rank, image_s, theirs, ready))
        for rank, (_, theirs) in enumerate(pipes)
    ]
    try:
        for node in nodes:
            node.start()
        for ours, theirs in pipes:
            theirs.close()
            ours.recv()
        began = time.monotonic()
        for ours, _ in pipes:
            ours.send("start")
        time.sleep(kill_s)
        nodes[killed].kill()
        while not job.json_path.exists() and any(node.is_alive() for node in nodes):
            time.sleep(0.005)
        seconds = time.monotonic() - began
        converted = {rank: ours.recv() for rank, (ours, _) in enumerate(pipes) if rank != killed}
        for node in nodes:
            node.join()
    except EOFError:
        raise UserError("a node ended before its time; see the lines above") from None
    finally:
        for node in nodes:
            if node.pid is not None:
                node.kill()
                node.join()
    return Together(seconds, [node.exitcode for node in nodes], converted)


def run_node(
    job: SplitJob,
    rank: int,
    image_s: list[float],
    pipe: "Connection[str | int, str]",
    ready: dict[str, Converted | str],
) -> None:
    """One node, each of whose images takes its `image_s`."""
    real, count = convert.convert, 0

    def slow(path: str, pixels: Pixels) -> Converted | str:
        nonlocal count
        begin, count = time.monotonic(), count + 1
        converted = ready.get(path) or real(path, pixels)
        time.sleep(max(0.0, image_s[rank] - (time.monotonic() - begin)))
        return converted

    convert.convert = slow  # type: ignore[assignment]
    importlib.import_module("webdataset")  # seconds, which belong to the start
    writer.NUM_PROBES = 1  # of the eight that estimate the space: as few as these images are
    tqdm.set_lock(threading.RLock())  # its own semaphore would outlive a killed process, with a warning
    pipe.send("ready")
    pipe.recv()
    write_split(job, node_rank=rank, num_nodes=len(image_s))
    pipe.send(count)


def fixed_split_s(job: SplitJob, image_s: list[float], *, killed: int, kill_s: float) -> float:
    """Seconds that the same nodes take with fixed parts; a killed node's finished shards are kept."""
    parts = [
        [len(group) for number, group in job.groups.items() if number % len(image_s) == rank]
        for rank in range(len(image_s))
    ]
    rest, left_s = sum(parts[killed]), kill_s
    for rows in parts[killed]:
        left_s -= rows * image_s[killed]
        if left_s < 0:
            break
        rest -= rows
    ends = {rank: sum(part) * image_s[rank] for rank, part in enumerate(parts) if rank != killed}
    free = min(ends, key=lambda rank: ends[rank])
    ends[free] = max(ends[free], kill_s) + rest * image_s[free]
    return max(ends.values())


def write_images(folder: Path, count: int) -> list[Source]:
    """`count` small images that differ, as the rows of a table without labels."""
    folder.mkdir()
    sources = []
    for key in range(count):
        path = folder / f"{key}.jpg"
        Image.fromarray(np.random.default_rng(key).integers(0, 255, (8, 8), dtype=np.uint8)).save(path)
        sources.append(Source(key, path.name, str(path), path.stat().st_size, ""))
    return sources


def bytes_of(folder: Path) -> dict[str, str]:
    """SHA-256 of each file in a folder, by name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
