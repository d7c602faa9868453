"""Shards that come while they are needed: fetched ahead in the order of use, by one process a node for all its ranks.

What is read is a sequence of passes (epochs), each a sequence of groups of shards (windows; single shards where rows
are read in their order). The node's first rank fetches group after group into the cache, in a few threads, and holds
as many as the need allows; when every rank of the node has passed a group its shards may be removed. Ranks tell one
another how far they are through a small file that all of them map into memory.
"""

import contextlib
import io
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from cxrdist import files
from cxrdist.data.cache import NEED, Cache
from cxrdist.data.fetch import DOWNLOADS, PAUSE_S, Remote, download
from cxrdist.data.rows import SomeRows, count_rows
from cxrdist.errors import UserError
from cxrdist.shards.index import ShardIndex

POLL_S = 0.02
CLOSE_S = 2.0  # for threads to end; one that reads from a server that stalls is left behind
SAY_S = 15.0  # of waiting, before it is said, and again each four times as long
RETRY_S = 30.0  # between two rounds of tries for a shard that cannot be fetched and is not needed yet

Groups = Sequence[NDArray[np.int64]]  # of shards


def shards_in_order(num_rows: NDArray[np.int64]) -> Groups:
    """The groups of a pass that reads rows in their order, of which each shard has so many: each shard alone."""
    return [np.array([shard], np.int64) for shard in np.flatnonzero(num_rows).tolist()]


def needed_bytes(
    passes: Iterable[Groups], sizes: NDArray[np.int64], num_rows: NDArray[np.int64], span: int, ahead: int = 1
) -> int:
    """The most that is held at once: a group, and the next `ahead` ones, or those that `span` rows after it reach.

    sizes: bytes of each shard; num_rows: of each shard, in a pass.
    """
    groups = [group for one in passes for group in one]
    ends = np.cumsum([int(num_rows[group].sum()) for group in groups])
    last = np.maximum(np.searchsorted(ends, ends - 1 + span, side="right"), np.arange(len(groups)) + ahead)
    together = (np.unique(np.concatenate(groups[i : int(j) + 1])) for i, j in enumerate(last))
    return max((int(sizes[shards].sum()) for shards in together), default=0)


@dataclass(frozen=True, kw_only=True)
class Node:
    """This process among those of its machine. name: equal for all of them, and for no other node or run."""

    name: str = ""
    local_rank: int = 0
    local_world_size: int = 1


@dataclass(eq=False)
class _Group:
    """A group that the node holds, or fetches."""

    shards: list[int]
    missing: int
    tars: list[io.BufferedRandom] = field(default_factory=list)


