"""Score a shard set with trained members and average them into a submission.

  cxrdist infer --task b --member eva_x=runs/eva_x_b@5,6:tta --member chexfound=runs/chexfound_b     on all GPUs
  cxrdist infer --shards shards/tb --split valid --member eva=runs/eva_x_tb

A member is NAME=RUN[@EPOCHS][:VIEWS][:raw][*WEIGHT]: the EMA weights of these epochs, with :raw those of the last step,
seen in these views (tta, plain or names with commas); what is left out is as the run's recipe says. NAME=FILE[#RECIPE]
is a weight file, the published ones too: read with the recipe named, else with the recipe.json of its run or beside it,
else with the published one of its architecture. A NAME given twice averages its runs, e.g. folds. Writes
OUT/scores/NAME.csv (with JSON) and, for images without labels or with --template, OUT/submission.csv. Every image is
decoded once, equal views and shared frozen backbones run once. A killed run resumes where it stopped.
--external scores shards of another task than the models', for `cxrdist evaluate --external`.
"""

import argparse

from cxrdist.cli import STREAMING, Parser, add_flags, at_least, flag, task_type
from cxrdist.errors import UserError


def parser() -> Parser:
    flags = Parser(prog="cxrdist infer", description=__doc__, check=check)
    models = flags.add_argument_group("models, and how they are averaged")
    member = "a model, as above (repeatable; default: runs/eva_x_<task> and runs/chexfound_<task>)"
    models.add_argument("--member", **flag(str, "NAME=RUN@5,6[:tta]", member, action="append") | {"default": []})
    add_flags(models, "--average", "--average-studies", "--backbone")
    images = flags.add_argument_group("images")
    add_flags(images, "--task", "--shards", *STREAMING)
    images.add_argument("--split", **flag(str, "NAME", "of the shards: what to score", default="test"))
    fold = "with --split train: only patients of this fold of the runs"
    images.add_argument("--fold", **flag(at_least(0), "K", fold))
    external = (
        "the shards are of another task than the models (the runs say theirs, or TASK): tables for evaluate --external"
    )
    images.add_argument("--external", **flag(task_type, "TASK", external, nargs="?") | {"default": False})
    add_flags(
        flags.add_argument_group("where it goes"),
        *("--out", "--template", "--checkpoint-minutes", "--dry-run"),
        out={"help": "where to write (default: predictions/<task>, of a and b predictions/div_<task>)"},
        template={"help": "sample submission, whose rows the submission gets (default: the shards' order)"},
        checkpoint_minutes={"default": 0.5, "help": "save scores this often (default %(default)s)"},
    )
    speed = flags.add_argument_group("speed and memory")
    add_flags(speed, "--device-batch-size", "--precision", "--compile", "--expect-processes")
    add_flags(flags.add_argument_group("faults"), "--max-unreadable", "--timeout-s", timeout_s={"default": 1800.0})
    return flags


def check(args: argparse.Namespace) -> None:
    if args.fold is not None and (args.split != "train" or args.external is not False):
        raise UserError("--fold chooses patients of the runs' training split: add --split train, without --external")
