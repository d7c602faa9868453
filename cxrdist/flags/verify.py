"""Check a shard set, and look at it: --report writes a page of its images, labels and what is suspicious.

  cxrdist verify --shards shards/div_b             names, sizes and headers of the tars: seconds
  cxrdist verify --shards shards/div_b --hashes    every byte
  cxrdist verify --shards shards/div_b --split train --table    print the index as CSV instead
  cxrdist verify --shards shards/div_b --report look.html        a page to look at before training

The page counts images, patients and labels, shows random images of each label and what is suspicious: repeated, nearly
equal, blank, tiny or turned images, patients in several splits, contradictory ids. It holds images and ids of patients.
"""

import argparse
from pathlib import Path

from cxrdist.cli import Parser, add_flags, flag
from cxrdist.errors import UserError


def parser() -> Parser:
    flags = Parser(prog="cxrdist verify", description=__doc__, check=check)
    add_flags(flags, "--task", "--shards")
    flags.add_argument("--split", metavar="NAME", help="only this split (default: each that is there)")
    flags.add_argument("--hashes", action="store_true", help="also read every byte and compare its SHA-256")
    flags.add_argument("--table", action="store_true", help="print the index of --split as CSV and check nothing else")
    flags.add_argument("--report", **flag(Path, "FILE.html", "also read every image and write a page about the set"))
    return flags


def check(args: argparse.Namespace) -> None:
    if args.table and args.report:
        raise UserError("--table prints one split and checks nothing; give --report in a command of its own")
