from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType, PartialState

from cxrdist.distributed.precision import Hardware, autocast, hardware_of, resolve_precision
from cxrdist.errors import UserError

pytestmark = pytest.mark.fast

CPU = hardware_of(torch.device("cpu"))
CAPABILITIES = {"T4": (7, 5), "V100": (7, 0), "A100": (8, 0), "A30 slice": (8, 0), "RTX 4090": (8, 9), "H100": (9, 0)}


def test_the_flag_wins_then_accelerate_then_the_hardware(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert resolve_precision("fp32", [CPU]) == ("fp32", "--precision")
    assert resolve_precision("auto", [CPU]) == ("bf16", "accelerate's mixed_precision")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert resolve_precision("auto", [CPU])[0] in ("bf16", "fp32")


def test_what_cannot_run_is_refused(monkeypatch):
    with pytest.raises(UserError, match="a CPU cannot train in fp16"):
        resolve_precision("fp16", [CPU])
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(UserError, match="fp8: not supported"):
        resolve_precision("auto", [CPU])


def test_autocast_casts_only_when_it_should():
    left = torch.ones(2, 2)
    cpu = torch.device("cpu")
    with autocast("bf16", cpu):
        assert (left @ left).dtype == torch.bfloat16
    with autocast("fp32", cpu):
        assert (left @ left).dtype == torch.float32


@pytest.mark.parametrize(
    ("ranks", "visible", "devices", "precision"),
    [
        (["T4", "T4"], 2, [0, 1], "fp16"),
        (["V100"], 1, [0], "fp16"),
        (["A100"], 1, [0], "bf16"),
        (["H100"] * 8, 8, list(range(8)), "bf16"),
        (["RTX 4090", "RTX 4090"], 2, [0, 1], "bf16"),
        (["A100", "T4"], 2, [0, 1], "fp16"),  # one machine with two kinds
        (["H100", "V100"], 1, [0, 0], "fp16"),  # a rank of one GPU on each of two nodes
        (["A30 slice"] * 4, 1, [0, 0, 0, 0], "bf16"),  # each process sees its own only (MIG, --gpus-per-task=1)
    ],
    ids=str,
)
def test_each_rank_takes_a_gpu_it_sees_and_all_one_precision(monkeypatch, ranks, visible, devices, precision):
    """The ranks' devices as accelerate chooses them; precision is agreed on by what each of them describes."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    chosen, described = [], []
    for rank, name in enumerate(ranks):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, name=name: CAPABILITIES[name])
        state = SimpleNamespace(device=None, distributed_type=DistributedType.MULTI_GPU, local_process_index=rank)
        PartialState.set_device(state)
        chosen.append(state.device.index)
        described.append(hardware_of(state.device))
    assert chosen == devices
    assert resolve_precision("auto", described)[0] == precision
    if precision == "fp16":
        with pytest.raises(UserError, match=r"(T4|V100) has no bf16; use --precision fp16"):
            resolve_precision("bf16", described)


def test_a_cpu_with_and_without_bf16():
    assert resolve_precision("auto", [Hardware("this CPU", "cpu", True)] * 2)[0] == "bf16"
    assert resolve_precision("auto", [Hardware("this CPU", "cpu", True), Hardware("that", "cpu", False)])[0] == "fp32"
