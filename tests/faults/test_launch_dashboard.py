"""The wandb dashboard read back from the file of an offline run: every panel has its series, as the local files."""

import json
import struct
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil
import pytest

from cxrdist.task import COMPETITION_LABELS as LABELS

pytestmark = [pytest.mark.fault, pytest.mark.timeout(240)]

REPOSITORY = Path(__file__).parents[2]
BLOCK = 32768  # the file is a LevelDB log: blocks of records, each with crc (4), length (2) and type (1)


def offline_records(path: Path) -> list[Any]:
    """The protobuf records of a .wandb file."""
    from wandb.proto import wandb_internal_pb2

    content = path.read_bytes()
    assert content[:4] == b":W&B"
    records, position, parts = [], 7, b""
    while position + 7 <= len(content):
        if BLOCK - position % BLOCK < 7:
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        parts = (b"" if kind in (1, 2) else parts) + content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            records.append(record)
    return records


def series_of(records: list[Any]) -> dict[str, list[tuple[int, Any]]]:
    """Panel name -> (step, value) of every logged row."""
    series: dict[str, list[tuple[int, Any]]] = defaultdict(list)
    for record in records:
        if record.WhichOneof("record_type") != "history":
            continue
        row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for name, value in row.items():
            series[name].append((row.get("step", -1), value))
    return series


def train_words(shards: Path, run: Path, *flags: str) -> list[str]:
    fields = ("image_size=32", "model_kwargs=depth=2", "global_batch_size=8", "epochs=2", "member_epochs=2")
    words = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    words += ["--config_file", "accel_configs/cpu.yaml", "-m", "cxrdist.train", "--div", "b", "--model", "eva_x_tiny"]
    words += ["--init", "random", "--shards", str(shards), "--out", str(run), "--log-every", "1"]
    words += ["--validate-fold", "0", "--folds", "3", "--wandb", "offline", *flags]
    return words + [word for field in fields for word in ("--set", field)]


def local_rows(run: Path, name: str) -> list[dict[str, Any]]:
    """The whole lines of a local file."""
    path = run / name
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def test_every_panel_of_the_dashboard_has_its_series_and_equals_the_local_file(
    uneven_shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = train_words(uneven_shards, run, "--wandb-images")
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = run.glob("wandb/offline-run-*/*.wandb")
    records = offline_records(path)
    series = series_of(records)
    rows = local_rows(run, "metrics.jsonl")
    train = [row for row in rows if row["kind"] == "train"]
    groups = [name for name in train[0] if name.startswith("lr/")]
    assert len(groups) >= 4
    for name in ("loss", "focal", "bce", "grad_norm", "loss_scale", "skipped", *groups):
        assert series[name] == [(row["step"], row[name]) for row in train], name
    for row in rows + local_rows(run, "timings.jsonl"):
        for name in row.keys() - {"step", "kind"}:
            assert (row["step"], row[name]) in series[name], name
    for name in ("images_per_s", "wait_share", "memory_bytes"):
        for rank in (0, 1):
            assert len(series[f"rank{rank}/{name}"]) >= len(train) - 1, name
    assert len(series["images_per_s"]) >= len(train) - 1
    validation = [row for row in rows if row["kind"] == "validation"]
    assert len(validation) == 2
    assert [value for _, value in series["validation/auroc_macro"]] == [
        row["validation/auroc_macro"] for row in validation
    ]
    assert all(f"validation/auroc/{label}" in series for label in LABELS)
    assert any(name.startswith("augmented samples") for name in series)
    assert any("roc" in name for name in series)
    (started,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert started.run_group == "run"
    assert "recipe" in {item.key for item in started.config.update}


def test_a_dashboard_killed_with_its_training_goes_on_and_has_what_the_local_files_have(
    uneven_shards: Path, tmp_path: Path
) -> None:
    """SIGKILL to everything at once, wandb's own process too, as when a node is lost."""
    run = tmp_path / "run"
    words = train_words(uneven_shards, run, "--resume", "--checkpoint-minutes", "0")
    killed = subprocess.Popen(
        words, cwd=REPOSITORY, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    limit = time.monotonic() + 120
    while len(local_rows(run, "metrics.jsonl")) < 4:
        assert killed.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.01)
    everything = [*psutil.Process(killed.pid).children(recursive=True), psutil.Process(killed.pid)]
    assert any("wandb" in process.name() for process in everything)
    for process in everything:
        process.kill()
    killed.wait()
    psutil.wait_procs(everything, timeout=30)
    before = local_rows(run, "metrics.jsonl")
    assert len(before) >= 4
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = local_rows(run, "metrics.jsonl")
    assert rows[: len(before)] == before
    newest = max(run.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    series = series_of(offline_records(newest))
    for row in rows:
        for name in row.keys() - {"step", "kind"}:
            assert (row["step"], row[name]) in series[name], name
