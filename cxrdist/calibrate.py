"""Fit what turns scores into calibrated probabilities and decisions. Its flags: `cxrdist.flags.calibrate`."""

from pathlib import Path

import numpy as np

from cxrdist import __version__
from cxrdist.cli import run_entry, with_readings
from cxrdist.errors import UserError
from cxrdist.files import check_outputs, with_json, write_output
from cxrdist.flags.calibrate import parser
from cxrdist.report.calibrated import points_section, reliability_section
from cxrdist.report.page import write_report
from cxrdist.scoring import operating
from cxrdist.scoring.calibration import reliability
from cxrdist.scoring.evaluation import match_labels
from cxrdist.scoring.tables import ScoreTable, align, average_tables, read_members, task_of
from cxrdist.truth import read_truth

REPORT = "calibration.html"
CROSSED = "After: each half of the patients by lines that were fitted on the other half."
NO_HELP = "On other patients the calibrated probabilities are no better than the raw ones: more cases are needed."


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    rule = operating.parse_rule(args.threshold)
    more = {"allow_missing": args.allow_missing}
    tables, weights = read_members(args.scores, args.task, args.weights, **more)
    notes = operating.check_unseen(tables, trusted=args.unseen)
    scores_of = operating.identity_of(tables, weights, args.average)
    out = args.out or own_run(tables)
    inputs = [*with_json(args.scores), *(path for path in (args.csv, args.shards) if path is not None)]
    check_outputs([out / operating.FILE, out / REPORT], inputs, folder=out)
    tables = align(tables, **more)
    together = average_tables(tables, weights, args.average) if len(tables) > 1 else tables[0]
    task = with_readings(task_of(together, args.task), args)
    truth = match_labels(together, *read_truth(args.csv, args.shards, task, tables))
    patients, targets = truth.about["patient"].to_numpy(object), truth.targets.astype(np.float64)
    print(f"calibrating {together.name} on {len(truth):,} images, {args.resamples:,} resamples", flush=True)
    fitted = operating.fit(
        *(together.probs, targets, patients),
        task=task,
        method=args.method,
        rule=rule,
        num_resamples=args.resamples,
        scores_of=scores_of,
        table=together,
    )
    crossed = operating.cross_fitted(together.probs, targets, patients, task, args.method)
    before, after = (reliability(targets, probs).expected_error for probs in (together.probs, crossed))
    warnings = [NO_HELP] if after > before else []
    write_output(out / operating.FILE, fitted.to_json())
    sections = [
        reliability_section(targets, together.probs, crossed, task.labels, [CROSSED, *warnings, *notes]),
        points_section(fitted, operating.performance(fitted, together.probs, targets, patients, args.resamples)),
    ]
    about = f"task {task.name}, {together.name}, {len(truth):,} images of {fitted.patients:,} patients; "
    write_report(out / REPORT, "Calibration and operating points", f"{about}cxrdist {__version__}", sections)
    for note in notes:
        print(note)
    print(summary(fitted))
    print(f"expected calibration error {before:.3f} -> {after:.3f} (each half of the patients by the other's lines)")
    for warning in warnings:
        print(f"warning: {warning}")
    print(f"calibration: {out / operating.FILE}; report: {out / REPORT}")


def own_run(tables: list[ScoreTable]) -> Path:
    """The one run that all scores are of; UserError where there is none."""
    sources = {item.source.rpartition("@")[0] for table in tables for item in table.meta.checkpoints}
    if len(sources) == 1 and (Path(*sources) / "recipe.json").is_file():
        return Path(*sources)
    raise UserError("the scores are not all of one run, in whose folder the calibration could be: give --out DIR")


def summary(fitted: operating.Calibration) -> str:
    """A line for each label: its line, its threshold and what that reaches."""
    width = max(len(each.label) for each in fitted.labels) + 2
    lines = [f"{'label':<{width}}positives   slope  intercept  threshold  sensitivity  specificity  ({fitted.rule})"]
    for each in fitted.labels:
        numbers = (each.threshold, each.sensitivity, each.specificity)
        texts = ["-" if number is None else f"{number:.3f}" for number in numbers]
        line = f"{each.label:<{width}}{each.positives:>9,.5g}{each.slope:>8.3f}{each.intercept:>11.3f}"
        line += f"{texts[0]:>11}{texts[1]:>13}{texts[2]:>13}"
        lines.append(line + ("  line of all labels (few cases)" if each.shared else ""))
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(run_entry(main))
