"""Score a shard set with trained members and average them into a submission.

  accelerate launch -m cxrdist.infer --div b --member eva_x=runs/eva_x_b@5,6:tta --member chexfound=runs/chexfound_b@5,6

A member is NAME=RUN@EPOCHS[:tta|:plain][*WEIGHT], or NAME=FILE for a weight file (the published ones too); a NAME given
twice averages its runs, e.g. folds. Writes OUT/scores/NAME.csv (with JSON) and OUT/submission.csv. Every image is
decoded once, equal views and shared frozen backbones run once. A killed run goes on where it stopped.
"""

import argparse
import contextlib
import hashlib
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from cxrdist.augment.views import distinct_views, make_views
from cxrdist.cli import Parser, add_flags, at_least
from cxrdist.data.fetch import fetch_shards
from cxrdist.data.folds import read_split, rows_of_fold
from cxrdist.data.loader import Loader
from cxrdist.data.order import eval_batches
from cxrdist.distributed.precision import autocast, resolve_precision
from cxrdist.distributed.ranks import Ranks, check_gpus_seen, check_processes, require_one_group, use_cpu
from cxrdist.errors import UserError, run_entry
from cxrdist.estimate.report import infer_dry_run
from cxrdist.files import folder_lock
from cxrdist.inference.parts import Part, PartStore, merge
from cxrdist.inference.passes import (
    Checkpoint,
    Member,
    MemberSpec,
    Pass,
    columns_of,
    describe_plan,
    parse_member,
    plan_passes,
)
from cxrdist.labels import LABELS, SPLITS, read_template
from cxrdist.models import CheXFound, build_model, frozen_names
from cxrdist.models import weights as weight_files
from cxrdist.recipes import MODELS, RECIPES, Recipe, recipe_for
from cxrdist.runs import checkpoint
from cxrdist.scoring.submission import check_template, write_submission
from cxrdist.scoring.tables import ScoreTable, average, average_studies, average_tables, sigmoid, write_table
from cxrdist.shards.index import ShardIndex, open_index
from cxrdist.shards.verify import verify

T = TypeVar("T")

HELD_BATCHES = 32  # decoded batches kept while models that do not fit together take turns on the device
RESIDENT_SHARE = 0.5  # of the free device memory that weights may fill; the rest is for activations


@dataclass(frozen=True)
class Origin:
    """Where a checkpoint came from; run (folder) and facts (the data it was trained on) are None for a bare file."""

    label: str
    run: Path | None = None
    facts: dict[str, Any] | None = None


@dataclass
class Ensemble:
    """Members as asked for, and the models by checkpoint hash; a frozen backbone is one module in all that share it."""

    members: list[Member]
    models: dict[str, nn.Module]
    origins: dict[str, Origin]  # by checkpoint hash


