import os
import subprocess
from pathlib import Path

import pytest
import torch

from cxrdist import doctor
from cxrdist.distributed.group import check_gpus_seen
from cxrdist.distributed.launch import launch
from cxrdist.distributed.plan import PROJECT, plan_launch
from cxrdist.doctor import compiling
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


def test_a_gpu_that_torch_does_not_see_is_an_error_and_no_training_on_the_cpu(monkeypatch):
    has_gpus(monkeypatch)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    with pytest.raises(UserError, match=r"sees no GPU.*to run on the CPU set ACCELERATE_USE_CPU=true"):
        launch("none", [], again="")
    monkeypatch.setenv("CXRDIST_ACCEL_CONFIG", "nowhere/cpu.yaml")
    with pytest.raises(UserError, match=r"CXRDIST_ACCEL_CONFIG=nowhere/cpu.yaml: no such file"):
        launch("none", [], again="")


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


def test_launch_sh_hands_every_command_to_the_package(tmp_path):
    """A stand-in python records how it is called."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$1" in -c) exit 0 ;; esac\necho "$@"\n')
    python.chmod(0o755)
    environment = os.environ | {"CXRDIST_PYTHON": str(python)}
    for words in (["train", "--div", "b"], ["doctor"], ["app", "--port", "0"], ["no-such-command"]):
        done = subprocess.run([PROJECT / "launch.sh", *words], env=environment, capture_output=True, text=True)
        assert done.stdout == f"-m cxrdist {' '.join(words)}\n", done.stderr


@pytest.mark.parametrize(
    ("gpus", "advice"), [(0, "is for GPUs"), (2, "or less"), (8, "train with --compile: 8 images")]
)
def test_compile_is_advised_where_a_step_is_small(gpus, advice):
    assert advice in compiling(gpus)


@pytest.mark.parametrize(
    ("files", "remedy"), [(("launch.sh",), r"run `./launch.sh setup`"), ((), "run `pip install 'timm<1,>=0.1'`")]
)
def test_a_package_of_another_version_is_mended_by_what_there_is(files, remedy, tmp_path, monkeypatch):
    for name in files:
        (tmp_path / name).touch()
    monkeypatch.setattr(doctor, "PROJECT", tmp_path)
    monkeypatch.setattr("importlib.metadata.requires", lambda name: ["timm>=0.1,<1"])
    problems: list[str] = []
    doctor.versions(problems)
    assert len(problems) == 1
    assert problems[0].endswith(f"is not <1,>=0.1; {remedy}")
