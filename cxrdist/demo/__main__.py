"""All steps on a small division: images and labels -> shards -> models -> report. Its flags: `cxrdist.flags.demo`."""

import argparse
import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from cxrdist import recipes
from cxrdist.cli import run_entry, with_readings
from cxrdist.data.folds import assign_folds
from cxrdist.demo.phantoms import write_division
from cxrdist.distributed.plan import plan_launch
from cxrdist.errors import UserError
from cxrdist.files import with_json
from cxrdist.flags.demo import NUM_FOLDS, parser
from cxrdist.published import read_labels
from cxrdist.runs.checkpoint import epoch_folder
from cxrdist.scoring.weights import Fit
from cxrdist.shards.columns import Texts
from cxrdist.shards.index import read_meta
from cxrdist.shards.sources import list_images
from cxrdist.steps import Step, run_steps, stop_as_interrupted
from cxrdist.tables import MissingColumnError
from cxrdist.task import Task, load_task

FOLD_EPOCHS = 3  # with --folds, a training has this part of its epochs: nine trainings in a quarter of an hour
MEMBERS = {"eva_x": "demo_eva_x", "chexfound": "demo_chexfound"}
FOLD_MEMBERS = MEMBERS | {"convnet": "demo_convnet"}


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    out: Path = args.out
    task = with_readings(load_task(args.task), args)
    check_input(args.images, args.csv, task)
    print(f"cxrdist demo: results go to {out}/; {plan_launch().reason}", flush=True)
    stop_as_interrupted()
    steps = make_steps(args, task, out)
    seconds = run_steps(steps, out)
    print(summary(Files.below(out, task, args.folds), task, seconds))
    if args.images is not None:
        print("The demo's models start from random weights; real images need the official ones (README, 'Weights').")


def check_input(images: Path | None, csv: Path | None, task: Task) -> None:
    """Raise UserError for input that the later steps would refuse, before anything is written."""
    if images is None or csv is None:
        return
    if not images.is_dir():
        raise UserError(f"--images {images}: no such folder; check the path")
    if not any(path.suffix.lower() in (".png", ".jpg", ".jpeg") for path in images.rglob("*")):
        raise UserError(f"--images {images}: holds no .png, .jpg or .jpeg file; give the folder that holds the images")
    try:
        about = read_labels(csv, task).about
    except MissingColumnError as error:
        raise UserError(f"--csv {error.what}; say what its columns are with --task FILE.toml") from None
    files = list_images(images)
    if all(files.file_of(name) is None for name in about["image_name"]):
        raise UserError(f"--csv {csv}: none of its images is in {images}; give the table of these images")
    num_patients = about["patient"].nunique()
    if num_patients < 2 * NUM_FOLDS:
        raise UserError(
            f"--csv {csv}: {num_patients} patients are too few to hold some out; use {2 * NUM_FOLDS} or more"
        )


@dataclass(frozen=True)
class Files:
    """Where the demo puts what."""

    shards: Path
    train_csv: Path
    template: Path
    truth: Path
    runs: Path
    prediction: Path
    report: Path
    members: dict[str, str]  # recipe by name

    @property
    def tables(self) -> list[Path]:
        """The members' score tables of the held-out patients."""
        return [self.prediction / "scores" / f"{member}.csv" for member in self.members]

    @property
    def ensemble(self) -> Path:
        """With folds: the average with fitted weights, of the same patients."""
        return self.prediction / "ensemble.csv"

    @property
    def weights(self) -> Path:
        return self.prediction / "weights.json"

    @classmethod
    def below(cls, out: Path, task: Task, folds: int | None = None) -> "Files":
        """folds: with them models and results lie in a folder of their own, beside those without."""
        tables = (out / "division" / name for name in ("train.csv", "sample_submission.csv", "test_labels.csv"))
        train_csv, template, truth = tables
        shards, made = out / "shards" / task.folder, out if folds is None else out / "folds"
        results = (made / "runs", made / "prediction", made / "report")
        return cls(shards, train_csv, template, truth, *results, MEMBERS if folds is None else FOLD_MEMBERS)


