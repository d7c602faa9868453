"""What this machine has and what cxrdist would use on it; problems are named with their remedy.

  cxrdist doctor          the report
  cxrdist doctor --bill   name, version and licence of every installed dependency

Ends with exit code 0 also when something is wrong: it reports, it does not judge. Prints no secret.
"""

from pathlib import Path

from cxrdist.cli import SHARDS, Parser, add_flags, flag


def parser() -> Parser:
    flags = Parser(prog="cxrdist doctor", description=__doc__)
    flags.add_argument("--bill", action="store_true", help="print name, version and licence of every dependency")
    sheet = "draw what a recipe's augmentation does to eight images of --shards, as a PNG"
    flags.add_argument("--augment-sheet", **flag(Path, "FILE", sheet))
    flags.add_argument("--model", **flag(str, "NAME", "the recipe for --augment-sheet", default="eva_x"))
    shards = f"shard set of the images for --augment-sheet (default: {SHARDS})"
    add_flags(flags, "--task", "--shards", "--set", "--augment", shards={"help": shards})
    return flags
