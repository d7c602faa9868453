"""Scores of finished batches on the disk, so that a killed inference resumes instead of starting from scratch.

A part is a file that is complete or not there, and holds its own hash: damage is scored again. It has the raw logits of
every pass, so averaging in another way, or a run on another number of processes, uses it again. The folder's name is
the hash of everything that the logits depend on.
"""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cxrdist.distributed.ranks import Ranks
from cxrdist.documents import Document
from cxrdist.errors import UserError
from cxrdist.files import read_bytes, write_atomically
from cxrdist.inference.passes import Column

Rows = NDArray[np.int64]
Logits = NDArray[np.float32]
DIGEST_BYTES = 32  # SHA-256, before the arrays


@dataclass(frozen=True, kw_only=True)
class Basis(Document):
    """All that the logits of a run depend on; equal on all ranks."""

    shards: str  # fingerprint
    rows: str  # SHA-256 (hex) of the rows that are scored
    columns: tuple[Column, ...]
    device_batch_size: int
    precision: str
    device: str
    checked: bool = True  # each image's bytes were compared with the index; older parts do not say it


@dataclass(frozen=True, eq=False)
class Part:
    """Some batches of the global list. batches: (b,) int64 their numbers; rows: (n,) int64; logits: (P, n, K) float32.

    unreadable: index row -> reason, for images of these batches that could not be decoded.
    """

    batches: NDArray[np.int64]
    rows: Rows
    logits: Logits
    unreadable: dict[int, str]

    def to_bytes(self) -> bytes:
        buffer = io.BytesIO()
        bad, reasons = np.array(list(self.unreadable), np.int64), np.array(list(self.unreadable.values()), str)
        np.savez(buffer, batches=self.batches, rows=self.rows, logits=self.logits, bad=bad, reasons=reasons)
        content = buffer.getvalue()
        return hashlib.sha256(content).digest() + content

    @staticmethod
    def from_bytes(content: bytes) -> "Part":
        """Raises ValueError for anything that `to_bytes` did not write."""
        digest, content = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
        if hashlib.sha256(content).digest() != digest:
            raise ValueError("its hash is another")
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            unreadable = dict(zip(arrays["bad"].tolist(), arrays["reasons"].tolist(), strict=True))
            return Part(arrays["batches"], arrays["rows"], arrays["logits"], unreadable)


def joined(parts: Sequence[Part]) -> Part:
    """Several parts as one."""
    unreadable = {row: reason for part in parts for row, reason in part.unreadable.items()}
    numbers, rows = (np.concatenate([getattr(part, name) for part in parts]) for name in ("batches", "rows"))
    return Part(numbers, rows, np.concatenate([part.logits for part in parts], axis=1), unreadable)


class PartStore:
    """The parts under `folder/<hash of basis>`."""

    def __init__(self, folder: Path, basis: Basis) -> None:
        self.folder = folder / hashlib.sha256(basis.to_json().encode()).hexdigest()[:16]

    def write(self, part: Part, rank: int) -> None:
        """UserError when the disk is full; the parts written before stay usable."""
        write_atomically(self.folder / f"{int(part.batches[0]):08d}-{rank}.npz", part.to_bytes())

    def read_all(self) -> dict[str, Part]:
        """File name -> part, for every intact file; a damaged one is left out, so that its batches are scored again."""
        parts = {}
        for path in sorted(self.folder.glob("*.npz")):
            try:
                parts[path.name] = Part.from_bytes(read_bytes(path))
            except (ValueError, OSError):
                print(f"{path} is damaged: its images are scored again")
        return parts


def batches_done(parts: dict[str, Part], ranks: Ranks) -> set[int]:
    """Numbers of the batches that are in a part of any rank, also where machines do not share the output folder."""
    return set().union(*ranks.gather({int(number) for part in parts.values() for number in part.batches}))


def collect(store: PartStore, ranks: Ranks) -> list[Part]:
    """All parts of all processes on rank 0, also where machines do not share the output folder. A barrier, too."""
    own = store.read_all()
    on_main = set(ranks.gather(sorted(own))[0])
    gathered = ranks.gather({name: part for name, part in own.items() if name not in on_main})
    return list({name: part for parts in (own, *gathered) for name, part in parts.items()}.values())


def merge(
    parts: Sequence[Part], num_rows: int, wanted: range | NDArray[np.integer[Any]]
) -> tuple[Logits, Rows, dict[int, str]]:
    """Logits (P, n, K) of the wanted index rows that were scored, those rows (n,) in index order, and the unreadable.

    Raises UserError unless every wanted row is in a part, scored or unreadable.
    """
    found = np.full(num_rows, -1, dtype=np.int64)
    rows = np.concatenate([part.rows for part in parts])
    found[rows] = np.arange(len(rows))
    unreadable = {row: reason for part in parts for row, reason in part.unreadable.items()}
    asked = np.arange(num_rows) if isinstance(wanted, range) else np.asarray(wanted, np.int64)
    kept = asked[found[asked] >= 0]
    if missing := set(asked[found[asked] < 0].tolist()) - unreadable.keys():
        raise UserError(f"{len(missing):,} images have no score yet; run the same command again to score them")
    return np.concatenate([part.logits for part in parts], axis=1)[:, found[kept]], kept, unreadable
