"""The wandb dashboard read back from the file of an offline run: every panel has its series, as the local files."""

import json
import struct
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from cxrdist.labels import LABELS

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


def test_every_panel_of_the_dashboard_has_its_series_and_equals_the_local_file(
    uneven_shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    fields = ("image_size=32", "model_kwargs=depth=2", "global_batch_size=8", "epochs=2", "member_epochs=2")
    settings = [word for field in fields for word in ("--set", field)]
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    launch += ["--config_file", "accel_configs/cpu.yaml", "-m", "cxrdist.train", "--div", "b", "--model", "eva_x_tiny"]
    flags = ["--init", "random", "--shards", str(uneven_shards), "--out", str(run), "--log-every", "1"]
    flags += ["--validate-fold", "0", "--folds", "3", "--wandb", "offline"]
    done = subprocess.run([*launch, *flags, *settings], cwd=REPOSITORY, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = run.glob("wandb/offline-run-*/*.wandb")
    records = offline_records(path)
    series = series_of(records)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = [row for row in rows if row["kind"] == "train"]
    groups = [name for name in train[0] if name.startswith("lr/")]
    assert len(groups) >= 4
    for name in ("loss", "focal", "bce", "grad_norm", "loss_scale", "skipped", *groups):
        assert series[name] == [(row["step"], row[name]) for row in train], name
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
