"""Compare score tables with labels: metrics.json and report.html. Its flags: `cxrdist.flags.evaluate`."""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cxrdist import __version__
from cxrdist.cli import run_entry, with_readings
from cxrdist.data.loader import Loader
from cxrdist.documents import LogRow, read_json_lines
from cxrdist.errors import UserError
from cxrdist.external import evaluate_external
from cxrdist.files import check_outputs, read_bytes, with_json, write_output
from cxrdist.flags.evaluate import parser
from cxrdist.models.architecture import Maps
from cxrdist.recipes import ema_warning
from cxrdist.report import figures, saliency
from cxrdist.report.calibrated import points_section, reliability_section
from cxrdist.report.page import PRIVACY, Section, write_report
from cxrdist.runs.checkpoint import epochs_of
from cxrdist.runs.member import load_member, read_recipe
from cxrdist.scoring.evaluation import FEW_CASES, Evaluation, evaluate, match_labels
from cxrdist.scoring.operating import Calibration, OperatingPoint, identity_of, performance, read_calibration
from cxrdist.scoring.tables import ScoreTable, may_be_seen, read_members, task_of, with_ensemble
from cxrdist.shards.index import open_index
from cxrdist.terminal import MAX_FIRST, aligned, fitted, printable, width, with_interval
from cxrdist.truth import check_rows, open_scored, read_truth

SEEN = "These images may have been trained on"
DRAWN = ("step", "epoch", "loss", "epoch_loss", "validation/auroc_macro")  # numbers of a row of metrics.jsonl


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if args.external:
        evaluate_external(args)
        return
    inputs = [*with_json(args.scores), args.csv, args.shards, args.timings, args.calibration]
    outputs = [args.out / name for name in ("metrics.json", "report.html")]
    check_outputs(outputs, [path for path in inputs if path is not None], folder=args.out)
    more = {"allow_missing": args.allow_missing}
    tables, weights = read_members(args.scores, args.task, args.weights, **more)
    if len(tables) > 1:
        tables = with_ensemble(tables, weights, args.average, take_made=args.weights is None, **more)
    calibration = calibration_of(args.calibration, tables)
    task = with_readings(task_of(tables[0], args.task), args)
    labelled, source = read_truth(args.csv, args.shards, task, tables)
    unscored = check_rows(tables[0], labelled, source, allow_missing=args.allow_missing)
    truth = match_labels(tables[0], labelled, source)
    logged = {run: read_metrics(run) for run in args.run}
    timings = {} if args.timings is None else read_timings(args.timings)
    shown = args.shards is not None and args.run
    check_shown(args, tables[0])
    counted = "1 table" if len(tables) == 1 else f"{len(tables)} tables"
    print(f"scoring {counted} over {len(truth):,} images, {args.resamples:,} resamples", flush=True)
    result = evaluate(tables, truth, num_resamples=args.resamples)
    write_output(args.out / "metrics.json", json.dumps(result.to_json(), indent=1) + "\n")
    targets = truth.targets.astype(np.float64)
    patients = truth.about["patient"].to_numpy(object)
    points = [] if calibration is None else performance(calibration, tables[0].probs, targets, patients)
    for note in (told := notes(tables)):
        if note.startswith(SEEN):
            print(f"warning: {note}")
    images, pictures = read_pictures(args, tables, targets, result) if shown else ({}, [])
    private = [PRIVACY] if shown else []
    sections = [
        figures.summary_section(result, [*told, *unscored, *ema_notes(logged), *private]),
        figures.label_section(result, points),
        figures.panel_section(tables, targets, result, points, images),
        figures.calibration_section(tables, targets, result),
        *operating_sections(calibration, points, tables[0], targets),
        figures.comparison_section(result),
    ]
    if args.run:
        rows = {run.name: found for run, found in logged.items()}
        sections.append(figures.training_section(rows, colours_of_runs(args.run, tables)))
    sections += pictures
    paths = {
        "scores": ", ".join(map(str, args.scores)),
        "labels": str(args.csv or args.shards),
        "this report": str(args.out),
    }
    paths |= {f"run {run.name}": str(run) for run in args.run}
    paths |= {} if args.shards is None else {"shards": str(args.shards)}
    sections.append(figures.files_section(paths, timings))
    first = tables[0].meta
    where = "" if first.task is None else f"task {first.task.name}, split {first.split or '?'}; "
    about = f"{where}{result.num_images:,} images of {result.num_patients:,} patients; cxrdist {__version__}"
    write_report(args.out / "report.html", args.title, about, sections)
    print("\n".join(printed(result)))
    print(f"report: {args.out / 'report.html'}; numbers: {args.out / 'metrics.json'}")


