import dataclasses
import hashlib

import numpy as np
import pytest

from cxrdist.data.folds import assign_folds, inside_fold, read_split, write_split
from cxrdist.errors import UserError
from cxrdist.shards.columns import Texts
from cxrdist.task import TASKS, Columns, Task

pytestmark = pytest.mark.fast


@pytest.fixture
def division():
    rng = np.random.default_rng(0)
    patients = np.repeat([f"{number:08d}" for number in range(600)], rng.integers(1, 7, 600))
    prevalence = np.geomspace(0.01, 0.4, 14)
    of_patient = {patient: rng.random(14) < prevalence for patient in np.unique(patients)}
    targets = np.stack([of_patient[patient] for patient in patients]).astype(np.float32)
    return patients, targets


def test_folds_keep_patients_together_and_every_label_near_its_share(division):
    patients, targets = division
    folds = assign_folds(Texts(patients), targets, num_folds=5, seed=1)
    for patient in np.unique(patients):
        assert len(set(folds[patients == patient])) == 1
    positives = np.stack([targets[folds == fold].sum(axis=0) for fold in range(5)])
    shares = positives / targets.sum(axis=0)
    assert np.abs(shares[:, targets.sum(axis=0) >= 50] - 0.2).max() < 0.05
    assert np.abs(np.bincount(folds) / len(folds) - 0.2).max() < 0.03


def test_folds_are_those_of_the_runs_in_the_world(division):
    """The digests are those of the code of stage 1: a split that changed would leak patients on resume."""
    patients, targets = division
    for num_folds, seed, expected in FOLDS_OF_STAGE_1:
        folds = assign_folds(Texts(patients), targets, num_folds, seed)
        assert hashlib.sha256(folds.astype(np.uint8).tobytes()).hexdigest()[:16] == expected


def test_folds_depend_on_the_seed_and_not_on_the_order_of_images(division):
    patients, targets = division
    folds = assign_folds(Texts(patients), targets, num_folds=4, seed=1)
    shuffled = np.random.default_rng(2).permutation(len(patients))
    assert np.array_equal(assign_folds(Texts(patients[shuffled]), targets[shuffled], 4, 1), folds[shuffled])
    assert not np.array_equal(assign_folds(Texts(patients), targets, 4, 2), folds)


def test_a_masked_label_counts_for_no_fold(division):
    patients, targets = division
    masked = np.where(targets == 0, np.nan, targets).astype(np.float32)
    assert np.array_equal(assign_folds(Texts(patients), masked, 5, 1), assign_folds(Texts(patients), targets, 5, 1))


def test_split_file_returns_what_was_written_and_selects_rows(division, tmp_path):
    patients, targets = division
    folds = assign_folds(Texts(patients), targets, num_folds=5, seed=1)
    write_split(tmp_path / "split.csv", Texts(patients), folds)
    fold_of = read_split(tmp_path / "split.csv", TASKS["b"])
    inside = inside_fold(Texts(patients), fold_of, validate_fold=2)
    assert np.array_equal(inside, folds == 2)
    assert not set(patients[~inside]) & set(patients[inside])
    assert list(tmp_path.iterdir()) == [tmp_path / "split.csv"]
    lines = (tmp_path / "split.csv").read_text().splitlines()
    assert lines[:2] == ["patient,fold", f"00000000,{folds[0]}"]
    assert lines[1:] == sorted(lines[1:])


FOLDS_OF_STAGE_1 = (
    (5, 22, "54800a64d3afb99f"),
    (3, 48, "662fa1fefdcd16dc"),
    (10, 0, "ffd931f4fb1bb920"),
)
TEXT_IDS = [
    "P-1",
    "007",
    "7",
    "a,b",
    'say "x"',
    " spaced ",
    "Müller/3",
    "x\u2028y",
    "\ufefffirst",
    "é" * 128,
    "-1",
    "nan",
]


@pytest.mark.parametrize("columns", [Columns(patient="who"), Columns()])
def test_a_split_of_text_patients_comes_back_exactly(columns, tmp_path):
    task = Task(name="mine", labels=("x",), columns=columns)
    folds = np.arange(len(TEXT_IDS)) % 3
    write_split(tmp_path / "split.csv", Texts(TEXT_IDS), folds)
    assert read_split(tmp_path / "split.csv", task) == dict(zip(TEXT_IDS, folds.tolist(), strict=True))
    named = dataclasses.replace(task, names="patient_study_image", columns=Columns())  # not all names fit the rule
    assert read_split(tmp_path / "split.csv", named) == dict(zip(TEXT_IDS, folds.tolist(), strict=True))


def test_patients_outside_the_split_and_empty_sides_are_named(division, tmp_path):
    patients, _ = division
    with pytest.raises(UserError, match=r"600 patients are not in the split, e\.g\. 00000000"):
        inside_fold(Texts(patients), {}, 0)
    with pytest.raises(UserError, match="0 to validate on"):
        inside_fold(Texts(patients), dict.fromkeys(patients, 0), 3)


def test_impossible_numbers_of_folds_are_named(division):
    patients, targets = division
    for num_folds in (1, 601):
        with pytest.raises(UserError, match=f"--folds {num_folds}"):
            assign_folds(Texts(patients), targets, num_folds=num_folds, seed=0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("patient;fold\n1;0\n", "first line"),
        ("patient,fold\n1\n", "line 2"),
        ("patient,fold\n1,0\nx,1\n", "line 3"),
        ("patient,fold\n1,0\n2,-1\n", "line 3"),
        ("patient,fold\n1,0\n2,1.0\n", "line 3"),
        ('patient,fold\n1,0\n"2,1\n', "cannot be read"),
    ],
)
def test_files_that_are_no_split_are_named_with_their_line(text, words, tmp_path):
    (tmp_path / "split.csv").write_text(text)
    with pytest.raises(UserError, match=words):
        read_split(tmp_path / "split.csv", TASKS["b"])
