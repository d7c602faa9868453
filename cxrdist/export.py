"""Write a trained model as a bundle. Its flags: `cxrdist.flags.export`."""

from cxrdist import __version__
from cxrdist.cli import run_entry
from cxrdist.documents import read_bounded
from cxrdist.errors import UserError
from cxrdist.flags.export import NO_CALIBRATION, parser
from cxrdist.inference import bundle
from cxrdist.inference.card import model_card
from cxrdist.inference.members import load_ensemble, parse_member, task_of_models
from cxrdist.inference.onnx import MAX_DIFFERENCE, check_levels, export_onnx, file_of, onnx_available
from cxrdist.inference.predictor import find_calibration, member_text, runs_of, stored_of


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    specs = [parse_member(member_text(text)) for text in args.members]
    task = task_of_models(specs, args.task)
    calibrated = args.calibration != NO_CALIBRATION
    files = [args.calibration if calibrated else None, args.backbone, args.metrics]
    inputs = [*(spec.source for spec in specs), *(path for path in files if path is not None)]
    if args.onnx and (missing := onnx_available()):
        raise UserError(f"--onnx: {missing}")
    bundle.check_folder(args.out, inputs)
    metrics = None if args.metrics is None else read_bounded(args.metrics)
    ensemble = load_ensemble(specs, task, args.backbone)
    heads = [item for member in ensemble.members for item in member.checkpoints]
    more = [file_of(number) for number in range(len(heads))] if args.onnx else []
    bundle.check_folder(args.out, inputs, more)
    calibration = None
    if calibrated:
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
    told = f"no calibration{' (cxrdist calibrate makes one)' if calibrated else ''}"
    told = told if calibration is None else f"calibrated ({calibration.rule})"
    print(
        f"bundle: {args.out}, {len(heads)} checkpoints, {len(ensemble.members)} members, {size / 1e6:,.1f} MB, {told}"
    )
    print(f"its id (SHA-256 of manifest.json): {sha256}")


if __name__ == "__main__":
    raise SystemExit(run_entry(main, again="run the same command again"))
