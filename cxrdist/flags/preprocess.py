"""Images and a table -> shards/<task>: what training and inference read.

  cxrdist preprocess --images DIR --csv FILE --labels Tuberculosis,Nodule    your own data
  cxrdist preprocess --images DIR --csv FILE --task nih      a public set (chexpert, mimic, padchest, vindr)
  cxrdist preprocess --images DIR --task shards/NAME --split new      images without a table, to be scored
  cxrdist preprocess --adopt 'DIR/*.tar' --csv FILE --labels A,B     WebDataset tars: an index beside them
  cxrdist preprocess --data DIR --task b                        the competition's folder: train and test

The competition's folder (--data DIR) as it is published; one division alone will do:

  DIR/train1.csv                 division a: Image_name, Patient_ID, Study, view, sex, age and the 14 labels
  DIR/train1/                    its training images: 00000001_001_001.jpg, ...
  DIR/test1/                     its test images
  DIR/sample_submission_1.csv    the test images in the order of the submission; without it all of test1/
  DIR/train2.csv  DIR/train2/  DIR/test2/  DIR/sample_submission_2.csv      division b: the same

Run the same command again after an interruption: finished shards are kept. See shards/README.md for the format.
"""

import argparse
from pathlib import Path

from cxrdist.cli import SHARDS, Parser, add_flags, at_least, flag
from cxrdist.errors import UserError
from cxrdist.shards.convert import MAX_SIZE_PX, MIN_SIZE_PX, SIZE_PX
from cxrdist.shards.store import folder_or_url
from cxrdist.task import TASKS

ROWS_PER_SHARD = 1000
COLUMN_FLAGS = {
    "image": "the image's file (default: found by looking)",
    "patient": "the patient, whose images stay in one fold (default: the task's, or none)",
    "study": "the study (default: the task's, or none)",
    "split": "the split: train, valid or test (default: the task's, or none)",
}
TABLE = (
    "table with a row an image: names, labels and what else is known; one for each folder of --images, or one for all "
    "(a split to be scored needs none)"
)
OUT = f"folder of the shards (default: {SHARDS}; of --adopt: that of the tars)"


def parser() -> Parser:
    flags = Parser(prog="cxrdist preprocess", description=__doc__, check=check)
    tasks = f"{', '.join(TASKS)}; a .toml or .json file; or a shard set, whose task it is (default: that of --out)"
    folders = {"type": str, "metavar": "DIR|URL", "nargs": "+", "help": "folders of images; also s3:// or gs://"}
    source = flags.add_argument_group("images and table")
    add_flags(
        source,
        *("--images", "--csv", "--data"),
        images=folders,
        csv={"type": table_path, "nargs": "+", "help": TABLE},
    )
    adopts = "WebDataset tars to index where they are; their labels: --csv, or json and cls members"
    source.add_argument("--adopt", **flag(str, "'DIR/*.tar'", adopts, nargs="+"))
    learned = flags.add_argument_group("task and labels")
    add_flags(learned, "--task", task={"type": str, "help": tasks})
    labels = "columns to learn; @FILE lists one a line (default: the task's)"
    learned.add_argument("--labels", **flag(str, "A,B|@FILE", labels))
    learned.add_argument("--name", **flag(str, "NAME", "what your task is called (default: the task's name, or csv)"))
    add_flags(learned, "--blank", "--uncertain")
    readers = "vindr: a label of several readers is what most say, or the share who say it"
    learned.add_argument("--readers", choices=("majority", "mean"), help=readers)
    columns = flags.add_argument_group("columns of the table")
    for name, what in COLUMN_FLAGS.items():
        columns.add_argument(f"--{name}-column", **flag(str, "NAME", f"the table's column that says {what}"))
    split = "one split: of a table that has several, else what the images are called (default: train)"
    written = flags.add_argument_group("what is written")
    add_flags(written, "--out", out={"help": OUT})
    written.add_argument("--split", **flag(str, "NAME", split))
    sides = f"px of the stored squares, {MIN_SIZE_PX} to {MAX_SIZE_PX}"
    written.add_argument("--size", **flag(int, "PX", sides, default=SIZE_PX))
    fits = "squash: sides scaled apart, as published; pad: aspect kept, black added"
    written.add_argument("--fit", choices=("squash", "pad"), default="squash", help=fits)
    modes = "exact: the published run's pixels; fast: a scaled decode, within 48 dB of them"
    written.add_argument("--mode", choices=("exact", "fast"), default="exact", help=modes)
    rows = "rows of the table a tar covers (default %(default)s, about 100 MB); does not change training"
    written.add_argument("--rows-per-shard", type=at_least(1), default=ROWS_PER_SHARD, metavar="N", help=rows)
    written.add_argument(
        "--overwrite", action="store_true", help="replace a finished split that was made from other inputs"
    )
    speed = flags.add_argument_group("cores and nodes")
    speed.add_argument("--workers", type=at_least(1), metavar="N", help="processes (default: all cores of this job)")
    nodes = (
        "share the work with other nodes that have the same --out: each begins with its part and helps the others "
        "(default: what Slurm or torchrun says, else 1)"
    )
    speed.add_argument("--num-nodes", type=at_least(1), metavar="N", help=nodes)
    speed.add_argument(
        "--node-rank",
        type=int,
        metavar="K",
        help="which of the N this is, from 0 (default: what Slurm or torchrun says)",
    )
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
