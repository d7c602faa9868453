import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cxrdist.distributed.group import check_gpus_seen
from cxrdist.distributed.plan import PROJECT, plan_launch
from cxrdist.doctor import compiling, main
from cxrdist.errors import UserError

pytestmark = pytest.mark.fast


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    for name in ("CXRDIST_ACCEL_CONFIG", "CXRDIST_PROCESSES", "ACCELERATE_USE_CPU", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)


def has_gpus(monkeypatch, *capabilities):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device.index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")


@pytest.mark.parametrize(
    ("capabilities", "config", "processes"),
    [
        ([], "cpu", 2),
        ([(7, 5)], "gpu1", 1),
        ([(9, 0)], "gpu1", 1),
        ([(7, 5)] * 2, "gpu2_fp16", 2),
        ([(8, 6)] * 2, "gpu8_bf16", 2),
        ([(7, 0)] * 4, "gpu2_fp16", 4),
        ([(9, 0), (7, 5)], "gpu2_fp16", 2),
        ([(10, 0)] * 8, "gpu8_bf16", 8),
    ],
)
def test_every_gpu_gets_a_process_and_a_precision_it_has(monkeypatch, capabilities, config, processes):
    has_gpus(monkeypatch, *capabilities)
    plan = plan_launch()
    assert (Path(plan.config).stem, plan.num_processes) == (config, processes)
    assert (PROJECT / "accel_configs" / f"{config}.yaml").is_file()


def test_a_gpu_that_torch_does_not_see_is_an_error_and_no_training_on_the_cpu(monkeypatch, capsys):
    has_gpus(monkeypatch)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    with pytest.raises(UserError, match=r"sees no GPU.*to run on the CPU set CXRDIST_ACCEL_CONFIG"):
        main(["--plan"])
    monkeypatch.setenv("CXRDIST_ACCEL_CONFIG", "accel_configs/cpu.yaml")
    main(["--plan"])
    assert capsys.readouterr().out.startswith("accel_configs/cpu.yaml\t2\tOMP_NUM_THREADS=")


def test_a_cpu_configuration_means_the_cpu_also_beside_gpus(monkeypatch):
    has_gpus(monkeypatch, *[(8, 0)] * 4)
    monkeypatch.setenv("CXRDIST_ACCEL_CONFIG", str(PROJECT / "accel_configs" / "cpu.yaml"))
    plan = plan_launch()
    assert (plan.num_processes, plan.environment["ACCELERATE_USE_CPU"]) == (2, "true")
    monkeypatch.delenv("CXRDIST_ACCEL_CONFIG")
    assert "ACCELERATE_USE_CPU" not in plan_launch().environment


def test_training_on_the_cpu_of_a_machine_whose_gpus_are_not_seen_has_to_be_asked_for(monkeypatch):
    has_gpus(monkeypatch)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    with pytest.raises(UserError, match=r"sees no GPU.*ACCELERATE_USE_CPU=true"):
        check_gpus_seen()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    check_gpus_seen()


def test_launch_sh_starts_what_the_doctor_plans(tmp_path):
    """A stand-in python records how accelerate is called; the doctor is the real one."""
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\ncase "$2" in cxrdist.doctor) exec "$REAL_PYTHON" "$@" ;; esac\n'
        'echo "$OMP_NUM_THREADS $ACCELERATE_USE_CPU" "$@"\n'
    )
    python.chmod(0o755)
    environment = os.environ | {
        "CXRDIST_PYTHON": str(python),
        "REAL_PYTHON": sys.executable,
        "CXRDIST_ACCEL_CONFIG": "my folder/cpu.yaml",
        "CXRDIST_PROCESSES": "3",
        "OMP_NUM_THREADS": "5",
    }
    done = subprocess.run(
        [PROJECT / "launch.sh", "train", "b", "--seed", "7"], env=environment, capture_output=True, text=True
    )
    called = "5 true -m accelerate.commands.launch --quiet --config_file my folder/cpu.yaml --num_processes 3"
    assert done.stdout == f"{called} -m cxrdist.train --task b --expect-processes 3 --seed 7\n", done.stderr
    call = [PROJECT / "launch.sh", "folds", "b", "--model", "chexfound", "--only", "1"]
    done = subprocess.run(call, env=environment, capture_output=True, text=True)
    assert done.stdout == "5  -m cxrdist.folds --task b --model chexfound --only 1\n", done.stderr
    done = subprocess.run([PROJECT / "launch.sh", "train", "c"], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: 'c' is not a, b or a .toml file, and there is no shard set shards/c")


@pytest.mark.parametrize(
    ("gpus", "advice"), [(0, "is for GPUs"), (2, "or less"), (8, "train with --compile: 8 images")]
)
def test_compile_is_advised_where_a_step_is_small(gpus, advice):
    assert advice in compiling(gpus)
