"""FAULTS 47, 59-61, 63: slow ranks are waited for, lost ones named, Ctrl-C saves, few open files suffice.

Two gloo processes each; the faults are those of tests/training/worker.py.
"""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cxrdist import train
from cxrdist.cli import run_entry
from cxrdist.runs import checkpoint
from tests import training_runs

pytestmark = [pytest.mark.fault, pytest.mark.timeout(240)]
TIMEOUT_S = 4.0
SHORT = ("--set", "epochs=1", "--set", "member_epochs=1", "--timeout-s", str(TIMEOUT_S))
NO_FOLD = ("--validate-fold", "none")


def start(shards: Path, run: Path, *flags: str, fault: dict[str, Any]) -> "subprocess.Popen[str]":
    return training_runs.start(shards, run, *NO_FOLD, *flags, model="tiny_eva_x", fault=fault)


def slow(module: str, name: str, rank: int = 0) -> dict[str, Any]:
    return {"slow": {"rank": rank, "module": module, "name": name, "seconds": 3 * TIMEOUT_S, "count": 1}}


@pytest.mark.parametrize(
    "fault",
    [
        slow("shards.verify", "check_headers", rank=1),  # verify
        slow("runs.checkpoint", "write_checkpoint"),  # a save
        slow("train", "validate", rank=1),
    ],
    ids=lambda fault: fault["slow"]["name"],
)
def test_a_training_whose_one_rank_works_three_times_longer_than_the_timeout_finishes(uneven_shards, tmp_path, fault):
    flags = SHORT if fault["slow"]["name"] != "validate" else (*SHORT, "--validate-fold", "0", "--folds", "3")
    ended = training_runs.finish(start(uneven_shards, tmp_path / "run", *flags, fault=fault), 180)
    assert ended.code == 0, ended.output
    assert "finished: 1 epochs" in ended.output
    assert f"waiting for rank {fault['slow']['rank']} (" in ended.output


def infer(world: Any, out: Path, fault: dict[str, Any], *flags: str) -> training_runs.Ended:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {"PYTHONPATH": str(training_runs.REPOSITORY), "FAULT": json.dumps(fault), "PROGRAM": "infer"}
    process = subprocess.Popen(
        [*command, str(training_runs.WORKER), *world.arguments(out, "--timeout-s", str(TIMEOUT_S), *flags)],
        env=os.environ | environment | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    return training_runs.finish(process, 180)


@pytest.mark.parametrize(("module", "name"), [("shards.verify", "check_headers"), ("infer", "write_results")])
def test_an_inference_whose_rank_0_checks_reads_or_averages_longer_finishes(world, tmp_path, module, name):
    ended = infer(world, tmp_path / "out", slow(module, name))
    assert ended.code == 0, ended.output
    assert (tmp_path / "out" / "scores" / "eva_x.csv").is_file()


def test_the_last_batches_of_one_rank_may_take_longer_than_the_timeout(world, tmp_path):
    """Three batches of one rank, each shorter than the timeout: it is not silent, and the other waits."""
    fault = {"slow": {"rank": 0, "module": "inference.score", "name": "run_passes", "seconds": TIMEOUT_S * 0.7}}
    ended = infer(world, tmp_path / "out", fault)
    assert ended.code == 0, ended.output


def last_lines(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("error")]


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("training.learner", "Learner.tensors"),  # while a checkpoint is gathered
        ("train", "default_device_batch"),  # start-up
        ("distributed.ranks", "Ranks.prepare"),  # between the group's set-up and DDP
    ],
)
def test_a_hung_rank_is_named_within_about_the_timeout(uneven_shards, tmp_path, module, name):
    fault = {"stop": {"rank": 1, "module": module, "name": name}}
    process = start(uneven_shards, tmp_path / "run", *SHORT, "--checkpoint-minutes", "0", fault=fault)
    ended = training_runs.finish(process, 120)
    assert ended.code != 0
    (line,) = last_lines(ended.output)
    assert re.search(r"stopped responding", line)
    assert "--resume" in line
    assert "Traceback" not in ended.output.split("\nerror: ")[0]


def test_a_rank_of_inference_that_hangs_before_it_joins_a_result_is_named(world, tmp_path):
    ended = infer(world, tmp_path / "out", {"stop": {"rank": 1, "module": "infer", "name": "collect"}})
    assert ended.code != 0
    (line,) = last_lines(ended.output)
    assert "rank 1 stopped responding" in line
    assert "run the same command again" in line


