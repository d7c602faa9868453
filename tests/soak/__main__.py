"""Kills runs at random until they finish, and compares them with undisturbed ones: `./launch.sh soak [--kills N]`.

Training of both tiny models and inference on two processes each, and preprocessing with two workers. A run is started,
one of its processes, whichever, gets SIGKILL at a time that is uniform over an undisturbed run's duration, and the same
command is given again, until a run ends before its time. What it then left must equal the undisturbed run bit for bit.
When the launcher is the victim, ranks that go on alone are killed too, as a scheduler would, and counted as orphaned:
in start-up torch waits two minutes or more for a launcher that is gone.
"""

import argparse
import contextlib
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import psutil

from cxrdist import preprocess
from tests import infer_world, training_runs

NUM_IMAGES = 48
LIMIT_S = 180  # from a kill to the end of all processes, or for a run that nothing disturbs
ORPHANS_S = 10  # for ranks to notice that their launcher was killed
TRAINING = ("--validate-fold=1", "--folds=4", "--checkpoint-minutes=0", "--device-batch-size=3", "--resume")


@dataclass(frozen=True)
class Workload:
    """start: begins or resumes the run in a folder; same: raises AssertionError if two folders' results differ."""

    name: str
    start: Callable[[Path], "subprocess.Popen[str]"]
    same: Callable[[Path, Path], None]
    child: str = "rank"  # what a child of the first process is; that one is the launcher, and what is below a worker


@dataclass
class Result:
    """What happened to one workload; `unequal` says what differed in which run."""

    workload: str
    victims: "Counter[str]" = field(default_factory=Counter)
    runs: int = 0
    orphaned: int = 0  # kills of the launcher after which ranks went on
    unequal: list[str] = field(default_factory=list)
    seconds: float = 0.0


def make_workloads(folder: Path) -> list[Workload]:
    """The inputs of all runs, written into `folder`, and the four workloads on them."""
    images, table, shards = folder / "images", folder / "train.csv", folder / "shards"
    names = [f"{number // 3:08d}_001_{number % 3:03d}.jpg" for number in range(NUM_IMAGES)]
    infer_world.write_images(images, names)
    rows = pd.DataFrame({"Image_name": names, "Patient_ID": [name[:8] for name in names], "Study": "001"})
    findings = np.random.default_rng(0).random((NUM_IMAGES, len(infer_world.LABELS))) < 0.4
    rows[list(infer_world.LABELS)] = findings.astype(int)
    rows.assign(Sex="Female", Age="60").to_csv(table, index=False)
    division = ["--div", "b", "--images", str(images), "--csv", str(table), "--rows-per-shard", "6", "--workers", "2"]
    preprocess.main([*division, "--out", str(shards)])
    world = infer_world.make_infer_world(folder / "world")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "cxrdist.infer"]

    def training(model: str) -> Workload:
        return Workload(
            f"train {model}",
            lambda out: training_runs.start(shards, out, *TRAINING, model=model),
            training_runs.assert_same_result,
        )

    def infer(out: Path) -> "subprocess.Popen[str]":
        more = ("--template", str(world.template), "--checkpoint-minutes", "0")
        return start([*launcher, *world.arguments(out, *more)])

    return [
        training("tiny_eva_x"),
        training("tiny_chexfound"),
        Workload("infer", infer, lambda out, wanted: same_files(out, wanted, "submission.csv", "scores/*.csv")),
        Workload(
            "preprocess",
            lambda out: start(["-m", "cxrdist.preprocess", *division, "--out", str(out)]),
            lambda out, wanted: same_files(out, wanted, "*"),
            child="worker",
        ),
    ]


