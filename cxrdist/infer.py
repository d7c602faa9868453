"""Score a shard set with trained members and average them into a submission. Its flags: `cxrdist.flags.infer`."""

import argparse
import contextlib
import dataclasses
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from cxrdist.cli import run_entry
from cxrdist.data.loader import Loader
from cxrdist.data.order import EvalBatches, num_steps
from cxrdist.data.reader import NO_XXH3
from cxrdist.distributed import environment
from cxrdist.distributed.group import check_gpus_seen, out_of_memory_named, process_group
from cxrdist.distributed.precision import Hardware, hardware_of, resolve_precision
from cxrdist.distributed.ranks import Ranks
from cxrdist.estimate.report import infer_dry_run
from cxrdist.files import folder_lock
from cxrdist.flags.infer import parser
from cxrdist.inference.members import Ensemble, held_out, load_ensemble, parse_members, seen_notes, task_of_models
from cxrdist.inference.parts import Basis, Part, PartStore, batches_done, collect, merge
from cxrdist.inference.passes import Pass, columns_of, describe_plan, plan_passes
from cxrdist.inference.score import check_finite, check_folder, check_same_images, in_parts, member_table, score
from cxrdist.inference.wanted import SomeOf, choose_rows, choose_template, hash_of
from cxrdist.models.compiled import graphs_told
from cxrdist.scoring.submission import check_unreadable, unreadable_note, write_submission
from cxrdist.scoring.tables import TableMeta, average_studies, average_tables, study_ids, write_table
from cxrdist.shard_sets import ShardSet, find_shards, scoring_stream
from cxrdist.shards.index import ShardIndex, task_of
from cxrdist.tables import Template
from cxrdist.task import Task

AGAIN = "run the same command again: finished scores are kept"
SHOWN = 20  # unreadable images that are printed; the tables' JSON lists all


@dataclass(frozen=True, eq=False)
class Job:
    """What is to be scored, and how: equal on all ranks, checked before any image is decoded."""

    out: Path
    index: ShardIndex
    task: Task  # the models'; the shards' is another one with --external
    template: Template | None  # known to rank 0 only
    ensemble: Ensemble
    passes: list[Pass]
    rows: SomeOf
    batches: EvalBatches  # all; their composition does not depend on the number of ranks
    basis: Basis
    store: PartStore
    left_out: dict[str, str]  # image name -> reason, of images that are asked for and not in the shards
    most_unreadable: int


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    environment.check_processes(args.expect_processes)
    start = time.monotonic()
    at = find_shards(args)
    if args.dry_run:
        if environment.rank() == 0:
            print(infer_dry_run(args.task or task_of(at.folder), at.folder, args.precision, args.split))
        return
    check_gpus_seen()
    at.fetch(args.split, args.task)  # before the process group, whose timeout is shorter than a download
    with process_group(args.timeout_s, then=AGAIN) as ranks, contextlib.ExitStack() as stack:
        found = ranks.gather(hardware_of(ranks.device))
        index = at.open_together(ranks, args.split, args.task)
        with ranks.agree():
            members = prepare_members(args, at.folder, index)
        rows = ranks.on_main(choose_rows, index, *members[:2], args.fold)
        with ranks.agree():
            job = prepare(args, index, members, rows, found, ranks.rank)
        if job.index.checksums is None:
            ranks.say(NO_XXH3)
        with ranks.agree():
            if ranks.rank == 0:
                stack.enter_context(folder_lock(job.out))
        score_missing(args, job, at, ranks, stack)
        with ranks.working("reading scores"):
            parts = collect(job.store, ranks)
        note = ranks.on_main(write_results, args, job, parts)
        seconds = time.monotonic() - start
        ranks.say(f"inference took {seconds:.0f} s on {ranks.world_size} processes, start and reading included{note}")


def score_missing(args: argparse.Namespace, job: Job, at: ShardSet, ranks: Ranks, stack: contextlib.ExitStack) -> None:
    """Score this rank's share of the batches that are in no part yet, and write it in parts."""
    size = job.basis.device_batch_size
    done = batches_done(job.store.read_all(), ranks)
    left = [number for number in job.batches if number not in done]
    batches = dataclasses.replace(job.batches, numbers=left[ranks.rank :: ranks.world_size])
    # for all ranks, until all of them have their scores
    stream = scoring_stream(at, job.index, dataclasses.replace(job.batches, numbers=left), ranks, stack)
    ranks.say("\n".join([describe_plan(job.ensemble.members, job.passes, len(job.rows)), *job.ensemble.notes]))
    ranks.say(f"  {ranks.world_size} processes on {ranks.device.type}, {job.basis.precision}, {size} images a batch")
    if done:
        ranks.say(f"resuming: {len(done):,} of {len(job.batches):,} batches are scored already")
    total, desc = sum(map(len, batches.values())), f"infer, process 1 of {ranks.world_size}"
    every_s = 0.5 if sys.stderr.isatty() else 30.0  # a log file needs few lines
    show = tqdm(total=total, unit=" images", desc=desc, disable=ranks.rank != 0, mininterval=every_s, maxinterval=60)
    none = torch.zeros(len(job.basis.columns), 0, job.task.num_labels, device=ranks.device)
    most_bad = job.most_unreadable - len(job.left_out)
    with (
        out_of_memory_named(ranks.device, size, "with which all images are scored again"),
        Loader(job.index, ranks.device, on_bad="skip", max_bad=most_bad, stream=stream) as loader,
        show,
        graphs_told(ranks.say) if args.compile else contextlib.nullcontext(),
    ):
        models, precision = job.ensemble.models, job.basis.precision
        scored = score(loader, batches.values(), job.passes, models, precision, compiled=args.compile)
        for part in in_parts(ranks.paced(scored), loader, batches, none, args.checkpoint_minutes * 60, show):
            job.store.write(part, ranks.rank)


