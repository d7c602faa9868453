"""Starts `cxrdist.train` in tests, on one or two gloo processes, and compares run folders."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

REPOSITORY = Path(__file__).parents[1]
WORKER = Path(__file__).parent / "training" / "worker.py"
FLAGS = (
    "--div",
    "b",
    "--init",
    "random",
    "--precision",
    "fp32",
    "--log-every",
    "1",
    "--threads",
    "1",
    "--timeout-s",
    "30",
)


@dataclass(frozen=True)
class Ended:
    code: int
    output: str


def start(
    shards: Path | None,
    run: Path,
    *flags: str,
    processes: int = 2,
    model: str = "tiny_chexfound",
    fault: dict[str, Any] | None = None,
    launcher: Sequence[str] | None = None,
) -> "subprocess.Popen[str]":
    """Start a training in a process group of its own; its output is one stream.

    shards: None where flags say them. launcher: of the processes, in place of the usual one.
    """
    usual = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    command = [
        sys.executable,
        *(usual if launcher is None else launcher),
        str(WORKER),
        *FLAGS,
        "--model",
        model,
        *([] if shards is None else ["--shards", str(shards)]),
        "--out",
        str(run),
    ]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "FAULT": json.dumps(fault or {})}
    return subprocess.Popen(
        [*command, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )


def finish(process: "subprocess.Popen[str]", timeout: float = 120) -> Ended:
    """Wait for the end; whatever happens, nothing of its process group is left."""
    try:
        output, _ = process.communicate(timeout=timeout)
        return Ended(process.returncode, output)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def train(shards: Path | None, run: Path, *flags: str, timeout: float = 120, **options: Any) -> Ended:
    """Run a training to its end."""
    return finish(start(shards, run, *flags, **options), timeout)


def rows(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The rows of one kind in a run's metrics.jsonl."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def assert_same_result(run: Path, expected: Path) -> None:
    """Weights, EMA, optimizer state and metrics of two runs are equal, bit for bit."""
    assert (run / "metrics.jsonl").read_bytes() == (expected / "metrics.jsonl").read_bytes()
    newest = max((expected / "checkpoints").glob("step_*"), key=lambda folder: int(folder.name[5:]))
    files = sorted(newest.glob("*.safetensors")) + sorted((expected / "checkpoints").glob("epoch_*/*.safetensors"))
    assert len(files) >= 6
    for file in files:
        ours, theirs = load_file(run / file.relative_to(expected)), load_file(file)
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert tensor.equal(ours[name]), f"{file.name}: {name}"
