"""Train a model fold after fold, and score each fold by the model that did not see it: one out-of-fold table.

  cxrdist folds --task b --model chexfound --folds 5
  sbatch --nodes=1 --array=0-4 accel_configs/slurm.sh folds --task b --folds 5         a fold for each task of the array

Further flags are those of `cxrdist train`, and are passed on to it. Every training and scoring is a command, printed
before it runs. Finished ones are reused, an interrupted one resumes, and what changes repeats only what depends on it.
Writes the runs OUT/RECIPE_TASK_fold<K> and the table OUT/MEMBER.csv: every training image once, as scored by the model
that was not trained on its patient. From such tables `cxrdist ensemble --fit` finds weights.
"""

import argparse
import re
from pathlib import Path
from typing import Any

from cxrdist.cli import Parser, at_least, flag
from cxrdist.errors import UserError
from cxrdist.flags import train

ALL = -1
REFUSED = {  # flags of `cxrdist train` that have no place here, and what has
    "validate_fold": "--only K does one fold",
    "resume": "what was interrupted is resumed without it",
    "dry_run": "ask `cxrdist train`",
    "max_steps": "--epochs 1 tries things out",
    "max_hours": "what is interrupted, by SIGTERM too, is resumed by the same command",
}


class FoldsParser(Parser):
    """Its `training` are the flags of `cxrdist train`, its `words` these as given."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, found_words = self.parse_known_args(args, namespace)
        found.words, found.training = tuple(found_words), train.parser().parse_args(found_words)
        if found.member is not None and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", found.member) is None:
            raise UserError(f"--member {found.member!r}: a name has letters, digits, '.', '_', '-'")
        for name, instead in REFUSED.items():
            if getattr(found.training, name) not in (None, False):
                text = f"--{name.replace('_', '-')} is of one training, and this command makes several: {instead}"
                raise UserError(text)
        return found


def fold_choice(text: str) -> int:
    """The fold of --only; ALL for all."""
    if text != "all" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither the number of a fold, from 0, nor all")
    return ALL if text == "all" else int(text)


def parser() -> Parser:
    flags = FoldsParser(prog="cxrdist folds", description=__doc__)
    only = "train and score this fold (default: the number of the Slurm array's task, or all)"
    flags.add_argument("--folds", **flag(at_least(2), "N", "patient-grouped folds", default=5))
    flags.add_argument("--only", **flag(fold_choice, "K|all", only))
    flags.add_argument(
        "--member", **flag(str, "NAME", "of the table, as a member of an ensemble (default: the recipe's name)")
    )
    flags.add_argument("--out", **flag(Path, "DIR", "where to write (default: runs/<recipe>_<task>_folds)"))
    return flags