@pytest.mark.parametrize(
    ("place", "kind", "said"),
    [
        ({"rank": 1, "module": "shards.verify", "name": "open_index"}, "MemoryError", "out of memory.*rank 1"),
        ({"rank": 1, "module": "train", "name": "Control.after_step"}, "DistNetworkError", "another process.*--resume"),
        ({"rank": 0, "module": "runs.checkpoint", "name": "write_checkpoint"}, "EMFILE", "too many open files"),
        ({"rank": 1, "module": "train", "name": "Control.after_step"}, "ValueError", "this is a bug of cxrdist"),
    ],
)
def test_what_one_of_two_ranks_meets_is_named_and_ends_both(uneven_shards, tmp_path, place, kind, said):
    process = start(uneven_shards, tmp_path / "run", *SHORT, fault={"fail": place | {"kind": kind, "text": "injected"}})
    ended = training_runs.finish(process, 120)
    assert ended.code != 0
    assert any(re.search(said, line) for line in last_lines(ended.output)), ended.output


PLACES = [
    ("shards.verify", "open_index"),
    ("train", "make_criterion"),
    ("train", "Loader"),
    ("training.meter", "Meter.log"),
    ("train", "Control.after_step"),
    ("runs.checkpoint", "write_checkpoint"),
]
NAMED = ["MemoryError", "EMFILE", "EACCES", "EIO", "DistStoreError", "ConnectionResetError", "OutOfMemoryError"]


@pytest.mark.parametrize(("place", "kind"), [(PLACES[n % 6], NAMED[n % 7]) for n in range(14)])
def test_from_start_up_to_the_last_write_every_end_is_one_line(
    uneven_shards, tmp_path, capsys, monkeypatch, place, kind
):
    from tests.training import worker  # registers the tiny recipes

    module, name = place
    target = f"cxrdist.{module}.{name}"
    monkeypatch.setattr(target, lambda *_, **__: worker.raise_error({"kind": kind, "text": "injected"}))
    words = [*training_runs.FLAGS, "--model", "tiny_eva_x", "--shards", str(uneven_shards)]
    words += ["--out", str(tmp_path / "run"), *NO_FOLD, *SHORT]
    assert run_entry(lambda: train.main(words), again=train.AGAIN) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert len(last_lines(err)) == 1


def wait_for_rows(process: "subprocess.Popen[str]", run: Path, count: int) -> None:
    while not (run / "metrics.jsonl").exists() or len(training_runs.rows(run)) < count:
        time.sleep(0.1)
        assert process.poll() is None, process.communicate()[0]


def test_ctrl_c_saves_and_the_advice_works(uneven_shards, tmp_path):
    run = tmp_path / "run"
    process = start(uneven_shards, run, fault={"slow_s": 0.5})
    wait_for_rows(process, run, 2)
    os.kill(process.pid, signal.SIGINT)  # the launcher passes it on
    ended = training_runs.finish(process)
    assert ended.output.count("with --resume") == 1, ended.output
    assert "stopped after step" in ended.output
    newest, _ = checkpoint.newest_step(run)
    assert newest is not None
    stood_at = json.loads((newest / "state.json").read_text())["global_step"]
    assert json.loads((run / "timings.jsonl").read_text().splitlines()[-1]) == {"step": stood_at, "stopped": "SIGINT"}
    ended = training_runs.train(
        uneven_shards, run, *NO_FOLD, "--resume", "--max-steps", "1", model="tiny_eva_x", processes=1
    )
    assert ended.code == 0, ended.output
    assert f"stopped after step {stood_at + 1} (--max-steps)" in ended.output  # FAULTS 60: counts from here


def test_few_open_files_suffice_for_many_shards(uneven_shards, tmp_path):
    """FAULTS 63: 64 open files, 48 shards."""
    words = [*training_runs.FLAGS, "--model", "tiny_eva_x", "--shards", str(many_shards(uneven_shards, tmp_path))]
    words += ["--out", str(tmp_path / "run"), *NO_FOLD, *SHORT]
    process = subprocess.Popen(
        [sys.executable, str(training_runs.WORKER), *words],
        env=os.environ | {"PYTHONPATH": str(training_runs.REPOSITORY), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)),
    )
    ended = training_runs.finish(process)
    assert ended.code == 0, ended.output


def many_shards(uneven_shards: Path, folder: Path) -> Path:
    """The images of `uneven_shards` in a shard each."""
    from cxrdist.shards.convert import Pixels
    from cxrdist.shards.writer import Source, SplitJob, write_split
    from cxrdist.task import TASKS

    sources = []
    for number in range(72):
        image = sorted((uneven_shards.parent / "images").glob("*.png"))[number % 48]
        path = folder / f"{number % 6:08d}_001_{number:03d}.png"
        shutil.copy(image, path)
        targets = tuple(float((number + place) % 3 == 0) for place in range(TASKS["b"].num_labels))
        source = Source(
            number, path.name, str(path), path.stat().st_size, "", f"{number % 6:08d}", "1", targets=targets
        )
        sources.append(source)
    write_split(SplitJob(folder / "div_b", TASKS["b"], "train", sources, Pixels(), 1, {}))
    return folder / "div_b"