@dataclass(frozen=True, eq=False)
class Job:
    """What is to be scored, and how: equal on all ranks, checked before any image is decoded."""

    index: ShardIndex
    template: pd.DataFrame | None
    ensemble: Ensemble
    passes: list[Pass]
    rows: NDArray[np.int64]
    batches: list[NDArray[np.int64]]  # the global list; its composition does not depend on the number of ranks
    precision: str
    describes: dict[str, Any]  # all that the logits depend on
    store: PartStore


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_processes(args.expect_processes)
    start = time.monotonic()
    shards = args.shards or Path("shards") / f"div_{args.div}"
    if args.dry_run:
        if os.environ.get("RANK", "0") == "0":
            print(infer_dry_run(args.div, shards, args.precision))
        return
    check_gpus_seen()
    if args.shards_url:  # before the process group, whose timeout is shorter than a download
        fetch_shards(args.shards_url, shards, args.split, args.div)
    timeout = InitProcessGroupKwargs(timeout=timedelta(seconds=args.timeout_s))
    # without cpu=True two processes on a machine without GPU each take themselves for the only one
    accelerator = Accelerator(cpu=use_cpu(), kwargs_handlers=[timeout], mixed_precision="no")
    require_one_group(accelerator.num_processes)
    ranks = Ranks(accelerator, timedelta(seconds=args.timeout_s))
    rank, world_size, device = ranks.rank, ranks.world_size, ranks.device
    with contextlib.ExitStack() as stack:
        together(lambda: verify(shards, args.split, args.div) if rank == 0 else None, ranks)  # every tar header
        job = together(lambda: prepare(args, shards, device), ranks)
        together(lambda: stack.enter_context(folder_lock(args.out)) if rank == 0 else None, ranks)
        parts = job.store.read_all()
        there = gathered([part.batches for part in parts.values()], ranks)
        done = {int(number) for numbers in there for number in numbers}
        own = [number for number in range(len(job.batches)) if number not in done][rank::world_size]
        own_batches = [job.batches[number] for number in own]
        size = job.describes["device_batch_size"]
        if rank == 0:
            print(describe_plan(job.ensemble.members, job.passes, len(job.rows)))
            print(f"  {world_size} processes on {device.type}, {job.precision}, {size} images a batch", flush=True)
            if done:
                print(f"going on: {len(done):,} of {len(job.batches):,} batches are scored already", flush=True)

        total = sum(len(batch) for batch in own_batches)
        every_s = 0.5 if sys.stderr.isatty() else 30.0  # a log file needs few lines
        name = f"infer, process 1 of {world_size}"
        with (
            named_out_of_memory(size),
            Loader(job.index, device, on_bad="skip", max_bad=args.max_unreadable) as loader,
            tqdm(total=total, unit=" images", desc=name, disable=rank != 0, mininterval=every_s, maxinterval=60) as bar,
        ):
            scored = score(loader, own_batches, job.passes, job.ensemble.models, job.precision)
            num_columns = len(columns_of(job.passes))
            for part in in_parts(scored, loader, own, own_batches, num_columns, args.checkpoint_minutes * 60, bar):
                job.store.write(part, rank)

        together(lambda: _finish(args, job, ranks), ranks)
        if rank == 0:
            seconds = time.monotonic() - start
            print(f"inference took {seconds:.0f} s on {world_size} processes, start and reading included", flush=True)
    accelerator.end_training()


def _finish(args: argparse.Namespace, job: Job, ranks: Ranks) -> None:
    parts = collect(job.store, ranks)
    if ranks.rank == 0:
        finish(args, job, parts)


