"""Compare score tables with labels: metrics.json, and report.html, one page that needs nothing else.

  python -m cxrdist.evaluate --scores OUT/scores/*.csv --csv labels.csv --out report
  ... --run runs/eva_x_b --run runs/chexfound_b --shards shards/div_b     adds loss curves, images and attention maps

Tables are averaged into an ensemble, which comes first. AUROC and average precision per label, intervals from resampled
patients, paired comparisons, calibration, subgroups by view, sex and age.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cxrdist import __version__
from cxrdist.augment.training import TrainingAugment
from cxrdist.augment.views import make_views, resize
from cxrdist.cli import Parser, add_flags
from cxrdist.data.loader import Loader
from cxrdist.errors import UserError, run_entry
from cxrdist.files import write_atomically
from cxrdist.labels import DIVISIONS, LABELS, read_label_csv
from cxrdist.models import CheXFound
from cxrdist.models.saliency import attention_maps, grad_cam
from cxrdist.recipes import Recipe
from cxrdist.report import figures as report
from cxrdist.report.figures import Overlay, Section, write_report
from cxrdist.runs.checkpoint import epoch_folders, load_member, read_recipe
from cxrdist.scoring.evaluation import Evaluation, evaluate, match_labels
from cxrdist.scoring.tables import ScoreTable, align, average_tables, join_parts, member_weights, read_table
from cxrdist.shards.index import ShardIndex, open_index

AVERAGES = {"prob": "probabilities", "logit": "logits", "rank": "ranks"}
NUM_EXAMPLES = 6  # images with attention maps
NUM_AUGMENTED = 4  # training images, each in as many epochs


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    tables = join_parts([read_table(path) for path in args.scores])
    weights = member_weights(tables, args.weights)
    if len(tables) > 1:
        combined = average_tables(tables, weights, args.average)
        tables = [combined, *in_order(combined, tables)]
    truth = match_labels(tables[0], read_label_csv(args.csv, blank=args.blank, uncertain=args.uncertain), str(args.csv))
    print(f"scoring {len(tables)} tables over {len(truth):,} images, {args.resamples:,} resamples", flush=True)
    result = evaluate(tables, truth, num_resamples=args.resamples)
    write_atomically(args.out / "metrics.json", json.dumps(result.to_json(), indent=1) + "\n")
    targets = truth[list(LABELS)].to_numpy(np.float64)
    sections = [
        report.summary_section(result, notes(tables)),
        report.label_section(result),
        report.roc_section(tables, targets, result),
        report.precision_section(tables, targets, result),
        report.calibration_section(tables, targets, result),
        report.comparison_section(result),
    ]
    if args.run:
        rows = {run.name: read_metrics(run) for run in args.run}
        sections.append(report.curves_section(rows, colours_of_runs(args.run, tables)))
    if args.shards is not None:
        sections += picture_sections(args, tables, targets, result)
    paths = {"scores": ", ".join(map(str, args.scores)), "labels": str(args.csv), "this report": str(args.out)}
    paths |= {f"run {run.name}": str(run) for run in args.run}
    paths |= {} if args.shards is None else {"shards": str(args.shards)}
    sections.append(report.files_section(paths, read_timings(args.timings)))
    write_report(args.out / "report.html", args.title, subtitle(tables[0], result), sections)
    print(scores_text(result))
    print(f"report: {args.out / 'report.html'}; numbers: {args.out / 'metrics.json'}")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m cxrdist.evaluate", description=__doc__)
    parser.add_argument(
        "--scores", type=Path, nargs="+", required=True, metavar="FILE", help="score tables, e.g. OUT/scores/*.csv"
    )
    add_flags(
        parser,
        "--csv",
        "--out",
        "--shards",
        csv={"required": True, "help": "label CSV of the scored images"},
        out={"help": "folder of the report (default: report)"},
    )
    parser.add_argument("--blank", choices=("error", "zero"), default="error", help="what a blank label means")
    parser.add_argument(
        "--uncertain", choices=("error", "zero", "one"), default="error", help="what label -1 means (default error)"
    )
    parser.add_argument(
        "--weights", type=float, nargs="+", metavar="W", help="weight of each member (default: as scored)"
    )
    parser.add_argument("--average", choices=("prob", "logit", "rank"), default="prob", help="how members are averaged")
    parser.add_argument(
        "--resamples", type=int, default=1000, metavar="N", help="bootstrap resamples of the patients (default 1000)"
    )
    parser.add_argument(
        "--run", type=Path, action="append", default=[], metavar="RUN", help="run folder of a member (repeatable)"
    )
    parser.add_argument(
        "--show", nargs="+", default=[], metavar="IMAGE", help="images for the attention maps (default: a choice)"
    )
    parser.add_argument("--div", choices=DIVISIONS, help="division of --shards (default: what the tables say)")
    parser.add_argument("--timings", type=Path, metavar="FILE", help='JSON {"step": seconds} to list in the report')
    parser.add_argument("--title", default="Chest X-ray findings: evaluation", help="of the report")
    args = parser.parse_args(argv)
    args.out = args.out or Path("report")
    if args.resamples < 1:
        raise UserError(f"--resamples {args.resamples} is not valid: use 1 or more")
    return args


def in_order(first: ScoreTable, tables: Sequence[ScoreTable]) -> list[ScoreTable]:
    """The tables with their rows in the order of `first`."""
    aligned = align([first, *tables])[1:]
    return [ScoreTable(first.image_names, probs, table.meta) for probs, table in zip(aligned, tables, strict=True)]


def notes(tables: Sequence[ScoreTable]) -> list[str]:
    """What a reader must know of the tables: averaging, images without a score, images that were trained on."""
    found = []
    if len(tables) > 1:
        members = [f"{item['member']} (weight {item['weight']:g})" for item in tables[0].meta["members"]]
        found.append(f"ensemble: {AVERAGES[tables[0].meta['average']]} averaged over {', '.join(members)}")
    for table in tables:
        checkpoints = table.meta.get("checkpoints", [])
        if checkpoints:
            views = sorted({view for item in checkpoints for view in item["views"]})
            sources = ", ".join(str(item["source"]) for item in checkpoints)
            found.append(f"{table.name}: {sources}; views {', '.join(views)}; {table.meta.get('precision', '')}")
    if tables[0].meta.get("split") == "train" and tables[0].meta.get("out_of_fold") is not True:
        found.append("These images may have been trained on: the scores say how well the models remember them.")
    if tables[0].unreadable:
        found.append(f"{len(tables[0].unreadable)} unreadable images have no score: {', '.join(tables[0].unreadable)}")
    return found


def colours_of_runs(runs: Sequence[Path], tables: Sequence[ScoreTable]) -> dict[str, str]:
    """The colour of each run's table, so that a member looks the same in every picture; others get the next ones."""
    sources = [[str(item["source"]) for item in table.meta.get("checkpoints", [])] for table in tables]
    colours = {}
    for number, run in enumerate(runs):
        places = [place for place, names in enumerate(sources) if any(name.startswith(f"{run}@") for name in names)]
        colours[run.name] = report.COLOURS[(places[0] if places else len(tables) + number) % len(report.COLOURS)]
    return colours


