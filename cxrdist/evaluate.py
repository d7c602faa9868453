"""Compare score tables with labels: metrics.json, and report.html, one self-contained page.

  python -m cxrdist.evaluate --scores OUT/scores/*.csv --csv labels.csv --out report
  ... --run runs/eva_x_b --run runs/chexfound_b --shards shards/div_b     adds loss curves, images and saliency maps

Tables are averaged into an ensemble, which comes first. AUROC and average precision per label, intervals from resampled
patients, paired comparisons, calibration, subgroups by view, sex and age.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cxrdist import __version__
from cxrdist.cli import Parser, add_flags, at_least, flag, run_entry, with_readings
from cxrdist.data.loader import Loader
from cxrdist.errors import UserError
from cxrdist.files import write_atomically
from cxrdist.published import read_labels
from cxrdist.report import figures, saliency
from cxrdist.report.page import Section, write_report
from cxrdist.runs.checkpoint import epochs_of
from cxrdist.runs.member import load_member, read_recipe
from cxrdist.scoring.evaluation import Evaluation, evaluate, match_labels
from cxrdist.scoring.tables import ScoreTable, align, average_tables, read_members, task_of
from cxrdist.shards.index import open_index
from cxrdist.tables import LabelTable
from cxrdist.task import Task


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    tables, weights = read_members(args.scores, args.task, args.weights)
    if len(tables) > 1:
        tables = [average_tables(tables, weights, args.average), *align(tables)]
    task = with_readings(task_of(tables[0], args.task), args)
    truth = match_labels(tables[0], *read_truth(args, task, tables[0].meta.split or "test"))
    print(f"scoring {len(tables)} tables over {len(truth):,} images, {args.resamples:,} resamples", flush=True)
    result = evaluate(tables, truth, num_resamples=args.resamples)
    write_atomically(args.out / "metrics.json", json.dumps(result.to_json(), indent=1) + "\n")
    targets = truth.targets.astype(np.float64)
    sections = [
        figures.summary_section(result, notes(tables)),
        figures.label_section(result),
        *(figures.curves_section(kind, tables, targets, result) for kind in (figures.ROC, figures.PRECISION)),
        figures.calibration_section(tables, targets, result),
        figures.comparison_section(result),
    ]
    if args.run:
        rows = {run.name: read_metrics(run) for run in args.run}
        sections.append(figures.training_section(rows, colours_of_runs(args.run, tables)))
    if args.shards is not None:
        sections += picture_sections(args, tables[0], targets, result)
    paths = {
        "scores": ", ".join(map(str, args.scores)),
        "labels": str(args.csv or args.shards),
        "this report": str(args.out),
    }
    paths |= {f"run {run.name}": str(run) for run in args.run}
    paths |= {} if args.shards is None else {"shards": str(args.shards)}
    sections.append(figures.files_section(paths, {} if args.timings is None else read_timings(args.timings)))
    first = tables[0].meta
    where = "" if first.task is None else f"task {first.task.name}, split {first.split or '?'}; "
    about = f"{where}{result.num_images:,} images of {result.num_patients:,} patients; cxrdist {__version__}"
    write_report(args.out / "report.html", args.title, about, sections)
    for score in result.scores:
        low, high = score.macro_interval
        counted = f"{score.num_labels} of {len(result.labels)} labels"
        print(f"{score.name:<12} macro AUROC {score.macro_auroc:.4f} (95 % {low:.4f} to {high:.4f}), {counted}")
    print(f"report: {args.out / 'report.html'}; numbers: {args.out / 'metrics.json'}")


def read_truth(args: argparse.Namespace, task: Task, split: str) -> tuple[LabelTable, Path]:
    """The labels of --csv, or else those in the shard set, and where they are from."""
    if args.csv is not None:
        truth = read_labels(args.csv, task)
        print("".join(f"{note}\n" for note in truth.notes), end="")
        return truth, args.csv
    if args.shards is None:
        raise UserError("give --csv FILE with the labels of the scored images, or --shards DIR that holds them")
    index = open_index(args.shards, split, task)
    if index.targets is None:
        raise UserError(f"{args.shards}: split {split!r} has no labels; give --csv FILE")
    return LabelTable(index.about(), index.targets), args.shards


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m cxrdist.evaluate", description=__doc__)
    add_flags(
        parser,
        *("--scores", "--csv", "--out", "--shards", "--task", "--blank", "--uncertain", "--weights", "--average"),
        csv={"help": "label table of the scored images (default: the labels in --shards)"},
        out={"help": "folder of the report (default %(default)s)", "default": Path("report")},
        shards={"help": "shard set of the scored images, for pictures (default: none)"},
        task={"help": "task of the label CSV: a built-in one or a .toml or .json file (default: the tables' own)"},
    )
    add = parser.add_argument
    add("--resamples", **flag(at_least(1), "N", "bootstrap resamples of the patients", default=1000))
    add("--run", **flag(Path, "RUN", "run folder of a member (repeatable)", action="append") | {"default": []})
    add("--show", **flag(str, "IMAGE", "images for the maps (default: a choice)", nargs="+") | {"default": []})
    add("--timings", **flag(Path, "FILE", 'JSON {"step": seconds} to list in the report'))
    add("--title", **flag(str, "TEXT", "of the report", default="Chest X-ray findings: evaluation"))
    return parser.parse_args(argv)


def notes(tables: Sequence[ScoreTable]) -> list[str]:
    """What a reader must know of the tables: averaging, images without a score, images that were trained on."""
    found, first = [], tables[0].meta
    if len(tables) > 1:
        members = [f"{name} (weight {weight:g})" for name, weight in first.members.items()]
        averaged = {"prob": "probabilities", "logit": "logits", "rank": "ranks"}[first.average]
        found.append(f"ensemble: {averaged} averaged over {', '.join(members)}")
    for meta in (table.meta for table in tables):
        if meta.checkpoints:
            views = ", ".join(sorted({view for item in meta.checkpoints for view in item.views}))
            sources = ", ".join(item.source for item in meta.checkpoints)
            found.append(f"{meta.member}: {sources}; views {views}; {meta.precision}")
        elif meta.task is None and not meta.members:
            found.append(f"{meta.member}: the table does not say its task, split, shards and models.")
    if first.split == "train" and not first.out_of_fold:
        found.append("These images may have been trained on: the scores say how well the models remember them.")
    if first.unreadable:
        found.append(f"{len(first.unreadable)} unreadable images have no score: {', '.join(first.unreadable)}")
    return found


def colours_of_runs(runs: Sequence[Path], tables: Sequence[ScoreTable]) -> dict[str, str]:
    """The colour of each run's table, so that a member looks the same in every picture; others get the next ones."""
    sources = [(item.source, place) for place, table in enumerate(tables) for item in table.meta.checkpoints]
    colours = {}
    for number, run in enumerate(runs, start=len(tables)):
        place = next((place for source, place in sources if source.startswith(f"{run}@")), number)
        colours[run.name] = figures.COLOURS[place % len(figures.COLOURS)]
    return colours


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl."""
    path = run / "metrics.jsonl"
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; --run takes a folder that cxrdist.train wrote") from None
    except ValueError:
        raise UserError(f"{path} is damaged; resume the run, which repairs it, or leave --run out") from None


def read_timings(path: Path) -> dict[str, float]:
    try:
        return {str(name): float(seconds) for name, seconds in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f'--timings {path}: needs a JSON object {{"step": seconds}} ({error})') from None


def picture_sections(
    args: argparse.Namespace, table: ScoreTable, targets: NDArray[np.float64], result: Evaluation
) -> Iterator[Section]:
    """Augmented training images, and maps of every run over a choice of scored images."""
    task, split = args.task or table.meta.task, table.meta.split or "test"
    if args.run and (args.shards / "train.json").is_file():
        with Loader(open_index(args.shards, "train", task), num_threads=1) as loader:
            yield saliency.augmented_section(loader, read_recipe(args.run[0]))
    index = open_index(args.shards, split, task)
    examples = saliency.choose_examples(args.show, table, targets, result)
    names = np.array([example.image_name for example in examples], dtype=object)
    rows = index.rows_of(names)
    if len(unknown := names[rows < 0]):
        raise UserError(f"{args.shards}: no {unknown[0]!r}, which was scored, in split {split!r}; other shards?")
    if not examples:
        return
    with Loader(index, num_threads=1) as loader:
        images = saliency.read_images(loader, rows)
    for run in args.run:
        member = load_member(run, max(epochs_of(run), default=0))
        if member.architecture.saliency is not None:
            name, size = f"{run.name}@{member.meta.epoch}", member.recipe.image_size
            shown = (size, images, examples, table.labels)
            yield saliency.saliency_section(name, member.architecture, member.model, *shown)


if __name__ == "__main__":
    raise SystemExit(run_entry(main))
