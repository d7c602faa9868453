"""A page in your browser to try a trained model: drop an X-ray, see its findings and where the model looked.

  cxrdist app --bundle my_model                                   then open the address that it prints
  cxrdist app --member eva_x=runs/eva_x_tb@5,6:tta --member convnext=runs/convnext_tb --port 8000

Takes PNG, JPEG, TIFF and DICOM; the numbers are those of `cxrdist predict`. Several members can be compared. Only this
machine can open the page unless --host is given; nothing is fetched from or sent to anywhere else, and uploads are
deleted as soon as they are read. Needs `pip install 'cxrdist[app]'`. Research software: no diagnosis may rest on it.
"""

import argparse

from cxrdist.cli import Parser, at_least, flag
from cxrdist.errors import UserError
from cxrdist.flags.model import add_model_flags, check_model_flags


def parser() -> Parser:
    flags = Parser(prog="cxrdist app", description=__doc__, check=check)
    add_model_flags(flags)
    flags.add_argument(
        "--host",
        **flag(str, "ADDRESS", "where to listen; any other address opens the page to others", default="127.0.0.1"),
    )
    flags.add_argument("--port", **flag(at_least(0), "N", "of the page; 0: any free one", default=7860))
    return flags


def check(args: argparse.Namespace) -> None:
    check_model_flags(args)
    if args.port > 65535:
        raise UserError(f"--port {args.port}: give 0 to 65535")
