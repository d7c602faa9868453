"""The flags that name a trained model (a bundle or members), and the model that they name: of `predict` and `app`."""

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from cxrdist.cli import add_flags, flag
from cxrdist.documents import BUNDLE
from cxrdist.errors import UserError

if TYPE_CHECKING:
    from cxrdist.inference.predictor import Predictor


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bundle", **flag(Path, "DIR", "a folder that cxrdist export wrote"))
    member = "a run, epochs and views, or a weight file, as in cxrdist infer (repeatable)"
    parser.add_argument("--member", **flag(str, "NAME=RUN@5,6[:tta]", member, action="append") | {"default": []})
    parser.add_argument(
        "--calibration", **flag(Path, "FILE", "calibration.json, or its folder (default: the bundle's or run's own)")
    )
    parser.add_argument("--device", **flag(str, "cpu|cuda", "where to run (default: a GPU if there is one)"))
    add_flags(
        parser,
        *("--task", "--average", "--backbone", "--precision"),
        task={"help": "of weight files, which do not say it: a built-in one, or a .toml or .json file"},
        average={"choices": ("prob", "logit"), "default": None, "help": "of members: prob (default) or logit"},
        precision={"help": "auto: the best that the device has"},
    )


def check_model_flags(args: argparse.Namespace) -> None:
    """UserError for flags that name no model, two, or no device."""
    if (args.bundle is None) == (not args.member):
        raise UserError("give the model: --bundle DIR, or --member NAME=RUN (repeatable), not both")
    if args.bundle is not None and not (args.bundle / BUNDLE).is_file():
        what = (
            f"no {BUNDLE} there" if args.bundle.is_dir() else "is a file" if args.bundle.exists() else "no such folder"
        )
        run = f", or a run with --member NAME={args.bundle}" if (args.bundle / "recipe.json").is_file() else ""
        raise UserError(f"--bundle {args.bundle}: {what}; give a folder that `cxrdist export` wrote{run}")
    if args.device is not None:
        check_device(args.device)


def check_device(text: str) -> None:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise UserError(f"--device {text}: give cpu, cuda or cuda:N")


def load_model(args: argparse.Namespace) -> "Predictor":
    from cxrdist.inference.predictor import load

    return load(
        args.bundle if args.bundle is not None else args.member,
        task=args.task,
        how=args.average,
        calibration=args.calibration,
        backbone=args.backbone,
        device=args.device,
        precision=args.precision,
    )
