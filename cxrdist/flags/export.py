"""Write a trained model as a bundle: one folder to use anywhere with `cxrdist predict`, `cxrdist.load` or ONNX.

  cxrdist export runs/eva_x_tb --out my_model
  cxrdist export eva_x=runs/eva_x_tb@5,6:tta convnext=runs/convnext_tb --calibration calibration --out my_model --onnx

The folder holds the members' weights (frozen backbones included, or only named: --without-backbone), task, preparation,
views, calibration and a model card, laid out as Hugging Face has it: `hf upload NAME my_model`. Nothing in it names
this machine or a patient. --onnx adds a file per checkpoint and checks it against torch at once.
"""

import argparse
from pathlib import Path

from cxrdist.cli import Parser, add_flags, flag
from cxrdist.errors import UserError

NO_CALIBRATION = Path("none")


def parser() -> Parser:
    flags = Parser(prog="cxrdist export", description=__doc__, check=check)
    about = "a run folder, or members as in cxrdist infer --member"
    form = "RUN|NAME=RUN@5,6[:tta]"
    flags.add_argument("members", nargs="*", metavar=form, help=about)
    flags.add_argument(
        "--member", **flag(str, form, "the same, as other commands have it", action="append") | {"default": []}
    )
    add_flags(
        flags,
        *("--out", "--task", "--average", "--backbone"),
        out={"required": True, "help": "folder of the bundle"},
        task={"help": "of weight files, which do not say it: a built-in one, or a .toml or .json file"},
        average={"choices": ("prob", "logit"), "help": "of members: probabilities (default) or logits"},
    )
    flags.add_argument(
        "--calibration",
        **flag(Path, "FILE", "calibration.json, or its folder; none: without (default: a run's own that fits these)"),
    )
    flags.add_argument("--metrics", **flag(Path, "FILE", "metrics.json of cxrdist evaluate, for the model card"))
    without = "leave frozen backbones out and name them by their hash; users then give --backbone"
    flags.add_argument("--without-backbone", action="store_true", help=without)
    flags.add_argument("--onnx", action="store_true", help="also write ONNX files (pip install 'cxrdist[onnx]')")
    images = "X-rays on which ONNX is compared with torch (default: made-up images)"
    flags.add_argument("--check", **flag(Path, "IMAGE|DIR", images))
    return flags


def check(args: argparse.Namespace) -> None:
    args.members += args.member
    if not args.members:
        raise UserError("say what to export: a run folder, e.g. `cxrdist export runs/eva_x_tb --out model`")
    if args.check is not None and not args.onnx:
        raise UserError("--check goes with --onnx")
