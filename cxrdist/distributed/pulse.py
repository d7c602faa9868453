"""Slow is not dead: each rank's pulse in the store, followed by the ranks that wait for it.

A collective of torch cannot tell a rank that verifies for an hour from one that hangs. So before each small collective
the ranks meet in the store, for as long as it takes, and only a rank that is missing *and* silent counts as lost.
"""

import contextlib
import datetime
import os
import queue
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from cxrdist.distributed.ends import LostRankError

BEATS = 4  # in the time after which silence counts
WORK_LIMIT = 24  # times that time: one piece of work that takes longer counts as hung (4 hours at 600 s)
LOOK_S = 0.25  # between two looks at the pulses of those who are missing
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.0005, 0.05  # between two looks at who is there
ENDED = "ended"


class Pulse:
    """This rank's pulse and its watch over the others. Needs torch's process group, whose store it uses.

    The pulse goes with the main thread: it changes with each `beat` and, inside `working`, by itself.
    """

    def __init__(self, rank: int, world_size: int, silence_s: float) -> None:
        """silence_s: a rank that is waited for and does not beat for so long is lost."""
        self._rank, self._world_size, self._silence_s = rank, world_size, silence_s
        self._beats, self._meetings, self._doing, self._since = 1, 0, "", 0.0
        self._stop = threading.Event()
        self._store = AnsweringStore(_connect(rank, silence_s), silence_s)
        self._store.set(f"process/{rank}", f"{os.getpid()} {_machine()}")
        self._thread = threading.Thread(target=self._publish, name="pulse", daemon=True)
        self._thread.start()

    def beat(self) -> None:
        """Say that the main thread goes on."""
        self._beats += 1

    @contextlib.contextmanager
    def working(self, what: str) -> Iterator[None]:
        """Inside, this rank does something that may take long, and beats while its process lives."""
        outer = self._doing, self._since
        self._doing, self._since = what, time.monotonic()
        try:
            yield
        finally:
            self._doing, self._since = outer
            self.beat()

    def meet(self) -> None:
        """Return when all ranks have come here. Raises LostRankError, naming the rank that ended or fell silent."""
        self.beat()
        self._meetings += 1
        keys = [f"{self._meetings}/{rank}" for rank in range(self._world_size)]
        self._store.set(keys[self._rank], "")
        begun = looked = told = time.monotonic()
        last: dict[int, tuple[str, float]] = {}
        pause_s = FIRST_PAUSE_S
        while not self._store.check(keys):  # Store.wait would print a warning for each time that it ends unheard
            time.sleep(pause_s)
            pause_s, now = min(2 * pause_s, LONGEST_PAUSE_S), time.monotonic()
            if now - looked < LOOK_S:
                continue
            looked = now
            missing = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
            for rank in missing:
                self._look_at(rank, last)
            doing = last[missing[0]][0].partition(" ")[2] if missing else ""
            if doing and now - told > self._silence_s and self._rank == min({*range(self._world_size)} - {*missing}):
                told = now
                print(
                    f"waiting for rank {missing[0]} ({doing}), {now - begun:.0f} s so far", file=sys.stderr, flush=True
                )
        if self._meetings > 1:  # all are here, so none waits for the last one any more
            self._store.delete_key(f"{self._meetings - 1}/{self._rank}")

    def _look_at(self, rank: int, last: dict[int, tuple[str, float]]) -> None:
        """Compare a missing rank's pulse with the `last` one, by rank, and when it was first seen."""
        if self._is_gone(rank):
            raise LostRankError(f"rank {rank} was killed or ended")
        key, now = f"pulse/{rank}", time.monotonic()
        pulse = self._store.get(key).decode() if self._store.check([key]) else ""
        if pulse == ENDED:
            raise LostRankError(f"rank {rank} ended")
        if rank not in last or last[rank][0] != pulse:
            last[rank] = pulse, now
        if (silent_s := now - last[rank][1]) > self._silence_s:
            doing = pulse.partition(" ")[2]
            where = f" in {doing}" if doing else ""
            raise LostRankError(f"rank {rank} stopped responding{where}: silent for {silent_s:.0f} s, see --timeout-s")

    def _is_gone(self, rank: int) -> bool:
        """Whether a rank of this machine has no process any more: a killed one leaves no word."""
        key = f"process/{rank}"
        if not self._store.check([key]):
            return False
        number, _, machine = self._store.get(key).decode().partition(" ")
        if not machine or machine != _machine():
            return False
        try:
            os.kill(int(number), 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # alive, of another user
            pass
        return False

    def close(self, *, failed: bool) -> None:
        """Stop beating; after a failure those who wait for this rank are told at once."""
        self._stop.set()
        self._thread.join(timeout=1.0)
        if failed:
            with contextlib.suppress(RuntimeError):
                self._store.set(f"pulse/{self._rank}", ENDED)

    def _publish(self) -> None:
        published, pause_s = 0, 0.0
        while not self._stop.wait(pause_s):
            pause_s = self._silence_s / BEATS / 2
            if self._doing and time.monotonic() - self._since < WORK_LIMIT * self._silence_s:
                self._beats += 1
            if self._beats == published:
                continue
            published = self._beats
            try:
                self._store.set(f"pulse/{self._rank}", f"{published} {self._doing}")
            except RuntimeError:  # the store is gone: the main thread meets that, too, and names it
                return


class AnsweringStore:
    """torch's store, whose client waits without end for a server behind a cut link: here each answer has a deadline.

    The calls are made in a thread of their own, one at a time. After a missed deadline nothing is asked any more.
    """

    def __init__(self, store: Any, timeout_s: float) -> None:
        self._store, self._timeout_s, self._silent = store, timeout_s, False
        self._calls: queue.SimpleQueue[tuple[str, tuple[Any, ...], queue.SimpleQueue[Any]]] = queue.SimpleQueue()
        threading.Thread(target=self._answer, name="store", daemon=True).start()

    def set(self, key: str, value: str) -> None:
        """As the store's. Like the others: LostRankError after the deadline, RuntimeError as from the store itself."""
        self._ask("set", key, value)

    def get(self, key: str) -> bytes:
        """As the store's."""
        found: bytes = self._ask("get", key)
        return found

    def check(self, keys: list[str]) -> bool:
        """As the store's."""
        return bool(self._ask("check", keys))

    def delete_key(self, key: str) -> None:
        """As the store's."""
        self._ask("delete_key", key)

    def _ask(self, name: str, *args: Any) -> Any:
        reply: queue.SimpleQueue[Any] = queue.SimpleQueue()
        if not self._silent:
            self._calls.put((name, args, reply))
        try:
            value, error = reply.get(timeout=0 if self._silent else self._timeout_s)
        except queue.Empty:
            self._silent = True
            what = f"the machine of rank 0 did not answer for {self._timeout_s:.0f} s, see --timeout-s"
            raise LostRankError(f"{what}: its processes ended, or the network between the machines is cut") from None
        if error is not None:
            raise error
        return value

    def _answer(self) -> None:
        while True:
            name, args, reply = self._calls.get()
            try:
                reply.put((getattr(self._store, name)(*args), None))
            except Exception as error:
                reply.put((None, error))


def _machine() -> str:
    """Equal for processes that see each other's numbers; '' where that cannot be known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}-{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _connect(rank: int, timeout_s: float) -> Any:
    """A new connection to the process group's store, under a name that only this group of processes has."""
    c10d: Any = dist  # its names have no types
    common = c10d.distributed_c10d._get_default_store()
    name = "cxrdist"
    if rank == 0 and not common.check([name]):
        common.set(name, uuid.uuid4().hex)
    prefix = common.get(name).decode()
    while isinstance(common, c10d.PrefixStore):
        common = common.underlying_store
    timeout = datetime.timedelta(seconds=timeout_s)
    client = c10d.TCPStore(common.host, common.port, is_master=False, wait_for_workers=False, timeout=timeout)
    return c10d.PrefixStore(prefix, client)
