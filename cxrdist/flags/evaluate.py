"""Compare score tables with labels: metrics.json, and report.html, one self-contained page.

  cxrdist evaluate --scores OUT/scores/*.csv --csv labels.csv --out report
  ... --calibration calibration       what the thresholds that cxrdist calibrate chose do on these images
  ... --run runs/eva_x_b --run runs/chexfound_b --shards shards/div_b     adds loss curves, images and saliency maps,
                                      of each label the most confident right and wrong ones
  cxrdist evaluate --external b=b.csv@shards/div_b --external nih=nih.csv@shards/nih --external site=s.csv@l.csv#t.toml

Tables are averaged into an ensemble, which comes first; where one of them says that it is the average of all the
others, it is taken as it is. AUROC and average precision per label, intervals from resampled patients, paired
comparisons, calibration, subgroups by view, sex and age.

--external NAME=SCORES@LABELS, once a set, is external validation on sets of several tasks (scores: `cxrdist infer
--external`): AUROC and prevalence by label and set. LABELS is a shard set, or a label CSV with #TASK where that is
another one than the scores'. Labels of equal names are compared, and what --map FILE says, in TOML:

  [nih]
  "Pleural Effusion" = "Effusion"     # label of the scores = what the set calls it; "" leaves the label out
"""

import argparse
from pathlib import Path

from cxrdist.cli import Parser, add_flags, at_least, flag
from cxrdist.errors import UserError

FORM = "NAME=SCORES.csv[,SCORES.csv]@SHARDS|LABELS.csv[#TASK]"
# Flags of the evaluation without --external.
OTHERS = ("scores", "csv", "shards", "task", "run", "show", "timings", "backbone", "calibration")


def parser() -> Parser:
    flags = Parser(prog="cxrdist evaluate", description=__doc__, check=check)
    add_flags(
        flags,
        *("--scores", "--csv", "--out", "--shards", "--task", "--blank", "--uncertain", "--weights", "--average"),
        *("--allow-missing", "--backbone"),
        scores={"required": False, "default": [], "help": "score tables, or submissions, to compare"},
        csv={"help": "label table of the scored images (default: the labels in --shards)"},
        out={"help": "folder of the report (default %(default)s)", "default": Path("report")},
        shards={"help": "shard set of the scored images: labels without --csv; with --run, pictures"},
        task={"help": "task of the label CSV: a built-in one or a .toml or .json file (default: the tables' own)"},
    )
    add = flags.add_argument
    add("--resamples", **flag(at_least(1), "N", "bootstrap resamples of the patients", default=1000))
    add(
        "--run",
        **flag(
            Path, "RUN", "run folder of a member: its curves and, with --shards, its maps (repeatable)", action="append"
        )
        | {"default": []},
    )
    add("--show", **flag(str, "IMAGE", "names of images for the maps (default: a choice)", nargs="+") | {"default": []})
    add(
        "--calibration",
        **flag(Path, "FILE", "what `cxrdist calibrate` wrote for these members: its thresholds at work"),
    )
    add("--timings", **flag(Path, "FILE", 'JSON {"step": seconds} to list in the report'))
    about = "a set of external validation: its scores and labels (repeatable)"
    add("--external", **flag(str, FORM, about, action="append") | {"default": []})
    add("--map", **flag(Path, "FILE", "with --external: what the sets call a label of the scores, in TOML"))
    add("--title", **flag(str, "TEXT", "of the report", default="Chest X-ray findings: evaluation"))
    return flags


def check(args: argparse.Namespace) -> None:
    """UserError where `--external` and the flags of the other evaluation are mixed, or neither says what to score."""
    if not args.external:
        if args.map is not None:
            raise UserError("--map says what the sets of --external call a label: give those, or leave it out")
        if not args.scores:
            raise UserError("give --scores FILES, or --external NAME=SCORES.csv@SHARDS for each set")
        return
    if mixed := [name for name in OTHERS if getattr(args, name)]:
        raise UserError(f"--external says each set's scores, labels and task: leave out --{', --'.join(mixed)}")