@contextlib.contextmanager
def named_out_of_memory(device_batch_size: int) -> Iterator[None]:
    """Turn a GPU's lack of memory into a line that names the flag."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of memory with {device_batch_size} images at once; use --device-batch-size "
            f"{max(1, device_batch_size // 2)}, with which all images are scored anew ({str(error).splitlines()[0]})"
        ) from error


def together(act: Callable[[], T], ranks: Ranks) -> T:
    """act() on every rank. If one cannot, all end with exit code 2, and rank 0 alone says why."""
    result, problem = None, None
    try:
        result = act()
    except UserError as error:
        problem = str(error)
    problems = [text for text in gathered([problem], ranks) if text is not None]
    if problems and ranks.rank != 0:
        raise SystemExit(2)
    if problems:
        raise UserError(problems[0])
    return result  # type: ignore[return-value]


def gathered(items: list[T], ranks: Ranks) -> list[T]:
    """The items of all ranks, in rank order, on every rank. UserError when another rank is gone.

    Over gloo, which sees a closed connection at once; NCCL would spin until its timeout and take the process down.
    """
    try:
        return [item for part in ranks.gather(items) for item in part]
    except RuntimeError as error:
        raise UserError(
            f"another process ended or stopped answering ({str(error).splitlines()[0][:150]}); its own message is the "
            "cause; finished scores are kept, run the same command again"
        ) from error


def prepare(args: argparse.Namespace, shards: Path, device: torch.device) -> Job:
    """Read and check everything that can be checked without an image."""
    specs = [parse_member(text) for text in args.member] or default_members(args.div)
    precision, _ = resolve_precision(args.precision, device)
    index = open_index(shards, args.split, args.div)
    template = choose_template(args, index)
    ensemble = load_ensemble(specs, args.div)
    rows = rows_to_score(index, args.fold, ensemble)
    passes = plan_passes(ensemble.members)
    batch_size = args.device_batch_size or (64 if device.type == "cuda" else 16)
    describes = {
        "shards": index.fingerprint,
        "rows": hashlib.sha256(rows.tobytes()).hexdigest(),
        "columns": columns_of(passes),
        "device_batch_size": batch_size,
        "precision": precision,
        "device": device.type,
    }
    return Job(
        index=index,
        template=template,
        ensemble=ensemble,
        passes=passes,
        rows=rows,
        batches=list(eval_batches(rows, batch_size, 0, 1)),
        precision=precision,
        describes=describes,
        store=PartStore(args.out / "parts", describes),
    )


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="accelerate launch -m cxrdist.infer", description=__doc__)
    add_flags(
        parser,
        "--div",
        "--shards",
        "--shards-url",
        "--out",
        out={"help": "where to write (default: predictions/div_<div>)"},
    )
    parser.add_argument(
        "--member",
        action="append",
        default=[],
        metavar="NAME=RUN@5,6[:tta]",
        help="whose scores (repeatable); default: runs/eva_x_<div> and runs/chexfound_<div>, as their recipes say",
    )
    parser.add_argument(
        "--template", type=Path, metavar="FILE", help="sample submission (default: the shards' own order)"
    )
    parser.add_argument("--split", choices=SPLITS, default="test", help="which split to score (default test)")
    parser.add_argument(
        "--fold", type=at_least(0), metavar="K", help="with --split train: only patients of this fold of the runs"
    )
    parser.add_argument(
        "--average",
        choices=("prob", "logit", "rank"),
        default="prob",
        help="average probabilities (default, as published), logits, or (members only) ranks",
    )
    parser.add_argument("--average-studies", action="store_true", help="give all images of a study their mean")
    parser.add_argument(
        "--max-unreadable",
        type=at_least(0),
        default=20,
        metavar="N",
        help="stop when a process meets more undecodable images than this; fewer get the class means (default 20)",
    )
    parser.add_argument(
        "--checkpoint-minutes",
        type=at_least(0, float),
        default=0.5,
        metavar="M",
        help="save scores this often (default 0.5)",
    )
    parser.add_argument(
        "--timeout-s",
        type=at_least(1, float),
        default=1800,
        metavar="S",
        help="give up when another process is silent for so long",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="estimate the hours of the published members' inference here and stop"
    )
    add_flags(parser, "--device-batch-size", "--precision", "--expect-processes")
    args = parser.parse_args(argv)
    args.out = args.out or Path("predictions") / f"div_{args.div}"
    if args.fold is not None and args.split != "train":
        raise UserError("--fold chooses patients of the training split: add --split train")
    return args


def default_members(div: str) -> list[MemberSpec]:
    return [MemberSpec(name, Path("runs") / f"{name}_{div}", None, None, None) for name in ("eva_x", "chexfound")]


def choose_template(args: argparse.Namespace, index: ShardIndex) -> pd.DataFrame | None:
    """The submission's rows: the template's, else the source CSV's own order; None where no submission is made."""
    if args.template is not None:
        template = read_template(args.template)
        check_template(template, list(index.image_names), index.left_out, str(args.template))
        return template
    if args.split != "test":
        return None
    left_out = [(int(entry["key"]), str(entry["image_name"])) for entry in index.meta["left_out"]]
    named = sorted([*zip(index.keys.tolist(), index.image_names, strict=True), *left_out])
    template = pd.DataFrame({"image_name": [name for _, name in named]} | dict.fromkeys(LABELS, 0))
    template.attrs["header"] = ["Image_name", *LABELS]
    return template


