"""Average score tables into a submission: no images, no models. Its flags: `cxrdist.flags.ensemble`."""

import argparse
from collections.abc import Sequence

from cxrdist.cli import run_entry
from cxrdist.data.folds import assign_folds
from cxrdist.errors import UserError
from cxrdist.files import check_outputs, with_json, write_output
from cxrdist.flags.ensemble import parser
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
    args = parser().parse_args(argv)
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
