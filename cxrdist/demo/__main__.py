"""The whole job on a small division: images and labels -> shards -> two trained models -> submission and report.

  python -m cxrdist.demo                              draws its own division (chest X-ray phantoms)
  python -m cxrdist.demo --images DIR --csv FILE      takes yours; a fifth of the patients is held out

Every step is a command that you could type, and is printed before it runs. A finished step leaves a stamp; the same
command later reuses it, and an interrupted one goes on where it stopped.
"""

import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cxrdist.cli import Parser, add_flags
from cxrdist.data.folds import assign_folds
from cxrdist.demo.phantoms import write_division
from cxrdist.doctor import LaunchPlan, plan_launch
from cxrdist.errors import UserError, run_entry
from cxrdist.labels import LABELS, read_label_csv
from cxrdist.recipes import Recipe, recipe_for, to_json

NUM_PATIENTS = 250
NUM_FOLDS = 5  # one fold of the patients is the held-out test split
MEMBERS = {"eva_x": "demo_eva_x", "chexfound": "demo_chexfound"}
GRACE_S = 60  # a stopped training writes its checkpoint within this time


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command of the demo. `needs` names the steps whose results it reads; `inputs` are further files and texts."""

    name: str
    words: tuple[str, ...]  # the command as a person types it; empty for a step of the demo's own
    call: Callable[[], None] | None = None
    needs: tuple[str, ...] = ()
    inputs: tuple[Path | str, ...] = ()
    results: tuple[Path, ...]
    folder: Path | None = None  # what to remove when the step must begin anew; None: it overwrites its results
    resume: bool = False  # the command takes --resume when the same step was interrupted


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="./launch.sh demo", description=__doc__)
    add_flags(parser, "--div", "--images", "--csv", "--out", div={"required": False, "default": "b"})
    parser.add_argument("--blank", choices=("error", "zero"), default="error", help="what a blank label in --csv means")
    parser.add_argument(
        "--uncertain", choices=("error", "zero", "one"), default="error", help="what label -1 in --csv means"
    )
    parser.add_argument(
        "--patients", type=int, default=NUM_PATIENTS, metavar="N", help="phantom patients (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the phantoms and of the held-out split")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        dest="overrides",
        help="override a field of both demo recipes, e.g. --set epochs=2 --set member_epochs=1,2 for a look",
    )
    args = parser.parse_args(argv)
    if (args.images is None) != (args.csv is None):
        raise UserError("--images DIR and --csv FILE go together; without both the demo draws its own division")
    if args.patients < 2 * NUM_FOLDS:
        raise UserError(f"--patients {args.patients} is too few to hold some out; use at least {2 * NUM_FOLDS}")
    out: Path = args.out or Path("demo")
    check_input(args.images, args.csv, args.blank, args.uncertain)
    plan = plan_launch()
    print(f"cxrdist demo: results go to {out}/; {plan.reason}", flush=True)
    signal.signal(signal.SIGTERM, _interrupt)
    steps = make_steps(args, out, plan)
    seconds = run_steps(steps, out, plan.environment)
    print(summary(args.div, out, seconds))
    if args.images is not None:
        print("The demo's models start from random weights; real images need the official ones (README, 'Weights').")


def check_input(images: Path | None, csv: Path | None, blank: Any, uncertain: Any) -> None:
    """Raise UserError for input that the later steps would refuse, before anything is written."""
    if images is None or csv is None:
        return
    if not images.is_dir():
        raise UserError(f"--images {images}: no such folder; check the path")
    if not any(path.suffix.lower() in (".png", ".jpg", ".jpeg") for path in images.iterdir()):
        raise UserError(f"--images {images}: holds no .png, .jpg or .jpeg file; give the folder that holds the images")
    table = read_label_csv(csv, blank=blank, uncertain=uncertain)
    num_patients = table["patient"].nunique()
    if num_patients < 2 * NUM_FOLDS:
        raise UserError(
            f"--csv {csv}: {num_patients} patients are too few to hold some out; use {2 * NUM_FOLDS} or more"
        )


def make_steps(args: Any, out: Path, plan: LaunchPlan) -> list[Step]:
    """The demo's steps in order; paths are spelt as the user would type them."""
    div: str = args.div
    division, shards = out / "division", out / "shards" / f"div_{div}"
    real = args.images is not None
    images, csv = (args.images, args.csv) if real else (division / "images", division / "labels.csv")
    train_csv, template, truth = (division / name for name in ("train.csv", "sample_submission.csv", "test_labels.csv"))
    readings = ("--blank", args.blank) * (args.blank != "error") + ("--uncertain", args.uncertain) * (
        args.uncertain != "error"
    )
    launch = ("accelerate", "launch", "--config_file", plan.config, "--num_processes", str(plan.num_processes), "-m")
    common = ("--div", div, "--shards", str(shards), "--expect-processes", str(plan.num_processes))
    settings = tuple(word for text in args.overrides for word in ("--set", text))
    python = ("python", "-m")
    steps = []
    if not real:

        def draw() -> None:
            count = write_division(images, csv, num_patients=args.patients, seed=args.seed)
            print(f"{count} phantom images of {args.patients} patients in {images}")

        steps.append(
            Step(
                name="draw the phantoms",
                words=(),
                call=draw,
                inputs=(f"patients {args.patients} seed {args.seed}",),
                results=(csv,),
                folder=images,
            )
        )

    def split() -> None:
        hold_out(csv, train_csv, template, truth, seed=args.seed, blank=args.blank, uncertain=args.uncertain)

    steps.append(
        Step(
            name="hold out patients",
            words=(),
            call=split,
            needs=tuple(step.name for step in steps),
            inputs=(*((csv,) if real else ()), f"seed {args.seed}", " ".join(readings)),
            results=(train_csv, template, truth),
        )
    )
    for name, file, flags in (("train", train_csv, readings), ("test", template, ())):
        source = ("--images", str(images), "--csv", str(file), "--out", str(shards), "--split", name)
        steps.append(
            Step(
                name=f"preprocess {name}",
                words=(*python, "cxrdist.preprocess", "--div", div, *source, *flags, "--overwrite"),
                needs=("hold out patients",),
                inputs=(folder_listing(images),) if real else (),
                results=(shards / f"{name}.json",),
            )
        )
    steps.append(
        Step(
            name="verify the shards",
            words=(*python, "cxrdist.verify", "--div", div, "--shards", str(shards), "--hashes"),
            needs=("preprocess train", "preprocess test"),
            results=(),
        )
    )
    members: list[str] = []
    pictures: list[str] = []
    for member, model in MEMBERS.items():
        recipe = recipe_with(model, div, args.overrides)
        run = out / "runs" / f"{model}_{div}"
        epochs = ",".join(str(epoch) for epoch in recipe.member_epochs)
        pictures += ["--run", str(run)]
        members += ["--member", f"{member}={run}@{epochs}:tta"]
        words = ("cxrdist.train", *common, "--model", model, "--out", str(run), "--init", "random", *settings)
        steps.append(
            Step(
                name=f"train {member}",
                words=(*launch, *words),
                needs=("preprocess train",),
                inputs=(to_json(recipe),),
                results=tuple(
                    run / "checkpoints" / f"epoch_{epoch:02d}" / "manifest.json" for epoch in recipe.member_epochs
                ),
                folder=run,
                resume=True,
            )
        )
    prediction = out / "prediction"
    tables = [prediction / "scores" / f"{member}.csv" for member in MEMBERS]
    words = ("cxrdist.infer", *common, *members, "--template", str(template), "--out", str(prediction))
    steps.append(
        Step(
            name="infer",
            words=(*launch, *words),
            needs=("preprocess test", *(f"train {member}" for member in MEMBERS)),
            results=(prediction / "submission.csv", *tables),
            folder=prediction,
        )
    )
    report = out / "report"
    words = ("cxrdist.evaluate", "--scores", *map(str, tables), "--csv", str(truth), *readings)
    words += ("--shards", str(shards), "--div", div, *pictures, "--out", str(report))
    steps.append(
        Step(
            name="evaluate",
            words=(*python, *words),
            needs=("infer",),
            results=(report / "report.html", report / "metrics.json"),
        )
    )
    return steps


