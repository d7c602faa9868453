"""Every kind of input, mutated by a seed, is read as the entries read it: fine, or one named error.

  ./launch.sh fuzz [--inputs 25000] [--seed 0] [--kinds NAME ...]      the table of results; exit code 1 for any failure
  ./launch.sh fuzz --kinds NAME --seed S --case N                      one input again, with its traceback

Failures: `traceback` (anything but a UserError of one line), `slow` (over 5 s, twice), `memory` (over 1 GB more
resident than before), `wrong` (another result than that of the undamaged input, though a hash vouches for the bytes).
"""

import argparse
import collections
import contextlib
import io
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

from tests.fuzz.kinds import KINDS, SELF_TEST, Kind, make_world
from tests.fuzz.workers import FAILURES, OUTCOMES, Outcome, Worker, read_case


def cases_of(kinds: dict[str, Kind], inputs: int, seed: int) -> list[tuple[str, int, int]]:
    """(kind, seed, case): `inputs` in all, shared by the kinds' weights, at least one of each."""
    total = sum(kind.weight for kind in kinds.values())
    counts = {name: max(1, int(inputs * kind.weight / total)) for name, kind in kinds.items()}
    for name in list(kinds)[: max(0, inputs - sum(counts.values()))] * 2:
        counts[name] += sum(counts.values()) < inputs
    return [(name, seed, case) for name, count in counts.items() for case in range(count)]


def run_all(
    world: Path, kinds: dict[str, Kind], inputs: int, seed: int, workers: int
) -> dict[str, list[tuple[int, Outcome]]]:
    waiting = collections.deque(cases_of(kinds, inputs, seed))
    found: dict[str, list[tuple[int, Outcome]]] = {name: [] for name in kinds}

    def serve() -> None:
        worker = Worker(world, list(kinds))
        try:
            while True:
                try:
                    name, its_seed, case = waiting.popleft()
                except IndexError:
                    return
                found[name].append((case, worker.run(name, its_seed, case)))
        finally:
            worker.close()

    threads = [threading.Thread(target=serve) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def print_table(found: dict[str, list[tuple[int, Outcome]]], seed: int, seconds: float) -> int:
    """The results by kind, then every failure; the number of failures."""
    width = max(map(len, found))
    print(f"{'kind':{width}} {'inputs':>7} " + " ".join(f"{name:>9}" for name in OUTCOMES) + f" {'slowest':>8}")
    rows = [*found.items(), ("all", [entry for entries in found.values() for entry in entries])]
    for name, entries in rows:
        counts = collections.Counter(outcome.what for _, outcome in entries)
        slowest = max((outcome.seconds for _, outcome in entries), default=0.0)
        print(
            f"{name:{width}} {len(entries):7,} "
            + " ".join(f"{counts[what]:9,}" for what in OUTCOMES)
            + f" {slowest:6.2f} s"
        )
    print(f"seed {seed}, {seconds:.0f} s")
    failures = [(name, *entry) for name, entries in found.items() for entry in entries if entry[1].what in FAILURES]
    shown: collections.Counter[tuple[str, str]] = collections.Counter()
    for name, case, outcome in failures:
        last = outcome.text.strip().rsplit("\n", 1)[-1][:200]
        shown[name, last] += 1
        if shown[name, last] <= 2:
            print(f"{outcome.what}: --kinds '{name}' --seed {seed} --case {case}: {last}")
    return len(failures)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=25_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=[*KINDS, *SELF_TEST], default=list(KINDS), metavar="NAME")
    parser.add_argument("--case", type=int)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    kinds = {name: (KINDS | SELF_TEST)[name] for name in args.kinds}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fuzz-world-") as place:
        with contextlib.redirect_stdout(io.StringIO()):
            make_world(Path(place))
        if args.case is not None:
            (kind,) = kinds.values()
            folder = Path(place, "case")
            kind.make(Path(place), folder)
            outcome = read_case(kind, folder, args.seed, args.case, kind.read(folder))
            print(f"{outcome.what} in {outcome.seconds:.2f} s: {outcome.text}")
            return int(outcome.what in FAILURES)
        print(f"{args.inputs:,} inputs of {len(kinds)} kinds, seed {args.seed}", flush=True)
        found = run_all(Path(place), kinds, args.inputs, args.seed, args.workers)
    return int(print_table(found, args.seed, time.perf_counter() - start) > 0)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("WANDB_MODE", "disabled")
    sys.exit(main())
