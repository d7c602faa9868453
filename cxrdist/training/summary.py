"""The end of a training in figures: a row for each epoch with the best marked, and the last validation by label."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cxrdist.data.loader import Loader
from cxrdist.documents import LogRow, json_row
from cxrdist.errors import UserError
from cxrdist.files import open_to_read
from cxrdist.scoring.metrics import quick_intervals
from cxrdist.terminal import aligned, with_interval
from cxrdist.training.validate import Validation

SHOWN = {"train loss": "epoch_loss", "validation loss": "validation/loss", "macro AUROC": "validation/auroc_macro"}


def epoch_rows(run: Path) -> dict[int, LogRow]:
    """What metrics.jsonl says of each epoch as a whole, in one row; damaged lines are left out."""
    rows: dict[int, LogRow] = {}
    with open_to_read(run / "metrics.jsonl") as file:
        for line in file:
            row = json_row(line) or {}
            if row.get("kind") in ("epoch", "validation") and type(row.get("epoch")) is int:
                rows[row["epoch"]] = rows.get(row["epoch"], {}) | row
    return dict(sorted(rows.items()))


def last_auroc(run: Path) -> float | None:
    """Of the last validation so far; None where there was none."""
    found = [_number(row, "validation/auroc_macro") for row in epoch_rows(run).values()]
    return next((value for value in reversed(found) if value is not None), None)


def tables(run: Path, validation: Validation, loader: Loader) -> str:
    """What to print when the last epoch is validated; loader: of the images that were validated on."""
    try:
        patients = loader.index.patients[validation.rows].codes()[0]
        return "\n".join([*_labels(validation, patients), "", *_epochs(epoch_rows(run))])
    except UserError as error:  # all that was trained is safe: a column of names that is damaged ends nothing now
        return f"no final table: {error}"


def _labels(validation: Validation, patients: NDArray[np.int32]) -> Iterator[str]:
    intervals, whole = quick_intervals(validation.targets, validation.logits, patients)
    yield (
        f"last validation: {validation.num_images:,} images of {int(patients.max(initial=-1)) + 1:,} patients; "
        "95 % intervals over patients"
    )
    positives = np.asarray(np.nansum(validation.targets, axis=0, dtype=np.float64))
    rows = [
        (label, f"{count:,.6g}", *with_interval(value, ends))
        for (label, value), count, ends in zip(validation.auroc.items(), positives, intervals, strict=True)
    ]
    rows.append((f"macro of {validation.labels_text} labels", "", *with_interval(validation.auroc_macro, whole)))
    yield from aligned(("label", "positive", "AUROC", "95 % interval"), rows)


def _epochs(rows: dict[int, LogRow]) -> Iterator[str]:
    """The best by macro AUROC, the first of equal ones, is marked."""
    best = max(rows, key=lambda epoch: _number(rows[epoch], "validation/auroc_macro") or -1.0, default=0)
    several = [
        (str(epoch), *(_text(_number(row, name)) for name in SHOWN.values()), "best" if epoch == best else "")
        for epoch, row in rows.items()
    ]
    yield from aligned(("epoch", *SHOWN, ""), several)


def _number(row: LogRow, name: str) -> float | None:
    value = row.get(name)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _text(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"
