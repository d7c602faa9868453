"""Weight files: the one place that reads them, whatever their layout, and that writes safetensors."""

import argparse
import hashlib
import os
import pathlib
import pickle
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cxrdist.errors import UserError

# What official files hold beside tensors, all of it data: the run's arguments, and numbers that numpy wrote.
_SAFE_GLOBALS: list[Any] = [
    argparse.Namespace,
    pathlib.PosixPath,
    np.dtype,
    *(type(np.dtype(name)) for name in ("float64", "float32", "int64", "int32", "bool")),
    (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),
    (np.float64(0).__reduce__()[0], "numpy._core.multiarray.scalar"),
]


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes; UserError when it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors atomically: to a temporary file beside `path`, synced, then renamed over it.

    UserError names the path and the free bytes when the disk is full; what was there before is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # safetensors refuses tensors that share memory, and writes nothing but contiguous ones
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, temporary, metadata or {})
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, SafetensorError) as error:
        disk = os.statvfs(path.parent) if path.parent.is_dir() else None
        free = f"; {disk.f_bavail * disk.f_frsize:,} bytes are free there" if disk else ""
        raise UserError(f"{path}: cannot be written ({error}){free}") from None
    finally:
        temporary.unlink(missing_ok=True)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (CPU) and metadata of a safetensors file; UserError when it is missing, cut short or another format."""
    _check_readable(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}); get it again or make it again") from None


def safe_torch_load(path: Path) -> Any:
    """What `torch.save` wrote, without running code from the file: tensors, containers, numbers, argparse.Namespace.

    Raises UserError for anything else (named), for a file cut short, and for a file that is no torch file.
    """
    _check_readable(path)
    try:
        with torch.serialization.safe_globals(_SAFE_GLOBALS):
            # mapped into memory: ranks share the pages, and what is not used is not read
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        refused = re.search(r"(?:GLOBAL|Trying to call reduce for unrecognized function|class) `?([\w.]+)", str(error))
        if refused:
            raise UserError(
                f"{path}: refused, loading it would run code ({refused[1]}); use the file from its official source"
            ) from None
        raise UserError(f"{path}: not a whole torch file; get it again (see its size at the source)") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise UserError(f"{path}: not a whole torch file ({reason}); get it again") from None


def _check_readable(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    with path.open("rb") as file:
        start = file.read(64).lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise UserError(f"{path}: is a web page, not weights; download the file itself")
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: is a Git LFS pointer, not weights; fetch the file itself (git lfs pull)")
    if not start:
        raise UserError(f"{path}: is empty; get it again")


def _is_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") <= path.stat().st_size
