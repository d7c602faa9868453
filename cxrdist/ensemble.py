"""Average score tables into a submission, in seconds: no images, no models.

  python -m cxrdist.ensemble --scores OUT/scores/*.csv --template sample_submission_2.csv --out submission.csv
  ... --weights 2 1                      weights in the order of the members
  ... --search-with FOLDS/*.csv --csv train2.csv     weights searched on out-of-fold tables of the same members

Tables of one member over disjoint images (its folds) are joined. A submission CSV is a table, too.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from cxrdist.cli import Parser, add_flags, flag, run_entry
from cxrdist.errors import UserError
from cxrdist.files import check_outputs, with_json
from cxrdist.published import read_labels
from cxrdist.scoring import tables as score_tables
from cxrdist.scoring.evaluation import match_labels
from cxrdist.scoring.metrics import macro_auroc
from cxrdist.scoring.submission import unreadable_note, write_submission
from cxrdist.scoring.tables import ScoreTable, average_tables, read_members, task_of
from cxrdist.shards.index import open_index
from cxrdist.tables import read_template


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_out(args)
    tables, weights = read_members(args.scores, args.task, args.weights, allow_missing=args.allow_missing)
    if args.search_with:
        weights = searched_weights(args, tables)
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
        print(f"score table: {args.out}, {len(final.image_names):,} images{note}; with --template it is a submission")
        return
    template = read_template(args.template, task_of(final, args.task))
    fallback = write_submission(final, template, args.out, args.max_unreadable.of(len(template)))
    print(f"submission: {args.out}, {len(template):,} images{unreadable_note(fallback, ' (class means)')}")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m cxrdist.ensemble", description=__doc__)
    about = "out-of-fold tables of the same members to search the weights on (needs --csv)"
    parser.add_argument("--search-with", **flag(Path, "FILE", about, nargs="+") | {"default": []})
    add_flags(
        parser,
        *("--scores", "--template", "--weights", "--average", "--average-studies", "--csv", "--out", "--shards"),
        *("--task", "--max-unreadable", "--allow-missing"),
        template={"help": "sample submission (default: write a table)"},
        csv={"help": "label CSV of the images in --search-with"},
        out={"metavar": "FILE", "help": "what to write (default %(default)s)", "default": Path("submission.csv")},
        shards={"help": "shard set that says the studies, for --average-studies (default: the images' names say them)"},
        task={"help": "task of the tables: a built-in one or a .toml or .json file (default: what they say)"},
    )
    args = parser.parse_args(argv)
    if args.search_with and args.weights is not None:
        raise UserError("--weights and --search-with exclude each other: give the weights, or have them searched")
    if bool(args.search_with) != (args.csv is not None):
        raise UserError("--search-with and --csv go together: the weights are searched on tables with known labels")
    return args


def check_out(args: argparse.Namespace) -> None:
    """UserError where --out must not be written: over an input, or over what is not cxrdist's own."""
    if args.out.suffix == ".json":
        raise UserError(f"--out {args.out}: a table is CSV, with its JSON beside it; name it .csv")
    inputs = [*with_json([*args.scores, *args.search_with]), args.csv, args.template, args.shards]
    outputs = [args.out] if args.template else with_json([args.out])
    check_outputs(outputs, [path for path in inputs if path is not None])


def studies_of(args: argparse.Namespace, table: ScoreTable) -> Sequence[tuple[str, str] | None]:
    """The study of each image, from --shards or else from the images' names."""
    if args.shards is None:
        return list(map(task_of(table, args.task).ids_in_name, table.image_names))
    index = open_index(args.shards, table.meta.split or "test", args.task or table.meta.task)
    score_tables.check_shards(table, index.fingerprint, args.shards)
    rows = index.rows_of(table.image_names)
    if len(unknown := table.image_names[rows < 0]):
        raise UserError(f"{args.shards}: no {unknown[0]!r}, which was scored, in split {index.split!r}; other shards?")
    return score_tables.study_ids(index.patients[rows], index.studies[rows])


def searched_weights(args: argparse.Namespace, tables: Sequence[ScoreTable]) -> list[float]:
    """Weights for `tables`, found on the out-of-fold tables of the members with the same names."""
    by_name = {table.name: table for table in read_members(args.search_with, args.task)[0]}
    if sorted(names := [table.name for table in tables]) != sorted(by_name):
        both = f"--search-with holds members {', '.join(by_name)}, --scores {', '.join(names)}"
        raise UserError(f"{both}; weights can be searched for the same members only")
    folds = [by_name[name] for name in names]
    targets = match_labels(folds[0], read_labels(args.csv, task_of(folds[0], args.task)), args.csv).targets
    weights = score_tables.search_weights(folds, targets)
    found, equal = (macro_auroc(targets, average_tables(folds, way).probs)[0] for way in (weights, None))
    gain = f"macro AUROC {found:.4f}, equal weights {equal:.4f} (the first is optimistic by the search)"
    print(f"weights searched on {len(targets):,} out-of-fold images: {gain}")
    return weights


if __name__ == "__main__":
    raise SystemExit(run_entry(main))