def start(arguments: list[str]) -> "subprocess.Popen[str]":
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=environment | {"PYTHONPATH": str(training_runs.REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def same_files(out: Path, wanted: Path, *patterns: str) -> None:
    def bytes_of(folder: Path) -> dict[str, bytes]:
        paths = (path for pattern in patterns for path in folder.glob(pattern) if path.is_file())
        return {str(path.relative_to(folder)): path.read_bytes() for path in paths}

    ours, theirs = bytes_of(out), bytes_of(wanted)
    assert theirs
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if ours[name] != theirs[name]] == []


def attempt(workload: Workload, out: Path, kill_at: float | None, rng: random.Random) -> str | None:
    """Start or resume once; kill one process `kill_at` seconds later, or none. Returns the victim's role, or None.

    The role of a launcher that left ranks behind is "orphaned".
    Raises RuntimeError if a run that nothing disturbed failed, or if processes are left LIMIT_S after a kill.
    """
    process = workload.start(out)
    tree: list[psutil.Process] = []
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            output, _ = process.communicate(timeout=LIMIT_S if kill_at is None else kill_at)
            if process.returncode == 0:
                return None
            raise RuntimeError(f"{workload.name} ended with {process.returncode} though nothing was killed:\n{output}")
        tree = family(process)
        if kill_at is not None and tree:
            victim = rng.choice(tree)
            depth = 0 if victim.pid == process.pid else 1 if victim.ppid() == process.pid else 2
            victim.kill()
            role = ("launcher", workload.child, "worker")[depth]
            if role == "launcher" and not ended(tree, ORPHANS_S):
                return "orphaned"
            if ended(tree, LIMIT_S):
                return role
            raise RuntimeError(f"{workload.name} has processes left {LIMIT_S} s after a {role} was killed")
        raise RuntimeError(f"{workload.name} did not end within {LIMIT_S} s though nothing was killed")
    finally:
        for left in [*tree, *(family(process) if process.poll() is None else [])]:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
        ended(tree, LIMIT_S)
        process.communicate()


def family(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        first = psutil.Process(process.pid)
        return [first, *sorted(first.children(recursive=True), key=lambda child: child.pid)]
    return []


def ended(processes: list[psutil.Process], limit_s: float) -> bool:
    """Whether all of them end within that time."""

    def lives(process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):
            return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        return False

    deadline = time.monotonic() + limit_s
    while any(map(lives, processes)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def soak(workload: Workload, kills: int, folder: Path, rng: random.Random) -> Result:
    """Runs in `folder`, killed `kills` times in all, each resumed to its end and compared with an undisturbed one."""
    result, begun, wanted = Result(workload.name), time.monotonic(), folder / "undisturbed"
    attempt(workload, wanted, None, rng)
    duration = time.monotonic() - begun
    while result.victims.total() < kills:
        out = folder / f"run_{result.runs}"
        result.runs += 1
        while True:
            kill_at = rng.uniform(0, duration) if result.victims.total() < kills else None
            role = attempt(workload, out, kill_at, rng)
            if role is None:
                break
            result.orphaned += role == "orphaned"
            result.victims["launcher" if role == "orphaned" else role] += 1
        try:
            workload.same(out, wanted)
        except (AssertionError, OSError) as error:
            result.unequal.append(f"{workload.name} {out}: {error!r}")
        result.seconds = time.monotonic() - begun
        print(f"{workload.name}: run {result.runs}, {result.victims.total()} of {kills} kills", file=sys.stderr)
    return result


def table(results: list[Result]) -> str:
    rows = [("workload", "kills", "launcher", "rank", "worker", "orphaned", "resumes", "runs", "equal", "seconds")]
    for result in results:
        victims = [result.victims[role] for role in ("launcher", "rank", "worker")]
        total, equal = result.victims.total(), result.runs - len(result.unequal)  # each kill is followed by a resume
        numbers = (total, *victims, result.orphaned, total, result.runs, equal, round(result.seconds))
        rows.append((result.workload, *map(str, numbers)))
    rows.append(("all", *(str(sum(int(row[place]) for row in rows[1:])) for place in range(1, len(rows[0])))))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="./launch.sh soak", description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="how many in all (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the times and the victims (default %(default)s)")
    args = parser.parse_args(argv)
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory(prefix="soak") as name:
        folder = Path(name)
        workloads = make_workloads(folder)
        shares = [args.kills // len(workloads) + (place < args.kills % len(workloads)) for place in range(4)]
        results = []
        for workload, kills in zip(workloads, shares, strict=True):
            results.append(soak(workload, kills, folder / workload.name.replace(" ", "_"), rng))
    print(table(results))
    unequal = [line for result in results for line in result.unequal]
    print(*unequal, sep="\n", file=sys.stderr)
    return 1 if unequal else 0


if __name__ == "__main__":
    raise SystemExit(main())
