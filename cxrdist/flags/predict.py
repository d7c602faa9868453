"""What a trained model says of X-rays: images, folders or DICOMs in, a table of findings out; no shards needed.

  cxrdist predict chest.dcm --bundle my_model                     a bundle that `cxrdist export` wrote
  cxrdist predict xrays/ --member eva_x=runs/eva_x_tb@5,6:tta --member convnext=runs/convnext_tb --csv found.csv
  cxrdist predict chest.png --bundle my_model --maps maps         where the model looked, for each positive finding

Preparation, views and averaging are those of inference: the same probabilities as its score table. With a calibration
(`cxrdist calibrate`) each finding has a calibrated probability and a threshold. Research software: no diagnosis may
rest on it. With --csv or --json, the same command resumes a folder that was interrupted.
"""

import argparse
from pathlib import Path

from cxrdist.cli import Parser, add_flags, flag
from cxrdist.errors import UserError
from cxrdist.flags.model import add_model_flags, check_model_flags


def parser() -> Parser:
    flags = Parser(prog="cxrdist predict", description=__doc__, check=check)
    flags.add_argument("images", type=Path, nargs="+", metavar="IMAGE|DIR", help="JPEG, PNG, DICOM, TIFF, or folders")
    add_model_flags(flags)
    flags.add_argument("--csv", **flag(Path, "FILE", "write the probabilities as a score table"))
    flags.add_argument("--maps", **flag(Path, "DIR", "write where the model looked, a PNG per positive finding"))
    add_flags(flags, "--json", "--device-batch-size", json={"help": "write all findings as JSON"})
    return flags


def check(args: argparse.Namespace) -> None:
    check_model_flags(args)
    if args.csv is not None and args.json in (args.csv, args.csv.with_suffix(".json")):
        raise UserError(f"--json {args.json}: --csv writes under this name, or its origin; give another")
