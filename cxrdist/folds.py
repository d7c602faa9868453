"""Train a model fold after fold, and score each fold by the model that did not see it: one out-of-fold table."""

import argparse
import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cxrdist import recipes, train
from cxrdist.cli import STREAMING, Parser, run_entry
from cxrdist.distributed import environment
from cxrdist.distributed.plan import plan_launch
from cxrdist.errors import UserError
from cxrdist.files import check_outputs, lock, with_json
from cxrdist.flags.folds import ALL, parser
from cxrdist.inference.members import parse_member
from cxrdist.models import architecture_of
from cxrdist.models.weights.fit import init_files
from cxrdist.recipes import Inference, Recipe
from cxrdist.runs.checkpoint import epoch_folder
from cxrdist.scoring.metrics import macro_auroc
from cxrdist.scoring.tables import ScoreTable, read_members, write_table
from cxrdist.shard_sets import ShardSet, find_shards
from cxrdist.shards.index import task_of
from cxrdist.steps import Step, path_hash, run_steps, stop_as_interrupted, unfinished

FOR_INFER = ("--task", "--shards", "--backbone", "--precision", "--max-unreadable")  # flags that go to both


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained and scored. words: training's flags, as given."""

    words: tuple[str, ...]
    recipe: Recipe
    identity: tuple[str, ...]  # of a training, but for its fold
    at: ShardSet
    task_name: str
    member: str
    num_folds: int
    out: Path

    @property
    def table(self) -> Path:
        """The out-of-fold table of all folds."""
        return self.out / f"{self.member}.csv"

    def run(self, fold: int) -> Path:
        """The run folder of a fold's training; its name is the run's in a report."""
        return self.out / f"{self.recipe.name}_{self.task_name}_fold{fold}"

    def part(self, fold: int) -> Path:
        """The score table of a fold."""
        return self.out / f"scores_fold{fold}" / "scores" / f"{self.member}.csv"


def main(argv: list[str] | None = None) -> None:
    """Train and score the folds asked for, then join all tables if none is missing."""
    args, job = prepare(argv)
    stop_as_interrupted()
    every = range(job.num_folds)
    print(f"folds of {job.recipe.name}: results go to {job.out}/; {plan_launch().reason}", flush=True)
    for fold in every if args.only == ALL else (args.only,):
        taken = f"fold {fold} in {job.out} is worked on by another command ({{holder}}); wait for it, or --only another"
        with lock(locks(job) / f"fold{fold}.lock", wait=False, message=taken):
            run_steps(fold_steps(job, fold), job.out)
    with lock(locks(job) / "join.lock", wait=True, message=""):
        if left := unfinished([step for fold in every for step in fold_steps(job, fold)], job.out):
            print(f"{job.table} is joined by the command that does the last of: {', '.join(left)}")
            return
        parts = tuple(map(job.part, every))
        call = functools.partial(join, job)
        run_steps([Step(name="join", words=(), call=call, inputs=parts, results=(job.table,))], job.out)
    print(f"out-of-fold table: {job.table}; weights: cxrdist ensemble --fit {job.table} MORE --shards ...")


def prepare(argv: list[str] | None) -> tuple[argparse.Namespace, Job]:
    """The flags of this entry, and what they ask for. Every mistake that can be seen beforehand ends here."""
    args = parser().parse_args(argv)
    given = args.training
    if args.only is None:
        array = environment.array_task()
        args.only = ALL if array is None else array
    if args.only != ALL and args.only >= args.folds:
        raise UserError(f"fold {args.only} is not possible (--only, or a Slurm array): they are 0 to {args.folds - 1}")
    at = find_shards(given)
    at.fetch("train", given.task)
    task = given.task or task_of(at.folder)
    index = at.open("train", task)
    if not index.patients.has_distinct(args.folds):
        raise UserError(f"--folds {args.folds}: {at.folder} has images of fewer patients; give fewer folds")
    num_images = len(index)
    recipe = train.asked_for(given, task.name, num_images)[1]
    job = Job(
        words=args.words,
        recipe=recipe,
        identity=identity_of(given, recipe),
        at=at,
        task_name=task.name,
        member=args.member or recipe.name,
        num_folds=args.folds,
        out=args.out or Path("runs") / f"{recipe.name}_{task.name}_folds",
    )
    parse_member(f"{job.member}={job.out}")  # a name that inference would refuse
    check_outputs(with_json([job.table]), [at.folder], folder=job.out)
    return args, job


