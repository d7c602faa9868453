import argparse

import pytest
import torch

from cxrdist.bench import gpu
from cxrdist.bench.__main__ import main
from cxrdist.bench.timing import Row
from cxrdist.errors import UserError


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
def test_gpu_check_runs_its_cpu_part_and_says_what_it_skipped(monkeypatch):
    monkeypatch.setattr(gpu, "MEASURED_S", 0.1)
    rows = gpu.run(argparse.Namespace(no_compile=True))
    assert [row.variant for row in rows if row.stage == "skipped"] == ["tests that need a GPU, memory", "all-reduce"]
    assert all(row.images_per_s > 0 for row in rows if row.stage in ("demo_eva_x", "demo_chexfound"))
    assert [row.note.split(" --dev")[0] for row in rows if row.stage == "use"] == [
        "--model demo_eva_x",
        "--model demo_chexfound",
    ]
    assert rows[-1].stage == "resume"


def test_a_part_that_fails_leaves_the_others_and_fails_the_command(monkeypatch, capsys):
    def broken(num_gpus):
        raise RuntimeError("NCCL error: unhandled system error")

    monkeypatch.setattr(gpu, "all_reduce_bandwidth", broken)
    monkeypatch.setattr(gpu, "run", lambda args: [gpu.all_reduce_row(2), Row("use", "", None, note="--model eva_x")])
    with pytest.raises(UserError, match="all-reduce over 2 GPUs: failed, see the table"):
        main(["gpu"])
    shown = capsys.readouterr().out
    assert "NCCL error: unhandled system error" in shown
    assert "--model eva_x" in shown
