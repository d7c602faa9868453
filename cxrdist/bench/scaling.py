"""Throughput of training on two processes against one, through the real launcher: what distributing costs.

Both train the same global batches with the same device batch. On a shared machine read the median of the ratios.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from cxrdist.bench.step import write_shards
from cxrdist.bench.timing import Row
from cxrdist.doctor import PROJECT
from cxrdist.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `python -m cxrdist.bench scaling`."""
    parser.add_argument("--model", default="eva_x_small", help="a model or recipe (default %(default)s)")
    parser.add_argument("--image-size", type=int, default=448, metavar="PX", help="(default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="images a step (default %(default)s)")
    parser.add_argument("--steps", type=int, default=6, metavar="N", help="steps of each run (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="runs of each kind, in turn")


def run(args: argparse.Namespace) -> list[Row]:
    """Images per second on one and on two processes, the ratio to twice one process, and where the rest goes."""
    speeds: dict[int, list[float]] = {1: [], 2: []}
    waits: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shards(folder)
        for turn in range(args.rounds):
            for processes in (1, 2) if turn % 2 == 0 else (2, 1):
                rows = train(args, folder, folder / f"run{turn}_{processes}", processes)
                speeds[processes].append(statistics.median(row["images_per_s"] for row in rows))
                waits[processes].append(statistics.median(row["wait_share"] for row in rows))
    shares = [two / (2 * one) for one, two in zip(speeds[1], speeds[2], strict=True)]
    table = []
    for processes in (1, 2):
        table.append(
            Row(
                "train",
                f"{args.model}, {processes} process{'es' * (processes > 1)}",
                statistics.median(speeds[processes]),
                ratio_to_limit=statistics.median(shares) if processes == 2 else None,
                note=f"waiting for images {statistics.median(waits[processes]):.1%}",
            )
        )
    return table


def train(args: argparse.Namespace, shards: Path, out: Path, processes: int) -> list[dict[str, float]]:
    """The timing rows of one short training, without the first step; UserError when it fails."""
    launch = [sys.executable, "-m"]
    if processes > 1:
        launch += ["accelerate.commands.launch", "--config_file", str(PROJECT / "accel_configs" / "cpu.yaml")]
        launch += ["--num_processes", str(processes), "-m"]
    (found,) = {path.parent for path in shards.rglob("train.json")}
    words = ["cxrdist.train", "--div", "b", "--model", args.model, "--init", "random", "--shards", str(found)]
    sizes = [f"image_size={args.image_size}", f"global_batch_size={args.batch_size}"]
    words += [word for field in sizes for word in ("--set", field)]
    words += ["--device-batch-size", str(max(args.batch_size // 2, 1)), "--max-steps", str(args.steps)]
    words += ["--out", str(out), "--log-every", "1", "--threads", "1", "--wandb", "off"]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([*launch, *words], env=os.environ | threads, capture_output=True, text=True)
    if done.returncode != 0:
        raise UserError(f"the training ended with exit code {done.returncode}: {done.stderr.strip()[-300:]}")
    rows = [json.loads(line) for line in (out / "timings.jsonl").read_text().splitlines()]
    return [row for row in rows if "images_per_s" in row][1:]
