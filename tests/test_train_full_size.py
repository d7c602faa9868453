"""Both published models at their real size: three optimizer steps of two images on the CPU, in bf16 where it has it."""

import math
import shutil

import pytest

from cxrdist import train as train_entry
from cxrdist.runs import checkpoint
from tests import training_runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.parametrize(("model", "largest_mb"), [("eva_x", 1400), ("chexfound", 150)])
def test_three_steps_at_full_size(uneven_shards, tmp_path, model, largest_mb):
    shards = tmp_path / "shards"
    shutil.copytree(uneven_shards, shards)
    run = tmp_path / "run"
    flags = ["--model", model, "--shards", str(shards), "--out", str(run), "--wandb", "off", "--device-batch-size", "2"]
    flags += ["--set", "global_batch_size=2", "--max-steps", "3"]
    command = [flag if flag != "fp32" else "auto" for flag in training_runs.FLAGS]
    train_entry.main([*command, *flags])
    losses = [row["loss"] for row in training_runs.rows(run)]
    assert len(losses) == 3
    assert all(math.isfinite(loss) and 0 < loss < 2 for loss in losses)
    (step,) = checkpoint.step_folders(run)
    size_mb = sum(path.stat().st_size for path in step.iterdir()) / 1e6
    assert size_mb <= largest_mb
    print(f"{model}: losses {losses}, checkpoint {size_mb:.0f} MB, {(run / 'timings.jsonl').read_text()}")
