import pytest
import torch

from cxrdist.distributed.precision import autocast, resolve_precision
from cxrdist.errors import UserError

pytestmark = pytest.mark.fast

CPU = torch.device("cpu")


def test_the_flag_wins_then_accelerate_then_the_hardware(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert resolve_precision("fp32", CPU) == ("fp32", "--precision")
    assert resolve_precision("auto", CPU) == ("bf16", "accelerate's mixed_precision")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert resolve_precision("auto", CPU)[0] in ("bf16", "fp32")


def test_what_cannot_run_is_refused(monkeypatch):
    with pytest.raises(UserError, match="a CPU cannot train in fp16"):
        resolve_precision("fp16", CPU)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(UserError, match="fp8: not supported"):
        resolve_precision("auto", CPU)


def test_autocast_casts_only_when_it_should():
    left = torch.ones(2, 2)
    with autocast("bf16", CPU):
        assert (left @ left).dtype == torch.bfloat16
    with autocast("fp32", CPU):
        assert (left @ left).dtype == torch.float32