def identity_of(given: argparse.Namespace, recipe: Recipe) -> tuple[str, ...]:
    """All of training's flags that its result depends on: neither the device batch nor threads, logs and saving."""
    learned = recipes.to_json(dataclasses.replace(recipe, inference=Inference(member_epochs=(1,))))
    if given.init in ("random", "timm"):
        weights = [given.init]
    else:
        init = None if given.init is None else Path(given.init)
        weights = [path_hash(file) for file in init_files(architecture_of(recipe.model), init)]
    continued = "continued" if given.continue_init else "begun"
    return learned, *weights, continued, given.precision, given.on_bad


def fold_steps(job: Job, fold: int) -> list[Step]:
    """A training without the fold, and the scoring of the fold."""
    run, part = job.run(fold), job.part(fold)
    inference = job.recipe.inference
    epochs, views = (",".join(map(str, several)) for several in (inference.member_epochs, inference.views))
    folds = ("--folds", str(job.num_folds), "--validate-fold", str(fold))
    scored = ("--split", "train", "--fold", str(fold), "--member", f"{job.member}={run}@{epochs}:{views}")
    first = Step(
        name=f"train fold {fold}",
        words=("cxrdist", "train", "--group", job.out.resolve().name, *job.words, *folds, "--out", str(run)),
        identity=(*job.identity, *folds),
        inputs=(job.at.folder / "train.json",),
        results=tuple(epoch_folder(run, epoch) / "manifest.json" for epoch in inference.member_epochs),
        folder=run,
        keep=True,
        resume=True,
    )
    words = ("cxrdist", "infer", *words_for_infer(job.words), *scored)
    second = Step(
        name=f"score fold {fold}",
        words=(*words, "--out", str(part.parent.parent)),
        identity=scored,
        needs=(first.name,),
        results=tuple(with_json([part])),
        folder=part.parent.parent,
    )
    return [first, second]


def words_for_infer(words: tuple[str, ...]) -> list[str]:
    """Those of training's flags that inference takes, too, as given."""
    shared = Parser(add_help=False)
    for name in (*FOR_INFER, *(STREAMING if "--cache-gb" in " ".join(words) else ())):
        shared.add_argument(*((name, "--div") if name == "--task" else (name,)))
    found = vars(shared.parse_known_args(words)[0])
    return [word for name, text in found.items() if text is not None for word in (f"--{name.replace('_', '-')}", text)]


def join(job: Job) -> None:
    """Write the folds' tables as one, in the order of the shards; UserError unless it holds every image, unseen."""
    (table,), _ = read_members([job.part(fold) for fold in range(job.num_folds)], None)
    index = job.at.open("train")
    if missing := table.without_score(index.image_names):
        raise UserError(f"{len(missing):,} images are in no fold's table, e.g. {missing[0]!r}; give another --out")
    if not table.meta.out_of_fold:
        raise UserError(f"a model of {job.out} has seen images that it scored; give another --out")
    rows = index.rows_of(table.image_names)
    order = np.argsort(rows)
    table = ScoreTable(table.image_names[order], table.probs[order], table.meta)
    write_table(job.table, table)
    if index.targets is not None:
        value, labels = macro_auroc(index.targets[np.sort(rows)], table.probs)
        print(f"{job.member}, {len(rows):,} images out of fold: macro AUROC {value:.4f} over {labels} labels")


def locks(job: Job) -> Path:
    folder = job.out / "steps"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


if __name__ == "__main__":
    raise SystemExit(run_entry(main))
