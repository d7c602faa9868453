"""Average score tables into a submission, in seconds: no images, no models.

  python -m cxrdist.ensemble --scores OUT/scores/*.csv --template sample_submission_2.csv --out submission.csv
  ... --weights 2 1                      weights in the order of the members
  ... --fit FOLDS/*.csv --shards shards/div_b      weights fitted on out-of-fold tables of the same members
  python -m cxrdist.ensemble --fit FOLDS/*.csv --csv train2.csv --out oof.csv      only that: their weighted average

Tables of one member over disjoint images (its folds) are joined. A submission CSV is a table, too.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from cxrdist.cli import Parser, add_flags, flag, run_entry
from cxrdist.data.folds import assign_folds
from cxrdist.errors import UserError
from cxrdist.files import check_outputs, with_json, write_output
from cxrdist.scoring import tables as score_tables
from cxrdist.scoring.evaluation import match_labels
from cxrdist.scoring.submission import unreadable_note, write_submission
from cxrdist.scoring.tables import ScoreTable, align, average_tables, read_members, task_of
from cxrdist.scoring.weights import Fit, fit
from cxrdist.shards.columns import Texts
from cxrdist.tables import read_template
from cxrdist.truth import open_scored, read_truth

NUM_FOLDS = 5  # of the patients, on which weights found on the others are scored


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_out(args)
    if args.fit:
        tables, fitted = fit_weights(args)
        weights = list(fitted.weights.values())
    if args.scores:
        tables, weights = read_members(args.scores, args.task, args.weights, allow_missing=args.allow_missing)
        if args.fit:
            weights = weights_for(tables, fitted)
    final = average_tables(tables, weights, args.average, allow_missing=args.allow_missing)
    if args.average_studies:
        final = score_tables.average_studies(final, studies_of(args, final))
    for table, weight in zip(tables, weights, strict=True):
        print(f"{table.name:<16} weight {weight:.3g}")
        if table.unsaid:
            print(f"note: {table.name} does not say its {', '.join(table.unsaid)}, so these were not compared")
    if args.template is None:
        score_tables.write_table(args.out, final)
        note = unreadable_note(final.meta.unreadable)
        more = "with --template it is a submission"
        if args.fit and not args.scores:
            more = "the weights were fitted on these images, so what they gain on others is what is said above"
        print(f"score table: {args.out}, {len(final.image_names):,} images{note}; {more}")
        return
    template = read_template(args.template, task_of(final, args.task))
    fallback = write_submission(final, template, args.out, args.max_unreadable.of(len(template)))
    print(f"submission: {args.out}, {len(template):,} images{unreadable_note(fallback, ' (class means)')}")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m cxrdist.ensemble", description=__doc__)
    about = "out-of-fold tables of the same members to fit the weights on (labels: --csv or --shards)"
    parser.add_argument("--fit", **flag(Path, "FILE", about, nargs="+") | {"default": []})
    add_flags(
        parser,
        *("--scores", "--template", "--weights", "--average", "--average-studies", "--csv", "--out", "--shards"),
        *("--task", "--max-unreadable", "--allow-missing", "--json"),
        scores={"required": False, "default": [], "help": "score tables to average (default: those of --fit)"},
        template={"help": "sample submission (default: write a table)"},
        csv={"help": "label CSV of the images in --fit"},
        json={"help": "also write the weights of --fit and their gain as JSON"},
        out={"metavar": "FILE", "help": "what to write (default %(default)s)", "default": Path("submission.csv")},
        shards={"help": "shard set that says the labels for --fit, and the studies (default: the images' names do)"},
        task={"help": "task of the tables: a built-in one or a .toml or .json file (default: what they say)"},
    )
    args = parser.parse_args(argv)
    if not args.fit and not args.scores:
        raise UserError("give --scores FILES to average, or --fit FILES to find weights on, or both")
    if args.fit and args.weights is not None:
        raise UserError("--weights and --fit exclude each other: give the weights, or have them found")
    if not args.fit and (args.csv is not None or args.json is not None):
        raise UserError("--csv and --json go with --fit: the labels that weights are fitted to, and what is found")
    if args.template is not None and not args.scores:
        raise UserError("--template goes with --scores: the tables of --fit are of training images")
    return args


def check_out(args: argparse.Namespace) -> None:
    """UserError where --out must not be written: over an input, or over what is not cxrdist's own."""
    if args.out.suffix == ".json":
        raise UserError(f"--out {args.out}: a table is CSV, with its JSON beside it; name it .csv")
    inputs = [*with_json([*args.scores, *args.fit]), args.csv, args.template, args.shards]
    outputs = [args.out] if args.template else with_json([args.out])
    outputs += [] if args.json is None else [args.json]
    check_outputs(outputs, [path for path in inputs if path is not None])


def studies_of(args: argparse.Namespace, table: ScoreTable) -> Sequence[tuple[str, str] | None]:
    """The study of each image, from --shards or else from the images' names."""
    if args.shards is None:
        return list(map(task_of(table, args.task).ids_in_name, table.image_names))
    index = open_scored(args.shards, [table], args.task or table.meta.task)
    rows = index.rows_of(table.image_names)
    if len(unknown := table.image_names[rows < 0]):
        raise UserError(f"{args.shards}: no {unknown[0]!r}, which was scored, in split {index.split!r}; other shards?")
    return score_tables.study_ids(index.patients[rows], index.studies[rows])


def fit_weights(args: argparse.Namespace) -> tuple[list[ScoreTable], Fit]:
    """The members' out-of-fold tables over the same images, and the weights that were found on them."""
    more = {"allow_missing": args.allow_missing}
    folds = align(read_members(args.fit, args.task, **more)[0], **more)
    truth = match_labels(folds[0], *read_truth(args.csv, args.shards, task_of(folds[0], args.task), folds))
    patients = Texts(truth.about["patient"])
    parts = assign_folds(patients, truth.targets, min(NUM_FOLDS, truth.about["patient"].nunique()), seed=0)
    fitted = fit(folds, truth.targets, truth.about["patient"], parts, args.average)
    print(fitted)
    if args.json is not None:
        write_output(args.json, fitted.to_json())
    return folds, fitted


def weights_for(tables: Sequence[ScoreTable], fitted: Fit) -> list[float]:
    """The weights of these tables' members; UserError where they are others than those that were fitted."""
    if sorted(names := [table.name for table in tables]) != sorted(fitted.weights):
        both = f"--fit holds members {', '.join(fitted.weights)}, --scores {', '.join(names)}"
        raise UserError(f"{both}; weights can be fitted for the same members only")
    return [fitted.weights[name] for name in names]


if __name__ == "__main__":
    raise SystemExit(run_entry(main))
