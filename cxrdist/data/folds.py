"""Patient-grouped, label-stratified folds, and the `split.csv` that records them in the run folder.

A patient's images are alike and share labels, so a patient lies in one fold. The file makes a validation score
repeatable: what was trained on is written down, not recomputed.
"""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cxrdist.errors import UserError
from cxrdist.files import read_bytes, write_atomically
from cxrdist.shards.columns import Targets, Texts, pieces
from cxrdist.task import Task

HEADER = ["patient", "fold"]
MAX_FOLDS = 2**15 - 1


def assign_folds(
    patients: Texts, targets: Targets | NDArray[np.float32], num_folds: int, seed: int
) -> NDArray[np.int16]:
    """The fold of every image, (N,) int16 in [0, num_folds).

    Args:
        patients: (N,) patient ids. targets: (N, K) labels in [0, 1]; a masked one (NaN) counts as 0.
        seed: breaks ties between patients that look alike.
    Greedy: patients with the rarest findings first, each to the fold where the squared distance of the label and image
    counts from their shares grows least. Raises UserError for fewer than 2 folds, or more folds than patients.
    Takes 8 bytes for each patient and label, and 4 for each image.
    """
    patient_ids, names = patients.codes()
    if not 2 <= num_folds <= len(names):
        raise UserError(f"--folds {num_folds} is not possible: use 2 to {len(names)} (the number of patients)")
    if num_folds > MAX_FOLDS:
        raise UserError(f"--folds {num_folds} is not possible: use at most {MAX_FOLDS:,}")
    shares = np.zeros((len(names), targets.shape[1] + 1))
    for piece in pieces(len(targets)):
        np.add.at(shares[:, :-1], patient_ids[piece], np.nan_to_num(targets[piece].astype(np.float64)))
    shares[:, -1] = np.bincount(patient_ids, minlength=len(names))
    shares /= np.maximum(shares.sum(axis=0), 1.0)
    shuffled = np.random.default_rng(seed).permutation(len(names))
    order = shuffled[np.argsort(-shares.max(axis=1)[shuffled], kind="stable")]
    folds = np.zeros(len(names), np.int16)
    filled = np.zeros((num_folds, shares.shape[1]))
    for piece in pieces(len(order)):
        for patient, share in zip(order[piece].tolist(), shares[order[piece]], strict=True):
            # |filled + share|^2 grows by 2 filled.share + |share|^2, and the second term is the same for every fold
            fold = (filled @ share).argmin()
            folds[patient] = fold
            filled[fold] += share
    return folds[patient_ids]


def write_split(path: Path, patients: Texts, folds: NDArray[np.integer[Any]]) -> None:
    """Write one row per patient, sorted, atomically. Raises UserError for a patient in two folds, naming it."""
    codes, names = patients.codes()
    fold_of = np.zeros(len(names), folds.dtype)
    fold_of[codes] = folds
    for row in np.flatnonzero(fold_of[codes] != folds)[:1]:
        first, second = sorted((folds[row], fold_of[codes[row]]))
        raise UserError(f"{path}: patient {patients[row]} would be in folds {first} and {second}")
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEADER)
    writer.writerows(zip(names, fold_of.tolist(), strict=True))
    write_atomically(path, text.getvalue())


def read_split(path: Path, task: Task) -> dict[str, int]:
    """The fold of each patient. Raises UserError naming file and line for anything but `patient,fold` rows, and for a
    patient with two folds (where ids are digits, a spreadsheet turns 00000211 into 211: both are one patient).
    """
    fold_of: dict[str, int] = {}
    line_of: dict[str, int] = {}
    digits = bool(task.names and task.columns.patient)
    try:
        rows = list(csv.reader(io.StringIO(read_bytes(path).decode("utf-8-sig"), newline=""), strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as a split ({error})") from error
    if not rows or rows[0] != HEADER:
        raise UserError(f"{path}: the first line must be `{','.join(HEADER)}`")
    for line, row in enumerate(rows[1:], start=2):
        try:
            name, number = row
            patient, fold = task.patient(name) if digits else name, int(number)
            if not number.isdecimal():
                raise ValueError
        except ValueError:
            raise UserError(f"{path}, line {line}: expected a patient and a fold, found {','.join(row)!r}") from None
        if fold_of.setdefault(patient, fold) != fold:
            both = f"in fold {fold_of[patient]} (line {line_of[patient]}) and in fold {fold} (line {line})"
            remedy = "keep one of the lines, or training and validation share a patient"
            raise UserError(f"{path}: patient {patient} is {both}: {remedy}")
        line_of.setdefault(patient, line)
    return fold_of


def inside_fold(patients: Texts, fold_of: Mapping[str, int], validate_fold: int) -> NDArray[np.bool_]:
    """(N,) whether each image is of a patient of the fold.

    Raises UserError if a patient is not in the split, or if all or none are in the fold.
    """
    codes, names = patients.codes()
    inside = np.zeros(len(names), np.bool_)
    unknown, first = 0, ""
    for place, patient in enumerate(names):
        fold = fold_of.get(patient)
        if fold is None:
            unknown, first = unknown + 1, first or patient
        inside[place] = fold == validate_fold
    if unknown:
        raise UserError(f"{unknown} patients are not in the split, e.g. {first}: it was made for other shards")
    chosen = inside[codes]
    number = int(np.count_nonzero(chosen))
    if number in (0, len(chosen)):
        left = f"{len(chosen) - number} images to train on and {number} to validate on"
        known = ", ".join(map(str, sorted({*fold_of.values()})[:20]))
        raise UserError(f"fold {validate_fold} leaves {left}; the split has the folds {known}")
    return chosen
