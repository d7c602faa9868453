"""Which number format the forward and backward pass run in, decided from the flag, accelerate and the hardware."""

import os
from pathlib import Path

import torch

from cxrdist.errors import UserError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def resolve_precision(flag: str, device: torch.device) -> tuple[str, str]:
    """(bf16, fp16 or fp32, and why): the flag, else accelerate's explicit choice, else the best the hardware has.

    Raises UserError when what was asked for cannot run here; nothing is replaced silently.
    """
    on_gpu, cpuinfo = device.type == "cuda", Path("/proc/cpuinfo")
    if on_gpu:
        name, has_bf16 = torch.cuda.get_device_name(device), torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        name, has_bf16 = "this CPU", cpuinfo.exists() and "avx512_bf16" in cpuinfo.read_text()
    told = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if flag != "auto":
        chosen, why = flag, "--precision"
    elif told != "no":
        chosen, why = told, "accelerate's mixed_precision"
    elif has_bf16:
        chosen, why = "bf16", f"{name} has it"
    else:
        chosen, why = "fp16" if on_gpu else "fp32", f"{name} has no bf16"
    if chosen not in DTYPES:
        raise UserError(f"{why} {chosen}: not supported; use --precision bf16, fp16 or fp32")
    if chosen == "fp16" and device.type == "cpu":
        raise UserError(f"{why} fp16: a CPU cannot train in fp16; use --precision bf16 or fp32")
    if chosen == "bf16" and on_gpu and not has_bf16:
        raise UserError(f"{why} bf16: {name} has no bf16; use --precision fp16")
    return chosen, why


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The context for a forward pass; does nothing in fp32."""
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")