def recipe_with(model: str, div: str, overrides: list[str]) -> Recipe:
    """The demo recipe with the user's overrides."""
    from cxrdist.recipes import with_overrides

    return with_overrides(recipe_for(model, div), overrides)


def hold_out(csv: Path, train_csv: Path, template: Path, truth: Path, *, seed: int, blank: Any, uncertain: Any) -> None:
    """Split a label CSV by patient: `train_csv` and `truth` keep its text, `template` is a sample submission in which
    the test images stand in shuffled order, as in the competition.
    """
    table = read_label_csv(csv, blank=blank, uncertain=uncertain)
    targets = table[list(LABELS)].to_numpy(np.float32)
    folds = assign_folds(table["patient"].to_numpy(object), targets, NUM_FOLDS, seed)
    rows = pd.read_csv(csv, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    train_csv.parent.mkdir(parents=True, exist_ok=True)
    rows[folds != 0].to_csv(train_csv, index=False)
    rows[folds == 0].to_csv(truth, index=False)
    names = rows.loc[folds == 0, "Image_name"].to_numpy(object)
    shuffled = np.random.default_rng(seed).permutation(names)
    pd.DataFrame({"Image_name": shuffled} | dict.fromkeys(LABELS, 0.5)).to_csv(template, index=False)
    num_test = table.loc[folds == 0, "patient"].nunique()
    print(
        f"{len(rows)} images of {table['patient'].nunique()} patients: {len(rows) - len(names)} to train on, "
        f"{len(names)} of {num_test} patients held out"
    )


def folder_listing(folder: Path) -> str:
    """Names, sizes and times of a folder's files: what reuse depends on without reading every image."""
    entries = sorted((entry.name, entry.stat().st_size, entry.stat().st_mtime_ns) for entry in os.scandir(folder))
    return json.dumps(entries)


def run_steps(steps: list[Step], out: Path, environment: dict[str, str]) -> dict[str, tuple[float, bool]]:
    """Run what is not finished yet; returns step -> (seconds it took, reused). Raises UserError for a failed command.

    A step's stamp holds a hash of its command, its inputs and when the steps that it needs were finished, so whatever
    changes or is done again repeats everything that depends on it, and nothing else.
    """
    stamps = out / "steps"
    stamps.mkdir(parents=True, exist_ok=True)
    finished: dict[str, int] = {}
    seconds: dict[str, tuple[float, bool]] = {}
    for number, step in enumerate(steps, 1):
        contents = [path_hash(item) if isinstance(item, Path) else item for item in step.inputs]
        identity = json.dumps([step.name, step.words, contents, [finished[need] for need in step.needs]])
        key = hashlib.sha256(identity.encode()).hexdigest()
        stamp = stamps / f"{step.name.replace(' ', '_')}.json"
        before = read_stamp(stamp)
        title = f"[{number}/{len(steps)}] {step.name}"
        same = before.get("key") == key
        if same and before["finished"] and all(path.exists() for path in step.results):
            print(f"{title}: finished before in {before['seconds']:.0f} s, reused", flush=True)
            seconds[step.name] = (before["seconds"], True)
            finished[step.name] = before["finished"]
            continue
        words = list(step.words)
        spent = 0.0
        if same and not before["finished"]:
            print(f"{title}: interrupted before, goes on", flush=True)
            words += ["--resume"] if step.resume and step.folder is not None and step.folder.exists() else []
            spent = before["seconds"]
        else:
            print(title, flush=True)
            if step.folder is not None and step.folder.exists():
                print(f"  {step.folder} is of another input or command: it is made anew", flush=True)
                shutil.rmtree(step.folder)
        begun = time.monotonic()
        write_stamp(stamp, key, words, spent, finished=0)
        try:
            if step.call is not None:
                step.call()
            else:
                run_command(step.name, words, environment)
        except BaseException:
            write_stamp(stamp, key, words, spent + time.monotonic() - begun, finished=0)
            raise
        missing = [str(path) for path in step.results if not path.exists()]
        if missing:
            raise UserError(f"step {step.name!r} ended well but did not write {', '.join(missing)}")
        took = spent + time.monotonic() - begun
        finished[step.name] = time.time_ns()
        write_stamp(stamp, key, words, took, finished=finished[step.name])
        seconds[step.name] = (took, False)
    return seconds


def path_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_stamp(path: Path) -> dict[str, Any]:
    """The stamp at `path`; empty when there is none or it is not whole."""
    try:
        stamp = json.loads(path.read_text())
        return stamp if {"key", "finished", "seconds"} <= set(stamp) else {}
    except (OSError, ValueError, TypeError):
        return {}


def write_stamp(path: Path, key: str, words: list[str], seconds: float, *, finished: int) -> None:
    """Note a step as begun (finished 0) or as finished at a time in ns."""
    stamp = {"key": key, "finished": finished, "seconds": round(seconds, 1), "command": shlex.join(words)}
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(stamp, indent=1))
    os.replace(part, path)