def load_ensemble(specs: Sequence[MemberSpec], div: str) -> Ensemble:
    """Load every checkpoint once, on the CPU. UserError for another division, or two weights of one member."""
    checkpoints: dict[str, list[Checkpoint]] = {}
    weights: dict[str, float] = {}
    ensemble = Ensemble([], {}, {})
    backbones: dict[str, Any] = {}
    for spec in specs:
        for origin, recipe, model in load_checkpoints(spec, div):
            if recipe.div != div:
                raise UserError(
                    f"{origin.label} was trained for division {recipe.div}, --div is {div}; use that division's run"
                )
            item = checkpoint_of(origin.label, recipe, model, spec.views or recipe.views)
            if isinstance(model, CheXFound):
                model.backbone = backbones.setdefault(f"{item.backbone_sha256} {item.image_size}", model.backbone)
            ensemble.models.setdefault(item.sha256, model.eval())
            ensemble.origins[item.sha256] = origin
            checkpoints.setdefault(spec.name, []).append(item)
        weight = 1.0 if spec.weight is None else spec.weight
        if weights.setdefault(spec.name, weight) != weight:
            raise UserError(f"--member {spec.name} has two weights ({weights[spec.name]}, {weight}); give one")
    if sum(weights.values()) <= 0:
        raise UserError("the members' weights sum to 0; give at least one a weight above 0")
    ensemble.members = [Member(name, tuple(items), weights[name]) for name, items in checkpoints.items()]
    return ensemble


def checkpoint_of(label: str, recipe: Recipe, model: nn.Module, views: Sequence[str]) -> Checkpoint:
    """The identity of a model's weights, by content, and the views that it is scored with."""
    state, frozen = model.state_dict(), frozen_names(model)
    backbone = tensors_sha256(state, frozen) if frozen else None
    trained = tensors_sha256(state, [name for name in state if name not in set(frozen)])
    sha256 = hashlib.sha256(f"{trained} {backbone} {recipe.image_size}".encode()).hexdigest()
    return Checkpoint(label, sha256, backbone, recipe.image_size, tuple(distinct_views(views).items()), len(views))


def load_checkpoints(spec: MemberSpec, div: str) -> Iterator[tuple[Origin, Recipe, nn.Module]]:
    """(origin, recipe, model) of every checkpoint that one `--member` names."""
    if spec.source.is_dir():
        for epoch in spec.epochs or checkpoint.read_recipe(spec.source).member_epochs:
            recipe, model = checkpoint.load_member(spec.source, epoch)
            folder = spec.source / "checkpoints" / f"epoch_{epoch:02d}"
            meta = checkpoint.read_document(folder, "meta")
            labels = meta.get("labels")
            if labels is not None and tuple(labels) != LABELS:
                raise UserError(
                    f"{folder}: its outputs are {', '.join(labels)}; that is not the competition's order of labels, so "
                    "its scores would land in wrong columns: use a run of this version"
                )
            yield Origin(f"{spec.source}@{epoch}", spec.source, meta.get("data")), recipe, model
        return
    files = [Path(part) for part in str(spec.source).split(",")]
    if not all(path.is_file() for path in files):
        raise UserError(
            f"--member {spec.name}: {spec.source} is neither a run folder nor a weight file; check the path"
        )
    if spec.epochs is not None:
        raise UserError(f"--member {spec.name}: {spec.source} is one weight file; @epochs belongs to a run folder")
    found = weight_files.read_weights(*files)
    recipe = recipe_for(spec.name if spec.name in (*RECIPES, *MODELS) else found.model, div)
    model = build_model(recipe.model, recipe.image_size)
    weight_files.load_init(model, spec.source, weights="ema", complete=True)
    yield Origin(str(spec.source)), recipe, model


def tensors_sha256(state: dict[str, Tensor], names: Iterable[str]) -> str:
    """Hash of names, types, shapes and bytes: equal weights are equal whichever file they came from."""
    digest = hashlib.sha256()
    for name in names:
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def rows_to_score(index: ShardIndex, fold: int | None, ensemble: Ensemble) -> NDArray[np.int64]:
    """All rows of the index, or those of the patients in `fold` of the runs' split (which must agree)."""
    if fold is None:
        return np.arange(len(index), dtype=np.int64)
    runs = [origin.run for origin in ensemble.origins.values()]
    if None in runs:
        raise UserError(
            "--fold needs members from run folders: a weight file does not say which patients were held out"
        )
    splits = {run: read_split(run / "split.csv") for run in runs if run is not None}
    first = next(iter(splits))
    for run, split in splits.items():
        if split != splits[first]:
            raise UserError(
                f"{run} and {first} have different splits (split.csv); --fold needs one split for all members"
            )
    return rows_of_fold(index.patients, splits[first], fold)[1]