def make_steps(args: argparse.Namespace, task: Task, out: Path) -> list[Step]:
    """The demo's steps in order; paths are spelt as the user would type them."""
    files = Files.below(out, task, args.folds)
    real = args.images is not None
    images, csv = (args.images, args.csv) if real else (out / "division" / "images", out / "division" / "labels.csv")
    readings = tuple(
        word
        for flag in ("blank", "uncertain")
        if (how := getattr(args, flag)) is not None
        for word in (f"--{flag}", how)
    )
    steps = [] if real else [draw_step(images, csv, args.patients, args.seed)]
    steps.append(
        Step(
            name="hold out patients",
            words=(),
            call=functools.partial(hold_out, csv, files, task, args.seed),
            needs=tuple(step.name for step in steps),
            inputs=(*((csv,) if real else ()), f"seed {args.seed}", " ".join(readings)),
            results=(files.train_csv, files.template, files.truth),
        )
    )
    listing = (folder_listing(images),) if real else ()
    for split, table, flags in (("train", files.train_csv, readings), ("test", files.template, ())):
        source = ("--images", str(images), "--csv", str(table), "--out", str(files.shards), "--split", split)
        steps.append(
            Step(
                name=f"preprocess {split}",
                words=("cxrdist", "preprocess", "--task", args.task, *source, *flags, "--overwrite"),
                needs=("hold out patients",),
                inputs=listing,
                results=(files.shards / f"{split}.json",),
            )
        )
    steps.append(
        Step(
            name="verify the shards",
            words=("cxrdist", "verify", "--shards", str(files.shards), "--hashes"),
            needs=("preprocess train", "preprocess test"),
            results=(),
        )
    )
    if args.folds is not None:
        return [*steps, *fold_steps(args, task, files, readings)]
    pictures = [files.runs / f"{model}_{task.name}" for model in files.members.values()]
    evaluate = evaluate_step(args, files, readings, files.tables, pictures, after="infer")
    return [*steps, *model_steps(args, task, files), evaluate]


def draw_step(images: Path, csv: Path, num_patients: int, seed: int) -> Step:
    def draw() -> None:
        count = write_division(images, csv, num_patients=num_patients, seed=seed)
        print(f"{count} phantom images of {num_patients} patients in {images}")

    inputs = (f"patients {num_patients} seed {seed}",)
    return Step(name="draw the phantoms", words=(), call=draw, inputs=inputs, results=(csv,), folder=images)


def model_steps(args: argparse.Namespace, task: Task, files: Files) -> list[Step]:
    """A training of each member, and the inference of all."""
    shards = ("--shards", str(files.shards))
    settings = tuple(word for text in args.overrides for word in ("--set", text))
    steps, members = [], []
    for member, model in files.members.items():
        recipe = recipes.with_overrides(recipes.recipe_for(model, task.name), args.overrides)
        run, epochs = files.runs / f"{model}_{task.name}", recipe.inference.member_epochs
        members += ["--member", f"{member}={run}@{','.join(map(str, epochs))}:tta"]
        words = (*shards, "--model", model, "--out", str(run), "--init", "random", *settings)
        steps.append(
            Step(
                name=f"train {member}",
                words=("cxrdist", "train", *words),
                needs=("preprocess train",),
                inputs=(recipes.to_json(recipe),),
                results=tuple(epoch_folder(run, epoch) / "manifest.json" for epoch in epochs),
                folder=run,
                resume=True,
            )
        )
    return [*steps, infer_step("infer", files, members, steps)]


def infer_step(name: str, files: Files, members: list[str], after: list[Step]) -> Step:
    words = ("--shards", str(files.shards), *members, "--template", str(files.template), "--out", str(files.prediction))
    return Step(
        name=name,
        words=("cxrdist", "infer", *words),
        needs=("preprocess test", *(step.name for step in after)),
        results=(files.prediction / "submission.csv", *files.tables),
        folder=files.prediction,
    )


def fold_steps(args: argparse.Namespace, task: Task, files: Files, readings: tuple[str, ...]) -> list[Step]:
    """The folds of each member, the held-out patients by all its folds, the fitted ensemble, and the report."""
    shards = ("--shards", str(files.shards))
    steps, members, tables, pictures = [], [], [], []
    for member, model in files.members.items():
        usual = recipes.recipe_for(model, task.name)
        settings = [f"epochs={-(-usual.epochs // FOLD_EPOCHS)}", *args.overrides]
        recipe, out = recipes.with_overrides(usual, settings), files.runs / f"{model}_{task.name}_folds"
        print(f"{member}: {args.folds} folds, epochs={recipe.epochs} each ({usual.epochs} without --folds)", flush=True)
        words = ["cxrdist", "folds", *shards, "--model", model, "--member", member]
        words += ["--folds", str(args.folds), "--only", "all"]
        words += ["--out", str(out), "--init", "random", *(word for text in settings for word in ("--set", text))]
        tables.append(out / f"{member}.csv")
        results = tuple(with_json(tables[-1:]))
        steps.append(Step(name=f"folds of {member}", words=tuple(words), needs=("preprocess train",), results=results))
        runs = [out / f"{recipe.name}_{task.name}_fold{fold}" for fold in range(args.folds)]
        epochs = ",".join(map(str, recipe.inference.member_epochs))
        members += [word for run in runs for word in ("--member", f"{member}={run}@{epochs}")]
        pictures.append(runs[0])
    infer = infer_step("infer by all folds", files, members, steps)
    fit = ("cxrdist", "ensemble", "--fit", *map(str, tables), *shards, "--scores", *map(str, files.tables))
    ensemble = Step(
        name="fit the ensemble",
        words=(*fit, "--out", str(files.ensemble), "--json", str(files.weights)),
        needs=(infer.name,),
        results=(*with_json([files.ensemble]), files.weights),
    )
    scores = [files.ensemble, *files.tables]
    report = evaluate_step(args, files, readings, scores, pictures, after=ensemble.name)
    return [*steps, infer, ensemble, report]


