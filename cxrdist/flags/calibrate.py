"""Fit what turns a model's scores into calibrated probabilities and decisions, on images that it has not seen.

  cxrdist calibrate --scores runs/*_folds/*.csv --csv train.csv --out calibration      out-of-fold tables
  cxrdist calibrate --scores out/scores/*.csv --shards shards/tb --threshold sensitivity=0.9    a split not trained on

Per label: Platt scaling (or a temperature), and a threshold (Youden, F1, or a wanted sensitivity or specificity), each
with an interval from resampled patients. A label with few cases takes the line of all labels, and it is said. Writes
calibration.json, which belongs to exactly these members, epochs, views and weights, and calibration.html; for scores of
a single run by default into the run's folder, where predict and export find it.
"""

from pathlib import Path

from cxrdist.cli import Parser, add_flags, at_least, flag


def parser() -> Parser:
    flags = Parser(prog="cxrdist calibrate", description=__doc__)
    labels = "label table of the scored images (default: the labels in --shards)"
    flags.add_argument("--csv", "--labels", **flag(Path, "FILE", labels))
    add_flags(
        flags,
        *("--scores", "--shards", "--task", "--blank", "--uncertain", "--weights", "--average", "--allow-missing"),
        "--out",
        scores={"help": "score tables of the members, of images that they have not seen"},
        shards={"help": "shard set of the scored images, which holds their labels"},
        task={"help": "task of the label CSV: a built-in one or a .toml or .json file (default: the tables' own)"},
        average={"choices": ("prob", "logit"), "help": "of members: probabilities (default) or logits"},
        out={"help": "folder of the result (default: the run's, for scores of one run; else needed)"},
    )
    flags.add_argument(
        "--method", choices=("platt", "temperature"), default="platt", help="Platt scaling, or a temperature"
    )
    rule = "of each label: youden, f1, sensitivity=0.9 or specificity=0.9"
    flags.add_argument("--threshold", **flag(str, "RULE", rule, default="youden"))
    flags.add_argument("--resamples", **flag(at_least(1), "N", "bootstrap resamples of the patients", default=200))
    unseen = "say that no model behind these scores has seen these patients, where the tables do not know it"
    flags.add_argument("--unseen", action="store_true", help=unseen)
    return flags
