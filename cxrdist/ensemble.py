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

from cxrdist.cli import Parser, add_flags
from cxrdist.errors import UserError, run_entry
from cxrdist.labels import LABELS, read_label_csv, read_template
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
    write_table,
)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    tables = join_parts([read_table(path) for path in args.scores])
    weights = member_weights(tables, args.weights)
    if args.search_with:
        weights = searched_weights(args, tables)
    final = average_tables(tables, weights, args.average)
    if args.average_studies:
        final = average_studies(final)
    for table, weight in zip(tables, weights, strict=True):
        print(f"{table.name:<16} weight {weight:.3g}")
    if args.template is None:
        write_table(args.out, final)
        print(f"score table: {args.out}, {len(final.image_names):,} images; with --template it is a submission")
        return
    fallback = write_submission(final, read_template(args.template), args.out)
    note = f"; {len(fallback)} unreadable ones got the class means: {', '.join(fallback)}" if fallback else ""
    print(f"submission: {args.out}, {len(final.image_names) + len(fallback):,} images{note}")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m cxrdist.ensemble", description=__doc__)
    parser.add_argument("--scores", type=Path, nargs="+", required=True, metavar="FILE", help="score tables")
    parser.add_argument(
        "--template", type=Path, metavar="FILE", help="sample submission; without it a table is written"
    )
    parser.add_argument(
        "--weights", type=float, nargs="+", metavar="W", help="weight of each member (default: as scored)"
    )
    parser.add_argument(
        "--average",
        choices=("prob", "logit", "rank"),
        default="prob",
        help="average probabilities (default, as published), logits or ranks",
    )
    parser.add_argument("--average-studies", action="store_true", help="give all images of a study their mean")
    parser.add_argument(
        "--search-with",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="out-of-fold tables of the same members to search the weights on (needs --csv)",
    )
    add_flags(
        parser,
        "--csv",
        "--out",
        csv={"help": "label CSV of the images in --search-with"},
        out={"metavar": "FILE", "help": "what to write (default: submission.csv)"},
    )
    args = parser.parse_args(argv)
    args.out = args.out or Path("submission.csv")
    if args.search_with and args.weights is not None:
        raise UserError("--weights and --search-with exclude each other: give the weights, or have them searched")
    if bool(args.search_with) != (args.csv is not None):
        raise UserError("--search-with and --csv go together: the weights are searched on tables with known labels")
    return args


def searched_weights(args: argparse.Namespace, tables: Sequence[ScoreTable]) -> list[float]:
    """Weights for `tables`, found on the out-of-fold tables of the members with the same names."""
    by_name = {table.name: table for table in join_parts([read_table(path) for path in args.search_with])}
    names = [table.name for table in tables]
    if sorted(names) != sorted(by_name):
        raise UserError(
            f"--search-with holds members {', '.join(by_name)}, --scores {', '.join(names)}; weights can be searched "
            "for the same members only"
        )
    folds = [by_name[name] for name in names]
    targets = match_labels(folds[0], read_label_csv(args.csv), str(args.csv))[list(LABELS)].to_numpy(np.float64)
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