def score(
    loader: Loader,
    batches: Sequence[NDArray[np.int64]],
    passes: Sequence[Pass],
    models: dict[str, nn.Module],
    precision: str,
) -> Iterator[tuple[int, NDArray[np.int64], Tensor]]:
    """(place in `batches`, rows (n,), logits (P, n, 14) float32 on the device) of every batch, in order.

    Undecodable rows are missing, a batch of nothing else too. Models stay on the device when all fit; else they take
    turns on `HELD_BATCHES` decoded batches at a time, so that each image is still decoded once.
    """
    device = loader.device
    if fits(models.values(), device):
        stages, held = [list(passes)], 1
    else:
        stages, held = [list(group) for _, group in itertools.groupby(passes, lambda item: item.heads)], HELD_BATCHES
    if held == 1:
        for model in models.values():
            model.to(device)
    decoded = loader.batches(batches)
    while group := list(itertools.islice(decoded, held)):
        logits: list[list[Tensor]] = [[] for _ in group]
        for stage in stages:
            used = [models[head.sha256] for head in stage[0].heads] if held > 1 else []
            for model in used:
                model.to(device)
            for place, batch in enumerate(group):
                logits[place] += run_passes(batch.images, stage, models, precision)
            for model in used:
                model.to("cpu")
        for batch, columns in zip(group, logits, strict=True):
            yield batch.step, batch.rows, torch.stack(columns)


@torch.no_grad()
def run_passes(images: Tensor, passes: Sequence[Pass], models: dict[str, nn.Module], precision: str) -> list[Tensor]:
    """(B, 14) float32 logits for every column of `columns_of(passes)`, of uint8 images (B, C, 600, 600).

    A view is resized once for all models of its size; a shared frozen backbone gives its features once to all heads.
    """
    columns: list[list[Tensor]] = [[] for _ in passes]
    for size in dict.fromkeys(item.image_size for item in passes):
        views = list(dict.fromkeys(item.view for item in passes if item.image_size == size))
        for view, inputs in make_views(images, views, size):
            for place, item in enumerate(passes):
                if (item.image_size, item.view) != (size, view):
                    continue
                heads = [models[head.sha256] for head in item.heads]
                with autocast(precision, images.device):
                    if isinstance(heads[0], CheXFound):
                        features = heads[0].features(inputs)
                        logits = [head.head_logits(features) for head in heads if isinstance(head, CheXFound)]
                    else:
                        logits = [head(inputs) for head in heads]
                columns[place] = [value.float() for value in logits]
    return [column for group in columns for column in group]


def fits(models: Iterable[nn.Module], device: torch.device) -> bool:
    """Whether all weights may stay on the device at once (always on a CPU: they are in its memory already)."""
    if device.type != "cuda":
        return True
    weights = {tensor.data_ptr(): tensor.nbytes for model in models for tensor in model.state_dict().values()}
    free, _ = torch.cuda.mem_get_info(device)
    return bool(sum(weights.values()) < RESIDENT_SHARE * free)


def in_parts(
    scored: Iterable[tuple[int, NDArray[np.int64], Tensor]],
    loader: Loader,
    numbers: Sequence[int],
    batches: Sequence[NDArray[np.int64]],
    num_columns: int,
    save_every_s: float,
    show: Any,
) -> Iterator[Part]:
    """Collect scores into parts of about `save_every_s`. The host waits for the device only where a part ends."""
    rows: list[NDArray[np.int64]] = []
    logits: list[Tensor] = []
    first, saved = 0, time.monotonic()

    def close(end: int) -> Part:
        wanted = np.concatenate(batches[first:end])
        reasons = {item.row: item.reason for item in loader.skipped}
        return Part(
            batches=np.array(numbers[first:end], dtype=np.int64),
            rows=np.concatenate([*rows, wanted[:0]]),
            logits=torch.cat([*logits, nothing.to(loader.device)], dim=1).cpu().numpy(),
            unreadable={int(row): reasons[int(row)] for row in wanted if int(row) in reasons},
        )

    nothing = torch.zeros(num_columns, 0, len(LABELS))
    for place, batch_rows, batch_logits in scored:
        rows.append(batch_rows)
        logits.append(batch_logits)
        show.update(len(batches[place]))
        if time.monotonic() - saved >= save_every_s:
            yield close(place + 1)
            first, rows, logits, saved = place + 1, [], [], time.monotonic()
    if first < len(batches):
        yield close(len(batches))


