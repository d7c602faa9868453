"""A page in your browser to try a trained model. Its flags: `cxrdist.flags.app`."""

import importlib.util

from cxrdist.cli import run_entry
from cxrdist.errors import UserError
from cxrdist.flags.app import parser
from cxrdist.flags.model import load_model
from cxrdist.report.page import WARNING


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
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


if __name__ == "__main__":
    raise SystemExit(run_entry(main, again="run the same command again"))