def subtitle(table: ScoreTable, result: Evaluation) -> str:
    where = f"division {table.meta['div']}, split {table.meta.get('split', '?')}; " if "div" in table.meta else ""
    return f"{where}{result.num_images:,} images of {result.num_patients:,} patients; cxrdist {__version__}"


def scores_text(result: Evaluation) -> str:
    """One line per table for the terminal."""
    lines = []
    for score in result.scores:
        low, high = score.macro_interval
        lines.append(
            f"{score.name:<12} macro AUROC {score.macro_auroc:.4f} (95 % {low:.4f} to {high:.4f}), "
            f"{score.num_labels} of {len(LABELS)} labels"
        )
    return "\n".join(lines)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl."""
    path = run / "metrics.jsonl"
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; --run takes a folder that cxrdist.train wrote") from None
    except ValueError:
        raise UserError(f"{path} is damaged; resume the run, which mends it, or leave --run out") from None


def read_timings(path: Path | None) -> dict[str, float]:
    if path is None:
        return {}
    try:
        return {str(name): float(seconds) for name, seconds in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f'--timings {path}: needs a JSON object {{"step": seconds}} ({error})') from None


def picture_sections(
    args: argparse.Namespace, tables: Sequence[ScoreTable], targets: NDArray[Any], result: Evaluation
) -> list[Section]:
    """Augmented training images, and attention maps of every run over a choice of scored images."""
    div, split = args.div or tables[0].meta.get("div"), tables[0].meta.get("split", "test")
    if div is None:
        raise UserError("the score tables do not say their division: give --div with --shards")
    sections = []
    recipes = [read_recipe(run) for run in args.run]
    if recipes and (args.shards / "train.json").is_file():
        sections.append(augmented_section(open_index(args.shards, "train", div), recipes[0]))
    index = open_index(args.shards, split, div)
    examples = choose_examples(args.show, tables[0], targets, result)
    row_of = {name: row for row, name in enumerate(index.image_names)}
    missing = [name for name, _ in examples if name not in row_of]
    if missing:
        raise UserError(f"{args.shards}: split {split!r} does not hold {missing[0]!r}, which was scored; other shards?")
    images = read_images(index, [row_of[name] for name, _ in examples])
    for run in args.run:
        sections.append(saliency_section(run, images, examples, tables[0]))
    return sections


def augmented_section(index: ShardIndex, recipe: Recipe) -> Section:
    rows = [int(row) for row in np.linspace(0, len(index) - 1, min(NUM_AUGMENTED, len(index)))]
    images = read_images(index, rows)
    augment = TrainingAugment(recipe.image_size, recipe.augment, recipe.seed, holes=recipe.holes)
    keys = index.keys[rows]
    plain = resize(images, recipe.image_size)
    stages = [plain, *(augment.levels(images, keys, epoch) for epoch in range(4))]
    pictures = [[_picture(stage[place]) for stage in stages] for place in range(len(rows))]
    names = [str(index.image_names[row]) for row in rows]
    titles = ["as stored", *(f"epoch {epoch + 1}" for epoch in range(4))]
    return report.images_section(list(zip(names, pictures, strict=True)), titles)


def choose_examples(
    asked: Sequence[str], table: ScoreTable, targets: NDArray[Any], result: Evaluation
) -> list[tuple[str, int]]:
    """(image, label) pairs: the images asked for with their highest-scored true label, else for each of the labels with
    the best AUROC its positive image with the highest score. Labels are not repeated, nor images.
    """
    row_of = {name: row for row, name in enumerate(table.image_names)}
    finding = np.array([label != "No Finding" for label in LABELS])
    if asked:
        unknown = [name for name in asked if name not in row_of]
        if unknown:
            raise UserError(f"--show {unknown[0]}: not among the scored images")
        scores = np.where((targets > 0) & finding, 1 + table.probs, table.probs)
        return [(name, int(np.argmax(scores[row_of[name]]))) for name in asked]
    auroc = np.where(finding, np.nan_to_num(np.array(result.scores[0].auroc), nan=-1.0), -1.0)
    examples: list[tuple[str, int]] = []
    for label in np.argsort(-auroc, kind="stable"):
        for row in np.argsort(-table.probs[:, label], kind="stable"):
            name = str(table.image_names[row])
            if targets[row, label] and auroc[label] >= 0 and name not in dict(examples):
                examples.append((name, int(label)))
                break
        if len(examples) == NUM_EXAMPLES:
            break
    return examples


def saliency_section(
    run: Path, images: torch.Tensor, examples: Sequence[tuple[str, int]], table: ScoreTable
) -> Section:
    epoch = int(epoch_folders(run)[0].name.removeprefix("epoch_")) if epoch_folders(run) else 0
    recipe, model = load_member(run, epoch)
    labels = np.array([label for _, label in examples], dtype=np.int64)
    _, inputs = next(make_views(images, ("plain",), recipe.image_size))
    row_of = {name: row for row, name in enumerate(table.image_names)}
    if isinstance(model, CheXFound):
        maps = attention_maps(model, inputs, labels)
        title = f"Attention of {run.name} (GLoRI)"
        about = "Where the finding's own query looks (mean over heads)."
    else:
        maps = grad_cam(model, inputs, labels)
        title = f"Grad-CAM of {run.name}"
        about = "Patches that raise the finding's score, on the tokens of the last block."
    overlays = [
        Overlay(
            image=_picture(image[:1]),
            heat=heat,
            title=LABELS[label],
            caption=f"{name.rsplit('.', 1)[0]}, score {table.probs[row_of[name], label]:.2f}",
        )
        for image, heat, (name, label) in zip(images, maps, examples, strict=True)
    ]
    note = " Images with the finding and a high ensemble score. A map shows what moved the score, not the disease."
    return report.attention_section(title, f"Epoch {epoch}. {about}{note}", overlays)


def read_images(index: ShardIndex, rows: Sequence[int]) -> torch.Tensor:
    """(B, C, 600, 600) uint8 of the given rows, on the CPU."""
    with Loader(index, "cpu", num_threads=1) as loader:
        return next(loader.batches([np.array(rows, dtype=np.int64)])).images


def _picture(levels: torch.Tensor) -> NDArray[np.uint8]:
    """(C, H, W) grey levels -> (H, W) uint8, or (H, W, 3) for colour."""
    pixels = levels.round().clamp(0, 255).to(torch.uint8).numpy() if levels.is_floating_point() else levels.numpy()
    return pixels[0] if len(pixels) == 1 else np.moveaxis(pixels, 0, 2)


if __name__ == "__main__":
    raise SystemExit(run_entry(main))
