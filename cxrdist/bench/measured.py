"""Run the benchmarks behind the documentation's figures, and write docs/measured.json and docs/measured.md.

  cxrdist bench measured --out docs/measured.json                 those that this commit has not measured yet
  cxrdist bench measured --out docs/measured.json --only data     these, again
  cxrdist bench measured --out docs/measured.json --only          none: writes the page from the JSON

An hour in all on two idle cores. The file is written after each benchmark, so an interrupted command continues. Every
figure carries its commit, date and machine. Baselines need `pip install '.[bench,onnx]'`.
"""

import argparse
import datetime
import fnmatch
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cxrdist.bench.timing import FAILED, Row, table
from cxrdist.cli import flag
from cxrdist.documents import Document
from cxrdist.errors import UserError
from cxrdist.files import write_atomically


@dataclass(frozen=True)
class Pick:
    """Where a number stands among the rows of a benchmark.

    stage, variant: patterns of `fnmatch`; the first row that fits counts. show: which ratio of the row, or a regular
    expression whose group is taken from the note. after: what the number is of.
    """

    bench: str
    stage: str
    variant: str
    show: str = "baseline"
    after: str = ""


@dataclass(frozen=True)
class Figure:
    """A line of the table."""

    what: str
    against: str
    picks: tuple[Pick, ...]


