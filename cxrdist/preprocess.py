"""Images and a CSV -> shards/<task>: what training and inference read.

  python -m cxrdist.preprocess --task b --images DIR --csv FILE      one split (--split train, the default, or another)
  python -m cxrdist.preprocess --task b --data DIR                   the competition's layout: train and test
  python -m cxrdist.preprocess --task FILE.toml --images DIR --csv FILE      your own labels and columns

Run the same command again after an interruption: finished shards are kept. See shards/README.md for the format.
"""

import argparse
import dataclasses
import hashlib
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cxrdist.cli import Parser, add_flags, at_least, run_entry
from cxrdist.distributed.environment import node_of, usable_cores
from cxrdist.errors import UserError
from cxrdist.shards.convert import Mode
from cxrdist.shards.index import check_split_name
from cxrdist.shards.writer import ROWS_PER_SHARD, Outcome, Source, SplitJob, write_split
from cxrdist.tables import read_label_csv, read_template
from cxrdist.task import ALL, LAYOUTS, Task, name_problem

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
    args = parse(argv)
    readings = {"blank": args.blank, "uncertain": args.uncertain}
    policies: dict[str, Any] = {kind: {ALL: reading} for kind, reading in readings.items() if reading}
    task: Task = dataclasses.replace(args.task, **policies)
    out = args.out or Path("shards") / task.folder
    node_rank, num_nodes, source = node_of(args.node_rank, args.num_nodes)
    if num_nodes > 1:
        print(f"part {node_rank} of {num_nodes} (from {source}; --num-nodes 1 does all of it here)")
    jobs = [  # all before the first image: a mistake in the test split must not show hours later
        make_job(task, split, images, csv, out, mode=args.mode, rows_per_shard=args.rows_per_shard)
        for split, images, csv in inputs_of(task, args.data, args.images, args.csv, args.split)
    ]
    workers = args.workers or usable_cores()
    for job in jobs:
        run(job, workers=workers, node_rank=node_rank, num_nodes=num_nodes, overwrite=args.overwrite)
    print(f"shards in {out}; {time.monotonic() - started:.0f} s in all")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m cxrdist.preprocess", description=__doc__)
    add_flags(parser, "--task", "--data", "--images", "--csv", "--out", task={"required": True})
    names = "with --images: its name, train by default (test has no labels); with --data: train or test, only it"
    parser.add_argument("--split", metavar="NAME", help=names)
    parser.add_argument(
        "--mode",
        choices=("exact", "fast"),
        default="exact",
        help="exact: the published run's pixels; fast: a scaled decode, within 48 dB of them",
    )
    parser.add_argument("--workers", type=at_least(1), metavar="N", help="processes (default: all cores of this job)")
    for kind, text in (("blank", "an empty label"), ("uncertain", "label -1")):
        choices = ("error", "zero", "one")
        parser.add_argument(f"--{kind}", choices=choices, help=f"what {text} means (default: as the task says)")
    parser.add_argument(
        "--rows-per-shard",
        type=at_least(1),
        default=ROWS_PER_SHARD,
        metavar="N",
        help="rows of the CSV a tar covers (default %(default)s, about 100 MB); does not change training",
    )
    parser.add_argument(
        "--num-nodes", type=at_least(1), metavar="N", help="split the work over N nodes that share --out"
    )
    parser.add_argument("--node-rank", type=int, metavar="K", help="which of them this is, from 0")
    parser.add_argument("--overwrite", action="store_true", help="replace a finished split made from other inputs")
    args = parser.parse_args(argv)
    if (args.data is None) == (args.images is None):
        raise UserError("give either --images DIR (with --csv FILE) or --data DIR (the competition's layout)")
    return args


def inputs_of(
    task: Task, data: Path | None, images: Path | None, csv: Path | None, split: str | None
) -> list[tuple[str, Path, Path | None]]:
    """(split, image folder, CSV or None) of each split to make. Raises UserError when the layout does not fit."""
    if images is not None:
        split = split or "train"
        check_split_name(split)
        if split != "test" and csv is None:
            raise UserError(f"--split {split} needs --csv FILE with the labels; images without labels are --split test")
        return [(split, images, csv)]
    assert data is not None
    if csv is not None:
        raise UserError("--csv goes with --images; with --data the CSVs are found in the folder")
    layout = LAYOUTS.get(task.name)
    if layout is None:
        known = " and ".join(LAYOUTS)
        raise UserError(f"--data knows the layout of task {known} only; give --images DIR and --csv FILE")
    if not data.is_dir():
        raise UserError(f"--data {data}: no such folder")
    template = data / layout.template_csv
    wanted = {
        "train": (data / layout.train_images, data / layout.train_csv),
        "test": (data / layout.test_images, template if template.is_file() else None),
    }
    if split not in (None, *wanted):
        raise UserError(f"--split {split}: with --data it is {' or '.join(wanted)}")
    chosen = [(name, *wanted[name]) for name in wanted if split in (None, name)]
    for name, folder, _ in chosen:
        if not folder.is_dir():
            other = "test" if name == "train" else "train"
            raise UserError(
                f"--data {data}: there is no folder {folder.name} in it; task {task.name} has {layout.train_csv}, "
                f"{layout.train_images}/, {layout.test_images}/ (--split {other} needs no {name} images)"
            )
    return chosen


def make_job(
    task: Task,
    split: str,
    images: Path,
    csv: Path | None,
    out: Path,
    *,
    mode: Mode = "exact",
    rows_per_shard: int = ROWS_PER_SHARD,
) -> SplitJob:
    """Read and check the CSV and list the image folder; no image is opened.

    Raises UserError for a CSV or folder that cannot be right (see `read_label_csv`, `read_template`).
    """
    rows = [] if csv is None else read_rows(task, split, csv)
    files = list_images(images, wanted={row[0] for row in rows})
    if csv is None:
        for name in files:
            if name_problem(name):
                raise UserError(f"{images}: the name of {name!r} {name_problem(name)}; rename it")
        rows = [(name, *(task.ids_in_name(name) or ("", ""))) for name in sorted(files)]
    names = [str(row[0]) for row in rows]
    if not any(name in files for name in names):
        raise UserError(
            f"none of the {len(names):,} images of {csv} (first: {names[0]!r}) is in {images}, which holds "
            f"{len(files):,} images (first: {min(files)!r}); are --images and --csv of the same split?"
        )
    known_bad = set(task.unreadable) if split != "test" else set()
    sources = []
    for key, (name, *about) in enumerate(rows):
        file = files.get(name) or ImageFile("", 0, MISSING)
        reason = f"known to be unreadable in task {task.name}" if name in known_bad else file.problem
        sources.append(Source(key, name, file.path, file.size, reason, *about))
    unused = len(files.keys() - set(names))
    print(f"{split}: {len(names):,} rows{f' in {csv}' if csv else ''}, {len(files):,} images in {images}")
    absent = [source.image_name for source in sources if source.reason == MISSING]
    if absent:
        more = f" and {len(absent) - NUM_NAMED:,} more" if len(absent) > NUM_NAMED else ""
        print(f"  {len(absent):,} of the rows have no image there: {', '.join(absent[:NUM_NAMED])}{more}")
    if unused:
        print(f"  {unused:,} images there are in no row of the CSV and are not used")
    provenance = {
        "csv": csv.name if csv else None,
        "csv_sha256": hashlib.sha256(csv.read_bytes()).hexdigest() if csv else None,
        "images_not_in_csv": unused,
    }
    return SplitJob(out, task, split, sources, mode, rows_per_shard, provenance)


def read_rows(task: Task, split: str, csv: Path) -> list[tuple[Any, ...]]:
    """For each row of the CSV its image name and what `Source` holds after the reason.

    The test split's rows are those of a template, which knows no more than the names say; other splits have labels.
    """
    if split == "test":
        return [(name, *(task.ids_in_name(name) or ("", ""))) for name in read_template(csv, task).image_names]
    table = read_label_csv(csv, task)
    about = [table.about[field].tolist() for field in ("image_name", "patient", "study", "view", "sex", "age")]
    return list(zip(*about, map(tuple, table.targets.tolist()), strict=True))


def list_images(folder: Path, wanted: set[str]) -> dict[str, ImageFile]:
    """Files below `folder` that are images by extension (any case) or named in `wanted`, by path relative to it.

    A link that leaves the folder, and anything that is not a regular file, is listed with its problem and never opened;
    linked folders are not entered. Raises UserError for a folder that is missing or holds no image.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such image folder; check the path")
    root = folder.resolve()
    files: dict[str, ImageFile] = {}
    folders, linked = [""], list[str]()
    while folders:
        inside = folders.pop()
        with os.scandir(folder / inside) as entries:
            for entry in entries:
                name = inside + entry.name
                if entry.is_dir(follow_symlinks=False):
                    folders.append(f"{name}/")
                elif entry.is_dir():
                    linked.append(name)
                elif name in wanted or name.lower().endswith(EXTENSIONS):
                    files[name] = _image_file(entry, root)
    if not files:
        found = f"; it holds the folder {min(os.listdir(folder))!r}" if any(folder.iterdir()) else ""
        raise UserError(f"{folder}: no {', '.join(EXTENSIONS)} file in this image folder or below{found}; name another")
    if linked:
        print(f"{folder}: {len(linked):,} linked folders in it are not entered (first: {min(linked)!r})")
    return files


def _image_file(entry: "os.DirEntry[str]", root: Path) -> ImageFile:
    if entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(root):
        return ImageFile(entry.path, 0, "a symbolic link that leaves the image folder is not followed")
    if not entry.is_file():
        return ImageFile(entry.path, 0, "not a regular file")
    return ImageFile(entry.path, entry.stat().st_size, "")


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
    part = "" if outcome.complete else " of this node (the other nodes' shards are not finished yet)"
    stored, left_out = outcome.num_images, len(outcome.left_out)
    lines = [f"  {outcome.num_rows:,} rows{part} = {stored:,} images stored + {left_out:,} left out"]
    lines += [f"    left out: {entry.image_name}: {entry.reason}" for entry in outcome.left_out[:NUM_NAMED]]
    if len(outcome.left_out) > NUM_NAMED:
        lines.append(f"    and {len(outcome.left_out) - NUM_NAMED:,} more, all listed in {job.split}.json")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(run_entry(main))
