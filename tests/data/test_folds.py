import numpy as np
import pytest

from cxrdist.data.folds import assign_folds, check_no_shared_patients, read_split, rows_of_fold, write_split
from cxrdist.errors import UserError

pytestmark = pytest.mark.fast


@pytest.fixture
def division():
    rng = np.random.default_rng(0)
    patients = np.repeat([f"{number:08d}" for number in range(600)], rng.integers(1, 7, 600)).astype(object)
    prevalence = np.geomspace(0.01, 0.4, 14)
    of_patient = {patient: rng.random(14) < prevalence for patient in np.unique(patients)}
    targets = np.stack([of_patient[patient] for patient in patients]).astype(np.float32)
    return patients, targets


def test_folds_keep_patients_whole_and_every_label_near_its_share(division):
    patients, targets = division
    folds = assign_folds(patients, targets, num_folds=5, seed=1)
    for patient in np.unique(patients):
        assert len(set(folds[patients == patient])) == 1
    positives = np.stack([targets[folds == fold].sum(axis=0) for fold in range(5)])
    shares = positives / targets.sum(axis=0)
    assert np.abs(shares[:, targets.sum(axis=0) >= 50] - 0.2).max() < 0.05
    assert np.abs(np.bincount(folds) / len(folds) - 0.2).max() < 0.03


def test_folds_depend_on_the_seed_and_not_on_the_order_of_images(division):
    patients, targets = division
    folds = assign_folds(patients, targets, num_folds=4, seed=1)
    shuffled = np.random.default_rng(2).permutation(len(patients))
    assert np.array_equal(assign_folds(patients[shuffled], targets[shuffled], 4, 1), folds[shuffled])
    assert not np.array_equal(assign_folds(patients, targets, 4, 2), folds)


def test_split_file_returns_what_was_written_and_selects_rows(division, tmp_path):
    patients, targets = division
    folds = assign_folds(patients, targets, num_folds=5, seed=1)
    write_split(tmp_path / "split.csv", patients, folds)
    fold_of = read_split(tmp_path / "split.csv")
    train, validation = rows_of_fold(patients, fold_of, validate_fold=2)
    assert np.array_equal(validation, np.flatnonzero(folds == 2))
    assert np.array_equal(np.sort(np.concatenate([train, validation])), np.arange(len(patients)))
    check_no_shared_patients(patients[train], patients[validation])
    assert list(tmp_path.iterdir()) == [tmp_path / "split.csv"]


def test_patients_outside_the_split_and_empty_sides_are_named(division, tmp_path):
    patients, _ = division
    with pytest.raises(UserError, match=r"600 patients are not in the split, e\.g\. 00000000"):
        rows_of_fold(patients, {}, 0)
    with pytest.raises(UserError, match="0 to validate on"):
        rows_of_fold(patients, dict.fromkeys(patients, 0), 3)


def test_impossible_numbers_of_folds_are_named(division):
    for num_folds in (1, 601):
        with pytest.raises(UserError, match=f"--folds {num_folds}"):
            assign_folds(*division, num_folds=num_folds, seed=0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("patient;fold\n1;0\n", "first line"),
        ("patient,fold\n1\n", "line 2"),
        ("patient,fold\n1,0\nx,1\n", "line 3"),
    ],
)
def test_files_that_are_no_split_are_named_with_their_line(text, words, tmp_path):
    (tmp_path / "split.csv").write_text(text)
    with pytest.raises(UserError, match=words):
        read_split(tmp_path / "split.csv")
