"""Score a shard set with trained members and average them into a submission.

  accelerate launch -m cxrdist.infer --task b --member eva_x=runs/eva_x_b@5,6:tta --member chexfound=runs/chexfound_b

A member is NAME=RUN@EPOCHS[:tta|:plain][*WEIGHT], or NAME=FILE for a weight file (the published ones too), which is
scored as the published recipe of its architecture says, or as another one: NAME=FILE#eva_x_224:tta. A NAME given
twice averages its runs, e.g. folds. Writes OUT/scores/NAME.csv (with JSON) and OUT/submission.csv. Every image is
decoded once, equal views and shared frozen backbones run once. A killed run resumes where it stopped.
--external scores shards of another task than the models', for `cxrdist evaluate --external`.
"""

import argparse

from cxrdist.cli import STREAMING, Parser, add_flags, at_least, flag, task_type
from cxrdist.errors import UserError


def parser() -> Parser:
    flags = Parser(prog="cxrdist infer", description=__doc__, check=check)
    member = (
        "whose scores (repeatable); also NAME=FILE[#RECIPE] (default: the published recipe of its architecture); "
        "default: runs/eva_x_<task> and runs/chexfound_<task>, as their recipes say"
    )
    flags.add_argument("--member", **flag(str, "NAME=RUN@5,6[:tta]", member, action="append") | {"default": []})
    flags.add_argument("--split", **flag(str, "NAME", "what to score", default="test"))
    fold = "with --split train: only patients of this fold of the runs"
    flags.add_argument("--fold", **flag(at_least(0), "K", fold))
    add_flags(
        flags,
        *("--task", "--shards", *STREAMING, "--out", "--template", "--average", "--average-studies"),
        *("--backbone", "--device-batch-size", "--precision", "--compile", "--expect-processes", "--dry-run"),
        *("--max-unreadable", "--checkpoint-minutes", "--timeout-s"),
        out={"help": "where to write (default: predictions/<task>, of a and b predictions/div_<task>)"},
        template={"help": "sample submission (default: the shards' order)"},
        checkpoint_minutes={"default": 0.5, "help": "save scores this often (default %(default)s)"},
        timeout_s={"default": 1800.0},
    )
    external = (
        "the shards are of another task than the models (the runs say theirs, or TASK): tables for evaluate --external"
    )
    flags.add_argument("--external", **flag(task_type, "TASK", external, nargs="?") | {"default": False})
    return flags


def check(args: argparse.Namespace) -> None:
    if args.fold is not None and (args.split != "train" or args.external is not False):
        raise UserError("--fold chooses patients of the runs' training split: add --split train, without --external")
