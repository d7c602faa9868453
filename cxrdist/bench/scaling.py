"""Throughput of training on two processes against one, through the real launcher: what distributing costs, and where.

Each process has one core and the same device batch, and accumulates gradients as the recipes do: a step has 64 images
there, and with fewer the exchange of gradients is dearer than in use. "two separate" are two trainings of one process
each at the same time, which exchange nothing: what they lack against twice one process is what the cores share (memory,
caches) and the optimizer and EMA that each runs for half as many images; what two processes lack against them is the
exchange. Measured on two shared cores, EVA-X-S: two separate 0.93 to 0.98 of the ideal, two processes 0.89 to 0.94 with
16 images a step, 0.73 to 0.85 with 4.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

from cxrdist.bench.step import write_shards
from cxrdist.bench.timing import Row, median_ratio
from cxrdist.distributed.plan import PROJECT
from cxrdist.errors import UserError

KINDS = {"one process": (1, 1), "two separate": (2, 1), "two processes": (1, 2)}  # trainings, processes of each


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `cxrdist bench scaling`."""
    parser.add_argument("--model", default="eva_x_small", help="a model or recipe (default %(default)s)")
    parser.add_argument("--image-size", type=int, default=448, metavar="PX", help="model size (default %(default)s)")
    parser.add_argument(
        "--device-batch-size", type=int, default=2, metavar="N", help="images a pass (default %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="images a step (default %(default)s)")
    parser.add_argument("--steps", type=int, default=3, metavar="N", help="steps of each run (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="runs of each kind (default %(default)s)")


def run(args: argparse.Namespace) -> list[Row]:
    """Images per second of each kind of run, and the ratio to the ideal, twice one process."""
    speeds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    waits: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with (
        tempfile.TemporaryDirectory() as name,
        tqdm(total=args.rounds * len(KINDS), unit="run", disable=None, leave=False) as bar,
    ):
        folder = Path(name)
        write_shards(folder)
        for turn in range(args.rounds):
            for kind in list(KINDS)[turn % len(KINDS) :] + list(KINDS)[: turn % len(KINDS)]:
                runs = train(args, folder, folder / f"run{turn}_{kind.replace(' ', '_')}", *KINDS[kind])
                speeds[kind].append(sum(statistics.median(row["images_per_s"] for row in rows) for rows in runs))
                waits[kind].append(statistics.median(row["wait_share"] for rows in runs for row in rows))
                bar.update()
    ideal = [2 * speed for speed in speeds["one process"]]
    return [
        Row(
            "train",
            f"{args.model}, {kind}",
            statistics.median(speeds[kind]),
            ratio_to_baseline=median_ratio(speeds[kind], speeds["one process"]),
            ratio_to_limit=None if kind == "one process" else median_ratio(speeds[kind], ideal),
            note=f"waiting for images {statistics.median(waits[kind]):.1%}",
        )
        for kind in KINDS
    ]


def train(
    args: argparse.Namespace, shards: Path, out: Path, trainings: int, processes: int
) -> list[list[dict[str, float]]]:
    """The timing rows of short trainings at the same time, without the first step; UserError when one fails."""
    launch = [sys.executable, "-m"]
    if processes > 1:
        launch += ["accelerate.commands.launch", "--config_file", str(PROJECT / "accel_configs" / "cpu.yaml")]
        launch += ["--num_processes", str(processes), "-m"]
    (found,) = {path.parent for path in shards.rglob("train.json")}
    images_a_step = args.batch_size // trainings
    words = ["cxrdist.train", "--div", "b", "--model", args.model, "--init", "random", "--shards", str(found)]
    words += ["--set", f"image_size={args.image_size}", "--set", f"global_batch_size={images_a_step}"]
    words += ["--device-batch-size", str(args.device_batch_size), "--max-steps", str(args.steps)]
    words += ["--log-every", "1", "--threads", "1", "--wandb", "off"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    folders = [Path(f"{out}_{number}") for number in range(trainings)]
    running = [
        subprocess.Popen(
            [*launch, *words, "--out", str(folder)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for folder in folders
    ]
    messages = [process.communicate()[1] for process in running]
    for process, message in zip(running, messages, strict=True):
        if process.returncode != 0:
            raise UserError(f"the training ended with exit code {process.returncode}: {message.strip()[-300:]}")
    timings = [(folder / "timings.jsonl").read_text().splitlines() for folder in folders]
    return [[row for row in map(json.loads, lines) if "images_per_s" in row][1:] for lines in timings]