WAITING = r"waiting ([\d.]+%)"
OUTSIDE = r"([\d.]+%) is overhead"
BENCHES: dict[str, tuple[str, ...]] = {  # a name for each run: the words after `cxrdist bench`
    "preprocess": ("preprocess",),
    "nodes": ("nodes",),
    "data": ("data",),
    "augment": ("augment",),
    "views": ("views",),
    "infer": ("infer",),
    "model": ("model",),
    "step": ("step",),
    "count-eva_x": ("step", "--count", "--model", "eva_x", "--batch-size", "32", "--precision", "bf16"),
    "count-chexfound": ("step", "--count", "--model", "chexfound", "--batch-size", "32", "--precision", "bf16"),
    "count-augmentation": ("step", "--count", "--model", "eva_x", "--batch-size", "64", "--precision", "bf16"),
    "scaling": ("scaling",),
    "order": ("order",),
    "stream": ("stream",),
    "onnx": ("onnx",),
    "scale": ("scale",),
}
PUBLISHED = "the published path (Pillow RGB)"
LOADER = "cxrdist loader"
FIGURES = (
    Figure(
        "preprocess, 2,500-px sources, one core, identical pixels",
        PUBLISHED,
        (
            Pick("preprocess", "preprocess, grey, *", "exact", after=" grey"),
            Pick("preprocess", "preprocess, RGB of *", "exact", after=" RGB file of a grey image"),
            Pick("preprocess", "preprocess, colour, *", "exact", after=" true colour"),
        ),
    ),
    Figure(
        "preprocess `--mode fast` (half-size decode, 48 dB)",
        PUBLISHED,
        (
            Pick("preprocess", "preprocess, grey, *", "fast", after=" grey"),
            Pick("preprocess", "preprocess, RGB of *", "fast", after=" RGB file of a grey image"),
            Pick("preprocess", "preprocess, colour, *", "fast", after=" true colour"),
        ),
    ),
    Figure(
        "preprocess by four nodes, one ten times slower and one killed (an image's time is waited out)",
        "a fixed split, computed",
        (
            Pick("nodes", "*", "work stealing"),
            Pick("nodes", "*", "work stealing", "limit", " of all speeds added up"),
        ),
    ),
    Figure(
        "loader, one core",
        "bare JPEG decode, the limit",
        (
            Pick("data", "one core", LOADER, "limit"),
            Pick("data", "one core", "webdataset, DataLoader", "limit", " webdataset"),
            Pick("data", "one core", "litdata, DataLoader", "limit", " litdata"),
            Pick("data", "one core", "mosaicml-streaming, DataLoader", "limit", " mosaicml-streaming"),
        ),
    ),
    Figure(
        "loader, augmentation off",
        "the published Dataset on OpenCV",
        (
            Pick("data", "one core", LOADER, after=" on one core"),
            Pick("data", "all cores", f"{LOADER}, *", after=" on all cores"),
        ),
    ),
    Figure(
        "augmentation of 32 images, one thread, CLAHE included",
        "3-channel kornia chain; albumentations",
        (
            Pick("augment", "augment / kornia*", "cxrdist published"),
            Pick("augment", "augment / albumentations*", "cxrdist published"),
        ),
    ),
    Figure("six test-time views", "albumentations, a view a pass", (Pick("views", "*", "cxrdist"),)),
    Figure(
        "inference, 10 + 1 passes and one decode",
        "12 + 2 passes and 14 decodes, as published",
        (
            Pick("infer", "inference", "planned"),
            Pick("infer", "inference", "limit", after=" by the passes alone"),
        ),
    ),
    Figure(
        "CheXFound forward, 512 px",
        "plain attention as in the official code",
        (
            Pick("model", "chexfound * fp32", "ours", after=" fp32"),
            Pick("model", "chexfound * bf16", "ours", after=" bf16"),
        ),
    ),
    Figure("EMA update of CheXFound", "over the full state", (Pick("step", "ema", "trained values"),)),
    Figure(
        "step outside forward and backward, EVA-X-S at 448 px", "complete step", (Pick("step", "step", "all", OUTSIDE),)
    ),
    Figure(
        "bytes of a step that are no matmul, bf16, 32 images; counted, not run",
        "-",
        (
            Pick("count-eva_x", "count", "all but matmul", r"([\d.]+ GB)", " EVA-X-B"),
            Pick("count-chexfound", "count", "all but matmul", r"([\d.]+ GB)", " CheXFound"),
        ),
    ),
    Figure(
        "augmentation of 64 images, counted",
        "EVA-X-B step, at the H100's rates of `--dry-run`",
        (Pick("count-augmentation", "count", "augmentation", r"([\d.]+%) of the step"),),
    ),
    Figure(
        "two processes on two cores, EVA-X-S at 448 px, 16 images a step",
        "twice one process",
        (
            Pick("scaling", "train", "*two processes", "limit"),
            Pick("scaling", "train", "*two separate", "limit", " without any exchange"),
        ),
    ),
    Figure(
        "waiting share of training streamed through a cache of a third of the set, a GPU that takes 21 MB/s",
        "links of 10, 50 and 200 MB/s",
        tuple(Pick("stream", "epoch", f"link of {link} MB/s", WAITING) for link in (10, 50, 200)),
    ),
    Figure(
        "ONNX files of EVA-X-B and CheXFound, onnxruntime on this CPU",
        "torch",
        (Pick("onnx", "full size", "eva_x, onnxruntime"), Pick("onnx", "full size", "chexfound, onnxruntime")),
    ),
    Figure(
        "opening 10 million images, first process of a node; private memory of each",
        "-",
        (
            Pick("scale", "8 of a node", "open, checked by the first", r"([\d.]+ s) of CPU"),
            Pick("scale", "8 of a node", "memory after an epoch", r"(\d+ MB) private"),
        ),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Taken(Document):
    """One benchmark as it was run."""

    name: str
    words: tuple[str, ...]
    commit: str
    date: str
    machine: str
    seconds: float
    rows: tuple[Row, ...]


@dataclass(frozen=True, kw_only=True)
class Measured(Document):
    """`measured.json`."""

    format_version: Literal[1] = 1
    taken: tuple[Taken, ...] = ()

    def by_name(self) -> dict[str, Taken]:
        return {each.name: each for each in self.taken}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", **flag(Path, "FILE.json", "the page goes beside it, as .md", required=True))
    only = f"only these, also where this commit has them: {', '.join(BENCHES)}"
    parser.add_argument("--only", nargs="*", choices=tuple(BENCHES), metavar="NAME", help=only)


def run(args: argparse.Namespace) -> list[Row]:
    """Run what is asked for; a row for each benchmark says what became of it."""
    if args.out.suffix != ".json" or not args.out.absolute().parent.is_dir():
        raise UserError(f"--out {args.out}: give a .json file in a folder that is there")
    measured = Measured.read(args.out) if args.out.exists() else Measured()
    commit, found = commit_of_code(), []
    for name in BENCHES if args.only is None else args.only:
        before = measured.by_name().get(name)
        if args.only is None and before and (before.commit, before.words) == (commit, BENCHES[name]):
            found.append(Row("kept", name, None, note=f"measured at this commit on {before.date}"))
            continue
        print(f"cxrdist bench {' '.join(BENCHES[name])}", flush=True)
        taken = take(name, commit)
        if isinstance(taken, str):
            found.append(Row(FAILED, name, None, note=taken))
            continue
        others = {each.name: each for each in measured.taken if each.name != name} | {name: taken}
        measured = Measured(taken=tuple(others[each] for each in BENCHES if each in others))
        write_atomically(args.out, measured.to_json())
        found.append(Row("measured", name, None, note=f"{taken.seconds:.0f} s"))
    write_atomically(args.out.with_suffix(".md"), page(measured))
    return found


def take(name: str, commit: str) -> Taken | str:
    """Run a benchmark in a process of its own; what it said last where it failed."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="cxrdist-bench-") as folder:
        path = Path(folder) / "rows.json"
        words = [sys.executable, "-m", "cxrdist.bench", *BENCHES[name], "--json", str(path)]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode != 0:
            return (done.stderr.strip().splitlines() or ["no message"])[-1]
        rows = tuple(Row(**row) for row in json.loads(path.read_text(encoding="utf-8")))
    return Taken(
        name=name,
        words=BENCHES[name],
        commit=commit,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        machine=machine(),
        seconds=round(time.monotonic() - begun, 1),
        rows=rows,
    )


def commit_of_code() -> str:
    """The last commit that changed the package, `-changed` where files were since; unknown outside a checkout."""
    place = Path(__file__).parents[1]
    git = ("git", "-C", str(place))
    try:
        commit, changed = (
            subprocess.run([*git, *words, "--", "."], capture_output=True, text=True, timeout=10, check=True).stdout
            for words in (("log", "-1", "--format=%h", "--abbrev=7"), ("status", "--porcelain"))
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return commit.strip() + ("-changed" if changed.strip() else "")


def machine() -> str:
    """Processor, cores and versions; no name of the machine."""
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    name = model[1].strip() if model else platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = f", {torch.cuda.get_device_name(0)}" if torch.cuda.is_available() else ""
    return f"{cores} cores of {name}{gpu}, Python {platform.python_version()}, torch {torch.__version__}"


# The page


def shown(figure: Figure, taken: dict[str, Taken]) -> str:
    """The numbers of a figure, '-' for those that were not measured."""
    numbers = [number(pick, taken) for pick in figure.picks]
    if set(numbers) == {"-"}:
        return "-"
    return ", ".join(f"{each}{pick.after}" for each, pick in zip(numbers, figure.picks, strict=True))


def number(pick: Pick, taken: dict[str, Taken]) -> str:
    rows: Sequence[Row] = taken[pick.bench].rows if pick.bench in taken else ()
    for row in rows:
        if not (fnmatch.fnmatchcase(row.stage, pick.stage) and fnmatch.fnmatchcase(row.variant, pick.variant)):
            continue
        if pick.show == "baseline":
            ratio = row.ratio_to_baseline
            return "-" if ratio is None else f"{ratio:.0f}x" if ratio >= 20 else f"{ratio:.2g}x"
        if pick.show == "limit":
            return "-" if row.ratio_to_limit is None else f"{row.ratio_to_limit:.2f}"
        said = re.search(pick.show, row.note)
        return said[1].replace("%", " %") if said else "-"
    return "-"


def page(measured: Measured) -> str:
    """docs/measured.md: the figures, then every benchmark with all of its rows."""
    taken = measured.by_name()
    lines = [
        "# Measured",
        "",
        "Written by `cxrdist bench measured --out docs/measured.json`; change no line by hand. Ratios",
        "(`2.0x`) are medians of interleaved runs, above 1 is faster. Shares (`0.90`) are of the limit that is named",
        "beside them. A `-` was not measured. The commit is the last one that changed the package.",
        "",
        "| what | against | figure | bench | commit |",
        "|---|---|---|---|---|",
    ]
    for figure in FIGURES:
        names = dict.fromkeys(pick.bench for pick in figure.picks)
        commits = dict.fromkeys(taken[name].commit for name in names if name in taken)
        cells = (figure.what, figure.against, shown(figure, taken), ", ".join(names), ", ".join(commits) or "-")
        lines.append(f"| {' | '.join(cells)} |")
    for each in measured.taken:
        command = f"cxrdist bench {' '.join(each.words)}"
        about = f"`{command}`: {each.date}, commit {each.commit}, {each.seconds:.0f} s, {each.machine}."
        lines += ["", f"## {each.name}", "", about, "", "```", table(each.rows), "```"]
    return "\n".join(lines) + "\n"
