"""Scores of finished batches on the disk, so that a killed inference goes on instead of beginning anew.

A part is a file written whole or not at all. It holds raw logits of every pass, so averaging in another way, or a run
on another number of processes, uses it again. The folder's name is the hash of everything that the logits depend on.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cxrdist.errors import UserError
from cxrdist.files import write_atomically


@dataclass(frozen=True, eq=False)
class Part:
    """Some batches of the global list. batches: (b,) int64 their numbers; rows: (n,) int64; logits: (P, n, K) float32.

    unreadable: index row -> reason, for images of these batches that could not be decoded.
    """

    batches: NDArray[np.int64]
    rows: NDArray[np.int64]
    logits: NDArray[np.float32]
    unreadable: dict[int, str]

    def to_bytes(self) -> bytes:
        buffer = io.BytesIO()
        reasons = np.frombuffer(json.dumps(self.unreadable).encode("utf-8"), dtype=np.uint8)
        np.savez(buffer, batches=self.batches, rows=self.rows, logits=self.logits, unreadable=reasons)
        return buffer.getvalue()

    @staticmethod
    def from_bytes(content: bytes) -> "Part":
        """Raises ValueError, KeyError or BadZipFile for anything that `to_bytes` did not write."""
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            reasons = {int(row): str(reason) for row, reason in json.loads(bytes(arrays["unreadable"])).items()}
            return Part(arrays["batches"], arrays["rows"], arrays["logits"], reasons)


class PartStore:
    """The parts under `folder/<fingerprint>`; `describes` (JSON) is all that determines the logits."""

    def __init__(self, folder: Path, describes: dict[str, Any]) -> None:
        text = json.dumps(describes, sort_keys=True)
        self.folder = folder / hashlib.sha256(text.encode()).hexdigest()[:16]

    def write(self, part: Part, rank: int) -> None:
        """UserError when the disk is full; the parts written before stay usable."""
        write_atomically(self.folder / f"{int(part.batches[0]):08d}-{rank}.npz", part.to_bytes())

    def read_all(self) -> dict[str, Part]:
        """File name -> part, for every whole file; a damaged one is left out, so that its batches are scored again."""
        parts = {}
        for path in sorted(self.folder.glob("*.npz")):
            try:
                parts[path.name] = Part.from_bytes(path.read_bytes())
            except (ValueError, KeyError, zipfile.BadZipFile):
                print(f"{path} is damaged: its images are scored again")
        return parts


def merge(
    parts: Sequence[Part], num_rows: int, wanted: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.int64], dict[int, str]]:
    """Logits (P, n, K) of the wanted index rows that were scored, those rows (n,) in index order, and the unreadable.

    Raises UserError unless every wanted row is in a part, scored or unreadable.
    """
    found = np.full(num_rows, -1, dtype=np.int64)
    rows = np.concatenate([part.rows for part in parts])
    found[rows] = np.arange(len(rows))
    unreadable = {row: reason for part in parts for row, reason in part.unreadable.items()}
    missing = [int(row) for row in wanted if found[row] < 0 and int(row) not in unreadable]
    if missing:
        raise UserError(f"{len(missing):,} images have no score yet; run the same command again to score them")
    kept = np.array([row for row in wanted if found[row] >= 0], dtype=np.int64)
    logits = np.concatenate([part.logits for part in parts], axis=1)
    return logits[:, found[kept]], kept, unreadable