class Stream:
    """One split's shards, as one use (training, validation) of one run reads them on this node. A context manager."""

    def __init__(
        self,
        cache: Cache,
        remote: Remote,
        index: ShardIndex,
        rows: SomeRows,
        passes: Sequence[Groups],
        *,
        span: int,
        ahead: int = 1,
        use: str,
        what: str,
        remedy: str = "",
        node: Node | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        """
        Args:
            rows: that a pass reads. passes: their shards in the order of use, for each pass.
            span: rows from the first one of a batch to the last one of the next batch, over all ranks.
            ahead: groups to fetch ahead. use: distinguishes the streams of a run.
            what: the need consists of, for messages: "two windows of 8 shards"; remedy: beside a larger cache.
        Reserves the need in the cache; UserError where it is too small.
        """
        self.index, self._cache, self._remote, self._say = index, cache, remote, say
        self._node, self._passes = node or Node(), passes
        self._num_rows = count_rows(index.shard_ids, rows)
        self._sizes = np.array([shard.bytes for shard in index.meta.shards], np.int64)
        self.need_bytes = needed_bytes(passes, self._sizes, self._num_rows, span, ahead)
        self._use_name = f"{self._node.name}-{use}"
        self._leads = self._node.local_rank == 0
        self._use: io.BufferedRandom | None = None
        if self._leads:
            numbers = 1 + 2 * self._node.local_world_size
            self._use = cache.register(self._use_name, self.need_bytes, numbers, f"for {what}", remedy)
        self.wait_s = 0.0  # in which at least one thread waited for a shard
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._num_waiting, self._waits_since = 0, 0.0
        self._groups: dict[int, _Group] = {}
        self._queue: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
        self._error: str | None = None
        self._threads: list[threading.Thread] = []
        self._place: dict[int, int] = {}  # of a shard: the number of its group, in the pass that is read

    def start(self, pass_number: int = 0, row: int = 0) -> None:
        """Begin at the group of that row of a pass. The node's first rank must have made its stream before."""
        path = self._cache.use_file(self._use_name)
        numbers = 1 + 2 * self._node.local_world_size
        board = np.asarray(np.memmap(path, np.int64, "r+", offset=NEED.size, shape=(numbers,)))
        self._ready = board[:1]  # groups that are here, counted from the first one
        self._cursors = board[1 : 1 + self._node.local_world_size]  # of each rank: the group it is at
        self._waits = board[1 + self._node.local_world_size :]  # and the one after that it waits for, or 0
        self._pass, self._base = pass_number, 0
        groups = self._groups_of(pass_number)
        ends = np.cumsum([int(self._num_rows[group].sum()) for group in groups])
        self._skip = int(np.searchsorted(ends, row, side="right"))
        self._first_pass = pass_number
        self._enter(groups[self._skip :])
        if self._leads:
            for work in (self._follow, *[self._fetch] * DOWNLOADS):
                self._threads.append(threading.Thread(target=work, name="stream", daemon=True))
                self._threads[-1].start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop fetching and let go of all that is held; threads that wait get an error."""
        self._closed.set()
        end = time.monotonic() + CLOSE_S
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        with self._lock:
            for group in self._groups.values():
                for tar in group.tars:
                    tar.close()
            self._groups.clear()
            if self._use is not None and not self._use.closed:
                Path(self._use.name).unlink(missing_ok=True)
                self._use.close()

    def file(self, shard: int) -> Path:
        """Where a shard is while it is here."""
        return self._cache.tar(self.index.meta.shards[shard])

    def wait(self, shard: int, stopped: Callable[[], bool] = lambda: False) -> Path:
        """The file of a shard that the current pass reads, as soon as it is here. UserError if it cannot be fetched."""
        group = self._place[shard]
        if self._ready[0] <= group:
            self._await(group, stopped)
        return self.file(shard)

    def warm(self) -> None:
        """Wait for the first group."""
        if self._place:
            self._await(min(self._place.values()), lambda: False)

    def passed(self, rows: NDArray[np.int64], forget: Callable[[list[int]], None]) -> None:
        """A batch of `rows` has been read, and every one before it; `forget` the shards that are done with."""
        self._move(max(self._place[self.index.shard_of(row)] for row in rows.tolist()), forget)

    def next_pass(self, forget: Callable[[list[int]], None]) -> None:
        """Tell that this pass has been read; `forget` its shards."""
        self._move(self._base + self._length, forget)
        self._pass, self._base = self._pass + 1, self._base + self._length
        self._enter(self._groups_of(self._pass))

    def _move(self, group: int, forget: Callable[[list[int]], None]) -> None:
        done = [shard for shard, place in self._place.items() if place < group]
        for shard in done:
            del self._place[shard]
        forget(done)  # first: an open file takes its room on the disk also when it is removed
        self._cursors[self._node.local_rank] = group

    def _enter(self, groups: Groups) -> None:
        self._length = len(groups)
        self._place = {shard: self._base + n for n, group in enumerate(groups) for shard in group.tolist()}

    def _groups_of(self, number: int) -> Groups:
        return self._passes[number] if number < len(self._passes) else []

    def _await(self, group: int, stopped: Callable[[], bool]) -> None:
        begun, said = time.monotonic(), SAY_S
        with self._lock:
            self._num_waiting += 1
            if self._num_waiting == 1:
                self._waits_since = begun
            own = self._waits[self._node.local_rank :][:1]
            own[0] = max(own[0], group + 1)
        try:
            while self._ready[0] <= group:
                if self._closed.is_set() or stopped():
                    raise RuntimeError("the shards are no longer fetched: the loader or its stream was closed")
                if self._error is not None or self._failed.exists():
                    raise UserError(self._error or files.read_bytes(self._failed, 2**16).decode(errors="replace"))
                if time.monotonic() - begun > said:
                    said *= 4
                    self._say(self._waiting_for(group))
                time.sleep(POLL_S)
        finally:
            with self._lock:
                self._num_waiting -= 1
                if self._num_waiting == 0:
                    self.wait_s += time.monotonic() - self._waits_since
                    own[0] = 0

    def _waiting_for(self, group: int) -> str:
        shards = [shard for shard, place in [*self._place.items()] if place == group]
        missing = [shard for shard in shards if not self.file(shard).exists()] or shards
        name = self.index.shards[missing[0]]
        return f"waiting for {self._remote.url}/{name}: {len(missing)} of {len(shards)} shards needed now are missing"

    # From here on: the node's first rank, in threads of its own

    @property
    def _failed(self) -> Path:
        """Why the first rank ended, for the others."""
        return self._cache.use_file(f"{self._use_name}.failed")

    def _follow(self) -> None:
        """Queue the shards in the order of use, as far as the need allows."""
        number = 0
        for one in range(self._first_pass, len(self._passes)):
            groups = self._passes[one][self._skip :] if one == self._first_pass else self._passes[one]
            for group in groups:
                shards = [int(shard) for shard in group]
                for place, shard in enumerate(shards):
                    while not self._room_for(shard):
                        if self._closed.wait(POLL_S):
                            return
                    with self._lock:
                        if place == 0:
                            self._groups[number] = _Group([], len(shards))
                        self._groups[number].shards.append(shard)
                    self._queue.put((number, shard))
                number += 1

    def _room_for(self, shard: int) -> bool:
        """Whether the need leaves room for a shard, after letting go of the groups that all ranks have passed."""
        low = int(self._cursors.min())
        with self._lock:
            for number in [number for number in self._groups if number < low]:
                for tar in self._groups.pop(number).tars:
                    tar.close()
            held = {shard for group in self._groups.values() for shard in group.shards} | {shard}
        return int(self._sizes[list(held)].sum()) <= self.need_bytes

    def _fetch(self) -> None:
        """Bring what is queued, until the end."""
        while not self._closed.is_set():
            try:
                number, shard = self._queue.get(timeout=POLL_S)
            except queue.Empty:
                continue
            try:
                tar = self._bring(number, shard)
            except Exception as error:
                self._error = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                with contextlib.suppress(UserError):
                    files.write_atomically(self._failed, self._error)
                return
            if tar is None:
                return
            with self._lock:
                if self._closed.is_set():
                    tar.close()
                    return
                group = self._groups[number]
                group.tars.append(tar)
                group.missing -= 1
                while (first := self._groups.get(int(self._ready[0]))) is not None:
                    if first.missing:
                        break
                    self._ready[0] += 1

    def _bring(self, number: int, shard: int) -> io.BufferedRandom | None:
        """The tar, held and complete; None when the stream was closed. UserError where it is needed and not to be had.

        What cannot be fetched and is not needed yet is tried again later.
        """
        file = self.index.meta.shards[shard]
        shown = f"{self._remote.url}/{file.name}"
        pause = PAUSE_S
        while not self._closed.is_set():
            tar = self._cache.take(file)
            if tar is None:
                self._closed.wait(5 * POLL_S)
                continue
            if not self._cache.is_empty(tar):
                return tar
            path, is_closed = f"{self._remote.root}/{file.name}", self._closed.is_set
            needed = self._is_needed(number)
            try:
                download(self._remote.source, path, file, tar, shown=shown, stopped=is_closed)
            except UserError:
                self._cache.drop(tar)
                if self._closed.is_set():
                    return None
                if needed:
                    raise
                end = time.monotonic() + pause
                while time.monotonic() < end and not self._is_needed(number) and not self._closed.wait(POLL_S):
                    pass
                pause = min(RETRY_S, 2 * pause)
                continue
            self._cache.keep(file, tar)
            return tar
        return None

    def _is_needed(self, number: int) -> bool:
        return int(self._waits.max()) > number
