"""Steps: commands that a person could type, each with a stamp, so that what is finished is reused."""

import hashlib
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cxrdist.documents import Document
from cxrdist.errors import UserError
from cxrdist.files import open_to_read, refuse_input, refuse_links, write_atomically

GRACE_S = 60  # a stopped training writes its checkpoint within this time


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command. `needs` names the steps whose results it reads; `inputs` are further files and texts."""

    name: str
    words: tuple[str, ...]  # the command as a person types it; empty for a step that is no command
    identity: tuple[str, ...] | None = None  # what counts of the words when they are compared; None: all
    call: Callable[[], None] | None = None
    needs: tuple[str, ...] = ()
    inputs: tuple[Path | str, ...] = ()
    results: tuple[Path, ...]
    folder: Path | None = None  # what to remove when the step must start again; None: it overwrites its results
    keep: bool = False  # such a folder is not removed but renamed
    resume: bool = False  # the command takes --resume when the same step was interrupted


@dataclass(frozen=True, kw_only=True)
class Stamp(Document):
    """How far a step is. key: hash of all that it depends on; finished: time in ns, 0 while it is not."""

    key: str = ""
    finished: int = 0
    seconds: float = 0.0
    command: str = ""


def run_steps(steps: list[Step], out: Path) -> dict[str, tuple[float, bool]]:
    """Run what is not finished yet; returns step -> (seconds it took, reused). Raises UserError for a failed command.

    A step's stamp holds a hash of its command, its inputs and when the steps that it needs were finished, so whatever
    changes or is done again repeats everything that depends on it, and nothing else.
    """
    finished: dict[str, int] = {}
    seconds: dict[str, tuple[float, bool]] = {}
    for number, step in enumerate(steps, 1):
        key, stamp = key_of(step, finished), stamp_path(step, out)
        before = read_stamp(stamp)
        check_results(step, out, stamp)
        title = f"[{number}/{len(steps)}] {step.name}"
        same = before.key == key
        if is_finished(step, key, before):
            print(f"{title}: finished before in {before.seconds:.0f} s, reused", flush=True)
            seconds[step.name] = (before.seconds, True)
            finished[step.name] = before.finished
            continue
        words = list(step.words)
        spent = 0.0
        if same and not before.finished:
            print(f"{title}: interrupted before, resumed", flush=True)
            words += ["--resume"] if step.resume and step.folder is not None and step.folder.exists() else []
            spent = before.seconds
        else:
            print(title, flush=True)
            make_room(step)
        begun = time.monotonic()
        command = shlex.join(words)
        write_atomically(stamp, Stamp(key=key, seconds=spent, command=command).to_json())
        try:
            if step.call is not None:
                step.call()
            else:
                run_command(step.name, words)
        except BaseException:
            took = spent + time.monotonic() - begun
            write_atomically(stamp, Stamp(key=key, seconds=took, command=command).to_json())
            raise
        missing = [str(path) for path in step.results if not path.exists()]
        if missing:
            raise UserError(f"step {step.name!r} ended well but did not write {', '.join(missing)}")
        took = spent + time.monotonic() - begun
        finished[step.name] = time.time_ns()
        write_atomically(stamp, Stamp(key=key, finished=finished[step.name], seconds=took, command=command).to_json())
        seconds[step.name] = (took, False)
    return seconds


def unfinished(steps: list[Step], out: Path) -> list[str]:
    """The names of the steps that `run_steps` would run."""
    finished: dict[str, int] = {}
    for step in steps:
        stamp = read_stamp(stamp_path(step, out))
        if finished.keys() >= set(step.needs) and is_finished(step, key_of(step, finished), stamp):
            finished[step.name] = stamp.finished
    return [step.name for step in steps if step.name not in finished]


def stamp_path(step: Step, out: Path) -> Path:
    return out / "steps" / f"{step.name.replace(' ', '_')}.json"


def key_of(step: Step, finished: dict[str, int]) -> str:
    """The hash of all that a step depends on; finished: when each step that it needs was."""
    contents = [path_hash(item) if isinstance(item, Path) else item for item in step.inputs]
    words = step.words if step.identity is None else step.identity
    identity = json.dumps([step.name, words, contents, [finished[need] for need in step.needs]])
    return hashlib.sha256(identity.encode()).hexdigest()


def is_finished(step: Step, key: str, stamp: Stamp) -> bool:
    return stamp.key == key and stamp.finished > 0 and all(path.exists() for path in step.results)


def make_room(step: Step) -> None:
    """Remove or rename the step's folder, which is of another input or command."""
    if step.folder is None or not step.folder.exists():
        return
    told = f"  {step.folder} is of another input or command: it is made again"
    if step.keep:
        aside = step.folder.with_name(f"{step.folder.name}_until_{time.strftime('%Y%m%dT%H%M%S')}")
        print(f"{told}, the earlier one is {aside}", flush=True)
        step.folder.rename(aside)
    else:
        print(told, flush=True)
        shutil.rmtree(step.folder)


def check_results(step: Step, out: Path, stamp: Path) -> None:
    """UserError where the step would write over an input, through a link, or over what no stamp says it made."""
    for path in (*step.results, *filter(None, [step.folder])):
        refuse_links(path, out)
        for source in step.inputs:
            if isinstance(source, Path):
                refuse_input(path, source)
        if path.exists() and not stamp.exists():
            raise UserError(f"{path}: is there, and no {stamp} says that this command made it; give another --out")


def path_hash(path: Path) -> str:
    """The SHA-256 of a file; UserError when it cannot be read."""
    with open_to_read(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_stamp(path: Path) -> Stamp:
    """The stamp at `path`; an empty one when there is none or it is damaged."""
    try:
        return Stamp.read(path)
    except UserError:
        return Stamp()


def run_command(name: str, words: list[str]) -> None:
    """Run one command with this Python; its output and bars pass through. Raises UserError when it fails."""
    print(f"  $ {shlex.join(words)}", flush=True)
    program = {"python": [sys.executable], "cxrdist": [sys.executable, "-m", "cxrdist"]}
    process = subprocess.Popen([*program[words[0]], *words[1:]])
    try:
        code = process.wait()
    except KeyboardInterrupt:
        print(f"\nstopping {name!r}: it saves what it has", file=sys.stderr, flush=True)
        before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a step that runs steps gets Ctrl-C, and then this
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
        finally:
            signal.signal(signal.SIGTERM, before)
        raise
    if code != 0:
        raise UserError(
            f"step {name!r} ended with exit code {code}: see its message above; then run the same command again"
        )


def stop_as_interrupted() -> None:
    """From now on SIGTERM ends this process as Ctrl-C does: a running command saves what it has."""
    signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt
