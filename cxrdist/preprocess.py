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
import time
from pathlib import Path
from typing import Any, NamedTuple

from cxrdist.cli import Parser, add_flags, at_least, run_entry
from cxrdist.distributed.environment import node_of, usable_cores
from cxrdist.errors import UserError
from cxrdist.shards.index import ABOUT, check_split_name
from cxrdist.shards.writer import ROWS_PER_SHARD, Records, Source, SplitJob, write_split
from cxrdist.tables import read_label_csv, read_template
from cxrdist.task import ALL, LAYOUTS, Task, name_problem

EXTENSIONS = (".png", ".jpg", ".jpeg")
NUM_NAMED = 10  # images left out that are printed one by one; the split's JSON lists all
MISSING = "not in the image folder"


class ImageFile(NamedTuple):
    """A file of the image folder: its path, size in bytes, and why it must not be read ('' if it may)."""

    path: str = ""
    size: int = 0
    problem: str = MISSING


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
        make_job(args, task, out, split, images, csv)
        for split, images, csv in inputs_of(task, args.data, args.images, args.csv, args.split)
    ]
    how = {"workers": args.workers or usable_cores(), "node_rank": node_rank, "num_nodes": num_nodes}
    for job in jobs:
        print(summary(job, *write_split(job, **how, overwrite=args.overwrite, show=True)))
    print(f"shards in {out}; {time.monotonic() - started:.0f} s in all")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m cxrdist.preprocess", description=__doc__)
    add_flags(parser, "--task", "--data", "--images", "--csv", "--out", task={"required": True})
    names = "with --images: its name, train by default (test has no labels); with --data: train or test, only it"
    parser.add_argument("--split", metavar="NAME", help=names)
    modes = "exact: the published run's pixels; fast: a scaled decode, within 48 dB of them"
    parser.add_argument("--mode", choices=("exact", "fast"), default="exact", help=modes)
    parser.add_argument("--workers", type=at_least(1), metavar="N", help="processes (default: all cores of this job)")
    for kind, text in (("blank", "an empty label"), ("uncertain", "label -1")):
        choices = ("error", "zero", "one")
        parser.add_argument(f"--{kind}", choices=choices, help=f"what {text} means (default: as the task says)")
    rows = "rows of the CSV a tar covers (default %(default)s, about 100 MB); does not change training"
    parser.add_argument("--rows-per-shard", type=at_least(1), default=ROWS_PER_SHARD, metavar="N", help=rows)
    nodes = "split the work over N nodes that share --out"
    parser.add_argument("--num-nodes", type=at_least(1), metavar="N", help=nodes)
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
    if (layout := LAYOUTS.get(task.name)) is None:
        raise UserError(f"--data knows task {' and '.join(LAYOUTS)} only; give --images DIR and --csv FILE")
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
            needed = f"{layout.train_csv}, {layout.train_images}/, {layout.test_images}/"
            remedy = f"task {task.name} has {needed} (--split {other} needs no {name} images)"
            raise UserError(f"--data {data}: there is no folder {folder.name} in it; {remedy}")
    return chosen


def make_job(args: argparse.Namespace, task: Task, out: Path, split: str, images: Path, csv: Path | None) -> SplitJob:
    """Read and check the CSV and list the image folder; no image is opened. UserError for what cannot be right."""
    rows = [] if csv is None else read_rows(task, split, csv)
    files = list_images(images, wanted={row[0] for row in rows})
    if csv is None:
        for name in files:
            if problem := name_problem(name):
                raise UserError(f"{images}: the name of {name!r} {problem}; rename it")
        rows = [(name, *(task.ids_in_name(name) or ("", ""))) for name in sorted(files)]
    names = [row[0] for row in rows]
    if files.keys().isdisjoint(names):
        found = f"which holds {len(files):,} images (first: {min(files)!r})"
        wanted = f"none of the {len(names):,} images of {csv} (first: {names[0]!r})"
        raise UserError(f"{wanted} is in {images}, {found}; are --images and --csv of the same split?")
    known_bad = set(task.unreadable) if split != "test" else set()
    sources = []
    for key, (name, *about) in enumerate(rows):
        path, size, problem = files.get(name, ImageFile())
        reason = f"known to be unreadable in task {task.name}" if name in known_bad else problem
        sources.append(Source(key, name, path, size, reason, *about))
    unused = len(files.keys() - names)
    print(f"{split}: {len(names):,} rows{f' in {csv}' if csv else ''}, {len(files):,} images in {images}")
    if absent := [source.image_name for source in sources if source.reason == MISSING]:
        more = f" and {len(absent) - NUM_NAMED:,} more" if len(absent) > NUM_NAMED else ""
        print(f"  {len(absent):,} of the rows have no image there: {', '.join(absent[:NUM_NAMED])}{more}")
    if unused:
        print(f"  {unused:,} images there are in no row of the CSV and are not used")
    digest = hashlib.sha256(csv.read_bytes()).hexdigest() if csv else None
    provenance = {"csv": csv.name if csv else None, "csv_sha256": digest, "images_not_in_csv": unused}
    return SplitJob(out, task, split, sources, args.mode, args.rows_per_shard, provenance)


def read_rows(task: Task, split: str, csv: Path) -> list[tuple[Any, ...]]:
    """For each row of the CSV (for `test` a template) its image name and what `Source` holds after the reason."""
    if split == "test":
        return [(name, *(task.ids_in_name(name) or ("", ""))) for name in read_template(csv, task).image_names]
    table = read_label_csv(csv, task)
    about = [table.about[field].tolist() for field in ABOUT]
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
        return ImageFile(entry.path, problem="a symbolic link that leaves the image folder is not followed")
    if not entry.is_file():
        return ImageFile(entry.path, problem="not a regular file")
    return ImageFile(entry.path, entry.stat().st_size, "")


def summary(job: SplitJob, records: Records, complete: bool) -> str:
    """The lines that account for every row: used, or named with the reason."""
    part = "" if complete else " of this node (the other nodes' shards are not finished yet)"
    num_rows = sum(len(job.groups[number]) for number in records)
    num_stored = sum(len(record.images) for record in records.values())
    left_out = [entry for record in records.values() for entry in record.left_out]
    lines = [f"  {num_rows:,} rows{part} = {num_stored:,} images stored + {len(left_out):,} left out"]
    lines += [f"    left out: {entry.image_name}: {entry.reason}" for entry in left_out[:NUM_NAMED]]
    if len(left_out) > NUM_NAMED:
        lines.append(f"    and {len(left_out) - NUM_NAMED:,} more, all listed in {job.split}.json")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(run_entry(main))
