"""Average score tables into a submission, in seconds: no images, no models.

  python -m cxrdist.ensemble --scores OUT/scores/*.csv --template sample_submission_2.csv --out submission.csv
  ... --weights 2 1                      weights in the order of the members
  ... --search-with FOLDS/*.csv --csv train2.csv     weights searched on out-of-fold tables of the same members

Tables of one member over disjoint images (its folds) are joined. A submission CSV is a table, too.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cxrdist.cli import Parser, add_flags, run_entry
from cxrdist.errors import UserError
from cxrdist.scoring.evaluation import match_labels
from cxrdist.scoring.metrics import macro_auroc
from cxrdist.scoring.submission import write_submission
from cxrdist.scoring.tables import (
    ScoreTable,
    average_studies,
    average_tables,
    join_parts,
    member_weights,
    read_table,
    search_weights,
    study_ids,
    task_of,
    write_table,
)
from cxrdist.shards.index import open_index
from cxrdist.tables import read_label_csv, read_template


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    tables = join_parts([read_table(path, args.task) for path in args.scores])
    weights = member_weights(tables, args.weights)
    if args.search_with:
        weights = searched_weights(args, tables)
    final = average_tables(tables, weights, args.average)
    if args.average_studies:
        final = average_studies(final, studies_of(args, final))
    for table, weight in zip(tables, weights, strict=True):
        print(f"{table.name:<16} weight {weight:.3g}")
    if args.template is None:
        write_table(args.out, final)
        print(f"score table: {args.out}, {len(final.image_names):,} images; with --template it is a submission")
        return
    fallback = write_submission(final, read_template(args.template, task_of(final, args.task)), args.out)
    note = f"; {len(fallback)} unreadable ones got the class means: {', '.join(fallback)}" if fallback else ""
    print(f"submission: {args.out}, {len(final.image_names) + len(fallback):,} images{note}")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m cxrdist.ensemble", description=__doc__)
    parser.add_argument("--scores", type=Path, nargs="+", required=True, metavar="FILE", help="score tables")
    parser.add_argument("--template", type=Path, metavar="FILE", help="sample submission (default: write a table)")
    parser.add_argument("--weights", type=float, nargs="+", metavar="W", help="of the members (default: as scored)")
    parser.add_argument("--average", choices=("prob", "logit", "rank"), default="prob", help="how members are averaged")
    parser.add_argument("--average-studies", action="store_true", help="give all images of a study their mean")
    about = "out-of-fold tables of the same members to search the weights on (needs --csv)"
    parser.add_argument("--search-with", type=Path, nargs="+", default=[], metavar="FILE", help=about)
    add_flags(
        parser,
        "--csv",
        "--out",
        "--shards",
        "--task",
        csv={"help": "label CSV of the images in --search-with"},
        out={"metavar": "FILE", "help": "what to write (default: submission.csv)"},
        shards={"help": "shard set that says the studies, for --average-studies (default: the images' names say them)"},
        task={"help": "task of the tables: a built-in one or a .toml or .json file (default: what they say)"},
    )
    args = parser.parse_args(argv)
    args.out = args.out or Path("submission.csv")
    if args.search_with and args.weights is not None:
        raise UserError("--weights and --search-with exclude each other: give the weights, or have them searched")
    if bool(args.search_with) != (args.csv is not None):
        raise UserError("--search-with and --csv go together: the weights are searched on tables with known labels")
    return args


def studies_of(args: argparse.Namespace, table: ScoreTable) -> Sequence[tuple[str, str] | None]:
    """The study of each image, from --shards or else from the images' names."""
    if args.shards is None:
        task = task_of(table, args.task)
        return [task.ids_in_name(name) for name in table.image_names]
    index = open_index(args.shards, table.meta.split or "test", args.task or table.meta.task)
    rows = index.rows_of(table.image_names)
    if (rows < 0).any():
        name = table.image_names[int((rows < 0).argmax())]
        raise UserError(f"{args.shards}: split {index.split!r} does not hold {name!r}, which was scored; other shards?")
    return study_ids(index.patients[rows], index.studies[rows])


def searched_weights(args: argparse.Namespace, tables: Sequence[ScoreTable]) -> list[float]:
    """Weights for `tables`, found on the out-of-fold tables of the members with the same names."""
    by_name = {table.name: table for table in join_parts([read_table(path, args.task) for path in args.search_with])}
    names = [table.name for table in tables]
    if sorted(names) != sorted(by_name):
        raise UserError(
            f"--search-with holds members {', '.join(by_name)}, --scores {', '.join(names)}; weights can be searched "
            "for the same members only"
        )
    folds = [by_name[name] for name in names]
    truth = match_labels(folds[0], read_label_csv(args.csv, task_of(folds[0], args.task)), str(args.csv))
    targets = truth.targets.astype(np.float64)
    weights = search_weights(folds, targets)
    equal = macro_auroc(targets, average_tables(folds, None, "prob").probs)[0]
    found = macro_auroc(targets, average_tables(folds, weights, "prob").probs)[0]
    print(
        f"weights searched on {len(targets):,} out-of-fold images: macro AUROC {found:.4f}, equal weights {equal:.4f} "
        "(the first is optimistic by the search)"
    )
    return weights


if __name__ == "__main__":
    raise SystemExit(run_entry(main))