def run_command(name: str, words: list[str], environment: dict[str, str]) -> None:
    """Run one command with this Python; its output and bars pass through. Raises UserError when it fails."""
    print(f"  $ {shlex.join(words)}", flush=True)
    program = {"python": [sys.executable], "accelerate": [sys.executable, "-m", "accelerate.commands.accelerate_cli"]}
    process = subprocess.Popen([*program[words[0]], *words[1:]], env=os.environ | environment)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        print(f"\nstopping {name!r}: it saves what it has", file=sys.stderr, flush=True)
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
        raise
    if code != 0:
        raise UserError(f"step {name!r} ended with exit code {code}: see its message above; then run the demo again")


def _interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt


def summary(div: str, out: Path, seconds: dict[str, tuple[float, bool]]) -> str:
    """Where everything lies, how long each step took, and the scores on the held-out patients."""
    lines = ["", "step                     seconds"]
    for name, (took, reused) in seconds.items():
        lines.append(f"{name:<24} {took:>7.0f}{'  (reused)' if reused else ''}")
    fresh = sum(took for took, reused in seconds.values() if not reused)
    lines += [f"{'this time':<24} {fresh:>7.0f}", ""]
    for split in ("train", "test"):
        meta = json.loads((out / "shards" / f"div_{div}" / f"{split}.json").read_text())
        left_out = [f"{item['image_name']} ({item['reason']})" for item in meta["left_out"]]
        lines.append(f"{split} images: {meta['counts']['images']} used, {len(left_out)} left out {'; '.join(left_out)}")
    lines += ["", score_lines(out / "report" / "metrics.json"), ""]
    for title, path in {
        "submission": out / "prediction" / "submission.csv",
        "report": out / "report" / "report.html",
        "scores": out / "prediction" / "scores",
        "models": out / "runs",
        "shards": out / "shards" / f"div_{div}",
    }.items():
        lines.append(f"{title:<12} {path}")
    return "\n".join(lines)


def score_lines(metrics: Path) -> str:
    """The macro AUROC of the ensemble and of each member on the held-out patients, from the evaluation's JSON."""
    lines = ["held-out patients        macro AUROC"]
    for score in json.loads(metrics.read_text())["scores"]:
        value = "undefined" if score["macro_auroc"] is None else f"{score['macro_auroc']:.3f}"
        lines.append(f"{score['name']:<24} {value:>11}  over {score['num_labels']} of {len(LABELS)} labels")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(run_entry(main))
