"""Processes that read one damaged input after the other, within limits of time and memory."""

import contextlib
import io
import multiprocessing
import os
import random
import resource
import tempfile
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from tests.fuzz.kinds import KINDS, SELF_TEST, Kind

MAX_S, MAX_GROWTH = 5.0, 2**30
MAX_ADDRESS_GROWTH = 3 * 2**30  # beyond the limit that counts, so that a runaway ends here and not in the machine
START_S = 300.0
OUTCOMES = ("fine", "named", "wrong", "traceback", "slow", "memory")
FAILURES = OUTCOMES[2:]
NAMED = {"UserError", "CheckpointError", "ArgumentTypeError"}  # by name: here nothing of cxrdist is imported


@dataclass(frozen=True)
class Outcome:
    what: str
    text: str = ""
    seconds: float = 0.0


def status(name: str) -> int:
    """Bytes, a line of /proc/self/status."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{name}:"))


def read_case(kind: Kind, folder: Path, seed: int, case: int, expected: object) -> Outcome:
    """Damage the files of `folder`, read them, and put them back."""
    before = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    rng = random.Random(f"{kind.name} {seed} {case}")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark of the resident memory
    resident = status("VmRSS")
    kind.damage(rng, folder)
    start = time.perf_counter()
    try:
        result = kind.read(folder)
        what = "wrong" if kind.vouched and result != expected else "fine"
        found = Outcome(what, "another result than that of the undamaged input" if what == "wrong" else "")
    except Exception as error:
        text = str(error)
        if NAMED & {each.__name__ for each in type(error).__mro__} and "\n" not in text and len(text) < 3000:
            found = Outcome("named", text)
        else:
            found = Outcome("traceback", traceback.format_exc())
    finally:
        seconds = time.perf_counter() - start
        _put_back(folder, before)
    if (growth := status("VmHWM") - resident) > MAX_GROWTH:
        found = Outcome("memory", f"{growth:,} bytes; {found.what}: {found.text}")
    return Outcome(found.what, found.text, seconds)


def _put_back(folder: Path, before: dict[Path, bytes]) -> None:
    for path in [path for path in folder.rglob("*") if path.is_file() and path not in before]:
        path.unlink()
    for path, content in before.items():
        if not path.is_file() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def work(pipe: Connection, world: Path, names: list[str]) -> None:
    """A worker: reads (kind, seed, case) from the pipe and answers with an Outcome each."""
    kinds = {name: (KINDS | SELF_TEST)[name] for name in names}
    expected: dict[str, object] = {}
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place, open(os.devnull, "w") as nothing:
        os.environ.get("FUZZ_STDERR") or os.dup2(nothing.fileno(), 2)  # what libraries in C say
        while (order := pipe.recv()) is not None:
            name, seed, case = order
            kind, folder = kinds[name], Path(place, name.replace(" ", "_").replace("/", "_"))
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                if name not in expected:
                    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
                    kind.make(world, folder)
                    expected[name] = kind.read(folder)
                    soft = status("VmSize") + MAX_ADDRESS_GROWTH
                    resource.setrlimit(resource.RLIMIT_AS, (soft, resource.RLIM_INFINITY))
                pipe.send("ready")
                pipe.recv()
                pipe.send(read_case(kind, folder, seed, case, expected[name]))


class Worker:
    """A process that is replaced when a case ends it or takes too long."""

    def __init__(self, world: Path, names: list[str]) -> None:
        self.arguments = world, names
        self.process: multiprocessing.process.BaseProcess | None = None

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=work, args=(other, *self.arguments), daemon=True)
        self.process.start()
        other.close()

    def run(self, name: str, seed: int, case: int) -> Outcome:
        for attempt in (1, 2):
            if self.process is None:
                self.start()
            try:
                self.pipe.send((name, seed, case))
                if not self.pipe.poll(START_S):  # libraries are imported, files made, the undamaged ones read
                    return self._lost(Outcome("slow", "the undamaged input"))
                self.pipe.recv()
                self.pipe.send(True)
                if self.pipe.poll(MAX_S * attempt):  # a loaded machine may be slow once
                    found: Outcome = self.pipe.recv()
                    if found.what != "memory":
                        return found
                    return self._lost(found)
            except (EOFError, OSError):
                return self._lost(Outcome("traceback", f"the process ended (exit code {self._exit_code()})"))
            self._lost(Outcome("slow"))
        return Outcome("slow", f"more than {MAX_S:.0f} s, twice", MAX_S)

    def _exit_code(self) -> int | None:
        assert self.process is not None
        self.process.join(5)
        return self.process.exitcode

    def _lost(self, found: Outcome) -> Outcome:
        assert self.process is not None
        self.process.kill()
        self.process.join()
        self.process = None
        return found

    def close(self) -> None:
        if self.process is not None:
            with contextlib.suppress(OSError):
                self.pipe.send(None)
            self.process.join(5)
            self.process.kill()
