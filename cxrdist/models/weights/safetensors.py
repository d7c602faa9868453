"""Safetensors files: written atomically, read whatever is wrong with them, compared by content."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cxrdist import files
from cxrdist.errors import UserError
from cxrdist.models.architecture import Tensors


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes; UserError when it cannot be read."""
    try:
        with files.open_to_read(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def tensors_sha256(state: dict[str, Tensor], names: Iterable[str]) -> str:
    """Hash of names, types, shapes and bytes: equal weights are equal whichever file they came from."""
    digest = hashlib.sha256()
    for name in names:
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_safetensors(
    path: Path, tensors: Tensors, metadata: dict[str, str] | None = None, *, recorded: bool = False
) -> None:
    """Write tensors atomically; UserError names the path and the free bytes when the disk is full.

    recorded: as an output for people (`files.write_output`).
    """
    # safetensors refuses tensors that share memory, and writes nothing but contiguous ones
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    write = files.write_output if recorded else files.write_atomically
    write(path, save(contiguous, metadata or {}))


def read_safetensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    """Tensors (CPU) and metadata of a safetensors file; UserError when it is missing, cut short or another format."""
    check_readable(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: not an intact safetensors file ({error}); get it or make it again") from None


def is_safetensors(path: Path) -> bool:
    """Whether the file begins as a safetensors file does, whatever it is called."""
    with files.open_to_read(path) as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") <= path.stat().st_size


def check_readable(path: Path) -> None:
    """UserError for a file that is missing, unreadable, empty, a web page or a Git LFS pointer."""
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    try:
        with path.open("rb") as file:
            start = file.read(64).lstrip().lower()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise UserError(f"{path}: is a web page, not weights; download the file itself")
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: is a Git LFS pointer, not weights; fetch the file itself (git lfs pull)")
    if not start:
        raise UserError(f"{path}: is empty; get it again")