def printed(result: Evaluation) -> Iterator[str]:
    """The first table by label, a star after those of few cases, and each table's macro."""
    first, rows = result.scores[0], []
    few_cases = result.few_cases()
    columns = result.labels, few_cases, result.positives, first.auroc, first.auroc_interval, first.average_precision
    for label, few, positives, auroc, ends, precision in zip(*columns, strict=True):
        if few:
            name = printable(label)
            label = f"{fitted(name, min(width(name), MAX_FIRST - 2))} *"
        cells = (*with_interval(auroc, ends), "none" if math.isnan(precision) else f"{precision:.4f}")
        rows.append((label, f"{positives:,.6g}", *cells))
    yield from aligned((f"label, by {first.name}", "positive", "AUROC", "95 % interval", "average precision"), rows)
    if any(few_cases):
        yield FEW_CASES
    yield ""
    columns_of_names = max(width(printable(score.name)) for score in result.scores)
    for score in result.scores:
        low, high = score.macro_interval
        counted = f"{score.num_labels} of {len(result.labels)} labels"
        name = fitted(printable(score.name), columns_of_names)
        yield f"{name}  macro AUROC {score.macro_auroc:.4f} (95 % {low:.4f} to {high:.4f}), {counted}"


def check_shown(args: argparse.Namespace, table: ScoreTable) -> None:
    """UserError, before anything is scored, for runs that have no epoch to show, or images that were not scored."""
    if args.show and not (args.run and args.shards is not None):
        raise UserError("--show draws images with a model's maps: give its --run and the --shards, too")
    if unknown := set(args.show) - {*table.image_names}:
        raise UserError(f"--show {min(unknown)}: not among the scored images, such as {table.image_names[0]}")
    if args.shards is not None and (empty := [run for run in args.run if not epochs_of(run)]):
        raise UserError(f"--run {empty[0]}: has no finished epoch to show; finish it, or leave it out")


def calibration_of(path: Path | None, tables: Sequence[ScoreTable]) -> Calibration | None:
    """What --calibration names; UserError where it was not fitted on the first table's members."""
    if path is None:
        return None
    given, first = read_calibration(path), tables[0].meta
    members = [table for table in tables if table.name in first.members] or [tables[0]]
    weights = [first.members.get(table.name, 1.0) for table in members]
    given.require(identity_of(members, weights, first.average), path)
    return given


def operating_sections(
    given: Calibration | None, points: Sequence[OperatingPoint], table: ScoreTable, targets: NDArray[np.float64]
) -> Iterator[Section]:
    """What a calibration makes of the table's probabilities, and what its thresholds do on these images."""
    if given is not None:
        yield reliability_section(targets, table.probs, given.apply(table.probs), given.task.labels)
        yield points_section(given, points)


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
            kinds = {"ema": " (EMA weights)", "raw": " (raw weights, not the EMA)", "": ""}
            sources = ", ".join(f"{item.source}{kinds[item.weights]}" for item in meta.checkpoints)
            found.append(f"{meta.member}: {sources}; views {views}; {meta.precision}")
    found += [
        f"{table.name}: the table does not say its {', '.join(table.unsaid)}, so these were not compared."
        for table in tables
        if table.unsaid
    ]
    behind = [table.meta for table in tables if table.meta.checkpoints] or [first]
    if any(map(may_be_seen, behind)):
        found.append(f"{SEEN}: the scores say how well the models remember them, not how good they are on others.")
    if first.unreadable:
        found.append(f"{len(first.unreadable)} unreadable images have no score: {', '.join(first.unreadable)}")
    return found