def evaluate_step(
    args: argparse.Namespace,
    files: Files,
    readings: tuple[str, ...],
    scores: list[Path],
    pictures: list[Path],
    *,
    after: str,
) -> Step:
    """The report on score tables of the held-out patients; pictures: the runs to show."""
    runs = [word for run in pictures for word in ("--run", str(run))]
    words = ("cxrdist", "evaluate", "--scores", *map(str, scores), "--csv", str(files.truth), *readings)
    words += ("--task", args.task, "--shards", str(files.shards), *runs, "--out", str(files.report))
    results = (files.report / "report.html", files.report / "metrics.json")
    name = "evaluate" if args.folds is None else "evaluate the ensemble"
    return Step(name=name, words=words, needs=(after,), results=results)


def hold_out(csv: Path, files: Files, task: Task, seed: int) -> None:
    """Split a label CSV by patient: the training CSV and the truth keep its text, the template is a sample submission
    in which the test images stand in shuffled order, as in the competition.
    """
    table = read_labels(csv, task)
    folds = assign_folds(Texts(table.about["patient"]), table.targets, NUM_FOLDS, seed)
    rows = pd.read_csv(csv, dtype=object, keep_default_na=False, encoding="utf-8-sig")
    files.train_csv.parent.mkdir(parents=True, exist_ok=True)
    rows[folds != 0].to_csv(files.train_csv, index=False)
    rows[folds == 0].to_csv(files.truth, index=False)
    names = rows.loc[folds == 0, task.columns.image].to_numpy(object)
    shuffled = np.random.default_rng(seed).permutation(names)
    pd.DataFrame({task.columns.image: shuffled} | dict.fromkeys(task.labels, 0.5)).to_csv(files.template, index=False)
    patients = table.about["patient"]
    print(
        f"{len(rows)} images of {patients.nunique()} patients: {len(rows) - len(names)} to train on, "
        f"{len(names)} of {patients[folds == 0].nunique()} patients held out"
    )


def folder_listing(folder: Path) -> str:
    """Names, sizes and times of a folder's files: what reuse depends on without reading every image."""
    entries = sorted((entry.name, entry.stat().st_size, entry.stat().st_mtime_ns) for entry in os.scandir(folder))
    return json.dumps(entries)


def summary(files: Files, task: Task, seconds: dict[str, tuple[float, bool]]) -> str:
    """Where everything lies, how long each step took, and the scores on the held-out patients."""
    lines = ["", "step                     seconds"]
    for name, (took, reused) in seconds.items():
        lines.append(f"{name:<24} {took:>7.0f}{'  (reused)' if reused else ''}")
    fresh = sum(took for took, reused in seconds.values() if not reused)
    lines += [f"{'this time':<24} {fresh:>7.0f}", ""]
    for split in ("train", "test"):
        meta = read_meta(files.shards, split)
        left_out = [f"{item.image_name} ({item.reason})" for item in meta.left_out]
        lines.append(f"{split} images: {meta.counts.images} used, {len(left_out)} left out {'; '.join(left_out)}")
    lines += ["", score_lines(files.report / "metrics.json", task), ""]
    fitted = files.weights.exists()
    if fitted:
        lines += [str(Fit.read(files.weights)), ""]
    for title, path in {
        "ensemble" if fitted else "submission": files.ensemble if fitted else files.prediction / "submission.csv",
        "report": files.report / "report.html",
        "scores": files.prediction / "scores",
        "models": files.runs,
        "shards": files.shards,
    }.items():
        lines.append(f"{title:<12} {path}")
    return "\n".join(lines)


def score_lines(metrics: Path, task: Task) -> str:
    """The macro AUROC of the ensemble and of each member on the held-out patients, from the evaluation's JSON."""
    lines = ["held-out patients        macro AUROC"]
    for score in json.loads(metrics.read_text())["scores"]:
        value = "undefined" if score["macro_auroc"] is None else f"{score['macro_auroc']:.3f}"
        lines.append(f"{score['name']:<24} {value:>11}  over {score['num_labels']} of {task.num_labels} labels")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(run_entry(main))
