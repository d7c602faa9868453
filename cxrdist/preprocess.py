"""Images and a CSV -> shards/div_<d>: what training and inference read.

  python -m cxrdist.preprocess --div b --images DIR --csv FILE      one split (--split train, the default, or test)
  python -m cxrdist.preprocess --div b --data DIR                   the competition's layout: train and test

Run the same command again after an interruption: finished shards are kept. See shards/README.md for the format.
"""

import hashlib
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from cxrdist.cli import Parser, add_flags
from cxrdist.errors import UserError, run_entry
from cxrdist.labels import (
    DIVISION_FILES,
    LABELS,
    SPLITS,
    name_problem,
    patient_of,
    read_label_csv,
    read_template,
    study_of,
)
from cxrdist.shards.writer import ROWS_PER_SHARD, Outcome, Source, SplitJob, write_split

EXTENSIONS = (".png", ".jpg", ".jpeg")
NUM_NAMED = 10  # images left out that are printed one by one; the split's JSON lists all
MISSING = "not in the image folder"


@dataclass(frozen=True)
class ImageFile:
    """A file of the image folder: its path, size in bytes, and why it must not be read ('' if it may)."""

    path: str
    size: int
    problem: str


def main(argv: list[str] | None = None) -> None:
    started = time.monotonic()
    parser = Parser(prog="python -m cxrdist.preprocess", description=__doc__)
    add_flags(parser, "--div", "--data", "--images", "--csv", "--out")
    parser.add_argument("--split", choices=SPLITS, help="with --images: train (default) or test; with --data: only it")
    parser.add_argument(
        "--mode",
        choices=("exact", "fast"),
        default="exact",
        help="exact: the published run's pixels; fast: a scaled decode, within 48 dB of them",
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: all cores this job may use)")
    parser.add_argument("--blank", choices=("error", "zero"), default="error", help="what a blank label means")
    parser.add_argument("--uncertain", choices=("error", "zero", "one"), default="error", help="what label -1 means")
    parser.add_argument(
        "--rows-per-shard",
        type=int,
        default=ROWS_PER_SHARD,
        metavar="N",
        help="rows of the CSV a tar covers (default %(default)s, about 100 MB); does not change training",
    )
    parser.add_argument("--num-nodes", type=int, metavar="N", help="split the work over N nodes that share --out")
    parser.add_argument("--node-rank", type=int, metavar="K", help="which of them this is, from 0")
    parser.add_argument("--overwrite", action="store_true", help="replace a finished split made from other inputs")
    args = parser.parse_args(argv)
    if (args.data is None) == (args.images is None):
        raise UserError("give either --images DIR (with --csv FILE) or --data DIR (the competition's layout)")
    for flag in ("workers", "rows_per_shard", "num_nodes"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')} must be at least 1")
    out = args.out or Path("shards") / f"div_{args.div}"
    all_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = args.workers or all_cores
    node_rank, num_nodes = node_of(args.node_rank, args.num_nodes, os.environ)
    jobs = [  # all before the first image: a mistake in the test split must not show hours later
        make_job(
            args.div,
            split,
            images,
            csv,
            out,
            mode=args.mode,
            rows_per_shard=args.rows_per_shard,
            blank=args.blank,
            uncertain=args.uncertain,
        )
        for split, images, csv in inputs_of(args.div, args.data, args.images, args.csv, args.split)
    ]
    for job in jobs:
        run(job, workers=workers, node_rank=node_rank, num_nodes=num_nodes, overwrite=args.overwrite)
    print(f"shards in {out}; {time.monotonic() - started:.0f} s in all")


def inputs_of(
    div: str, data: Path | None, images: Path | None, csv: Path | None, split: str | None
) -> list[tuple[str, Path, Path | None]]:
    """(split, image folder, CSV or None) of each split to make. Raises UserError when the layout does not fit."""
    if images is not None:
        split = split or "train"
        if split == "train" and csv is None:
            raise UserError("--split train needs --csv FILE with the labels; images without labels are --split test")
        return [(split, images, csv)]
    assert data is not None
    if csv is not None:
        raise UserError("--csv goes with --images; with --data the CSVs are found in the folder")
    if not data.is_dir():
        raise UserError(f"--data {data}: no such folder")
    files = DIVISION_FILES[div]
    template = data / files.template_csv
    wanted = {
        "train": (data / files.train_images, data / files.train_csv),
        "test": (data / files.test_images, template if template.is_file() else None),
    }
    chosen = [(name, *wanted[name]) for name in SPLITS if split in (None, name)]
    for name, folder, _ in chosen:
        if not folder.is_dir():
            other = SPLITS[1 - SPLITS.index(name)]
            raise UserError(
                f"--data {data}: there is no folder {folder.name} in it; division {div} has {files.train_csv}, "
                f"{files.train_images}/, {files.test_images}/ (--split {other} needs no {name} images)"
            )
    return chosen


def node_of(node_rank: int | None, num_nodes: int | None, environ: Any) -> tuple[int, int]:
    """(rank, count) of this process among those that share the work: flags, else a launcher's or Slurm's variables."""
    source = "flags"
    if num_nodes is None and node_rank is None:
        candidates = (
            ("torchrun or accelerate", "RANK", "WORLD_SIZE", ""),
            ("a Slurm array", "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN"),
            ("a Slurm step", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", ""),
        )
        for name, rank, count, first in candidates:
            if rank in environ and count in environ:
                source, num_nodes = name, int(environ[count])
                node_rank = int(environ[rank]) - int(environ.get(first, "0"))
                break
    node_rank, num_nodes = node_rank or 0, num_nodes or 1
    if not 0 <= node_rank < num_nodes:
        raise UserError(f"--node-rank {node_rank} with --num-nodes {num_nodes}: ranks run from 0 to {num_nodes - 1}")
    if num_nodes > 1:
        print(f"part {node_rank} of {num_nodes} (from {source}; --num-nodes 1 does all of it here)")
    return node_rank, num_nodes


def make_job(
    div: str,
    split: str,
    images: Path,
    csv: Path | None,
    out: Path,
    *,
    mode: Any = "exact",
    rows_per_shard: int = ROWS_PER_SHARD,
    blank: Any = "error",
    uncertain: Any = "error",
) -> SplitJob:
    """Read and check the CSV and list the image folder; no image is opened.

    Raises UserError for a CSV or folder that cannot be right (see `read_label_csv`, `read_template`).
    """
    if csv is None:
        table = None
    elif split == "train":
        table = read_label_csv(csv, blank=blank, uncertain=uncertain)
    else:
        table = read_template(csv)
    files = list_images(images, wanted=set() if table is None else set(table["image_name"]))
    if table is None:
        for name in files:
            if name_problem(name):
                raise UserError(f"{images}: the name of {name!r} {name_problem(name)}; rename it")
        table = pd.DataFrame({"image_name": sorted(files)})
    names = list(table["image_name"])
    found = sum(name in files for name in names)
    if not found:
        raise UserError(
            f"none of the {len(names):,} images of {csv} (first: {names[0]!r}) is in {images}, which holds "
            f"{len(files):,} images (first: {min(files)!r}); are --images and --csv of the same split?"
        )
    known_bad = set(DIVISION_FILES[div].unreadable) if split == "train" else set()
    absent_file = ImageFile("", 0, MISSING)
    sources = []
    for key, (name, about) in enumerate(zip(names, _known_of(table, split), strict=True)):
        file = files.get(name, absent_file)
        reason = f"known to be unreadable in division {div.upper()}" if name in known_bad else file.problem
        sources.append(Source(key, name, file.path, file.size, reason, *about))
    extra = len(set(files) - set(names))
    provenance = {
        "csv": csv.name if csv else None,
        "csv_sha256": hashlib.sha256(csv.read_bytes()).hexdigest() if csv else None,
        "blank": blank,
        "uncertain": uncertain,
        "images_not_in_csv": extra,
    }
    absent = [name for name, source in zip(names, sources, strict=True) if source.reason == MISSING]
    print(f"{split}: {len(names):,} rows{f' in {csv}' if csv else ''}, {len(files):,} images in {images}")
    if absent:
        more = f" and {len(absent) - NUM_NAMED:,} more" if len(absent) > NUM_NAMED else ""
        print(f"  {len(absent):,} of the rows have no image there: {', '.join(absent[:NUM_NAMED])}{more}")
    if extra:
        print(f"  {extra:,} images there are in no row of the CSV and are not used")
    return SplitJob(out, div, split, sources, mode, rows_per_shard, provenance)


def _known_of(table: pd.DataFrame, split: str) -> list[tuple[Any, ...]]:
    """For each row what `Source` holds after the reason: all of it from a label CSV, patient and study from a name."""
    if split == "train":
        about = [table[field].tolist() for field in ("patient", "study", "view", "sex", "age")]
        targets = [tuple(row) for row in table[list(LABELS)].to_numpy().tolist()]
        return list(zip(*about, targets, strict=True))
    known: list[tuple[Any, ...]] = []
    for name in table["image_name"]:
        try:
            known.append((patient_of(name), study_of(name)))
        except UserError:  # a test image may be called anything
            known.append(("", ""))
    return known


def list_images(folder: Path, wanted: set[str]) -> dict[str, ImageFile]:
    """Files directly inside `folder` that are images by extension (any case) or named in `wanted`, by name.

    A link that leaves the folder, and anything that is not a regular file, is listed with its problem and never opened.
    Raises UserError for a folder that is missing or holds no image.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such image folder; check the path")
    root = folder.resolve()
    files, folders = {}, []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.name)
                continue
            if entry.name not in wanted and not entry.name.lower().endswith(EXTENSIONS):
                continue
            problem = ""
            if entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(root):
                problem = "a symbolic link that leaves the image folder is not followed"
            elif not entry.is_file():
                problem = "not a regular file"
            size = 0 if problem else entry.stat().st_size
            files[entry.name] = ImageFile(entry.path, size, problem)
    if not files:
        inside = f"; it holds the folder {sorted(folders)[0]!r}: is that meant?" if folders else ""
        raise UserError(
            f"{folder}: no {', '.join(EXTENSIONS)} file in this image folder{inside}; name the one that has images"
        )
    return files


def run(job: SplitJob, *, workers: int, node_rank: int, num_nodes: int, overwrite: bool) -> Outcome:
    """`write_split` with a progress bar, a line on what is reused, and a summary whose counts add up."""
    bar: tqdm[Any] | None = None

    def start(images: int, shards: int, reused: int) -> None:
        nonlocal bar
        if reused:
            print(f"  reused: {reused:,} finished shards; to do: {shards:,} shards, {images:,} images")
        if images:
            slow_terminal = {} if sys.stderr.isatty() else {"mininterval": 10.0}
            bar = tqdm(total=images, unit=" images", desc=f"  {job.split}", **slow_terminal)

    try:
        outcome = write_split(
            job,
            workers=workers,
            node_rank=node_rank,
            num_nodes=num_nodes,
            overwrite=overwrite,
            on_start=start,
            on_image=lambda: bar.update() if bar is not None else None,
        )
    finally:
        if bar is not None:
            bar.close()
    print(summary(job, outcome))
    return outcome


def summary(job: SplitJob, outcome: Outcome) -> str:
    """The lines that account for every row: used, or named with the reason."""
    whole = "" if outcome.complete else " of this node (the other nodes' shards are not finished yet)"
    stored, left_out = outcome.num_images, len(outcome.left_out)
    lines = [f"  {outcome.num_rows:,} rows{whole} = {stored:,} images stored + {left_out:,} left out"]
    lines += [f"    left out: {name}: {reason}" for _, name, reason in outcome.left_out[:NUM_NAMED]]
    if len(outcome.left_out) > NUM_NAMED:
        lines.append(f"    and {len(outcome.left_out) - NUM_NAMED:,} more, all listed in {job.split}.json")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(run_entry(main))
