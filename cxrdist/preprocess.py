"""Images and a table -> shards/<task>: what training and inference read. Its flags: `cxrdist.flags.preprocess`."""

import argparse
import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cxrdist.cli import run_entry, with_readings
from cxrdist.distributed.environment import node_of, usable_cores
from cxrdist.documents import read_bounded
from cxrdist.errors import UserError
from cxrdist.flags.preprocess import COLUMN_FLAGS, parser
from cxrdist.shards.adopt import find_tars, plan, write_indexes
from cxrdist.shards.convert import MAX_SIZE_PX, MIN_SIZE_PX, Pixels
from cxrdist.shards.index import LeftOut, open_index, splits_in, task_of
from cxrdist.shards.sources import make_jobs
from cxrdist.shards.writer import Records, SplitJob, refuse_foreign, write_split
from cxrdist.tables import read_cells
from cxrdist.task import ALL, LAYOUTS, Columns, Task, load_task

NUM_NAMED = 10  # images left out that are printed one by one; the split's JSON lists all


def main(argv: list[str] | None = None) -> None:
    started = time.monotonic()
    args = parser().parse_args(argv)
    task = task_from(args)
    out = args.out or Path("shards") / task.folder
    pixels = Pixels(args.mode, args.size, args.fit)
    node_rank, num_nodes, source = node_of(args.node_rank, args.num_nodes)
    if num_nodes > 1:
        print(f"node {node_rank} of {num_nodes} (from {source}): they share the work, whichever of them run")
    if args.adopt:
        adopt(args, task, pixels, num_nodes)
        print(f"index in {args.out or find_tars(args.adopt).folder}; {time.monotonic() - started:.0f} s in all")
        return
    inputs: list[tuple[str | None, Sequence[Path | str], list[Path]]] = [(args.split, args.images, args.csv or [])]
    if args.data:
        inputs = [*competition_inputs(task, args.data, args.split)]
    # All before the first image: a mistake in the last split must not show hours later.
    jobs = [job for given in inputs for job in make_jobs(task, out, *given, pixels, args.rows_per_shard)]
    for job in jobs:
        refuse_foreign(job)
    how = {"workers": args.workers or usable_cores(), "node_rank": node_rank, "num_nodes": num_nodes}
    for job in jobs:
        print(summary(job, write_split(job, **how, overwrite=args.overwrite, show=True)))
    print(f"shards in {out}; {time.monotonic() - started:.0f} s in all")


def task_from(args: argparse.Namespace) -> Task:
    """The task that the flags describe. Raises UserError where they contradict or say too little."""
    out = args.out or (Path("shards") / args.name if args.name else None)
    labels = parse_labels(args.labels) if args.labels else ()
    if args.task is not None:
        folder = Path(args.task)
        task = task_of(folder) if folder.is_dir() and splits_in(folder) else load_task(args.task, "--task shards/")
    elif labels:
        task = Task(name=args.name or "csv", labels=labels, columns=Columns(image=""))
    elif out is not None and splits_in(out):
        task = task_of(out)
    else:
        if args.data:
            raise UserError(f"--data {args.data}: which division is it? add --task {' or --task '.join(LAYOUTS)}")
        there = [*read_cells(args.csv[0], (), most=1).first][:40] if args.csv else []
        named = f" (columns of {args.csv[0]}: {', '.join(there)})" if there else ""
        raise UserError(f"give --labels A,B,... for your own table{named}, or --task NAME|FILE|SHARDS")
    if labels:
        own = [
            {name: how for name, how in readings.items() if name in (ALL, *labels)}
            for readings in (task.blank, task.uncertain)
        ]
        task = dataclasses.replace(task, labels=labels, blank=own[0], uncertain=own[1])
    columns = {name: value for name in COLUMN_FLAGS if (value := getattr(args, f"{name}_column")) is not None}
    if columns and task.format != "table":
        raise UserError(f"--{next(iter(columns))}-column: the tables of task {task.name} are read as published")
    task = dataclasses.replace(task, name=args.name or task.name, columns=dataclasses.replace(task.columns, **columns))
    if args.readers:
        task = dataclasses.replace(task, readers=args.readers)
    return with_readings(task, args)