def collect(store: PartStore, ranks: Ranks) -> dict[str, Part]:
    """All parts of all processes on rank 0, also where machines do not share the output folder. A barrier, too."""
    own = store.read_all()
    seen = set(gathered(sorted(own) if ranks.rank == 0 else [], ranks))
    return own | dict(gathered([(name, part) for name, part in own.items() if name not in seen], ranks))


def finish(args: argparse.Namespace, job: Job, parts: dict[str, Part]) -> None:
    """Average what was scored into score tables and the submission, and say what lies where."""
    index = job.index
    logits, kept, undecodable = merge(list(parts.values()), len(index), job.rows)
    unreadable = {str(index.image_names[row]): reason for row, reason in sorted(undecodable.items())}
    if args.fold is None:
        unreadable = index.left_out | unreadable
    column = {name: place for place, name in enumerate(columns_of(job.passes))}
    check_finite(logits, job, kept)
    how = within(args.average)
    tables = []
    for member in job.ensemble.members:
        per_checkpoint = []
        for item in member.checkpoints:
            views = [sigmoid(logits[column[item.sha256, item.image_size, view]]) for view, _ in item.views]
            per_checkpoint.append(average(views, [share for _, share in item.views], how))
        meta = {
            "member": member.name,
            "div": args.div,
            "split": args.split,
            "shards": index.fingerprint,
            "checkpoints": [describe_checkpoint(item) for item in member.checkpoints],
            "weight": member.weight,
            "average": how,
            "precision": job.precision,
            "device_batch_size": job.describes["device_batch_size"],
            "out_of_fold": held_out(job, member, args.fold),
            "unreadable": unreadable,
        }
        tables.append(ScoreTable(index.image_names[kept], average(per_checkpoint, None, how), meta))
    for table in tables:
        path = args.out / "scores" / f"{table.name}.csv"
        write_table(path, table)
        print(f"scores of {table.name}: {path}")
    for name, reason in unreadable.items():
        print(f"unreadable: {name}: {reason}")
    if job.template is None:
        return
    final = average_tables(tables, [member.weight for member in job.ensemble.members], args.average)
    if args.average_studies:
        final = average_studies(final)
    fallback = write_submission(final, job.template, args.out / "submission.csv")
    note = f", {len(fallback)} of them unreadable (class means)" if fallback else ""
    print(f"submission: {args.out / 'submission.csv'}, {len(job.template):,} images{note}")


def check_finite(logits: NDArray[np.float32], job: Job, kept: NDArray[np.int64]) -> None:
    """UserError that names checkpoint, view and image of the first score that is no number."""
    bad = np.argwhere(~np.isfinite(logits).all(axis=2))
    if len(bad):
        sha256, _, view = columns_of(job.passes)[bad[0, 0]]
        remedy = "use --precision bf16 or fp32" if job.precision == "fp16" else "train again or use another epoch"
        raise UserError(
            f"{job.ensemble.origins[sha256].label} gives no number for {len(set(bad[:, 1])):,} images, e.g. "
            f"{job.index.image_names[kept[bad[0, 1]]]!r} (view {view}, {job.precision}); {remedy}"
        )


def within(how: Any) -> Any:
    """How views and checkpoints of one member are averaged: ranks are taken of whole members only."""
    return "prob" if how == "rank" else how


def describe_checkpoint(item: Checkpoint) -> dict[str, Any]:
    return {
        "source": item.label,
        "sha256": item.sha256,
        "backbone_sha256": item.backbone_sha256,
        "image_size": item.image_size,
        "views": dict(item.views),
    }


def held_out(job: Job, member: Member, fold: int | None) -> bool:
    """True when every run of the member kept `fold` of these very shards out of training."""
    if fold is None:
        return False
    wanted = (fold, job.index.fingerprint)
    facts = [job.ensemble.origins[item.sha256].facts for item in member.checkpoints]
    return all(item is not None and (item["validate_fold"], item["shards"]) == wanted for item in facts)


if __name__ == "__main__":
    raise SystemExit(run_entry(main))
