"""Average score tables into a submission, in seconds: no images, no models.

  cxrdist ensemble --scores OUT/scores/*.csv --template sample_submission_2.csv --out submission.csv
  ... --weights 2 1                      weights in the order of the members
  ... --fit FOLDS/*.csv --shards shards/div_b      weights fitted on out-of-fold tables of the same members
  cxrdist ensemble --fit FOLDS/*.csv --csv train2.csv --out oof.csv      only that: their weighted average

Tables of one member over disjoint images (its folds) are joined. A submission CSV is a table, too.
"""

import argparse
from pathlib import Path

from cxrdist.cli import Parser, add_flags, flag
from cxrdist.errors import UserError


def parser() -> Parser:
    flags = Parser(prog="cxrdist ensemble", description=__doc__, check=check)
    about = "out-of-fold tables of the same members to fit the weights on (labels: --csv or --shards)"
    flags.add_argument("--fit", **flag(Path, "FILE", about, nargs="+") | {"default": []})
    add_flags(
        flags,
        *("--scores", "--template", "--weights", "--average", "--average-studies", "--csv", "--out", "--shards"),
        *("--task", "--max-unreadable", "--allow-missing", "--json"),
        scores={"required": False, "default": [], "help": "score tables to average (default: those of --fit)"},
        template={"help": "sample submission (default: write a table)"},
        csv={"help": "label table of the images in --fit (default: the labels in --shards)"},
        max_unreadable={"help": "stop when more images of the template have no score (default 1%%)"},
        json={"help": "also write the weights of --fit and their gain as JSON"},
        out={"metavar": "FILE", "help": "what to write (default %(default)s)", "default": Path("submission.csv")},
        shards={"help": "shard set that says the labels for --fit, and the studies (default: the images' names do)"},
        task={"help": "task of the tables: a built-in one or a .toml or .json file (default: what they say)"},
    )
    return flags


def check(args: argparse.Namespace) -> None:
    if not args.fit and not args.scores:
        raise UserError("give --scores FILES to average, or --fit FILES to find weights on, or both")
    if args.fit and args.weights is not None:
        raise UserError("--weights and --fit exclude each other: give the weights, or have them found")
    if not args.fit and (args.csv is not None or args.json is not None):
        raise UserError("--csv and --json go with --fit: the labels that weights are fitted to, and what is found")
    if args.template is not None and not args.scores:
        raise UserError("--template goes with --scores: the tables of --fit are of training images")
