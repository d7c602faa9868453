"""Which shards of a split a node makes: its own share first, then whatever nobody has claimed, then what is missing.

All through files of the split's work folder, which any number of nodes share. A claim is a lock on a file, which the
kernel frees when its process ends, however it ends. No result depends on a claim: the same rows give the same bytes, so
on a file system without locks, or where a machine is cut off, a shard is made twice and nothing else happens.
"""

import contextlib
import os
import random
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from cxrdist import files
from cxrdist.errors import UserError

LOOK_S = 1.0  # at least, between two looks at the folder
LOOK_SHARE = (
    50  # a look takes at most this part of the time: 10,000 records on a slow network are not read at each image
)
# A shard is claimed once, then a second time by a node that has nothing else to do (its holder is slow, or cut off),
# then made by every node that is left.
CLAIMS = ("claim", "second-claim")


class Board:
    """The shards of a split as all nodes claim and finish them.

    result: the file that ends the split. inputs: what each shard is made from, by number. records: the name of each
    one's record in `work`. counts: its images to convert. done: the shards known to be finished, by whatever node, and
    `images_done` theirs.
    Records that are there already count only where they are `add`ed: they may be damaged, or of other inputs.
    """

    def __init__(
        self,
        work: Path,
        result: Path,
        inputs: Mapping[int, str],
        records: Mapping[int, str],
        counts: Mapping[int, int],
    ) -> None:
        self.work, self.result, self.inputs, self.records, self.counts = work, result, inputs, records, counts
        self.done = set[int]()
        self.images_done = 0
        self._missing = {name: number for number, name in records.items()}
        self._held: dict[int, contextlib.ExitStack] = {}
        self._next_look = 0.0
        self._stale = {number: _stamp(work / name) for number, name in records.items()}

    def add(self, number: int) -> None:
        """That shard is done."""
        if number not in self.done:
            self.done.add(number)
            self.images_done += self.counts[number]
            del self._missing[self.records[number]]

    def to_make(self, node_rank: int, num_nodes: int) -> Iterator[int]:
        """The numbers of shards that this node is to make, each claimed when it is asked for; `finish` each."""
        begun = set[int]()
        order = [number for number in self.inputs if number % num_nodes == node_rank]
        others = [number for number in self.inputs if number % num_nodes != node_rank]
        random.Random(node_rank).shuffle(others)  # two nodes that help begin at different places
        for claim in (*CLAIMS, None):
            self.look(now=True)
            for number in (*order, *others):
                if number not in self.done and number not in begun and self._take(number, claim):
                    begun.add(number)
                    yield number

    def finish(self, number: int) -> None:
        """This node has written that shard's record, or gives the shard up."""
        self.add(number)
        self._held.pop(number, contextlib.ExitStack()).close()

    def look(self, *, now: bool = False) -> None:
        """See which shards are done, unless that was seen a moment ago; all of them once the split is finished.

        Raises UserError when another node makes them from other inputs.
        """
        begin = time.monotonic()
        if begin < self._next_look and not now:
            return
        there: list[int] = []
        if self.result.exists() or not self.work.exists():  # another node has finished the split
            for left in [*self._missing.values()]:
                self.add(left)
        with contextlib.suppress(FileNotFoundError), os.scandir(self.work) as entries:
            there = [number for entry in entries if (number := self._missing.get(entry.name)) is not None]
        for number in there:
            self.is_done(number)
        self._next_look = time.monotonic() + max(LOOK_S, LOOK_SHARE * (time.monotonic() - begin))

    def is_done(self, number: int) -> bool:
        """Whether that shard is done, by its record as it is now."""
        record = self.work / self.records[number]
        if number in self.done or _stamp(record) in (None, self._stale[number]):
            return number in self.done
        with contextlib.suppress(FileNotFoundError), record.open("rb") as file:
            if self.inputs[number].encode() not in file.read(200):
                what = "another node makes this split from other images, labels or settings"
                raise UserError(f"{record}: {what}; give all nodes the same, or another --out")
            self.add(number)
        return number in self.done

    def _take(self, number: int, claim: str | None) -> bool:
        """Whether the shard is still to be made, and ours to make."""
        with contextlib.ExitStack() as stack:
            if claim is not None:
                path = self.work / f"{self.records[number].removesuffix('.json')}.{claim}"
                try:
                    stack.enter_context(files.lock(path, wait=False, message="claimed by {holder}"))
                except UserError:  # claimed, or the folder is gone: then the record, or the next look, tells
                    return False
            if self.is_done(number):
                return False
            self._held[number] = stack.pop_all()
        return True


def _stamp(record: Path) -> tuple[int, int] | None:
    """What changes whenever a record is written; None where there is none, or only its name."""
    try:
        found = record.stat()
    except FileNotFoundError:
        return None
    return (found.st_ino, found.st_mtime_ns) if found.st_size else None
