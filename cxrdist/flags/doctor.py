"""What this machine has and what cxrdist would use on it; problems are named with their remedy.

  cxrdist doctor          the report
  cxrdist doctor --bill   name, version and licence of every installed dependency

Ends with exit code 0 also when something is wrong: it reports, it does not judge. Prints no secret.
"""

import argparse
from pathlib import Path

from cxrdist.cli import SHARDS, Parser, add_flags, flag
from cxrdist.errors import UserError


def parser() -> Parser:
    flags = Parser(prog="cxrdist doctor", description=__doc__, check=check)
    flags.add_argument("--bill", action="store_true", help="print name, version and licence of every dependency")
    sheet = "draw what a recipe's augmentation does to eight images of --shards, as a PNG"
    flags.add_argument("--augment-sheet", **flag(Path, "FILE", sheet))
    flags.add_argument("--model", **flag(str, "NAME", "the recipe for --augment-sheet", default="eva_x"))
    shards = f"shard set of the images for --augment-sheet (default: {SHARDS})"
    add_flags(flags, "--task", "--shards", "--set", "--augment", shards={"help": shards})
    return flags


def check(args: argparse.Namespace) -> None:
    sheet = args.augment_sheet
    if sheet is not None and sheet.suffix.lower() != ".png":
        raise UserError(f"--augment-sheet {sheet}: the sheet is a PNG; name a file that ends with .png")
    if sheet is not None and args.bill:
        raise UserError("--bill and --augment-sheet are two things: give one of them")
    given = {"--task": args.task, "--shards": args.shards, "--set": args.overrides, "--augment": args.augment}
    if sheet is None and (names := [name for name, value in given.items() if value]):
        raise UserError(f"{names[0]} goes with --augment-sheet FILE.png, which draws what the augmentation does")
