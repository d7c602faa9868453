"""Average the weights of several checkpoints into one: `cxrdist average --from RUN@5,6 --out runs/NAME`.

The result is a run folder with one epoch, which inference takes like any other (`--member eva_x=runs/NAME@6`). The
published solution averaged probabilities, which needs a pass per checkpoint; averaged weights need one.
"""

from cxrdist.cli import Parser, add_flags, flag


def parser() -> Parser:
    flags = Parser(prog="cxrdist average", description=__doc__)
    about = "run folder and epochs, e.g. runs/eva_x_b@5,6 (repeatable)"
    flags.add_argument("--from", **flag(str, "RUN@EPOCHS", about, action="append", required=True, dest="sources"))
    flags.add_argument(
        "--weights", choices=("ema", "model"), default="ema", help="of each checkpoint: the EMA, or the raw ones"
    )
    add_flags(flags, "--out", out={"required": True, "help": "run folder to write"})
    return flags