def prepare_members(args: argparse.Namespace, shards: Path, index: ShardIndex) -> tuple[Ensemble, Task, Path]:
    """The members, their task and the output folder, where their tables may be written."""
    specs = parse_members(args.member, (args.external or index.task).name)
    task = index.task if args.external is False else task_of_models(specs, args.external, "--external")
    by = "" if args.external is False else f"_by_{task.folder}"
    out = args.out or Path("predictions") / f"{index.task.folder}{by}"
    inputs = [shards, args.template, args.backbone, *(spec.source for spec in specs if spec.source.is_file())]
    check_folder(out, [spec.name for spec in specs], inputs)
    check_same_images(out / "scores", [spec.name for spec in specs], index)
    return load_ensemble(specs, task, args.backbone), task, out


def prepare(
    args: argparse.Namespace,
    index: ShardIndex,
    members: tuple[Ensemble, Task, Path],
    rows: SomeOf,
    found: Sequence[Hardware],
    rank: int,
) -> Job:
    """What is done, once all that can be checked without an image is checked. found: every rank's device."""
    precision, _ = resolve_precision(args.precision, found)
    kind, (ensemble, task, out) = found[0].kind, members
    submits = args.template is not None or (index.targets is None and args.external is False)
    template = choose_template(args.template, index, task, submits=submits) if rank == 0 else None
    left_out = index.left_out if args.fold is None else {}
    most = args.max_unreadable.of(len(rows) + len(left_out))
    check_unreadable(left_out, most, len(rows) + len(left_out))
    passes = plan_passes(ensemble.members)
    ensemble.notes += seen_notes(ensemble, args.fold, index.split, index.fingerprint)
    basis = Basis(
        shards=index.fingerprint,
        rows=hash_of(rows),
        columns=tuple(columns_of(passes)),
        device_batch_size=args.device_batch_size or (64 if kind == "cuda" else 16),
        precision=precision,
        device=kind,
    )
    size = basis.device_batch_size
    batches = EvalBatches(rows, size, range(num_steps(len(rows), size)))
    store = PartStore(out / "parts", basis)
    return Job(out, index, task, template, ensemble, passes, rows, batches, basis, store, left_out, most)


def write_results(args: argparse.Namespace, job: Job, parts: Sequence[Part]) -> str:
    """Average what was scored into score tables and the submission, and say what lies where.

    Returns a note on unreadable images; UserError, before anything is written, for too many.
    """
    index, basis = job.index, job.basis
    logits, kept, undecodable = merge(parts, len(index), job.rows)
    unreadable = job.left_out | {index.image_names[row]: reason for row, reason in sorted(undecodable.items())}
    check_unreadable(unreadable, job.most_unreadable, len(job.rows) + len(job.left_out))
    image_names = np.array(index.unique_names[kept].to_list(), dtype=object)
    check_finite(logits, job.passes, image_names, basis.precision)
    shared = TableMeta(
        task=job.task,
        split=args.split,
        shards=index.fingerprint,
        average="prob" if args.average == "rank" else args.average,  # ranks are taken of members only
        precision=basis.precision,
        device_batch_size=basis.device_batch_size,
        unreadable=unreadable,
        asked=len(job.rows) + len(job.left_out),
    )
    tables = []
    for member in job.ensemble.members:
        meta = dataclasses.replace(shared, out_of_fold=held_out(job.ensemble, member, args.fold, index.fingerprint))
        tables.append(member_table(member, logits, basis.columns, image_names, meta))
        path = job.out / "scores" / f"{member.name}.csv"
        write_table(path, tables[-1])
        print(f"scores of {member.name}: {path}")
    for name, reason in list(unreadable.items())[:SHOWN]:
        print(f"unreadable: {name}: {reason}")
    note, submission = unreadable_note(unreadable), job.out / "submission.csv"
    if job.template is None:
        if submission.exists():
            print(f"warning: {submission} is of an earlier inference; this one writes none")
        return note
    final = average_tables(tables, [member.weight for member in job.ensemble.members], args.average)
    if args.average_studies:
        final = average_studies(final, study_ids(index.patients[kept], index.studies[kept]))
    fallback = write_submission(final, job.template, submission, job.most_unreadable)
    print(f"submission: {submission}, {len(job.template):,} images{unreadable_note(fallback, ' (class means)')}")
    return note


if __name__ == "__main__":
    raise SystemExit(run_entry(main, again=AGAIN))
