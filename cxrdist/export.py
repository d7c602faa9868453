"""Write a trained model as a bundle: one folder to use anywhere with `cxrdist predict`, `cxrdist.load` or ONNX.

  cxrdist export runs/eva_x_tb --out my_model
  cxrdist export eva_x=runs/eva_x_tb@5,6:tta convnext=runs/convnext_tb --calibration calibration --out my_model --onnx

The folder holds the EMA weights (frozen backbones included, or only named: --without-backbone), task, preparation,
views, calibration and a model card, laid out as Hugging Face has it: `hf upload NAME my_model`. Nothing in it names
this machine or a patient. --onnx adds a file per checkpoint and checks it against torch at once.
"""

import argparse
from pathlib import Path

from cxrdist import __version__
from cxrdist.cli import Parser, add_flags, flag, run_entry
from cxrdist.documents import read_bounded
from cxrdist.errors import UserError
from cxrdist.inference import bundle
from cxrdist.inference.card import model_card
from cxrdist.inference.members import load_ensemble, parse_member, task_of_models
from cxrdist.inference.onnx import MAX_DIFFERENCE, check_levels, export_onnx, file_of, onnx_available
from cxrdist.inference.predictor import find_calibration, member_text, runs_of, stored_of


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    specs = [parse_member(member_text(text)) for text in args.members]
    task = task_of_models(specs, args.task)
    files = [path for path in (args.calibration, args.backbone, args.metrics) if path is not None]
    if args.onnx and (missing := onnx_available()):
        raise UserError(f"--onnx: {missing}")
    bundle.check_folder(args.out, [*(spec.source for spec in specs), *files])
    metrics = None if args.metrics is None else read_bounded(args.metrics)
    ensemble = load_ensemble(specs, task, args.backbone)
    heads = [item for member in ensemble.members for item in member.checkpoints]
    more = [file_of(number) for number in range(len(heads))] if args.onnx else []
    bundle.check_folder(args.out, [*(spec.source for spec in specs), *files], more)
    calibration = find_calibration(ensemble, runs_of(specs), args.average, args.calibration)
    stored, note = stored_of(ensemble)
    for line in [*ensemble.notes, *([note] if note else [])]:
        print(line)
    card = model_card(task, ensemble, stored, calibration, metrics, args.metrics, onnx=args.onnx)
    levels = check_levels(args.check, stored) if args.onnx else []
    names = bundle.write_bundle(
        *(args.out, task, ensemble, stored, args.average),
        version=__version__,
        card=card,
        calibration=calibration,
        with_backbone=not args.without_backbone,
    )
    for number, head in enumerate(heads if args.onnx else ()):
        found = export_onnx(args.out / file_of(number), head, ensemble.models[head.sha256], task, levels)
        print(found)
        if not found.difference <= MAX_DIFFERENCE:
            raise UserError(f"{args.out / file_of(number)}: more than {MAX_DIFFERENCE:g} from torch; not used")
    sha256 = bundle.write_manifest(args.out, [*names, *more])
    size = sum((args.out / name).stat().st_size for name in (*names, *more))
    told = "no calibration (cxrdist calibrate makes one)" if calibration is None else f"calibrated ({calibration.rule})"
    print(
        f"bundle: {args.out}, {len(heads)} checkpoints, {len(ensemble.members)} members, {size / 1e6:,.1f} MB, {told}"
    )
    print(f"its id (SHA-256 of manifest.json): {sha256}")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="cxrdist export", description=__doc__)
    about = "a run folder, or members as in cxrdist infer --member"
    parser.add_argument("members", nargs="+", metavar="RUN|NAME=RUN@5,6[:tta]", help=about)
    add_flags(
        parser,
        *("--out", "--task", "--average", "--backbone"),
        out={"required": True, "help": "folder of the bundle"},
        task={"help": "of weight files, which do not say it: a built-in one, or a .toml or .json file"},
        average={"choices": ("prob", "logit"), "help": "of members: probabilities (default) or logits"},
    )
    parser.add_argument("--calibration", **flag(Path, "FILE", "default: a run's own that fits these members"))
    parser.add_argument("--metrics", **flag(Path, "FILE", "metrics.json of cxrdist evaluate, for the model card"))
    without = "leave frozen backbones out and name them by their hash; users then give --backbone"
    parser.add_argument("--without-backbone", action="store_true", help=without)
    parser.add_argument("--onnx", action="store_true", help="also write ONNX files (pip install 'cxrdist[onnx]')")
    check = "X-rays on which ONNX is compared with torch (default: made-up images)"
    parser.add_argument("--check", **flag(Path, "IMAGE|DIR", check))
    args = parser.parse_args(argv)
    if args.check is not None and not args.onnx:
        raise UserError("--check goes with --onnx")
    return args


if __name__ == "__main__":
    raise SystemExit(run_entry(main, again="run the same command again"))