def ema_notes(logged: dict[Path, list[LogRow]]) -> list[str]:
    """A note for each run whose average is still much of its first weights."""
    warnings = {
        run.name: ema_warning(read_recipe(run), max((row["step"] for row in rows), default=0))
        for run, rows in logged.items()
        if (run / "recipe.json").is_file()
    }
    return [f"{name}: {warning}" for name, warning in warnings.items() if warning]


def colours_of_runs(runs: Sequence[Path], tables: Sequence[ScoreTable]) -> dict[str, int]:
    """The colour of each run's table, so that a member looks the same in every picture; others get the next ones."""
    sources = [(item.source, place) for place, table in enumerate(tables) for item in table.meta.checkpoints]
    return {
        run.name: next((place for source, place in sources if source.startswith(f"{run}@")), number)
        for number, run in enumerate(runs, start=len(tables))
    }


def read_metrics(run: Path) -> list[LogRow]:
    """The rows of a run's metrics.jsonl that can be drawn; how many are damaged is said."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"--run {run}: holds no {path.name}; give the folder of a run, as `cxrdist train` writes it")
    rows, num_bad = read_json_lines(path)
    good = [row for row in rows if isinstance(row.get("kind"), str) and all(map(_drawable, map(row.get, DRAWN)))]
    good = [row for row in good if row.get("step") and row.get("epoch")]
    if num_bad := num_bad + len(rows) - len(good):
        print(f"warning: {path}: {num_bad:,} damaged lines are left out", file=sys.stderr)
    return good


def _drawable(value: object) -> bool:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return -1e15 <= value <= 1e15
    return value is None


def read_timings(path: Path) -> dict[str, float]:
    try:
        return {str(name): float(seconds) for name, seconds in json.loads(read_bytes(path)).items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f'--timings {path}: needs a JSON object {{"step": seconds}} ({error})') from None


def read_pictures(
    args: argparse.Namespace, tables: Sequence[ScoreTable], targets: NDArray[np.float64], result: Evaluation
) -> tuple[dict[int, str], list[Section]]:
    """Each label's images with the first model's maps (HTML, by the label's place), and sections of images.

    The sections: augmented training images, and maps of every run over a choice of scored images.
    """
    table, sections = tables[0], []
    task = args.task or table.meta.task
    if (args.shards / "train.json").is_file():
        with Loader(open_index(args.shards, "train", task), num_threads=1) as loader:
            sections.append(saliency.augmented_section(loader, read_recipe(args.run[0])))
    examples = saliency.choose_examples(args.show, table, targets, result)
    confident = saliency.confident_examples(table, targets, figures.shown_labels(result))
    maps: dict[str, Maps] = {}
    abouts: dict[str, None] = {}
    images: dict[int, str] | None = None
    with Loader(open_scored(args.shards, tables, task), num_threads=1) as loader:
        stored = saliency.read_images(loader, saliency.rows_of(loader, examples)) if examples else None
        for run in args.run:
            member = load_member(run, max(epochs_of(run), default=0), backbone=args.backbone)
            kind = member.architecture
            if kind.saliency is None:
                continue
            title = f"{kind.saliency_title} of {run.name}@{member.meta.epoch}"
            abouts[f"{kind.saliency_title}: {kind.saliency_about}"] = None
            if member.from_random:
                abouts[f"{run.name}: {saliency.FROM_RANDOM}"] = None
            if stored is not None:
                maps[title] = saliency.maps_of(member, stored, examples)
            if images is None:
                print(f"maps of {len(confident)} images by {run.name}", flush=True)
                images = saliency.label_images(loader, confident, table.labels, member, title)
        if images is None:
            images = saliency.label_images(loader, confident, table.labels)
    if stored is not None and maps:
        sections.append(saliency.saliency_section(stored, examples, table.labels, maps, " ".join(abouts)))
    return images, sections


if __name__ == "__main__":
    raise SystemExit(run_entry(main))
