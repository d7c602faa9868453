"""All steps on a small set of X-rays: images and labels -> shards -> trained models -> submission and report.

  cxrdist demo                              draws its own X-rays (phantoms)
  cxrdist demo --images DIR --csv FILE      takes yours; a fifth of the patients is held out
  cxrdist demo --folds                      trains each model fold by fold: out-of-fold tables -> weights of
                                            the ensemble -> the ensemble and its members on the held-out fifth

Every step is a command that you could type, and is printed before it runs. A finished step leaves a stamp; the same
command later reuses it, and an interrupted one resumes where it stopped.
"""

import argparse
from pathlib import Path
from typing import Any

from cxrdist.cli import Parser, add_flags, at_least, flag
from cxrdist.errors import UserError
from cxrdist.task import TASKS

NUM_PATIENTS = 250
NUM_FOLDS = 5  # one fold of the patients is the held-out test split


def parser() -> Parser:
    flags = Parser(prog="cxrdist demo", description=__doc__, check=check)
    given: dict[str, dict[str, Any]] = {
        "task": {"type": str, "default": "b", "help": f"{', '.join(TASKS)}; or a .toml or .json file"},
        "images": {"help": "folder of your images"},
        "csv": {"help": "their labels; goes with --images"},
        "set": {"help": "change a field of all recipes of the demo, e.g. epochs=2 (repeatable)"},
    }
    given |= {"out": {"default": Path("demo"), "help": "where to write (default %(default)s)"}}
    add_flags(flags, "--task", "--images", "--csv", "--out", "--blank", "--uncertain", "--set", **given)
    flags.add_argument("--patients", **flag(int, "N", "phantom patients", default=NUM_PATIENTS))
    flags.add_argument("--seed", **flag(at_least(0), "N", "of the phantoms and of the held-out split", default=0))
    folds = "train by N folds of the patients, 3 where N is left out, with a third of the epochs, and fit weights"
    flags.add_argument("--folds", **flag(at_least(2), "N", folds, nargs="?", const=3))
    return flags


def check(args: argparse.Namespace) -> None:
    if (args.images is None) != (args.csv is None):
        raise UserError("--images DIR and --csv FILE go together; without both the demo draws its own division")
    if args.patients < 2 * NUM_FOLDS:
        raise UserError(f"--patients {args.patients} is too few to hold some out; use at least {2 * NUM_FOLDS}")
