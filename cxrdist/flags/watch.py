"""Watch running and finished trainings side by side in the terminal, from the logs in their folders alone.

  cxrdist watch                                       all runs below runs/
  cxrdist watch runs/eva_x_b runs/chexfound_b         these
  ssh -t cluster cxrdist watch /scratch/runs          elsewhere
  cxrdist watch --once runs/eva_x_b                   print what there is, and end

Loss with its curve, macro AUROC of each validation with the best, images/s, the share of time in which the slowest
process waits for data, and time left at the present speed. A run is stopped when Ctrl-C or a limit ended it before its
last epoch, until it is resumed and writes a row; it counts as silent when nothing was written for five minutes and four
rows' time. Nothing is written, and what runs is not touched. Ctrl-C ends it.
"""

from pathlib import Path

from cxrdist.cli import Parser, at_least, flag


def parser() -> Parser:
    flags = Parser(prog="cxrdist watch", description=__doc__)
    about = "folder of a run, or a folder that holds runs (default: runs)"
    flags.add_argument("runs", **flag(Path, "RUN", about, nargs="*") | {"default": [Path("runs")]})
    flags.add_argument("--once", action="store_true", help="print what there is now, and end")
    flags.add_argument("--every", **flag(at_least(0.1, float), "S", "seconds between two looks", default=2.0))
    return flags