def adopt(args: argparse.Namespace, task: Task, pixels: Pixels, num_nodes: int) -> None:
    """Index the tars of --adopt, and say what became of every row."""
    if num_nodes > 1:
        raise UserError("--adopt runs as one process: start it on one machine, with --num-nodes 1")
    adoption = plan(task, args.out, args.split, args.adopt, args.csv[0] if args.csv else None, pixels)
    metas = write_indexes(adoption, workers=args.workers or usable_cores(), overwrite=args.overwrite, show=True)
    for split, meta in metas.items():
        rows, left_out = meta.counts.rows, list(meta.left_out)
        print("\n".join(account(split, f"{rows:,} rows = {meta.counts.images:,} images indexed", left_out)))
        found = open_index(adoption.out, split)
        patients = {patient for patient, name in zip(found.patients, found.image_names, strict=True) if patient != name}
        labels = () if found.targets is None else map(found.targets.label, range(found.targets.shape[1]))
        for line in contents(len(patients), sum(int(np.isnan(cells).sum()) for cells in labels)):
            print(line)
        sides = {*found.widths.tolist(), *found.heights.tolist()}
        if len(sides) == 1 and sides != {pixels.size_px} and MIN_SIZE_PX <= min(sides) <= MAX_SIZE_PX:
            side = sides.pop()
            print(f"  all images are {side} x {side} px: with --size {side} none is resized as it is read")
        elif 2 * np.count_nonzero(np.maximum(found.widths, found.heights) > 1.5 * pixels.size_px) > len(found):
            remedy = "unpacked once and preprocessed with --images it trains faster"
            print(f"  most images are much larger than {pixels.size_px} px and made smaller at each read; {remedy}")
        if found.targets is not None and found.patients[:100].to_list() == found.image_names[:100].to_list():
            print("  no patient is known: folds cannot keep the images of a patient apart (--patient-column says them)")


def competition_inputs(task: Task, data: Path, split: str | None) -> list[tuple[str, list[Path], list[Path]]]:
    """(split, image folders, tables) of each split of the competition's folder. UserError when it does not fit."""
    if (layout := LAYOUTS.get(task.name)) is None:
        raise UserError(f"--data knows task {' and '.join(LAYOUTS)} only; give --images DIR and --csv FILE")
    if not data.is_dir():
        raise UserError(f"--data {data}: no such folder")
    template = data / layout.template_csv
    wanted = {
        "train": ([data / layout.train_images], [data / layout.train_csv]),
        "test": ([data / layout.test_images], [template] if template.is_file() else []),
    }
    if split not in (None, *wanted):
        raise UserError(f"--split {split}: with --data it is {' or '.join(wanted)}")
    chosen = [(name, *wanted[name]) for name in wanted if split in (None, name)]
    for name, (folder,), _ in chosen:
        if not folder.is_dir():
            other = "test" if name == "train" else "train"
            needed = f"{layout.train_csv}, {layout.train_images}/, {layout.test_images}/"
            remedy = f"task {task.name} has {needed} (--split {other} needs no {name} images)"
            raise UserError(f"--data {data}: there is no folder {folder.name} in it; {remedy}")
    return chosen


def parse_labels(text: str) -> tuple[str, ...]:
    """The labels of --labels: A,B,C, or @FILE with one a line."""
    names = text.split(",")
    if len(names) == 1 and Path(text).is_file():
        raise UserError(f"--labels {text}: is a file; write --labels @{text} for labels that it lists, one a line")
    if text.startswith("@"):
        try:
            names = read_bounded(Path(text[1:])).decode("utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise UserError(f"--labels {text}: not UTF-8 text") from None
    return tuple(name.strip() for name in names if name.strip())


def account(split: str, counts: str, left_out: Sequence[LeftOut]) -> list[str]:
    """Lines that say how many rows are used, and name the first that are not."""
    lines = [f"  {counts} + {len(left_out):,} left out"]
    lines += [f"    left out: {entry.image_name}: {entry.reason}" for entry in left_out[:NUM_NAMED]]
    if len(left_out) > NUM_NAMED:
        lines.append(f"    and {len(left_out) - NUM_NAMED:,} more, all listed in {split}.json")
    return lines


def contents(num_patients: int, num_masked: int) -> list[str]:
    """The line that says how many patients and masked cells there are, of those that there are."""
    counts = ((num_patients, "patient"), (num_masked, "masked cell"))
    known = [f"{count:,} {what}{'s' * (count > 1)}" for count, what in counts if count]
    return [f"  {'; '.join(known)}"] if known else []


def summary(job: SplitJob, records: Records) -> str:
    """The lines that account for every row: used, or named with the reason."""
    patients: set[str] = set()
    num_stored = num_masked = 0
    for number, record in records.items():  # by shard, so that nothing is held for every image
        rows = {row.key: row for row in job.groups[number]}
        num_stored += len(record.images)
        patients.update(image.patient for image in record.images if image.patient != rows[image.key].image_name)
        num_masked += sum(sum(map(math.isnan, rows[image.key].targets or ())) for image in record.images)
    left_out = [entry for record in records.values() for entry in record.left_out]
    lines = account(job.split, f"{len(job.sources):,} rows = {num_stored:,} images stored", left_out)
    lines += contents(len(patients), num_masked)
    if num_stored and not patients and job.sources[0].targets is not None:
        remedy = " (--patient-column says them)" if job.task.format == "table" else ""
        lines.append(f"  no patient is known: folds cannot keep the images of a patient apart{remedy}")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(run_entry(main))
