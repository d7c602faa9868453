"""Rows of a split, and the order in which an epoch uses them, without a number in memory for each of them.

Ten million rows as int64 take 80 MB, and every process of a node has its own: a part of a split is a mask, and of an
epoch's order only the part is sorted that is being used.
"""

import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cxrdist.shards.columns import pieces
from cxrdist.splitmix import GAMMA, mix

Rows = NDArray[np.int64]
# Rows that are sorted at once, and the hash's first bits by which they are chosen. To sort 10 million in 39 parts costs
# a process 2.5 s of an epoch instead of 1 s, and 8 MB instead of 240.
SORTED_AT_ONCE = 2**18
BITS = 16


@dataclass(frozen=True, eq=False)
class Chosen:
    """The rows, in ascending order, where `mask` (N,) bool is true."""

    mask: NDArray[np.bool_]

    @cached_property
    def _num(self) -> int:
        return int(np.count_nonzero(self.mask))

    def __len__(self) -> int:
        return self._num


SomeRows = range | NDArray[np.integer[Any]] | Chosen


def in_pieces(rows: SomeRows) -> Iterator[Rows]:
    """The rows as int64, some at once."""
    if isinstance(rows, Chosen):
        for piece in pieces(len(rows.mask)):
            yield piece.start + np.flatnonzero(rows.mask[piece])
    else:
        for piece in pieces(len(rows)):
            yield as_array(rows[piece])


def as_array(rows: range | NDArray[np.integer[Any]]) -> Rows:
    """Some rows as int64."""
    return np.arange(rows.start, rows.stop, rows.step) if isinstance(rows, range) else np.asarray(rows, np.int64)


def count_rows(shards: NDArray[np.integer[Any]], rows: SomeRows) -> NDArray[np.int64]:
    """How many of the rows each shard has, up to the last one that has any; shards: of every row of the index."""
    counts = np.zeros(int(shards.max(initial=-1)) + 1, np.int64)
    for piece in in_pieces(rows):
        counts += np.bincount(shards[piece], minlength=len(counts))
    return counts


def windows(shards: NDArray[np.integer[Any]], seed: int, epoch: int, window: int) -> list[Rows]:
    """The distinct `shards` in the order of `epoch`, `window` of them at a time; the last window may have fewer.

    Sorted by a hash, as rows are in `EpochOrder`; another one, so that it says nothing of the rows.
    """
    numbers = np.asarray(shards, np.int64)
    order = numbers[np.argsort(mix(mix(_key(seed, epoch) ^ GAMMA) + numbers.astype(np.uint64) * GAMMA))]
    return [order[first : first + window] for first in range(0, len(order), window)]


def _key(seed: int, epoch: int) -> NDArray[np.uint64]:
    return mix(mix(np.array([seed % 2**64], np.uint64)) + np.uint64(epoch))


class EpochOrder:
    """`rows` in the order in which `epoch` uses them; a slice of it is an array. Which way `rows` come does not matter.

    Rows are sorted by a hash of (seed, epoch, row) instead of drawn from numpy's generator, whose streams may change
    between versions: a run resumes on another numpy. The hash is a bijection of the row, hence no ties.
    Source of the hash: SplitMix64 (Steele et al. 2014).
    """

    def __init__(
        self,
        rows: SomeRows,
        seed: int,
        epoch: int,
        shards: NDArray[np.integer[Any]] | None = None,
        window: int | None = None,
    ) -> None:
        """shards: the shard of every row of the index. window: shards among whose rows the order is random at a time,
        see `windows`; None, or at least as many as there are: all.
        """
        self._rows = rows
        self._key = _key(seed, epoch)
        self._shards, self._window_of = shards, np.empty(0, np.int64)
        # Of each part: the first of its places in the order, and of the first bits of its hashes.
        self._places, self._bits = [0, len(rows)], [0, 2**BITS]
        self._part: tuple[int, Rows] = (-1, np.empty(0, np.int64))
        if window is not None and shards is not None:  # a part is a window
            of_shard = count_rows(shards, rows)
            groups = windows(np.flatnonzero(of_shard), seed, epoch, window)
            self._window_of = np.empty(len(of_shard), np.int64)
            for number, group in enumerate(groups):
                self._window_of[group] = number
            self._places = [0, *np.cumsum([int(of_shard[group].sum()) for group in groups]).tolist()]
        elif len(rows) > SORTED_AT_ONCE:
            counts = np.zeros(2**BITS, np.int64)
            for piece in in_pieces(rows):
                counts += np.bincount(self._first_bits(self._hashes(piece)), minlength=2**BITS)
            ends = np.cumsum(counts)
            self._places, self._bits = [0], [0]
            while self._bits[-1] < 2**BITS:
                last = int(np.searchsorted(ends, self._places[-1] + SORTED_AT_ONCE, side="right"))
                self._bits.append(max(last, self._bits[-1] + 1))
                self._places.append(int(ends[self._bits[-1] - 1]))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, places: slice) -> Rows:
        start, stop, _ = places.indices(len(self))
        found = []
        while start < stop:
            part = bisect.bisect_right(self._places, start) - 1
            first, end = self._places[part], min(stop, self._places[part + 1])
            found.append(self._sorted(part)[start - first : end - first])
            start = end
        return found[0] if len(found) == 1 else np.concatenate([np.empty(0, np.int64), *found])

    def _sorted(self, part: int) -> Rows:
        """The rows of one part in their order; it is kept until another one is asked for."""
        if self._part[0] != part:
            in_windows = len(self._window_of) > 0
            low, high = (part, part + 1) if in_windows else self._bits[part : part + 2]
            found = []
            for rows in in_pieces(self._rows):
                if in_windows and self._shards is not None:
                    rows = rows[self._window_of[self._shards[rows]] == part]
                hashes = self._hashes(rows)
                if len(self._bits) > 2:
                    bits = self._first_bits(hashes)
                    inside = (bits >= low) & (bits < high)
                    rows, hashes = rows[inside], hashes[inside]
                found.append((rows, hashes))
            rows, hashes = (np.concatenate(column) for column in zip(*found, strict=True))
            self._part = part, rows[np.argsort(hashes)]
        return self._part[1]

    def _hashes(self, rows: Rows) -> NDArray[np.uint64]:
        return mix(self._key + rows.astype(np.uint64) * GAMMA)

    @staticmethod
    def _first_bits(hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
        return (hashes >> np.uint64(64 - BITS)).astype(np.int64)
