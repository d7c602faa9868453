"""Patient-grouped, label-stratified folds, and the `split.csv` that records them in the run folder.

A patient's images are alike and share labels, so a patient lies in one fold. The file makes a validation score
repeatable: what was trained on is written down, not recomputed.
"""

import csv
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cxrdist.errors import UserError
from cxrdist.files import write_atomically

HEADER = ["patient", "fold"]


def assign_folds(
    patients: NDArray[np.object_], targets: NDArray[np.float32], num_folds: int, seed: int
) -> NDArray[np.int64]:
    """The fold of every image, (N,) int64 in [0, num_folds).

    Args:
        patients: (N,) patient ids. targets: (N, K) labels, 0 or 1.
        seed: breaks ties between patients that look alike.
    Greedy: patients with the rarest findings first, each to the fold where the squared distance of the label and image
    counts from their shares grows least. Raises UserError for fewer than 2 folds, or more folds than patients.
    """
    names, patient_ids = np.unique(patients.astype(str), return_inverse=True)
    if not 2 <= num_folds <= len(names):
        raise UserError(f"--folds {num_folds} is not possible: use 2 to {len(names)} (the number of patients)")
    per_image = np.column_stack([targets.astype(np.float64), np.ones(len(targets))])
    counts = np.zeros((len(names), per_image.shape[1]))
    np.add.at(counts, patient_ids, per_image)
    shares = counts / np.maximum(counts.sum(axis=0), 1.0)
    shuffled = np.random.default_rng(seed).permutation(len(names))
    folds = np.zeros(len(names), np.int64)
    filled = np.zeros((num_folds, shares.shape[1]))
    for patient in shuffled[np.argsort(-shares.max(axis=1)[shuffled], kind="stable")]:
        # |filled + share|^2 grows by 2 filled.share + |share|^2, and the second term is the same for every fold
        fold = int(np.argmin(filled @ shares[patient]))
        folds[patient] = fold
        filled[fold] += shares[patient]
    return folds[patient_ids]


def write_split(path: Path, patients: NDArray[np.object_], folds: NDArray[np.int64]) -> None:
    """Write one row per patient, sorted, atomically. Raises UserError for a patient in two folds, naming it."""
    fold_of: dict[str, int] = {}
    for patient, fold in zip(patients, folds.tolist(), strict=True):
        if fold_of.setdefault(patient, fold) != fold:
            raise UserError(f"{path}: patient {patient} would be in folds {fold_of[patient]} and {fold}")
    rows = [HEADER, *([patient, str(fold)] for patient, fold in sorted(fold_of.items()))]
    write_atomically(path, "".join(f"{','.join(row)}\n" for row in rows))


def read_split(path: Path) -> dict[str, int]:
    """The fold of each patient (8 digits). Raises UserError naming file and line for anything but `patient,fold` rows,
    and for a patient with two folds (a spreadsheet turns 00000211 into 211: both are one patient).
    """
    fold_of: dict[str, int] = {}
    line_of: dict[str, int] = {}
    try:
        rows = list(csv.reader(path.read_text(encoding="utf-8-sig").splitlines()))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a split ({error})") from error
    if not rows or rows[0] != HEADER:
        raise UserError(f"{path}: the first line must be `{','.join(HEADER)}`")
    for line, row in enumerate(rows[1:], start=2):
        if len(row) != 2 or not row[0].isdecimal() or not row[1].isdecimal():
            raise UserError(f"{path}, line {line}: expected a patient number and a fold, found {','.join(row)!r}")
        patient, fold = row[0].zfill(8), int(row[1])
        if fold_of.setdefault(patient, fold) != fold:
            raise UserError(
                f"{path}: patient {patient} is in fold {fold_of[patient]} (line {line_of[patient]}) and in fold {fold} "
                f"(line {line}): keep one of the lines, or training and validation share a patient"
            )
        line_of.setdefault(patient, line)
    return fold_of


def rows_of_fold(
    patients: NDArray[np.object_], fold_of: Mapping[str, int], validate_fold: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row positions for training and for validation, each sorted, both (n,) int64.

    Raises UserError if a patient is not in the split, or if one side would be empty.
    """
    unknown = sorted({patient for patient in patients if patient not in fold_of})
    if unknown:
        raise UserError(
            f"{len(unknown)} patients are not in the split, e.g. {unknown[0]}: it was made for other shards"
        )
    folds = np.fromiter((fold_of[patient] for patient in patients), np.int64, len(patients))
    train, validation = np.flatnonzero(folds != validate_fold), np.flatnonzero(folds == validate_fold)
    if len(train) == 0 or len(validation) == 0:
        raise UserError(
            f"fold {validate_fold} leaves {len(train)} images to train on and {len(validation)} to validate on"
        )
    return train, validation


def check_no_shared_patients(train: NDArray[np.object_], validation: NDArray[np.object_]) -> None:
    """Raise UserError naming patients that are in both, for sets that do not come from one split.csv."""
    shared = sorted(set(train) & set(validation))
    if shared:
        raise UserError(
            f"{len(shared)} patients are in both training and validation, e.g. {', '.join(shared[:5])}: "
            "the validation score would be too good; split by patient"
        )
