"""Images and a table -> shards/<task>: what training and inference read.

  cxrdist preprocess --images DIR --csv FILE --labels Tuberculosis,Nodule    your own data
  cxrdist preprocess --images DIR --csv FILE --task nih      a public set (chexpert, mimic, padchest, vindr)
  cxrdist preprocess --images DIR --task shards/NAME --split new      images without a table, to be scored
  cxrdist preprocess --adopt 'DIR/*.tar' --csv FILE --labels A,B     WebDataset tars: an index beside them
  cxrdist preprocess --data DIR --task b                        the competition's folder: train and test

Run the same command again after an interruption: finished shards are kept. See shards/README.md for the format.
"""

import argparse
from pathlib import Path

from cxrdist.cli import Parser, add_flags, at_least, flag
from cxrdist.errors import UserError
from cxrdist.shards.convert import MAX_SIZE_PX, MIN_SIZE_PX, SIZE_PX
from cxrdist.shards.store import folder_or_url
from cxrdist.task import TASKS

ROWS_PER_SHARD = 1000
COLUMN_FLAGS = ("image", "patient", "study", "split")


def parser() -> Parser:
    flags = Parser(prog="cxrdist preprocess", description=__doc__, check=check)
    tasks = f"{', '.join(TASKS)}; a .toml or .json file; or a shard set, whose task it is (default: that of --out)"
    folders = {"type": str, "metavar": "DIR|URL", "nargs": "+", "help": "folders of images; also s3:// or gs://"}
    several = {"images": folders, "csv": {"type": table_path, "nargs": "+"}}
    add_flags(flags, "--task", "--data", "--images", "--csv", "--out", task={"type": str, "help": tasks}, **several)
    add_flags(flags, "--blank", "--uncertain")
    adopts = "WebDataset tars to index where they are; their labels: --csv, or json and cls members"
    flags.add_argument("--adopt", **flag(str, "'DIR/*.tar'", adopts, nargs="+"))
    flags.add_argument("--labels", **flag(str, "A,B|@FILE", "columns to learn; @FILE lists one a line"))
    flags.add_argument("--name", **flag(str, "NAME", "what your task is called (default: csv)"))
    for name in COLUMN_FLAGS:
        flags.add_argument(f"--{name}-column", **flag(str, "NAME", f"the table's column of {name}s"))
    split = "one split: of a table that has several, else what the images are called (default: train)"
    flags.add_argument("--split", **flag(str, "NAME", split))
    readers = "vindr: a label of several readers is what most say, or the share who say it"
    flags.add_argument("--readers", choices=("majority", "mean"), help=readers)
    sides = f"px of the stored squares, {MIN_SIZE_PX} to {MAX_SIZE_PX}"
    flags.add_argument("--size", **flag(int, "PX", sides, default=SIZE_PX))
    fits = "squash: sides scaled apart, as published; pad: aspect kept, black added"
    flags.add_argument("--fit", choices=("squash", "pad"), default="squash", help=fits)
    modes = "exact: the published run's pixels; fast: a scaled decode, within 48 dB of them"
    flags.add_argument("--mode", choices=("exact", "fast"), default="exact", help=modes)
    flags.add_argument("--workers", type=at_least(1), metavar="N", help="processes (default: all cores of this job)")
    rows = "rows of the table a tar covers (default %(default)s, about 100 MB); does not change training"
    flags.add_argument("--rows-per-shard", type=at_least(1), default=ROWS_PER_SHARD, metavar="N", help=rows)
    nodes = "share the work with other nodes that have the same --out: each begins with its part and helps the others"
    flags.add_argument("--num-nodes", type=at_least(1), metavar="N", help=nodes)
    flags.add_argument("--node-rank", type=int, metavar="K", help="which of the N this is, from 0")
    flags.add_argument("--overwrite", action="store_true", help="replace a finished split made from other inputs")
    return flags


def check(args: argparse.Namespace) -> None:
    args.images = args.images and [folder_or_url(text) for text in args.images]
    if sum(given is not None for given in (args.data, args.images, args.adopt)) != 1:
        either = "either --images DIR (with --csv FILE), --adopt 'DIR/*.tar' or --data DIR (the competition's layout)"
        raise UserError(f"give {either}")
    if args.adopt:
        if args.csv and len(args.csv) > 1:
            raise UserError("--adopt takes one --csv FILE, or none where json or cls members say the labels")
        return
    if args.csv and args.data:
        raise UserError("--csv goes with --images; with --data the CSVs are found in the folder")
    if args.csv and len(args.csv) not in (1, len(args.images)):
        raise UserError(f"{len(args.images)} --images and {len(args.csv)} --csv: give a table for each folder, or one")


def table_path(text: str) -> Path:
    """A path as an argparse type; an address is refused: a table is small, and read whole before the first image."""
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text}: tables are read from a disk; copy it here first")
    return Path(text)
