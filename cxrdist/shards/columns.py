"""The columns of an index as they lie in the mapped file: what is not asked for is not read, and no Python object is
made of a row before it is asked for.

An index that this version writes holds the XXH3 of each of its columns, so that those which training needs are
checked without the text, and text is checked when it is first used.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from numpy.typing import NDArray

from cxrdist.errors import UserError

TEXT = pa.large_string()
MASKED = 255  # in a uint8 label column; NaN in a float32 one
ROWS_AT_ONCE = 2**17  # of a pass over a column: what it needs beside the column stays in a core's cache
SEAL = b"cxrdist"  # in the file's metadata: the JSON of its columns' hashes, and of what the JSON beside it says
AGAIN = "copy the shard set again, or run cxrdist.preprocess again"


def pieces(num_rows: int) -> Iterator[slice]:
    """The rows in pieces that are worked on at once."""
    return (slice(start, min(start + ROWS_AT_ONCE, num_rows)) for start in range(0, num_rows, ROWS_AT_ONCE))


class Texts:
    """A column of text, an entry per image, held as Arrow: no Python object per row until one is asked for."""

    def __init__(self, texts: Iterable[str] | pa.Array, check: Callable[[pa.Array], None] | None = None) -> None:
        """check: of the column, before it is first used."""
        self._array = texts if isinstance(texts, pa.Array) else pa.array(list(texts), TEXT)
        self._check = check

    @cached_property
    def array(self) -> pa.Array:
        if self._check is not None:
            self._check(self._array)
        return self._array

    def __len__(self) -> int:
        return len(self._array)

    @overload
    def __getitem__(self, rows: int | np.integer[Any]) -> str: ...
    @overload
    def __getitem__(self, rows: slice | NDArray[Any]) -> Self: ...
    def __getitem__(self, rows: int | np.integer[Any] | slice | NDArray[Any]) -> str | Self:
        """The text of one row, or the texts of a slice, of row positions, or where a mask is true."""
        if isinstance(rows, np.ndarray):
            return type(self)(self.array.filter(rows) if rows.dtype == bool else self.array.take(rows))
        return type(self)(self.array[rows]) if isinstance(rows, slice) else str(self.array[int(rows)].as_py())

    def __iter__(self) -> Iterator[str]:
        for piece in pieces(len(self)):
            yield from self.array[piece].to_pylist()

    def to_list(self) -> list[str]:
        return list(self.array.to_pylist())

    def to_objects(self) -> NDArray[np.object_]:
        """(N,) of str; equal texts are one object."""
        codes, distinct = self.codes()
        return np.array([*distinct.to_list(), None], object)[:-1][codes]

    def codes(self) -> tuple[NDArray[np.int32], "Texts"]:
        """(N,) int32, equal for equal texts, and the distinct texts, sorted, which these numbers count from 0."""
        encoded = pc.dictionary_encode(self.array)
        order = pc.sort_indices(encoded.dictionary).to_numpy()
        rank = np.empty(len(order), np.int32)
        rank[order] = np.arange(len(order), dtype=np.int32)
        return rank[encoded.indices.to_numpy()], Texts(encoded.dictionary.take(order))

    def has_distinct(self, number: int) -> bool:
        """Whether there are at least so many distinct texts; reads no more of them than it takes to see that."""
        found: set[str] = set()
        for piece in pieces(len(self)):
            found.update(self.array[piece].unique().to_pylist())
            if len(found) >= number:
                return True
        return False

    def first_repeated(self) -> int | None:
        """The first row whose text is there before; None where each is there once. Takes 16 bytes a row meanwhile."""
        hashes = np.fromiter((xxhash.xxh3_64_intdigest(text.encode()) for text in self), np.uint64, len(self))
        ordered = np.sort(hashes)
        twice = ordered[1:][ordered[1:] == ordered[:-1]]
        seen: set[str] = set()
        for row in np.flatnonzero(np.isin(hashes, twice)) if len(twice) else ():
            if (text := self[row]) in seen:
                return int(row)
            seen.add(text)
        return None


class Targets:
    """The targets (N, K) of a split in its mapped label columns: (n, K) float32 in [0, 1], NaN where masked, of the
    rows that are asked for.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, columns: Sequence[NDArray[Any]]) -> None:
        """columns: K of (N,), uint8 with 255 for masked, or float32 with NaN."""
        self.columns = tuple(columns)
        self.shape = len(self.columns[0]), len(self.columns)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: int | np.integer[Any] | slice | NDArray[Any]) -> NDArray[np.float32]:
        """(n, K) of a slice, of row positions, or where a mask is true; (K,) of one row."""
        if isinstance(rows, int | np.integer):
            return np.asarray(self[np.array([rows])][0])
        cells = [column[rows] for column in self.columns]
        targets: NDArray[np.float32] = np.empty((len(cells[0]), len(cells)), np.float32)
        for place, column in enumerate(cells):
            targets[:, place] = column
            if column.dtype == np.uint8:
                targets[column == MASKED, place] = np.nan
        return targets

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self[:], dtype or self.dtype)

    def label(self, place: int) -> NDArray[np.float32]:
        """(N,) one label's targets."""
        return np.asarray(Targets([self.columns[place]])[:][:, 0])

    @cached_property
    def masked(self) -> bool:
        """Whether any cell is."""
        columns = (column[piece] for column in self.columns for piece in pieces(len(self)))
        return any(bool(((c == MASKED) if c.dtype == np.uint8 else np.isnan(c)).any()) for c in columns)

    def observed(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """(n,) the cells of each of these rows that are not masked."""
        return np.asarray(np.count_nonzero(~np.isnan(self[rows]), axis=1), np.int64)


def column_hash(column: pa.Array) -> str:
    """XXH3 (128 bits, hex) of what a column without nulls holds: its values, and of text also where each begins."""
    digest = xxhash.xxh3_128()
    for buffer, size in zip(column.buffers()[1:], _sizes(column), strict=True):
        if column.offset or (0 if buffer is None else buffer.size) < size:
            raise ValueError("its buffers are not those of its rows")
        if size:
            digest.update(memoryview(buffer)[:size])
    return str(digest.hexdigest())


def _sizes(column: pa.Array) -> list[int]:
    """The bytes of each buffer that its rows take."""
    if column.type != TEXT:
        return [len(column) * column.type.bit_width // 8]
    offsets = memoryview(column.buffers()[1])[: 8 * (len(column) + 1)].cast("q")
    if len(offsets) != len(column) + 1 or offsets[-1] < 0:
        raise ValueError("its offsets are not those of its rows")
    return [8 * len(offsets), offsets[-1]]


def sealed(batch: pa.RecordBatch, of: str) -> pa.RecordBatch:
    """The batch with its columns' hashes in its metadata, and `of`: the hash of the set that it belongs to."""
    hashes = {name: column_hash(column) for name, column in zip(batch.schema.names, batch.columns, strict=True)}
    return batch.replace_schema_metadata({SEAL: json.dumps({"of": of, "xxh3_128": hashes})})


def seal_of(batch: pa.RecordBatch) -> tuple[str, Mapping[str, str]]:
    """The hash of the set, and by name the columns' hashes; empty where the file has none, as older ones."""
    try:
        seal = json.loads((batch.schema.metadata or {}).get(SEAL, b""))
        return str(seal["of"]), {str(name): str(digest) for name, digest in seal["xxh3_128"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "", {}


def check_column(path: Path, name: str, expected: str, column: pa.Array) -> None:
    """UserError unless a column has its hash, and is a column of its kind."""
    try:
        intact = column_hash(column) == expected
        column.validate(full=True)
    except (pa.ArrowException, ValueError) as error:
        raise UserError(f"{path} is damaged: column {name!r}: {str(error).splitlines()[0]}; {AGAIN}") from None
    if not intact:
        raise UserError(f"{path} is damaged: column {name!r} does not have its hash; {AGAIN}")
