"""Which number format the forward and backward pass run in, decided from the flag, accelerate and the hardware."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cxrdist.errors import UserError

FIRST_WITH_BF16 = (8, 0)  # compute capability of Ampere
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Hardware:
    """What decides a precision on one device."""

    name: str
    kind: str  # cuda or cpu
    has_bf16: bool


def hardware_of(device: torch.device) -> Hardware:
    """The device as the machine describes it."""
    if device.type == "cuda":
        has_bf16 = torch.cuda.get_device_capability(device) >= FIRST_WITH_BF16
        return Hardware(torch.cuda.get_device_name(device), "cuda", has_bf16)
    cpuinfo = Path("/proc/cpuinfo")
    return Hardware("this CPU", "cpu", cpuinfo.exists() and "avx512_bf16" in cpuinfo.read_text())


def resolve_precision(flag: str, found: Sequence[Hardware]) -> tuple[str, str]:
    """(bf16, fp16 or fp32, and why): the flag, else accelerate's explicit choice, else the best that all devices have.

    Raises UserError when what was asked for cannot run here; nothing is replaced silently.
    """
    least = next((each for each in found if not each.has_bf16), found[0])
    on_gpu, name = least.kind == "cuda", least.name
    told = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if flag != "auto":
        chosen, why = flag, "--precision"
    elif told != "no":
        chosen, why = told, "accelerate's mixed_precision"
    elif least.has_bf16:
        chosen, why = "bf16", f"{name} has it"
    else:
        chosen, why = "fp16" if on_gpu else "fp32", f"{name} has no bf16"
    if chosen not in DTYPES:
        raise UserError(f"{why} {chosen}: not supported; use --precision bf16, fp16 or fp32")
    if chosen == "fp16" and not on_gpu:
        raise UserError(f"{why} fp16: a CPU cannot train in fp16; use --precision bf16 or fp32")
    if chosen == "bf16" and on_gpu and not least.has_bf16:
        raise UserError(f"{why} bf16: {name} has no bf16; use --precision fp16")
    return chosen, why


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The context for a forward pass; does nothing in fp32."""
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")
