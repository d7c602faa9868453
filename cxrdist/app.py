"""A page in your browser to try a trained model: drop an X-ray, see its findings and where the model looked.

  cxrdist app --bundle my_model                                   then open the address that it prints
  cxrdist app --member eva_x=runs/eva_x_tb@5,6:tta --member convnext=runs/convnext_tb --port 8000

Takes PNG, JPEG, TIFF and DICOM; the numbers are those of `cxrdist predict`. Several members can be compared. Only this
machine can open the page unless --host is given; nothing is fetched from or sent to anywhere else, and uploads are
deleted as soon as they are read. Needs `pip install 'cxrdist[app]'`. Research software: no diagnosis may rest on it.
"""

import argparse
import importlib.util

from cxrdist.cli import Parser, at_least, flag, run_entry
from cxrdist.errors import UserError
from cxrdist.model_flags import add_model_flags, check_model_flags, load_model
from cxrdist.report.page import WARNING


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the page needs Gradio: pip install 'cxrdist[app]'")
    from cxrdist.web.serve import is_loopback, listen, serve

    with listen(args.host, args.port) as listening:
        model = load_model(args)
        for note in model.notes:
            print(note)
        print(WARNING)
        if not is_loopback(args.host):
            print(f"warning: --host {args.host}: anyone who can reach this machine can send images to the page")
        try:
            serve(model, listening, args.host)
        except KeyboardInterrupt:
            print("ended; no image was kept")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="cxrdist app", description=__doc__)
    add_model_flags(parser)
    parser.add_argument(
        "--host", **flag(str, "ADDRESS", "where to listen; another: open to others", default="127.0.0.1")
    )
    parser.add_argument("--port", **flag(at_least(0), "N", "of the page; 0: any free one", default=7860))
    args = parser.parse_args(argv)
    check_model_flags(args)
    if args.port > 65535:
        raise UserError(f"--port {args.port}: give 0 to 65535")
    return args


if __name__ == "__main__":
    raise SystemExit(run_entry(main, again="run the same command again"))
