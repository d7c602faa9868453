"""Tables of public datasets as published: small made-up ones of each form, and the real ones where installed."""

import csv
import dataclasses
import gzip
import importlib.util
import io
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from cxrdist import published
from cxrdist.errors import UserError
from cxrdist.published import read_labels
from cxrdist.tables import LabelTable, label_table, read_targets
from cxrdist.task import CHEXPERT_LABELS, PUBLISHED, TASKS, Task

CHEXPERT, MIMIC, NIH, PADCHEST, VINDR = (TASKS[name] for name in ("chexpert", "mimic", "nih", "padchest", "vindr"))


def write(path: Path, header: Sequence[str], *rows: Sequence[object]) -> Path:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([header, *rows])
    content = text.getvalue().encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def cells(table: LabelTable, task: Task, *labels: str) -> list[list[float]]:
    """The targets of these labels, -1 for a masked one."""
    places = [task.labels.index(label) for label in labels]
    found: list[list[float]] = np.nan_to_num(table.targets[:, places], nan=-1).tolist()
    return found


def about(table: LabelTable) -> list[list[str]]:
    found: list[list[str]] = table.about[["patient", "study", "view", "sex", "age", "split"]].to_numpy().tolist()
    return found


# CheXpert


def chexpert_row(path: str, sex: str, age: object, side: str, view: str, **labels: object) -> list[object]:
    return [path, sex, age, side, view, *(labels.get(label.replace(" ", "_"), "") for label in CHEXPERT_LABELS)]


CHEXPERT_HEADER = ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *CHEXPERT_LABELS]
CHEXPERT_ROWS = [
    chexpert_row(
        "CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg", "Female", 68, "Frontal", "AP", Edema="1.0"
    ),
    chexpert_row(
        "CheXpert-v1.0-small/train/patient00001/study1/view2_lateral.jpg", "Female", 68, "Lateral", "", Edema="-1.0"
    ),
    chexpert_row(
        "CheXpert-v1.0-small/valid/patient64541/study2/view1_frontal.jpg", "Male", 73, "Frontal", "PA", Edema="0.0"
    ),
]


@pytest.mark.fast
@pytest.mark.parametrize("name", ["train.csv", "train.csv.gz"])
def test_a_chexpert_path_says_patient_study_and_split(tmp_path: Path, name: str) -> None:
    table = read_labels(write(tmp_path / name, CHEXPERT_HEADER, *CHEXPERT_ROWS), CHEXPERT)
    assert list(table.about["image_name"]) == [row[0] for row in CHEXPERT_ROWS]
    assert about(table) == [
        ["patient00001", "study1", "AP", "Female", "68", "train"],
        ["patient00001", "study1", "Lateral", "Female", "68", "train"],
        ["patient64541", "study2", "PA", "Male", "73", "valid"],
    ]
    assert table.notes == ()


@pytest.mark.fast
def test_chexpert_cells_follow_the_policies_and_default_to_blank_zero_and_uncertain_masked(tmp_path: Path) -> None:
    path = write(tmp_path / "train.csv", CHEXPERT_HEADER, *CHEXPERT_ROWS)
    assert cells(read_labels(path, CHEXPERT), CHEXPERT, "Edema", "Fracture") == [[1, 0], [-1, 0], [0, 0]]
    for blank, value in (("zero", 0), ("one", 1), ("masked", -1), (0.25, 0.25)):
        task = CHEXPERT.with_readings({"*": "zero", "Fracture": blank}, blank)  # type: ignore[dict-item, arg-type]
        assert cells(read_labels(path, task), task, "Edema", "Fracture") == [[1, value], [value, value], [0, value]]
    with pytest.raises(UserError, match=r"line 3, column 'Edema': '-1.0' means uncertain; --uncertain zero"):
        read_labels(path, CHEXPERT.with_readings(None, "error"))
    with pytest.raises(UserError, match=r"line 2, column 'No Finding': '' is blank; --blank zero\|one\|masked"):
        read_labels(path, CHEXPERT.with_readings("error", None))


@pytest.mark.fast
def test_another_table_is_answered_with_the_one_that_is_needed(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", ["path", "Edema"], ["a.jpg", 1])
    for task, column, needed in (
        (CHEXPERT, "'Path' is missing; the nearest is 'path'", "train.csv or valid.csv"),
        (MIMIC, "'study_id'", "-metadata.csv"),
        (NIH, "'Image Index'", "Data_Entry_2017"),
        (PADCHEST, "'ImageID'", "PADCHEST_chest"),
        (VINDR, "'image_id'", "image_labels_train.csv"),
    ):
        with pytest.raises(UserError, match=rf"x\.csv: column {column}.*{needed}.*--labels") as caught:
            read_labels(path, task)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no such CSV"):
        read_labels(tmp_path / "none.csv", CHEXPERT)


@pytest.mark.fast
def test_a_chexpert_path_without_a_patient_is_noted_and_a_misspelt_label_named(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", CHEXPERT_HEADER, chexpert_row("a.jpg", "", "", "", ""), CHEXPERT_ROWS[0])
    table = read_labels(path, CHEXPERT)
    assert about(table)[0] == ["a.jpg", "", "", "", "", ""]
    assert table.notes == ("1 image names do not say their patient (first: 'a.jpg'): each is its own",)
    with pytest.raises(UserError, match=r"'Oedema' is missing; the nearest is 'Edema'; give --labels Fracture,Edema"):
        read_labels(path, dataclasses.replace(CHEXPERT, labels=("Fracture", "Oedema")))


# MIMIC-CXR-JPG


def write_mimic(folder: Path, end: str = "") -> Path:
    write(
        folder / f"mimic-cxr-2.0.0-metadata.csv{end}",
        ["dicom_id", "subject_id", "study_id", "PerformedProcedureStepDescription", "ViewPosition"],
        ["d1-a", 10000032, 50414267, "CHEST (PA AND LAT)", "PA"],
        ["d2-b", 10000032, 50414267, "CHEST (PA AND LAT)", "LATERAL"],
        ["d3-c", 10000764, 57375967, "CHEST", ""],
        ["d4-d", 10000999, 50000001, "CHEST", "AP"],  # of a study without labels
        ["d5-e", 19999999, 50000002, "CHEST", "AP"],
    )
    write(
        folder / f"mimic-cxr-2.0.0-split.csv{end}",
        ["dicom_id", "study_id", "subject_id", "split"],
        ["d3-c", 57375967, 10000764, "test"],
        ["d2-b", 50414267, 10000032, "train"],
        ["d1-a", 50414267, 10000032, "validate"],
    )
    return write(
        folder / f"mimic-cxr-2.0.0-chexpert.csv{end}",
        ["subject_id", "study_id", *MIMIC.labels],
        [10000764, 57375967, *("-1.0" if label == "Edema" else "" for label in MIMIC.labels)],
        [10000032, 50414267, *("1.0" if label == "Edema" else "0.0" for label in MIMIC.labels)],
        [19999999, 50000002, *("0.0" for _ in MIMIC.labels)],
        [18888888, 50000009, *("" for _ in MIMIC.labels)],  # without an image
    )


@pytest.mark.fast
@pytest.mark.parametrize("end", ["", ".gz"])
def test_mimic_tables_are_joined_and_what_does_not_join_is_counted(tmp_path: Path, end: str) -> None:
    path = write_mimic(tmp_path, end)
    table = read_labels(path, MIMIC)
    assert list(table.about["image_name"]) == [
        "files/p10/p10000032/s50414267/d1-a.jpg",
        "files/p10/p10000032/s50414267/d2-b.jpg",
        "files/p10/p10000764/s57375967/d3-c.jpg",
        "files/p19/p19999999/s50000002/d5-e.jpg",
    ]
    assert about(table) == [
        ["10000032", "50414267", "PA", "", "", "valid"],
        ["10000032", "50414267", "LATERAL", "", "", "train"],
        ["10000764", "57375967", "", "", "", "test"],
        ["19999999", "50000002", "AP", "", "", ""],
    ]
    assert cells(table, MIMIC, "Edema", "Fracture") == [[1, 0], [1, 0], [-1, 0], [0, 0]]
    images, labels = f"mimic-cxr-2.0.0-metadata.csv{end}", f"mimic-cxr-2.0.0-chexpert.csv{end}"
    assert table.notes == (
        f"1 images of {images} are left out: their studies are not in {labels}",
        f"1 studies of {labels} have no image in {images}",
        f"1 images are not in mimic-cxr-2.0.0-split.csv{end}: no split",
    )
    assert [MIMIC.ids_in_name(name) for name in table.about["image_name"][1:3]] == [
        ("10000032", "50414267"),
        ("10000764", "57375967"),
    ]


@pytest.mark.fast
def test_a_bad_mimic_label_is_named_by_the_line_of_the_label_table(tmp_path: Path) -> None:
    path = write_mimic(tmp_path)
    with pytest.raises(UserError, match=r"chexpert\.csv, line 2, column 'Edema': '-1\.0'"):
        read_labels(path, MIMIC.with_readings(None, "error"))


@pytest.mark.fast
def test_newer_mimic_labels_without_a_subject_use_the_tables_beside_them(tmp_path: Path) -> None:
    write_mimic(tmp_path).unlink()
    path = write(tmp_path / "mimic-cxr-2.1.0-test-set-labeled.csv", ["study_id", *MIMIC.labels], [57375967, *[1] * 14])
    assert about(read_labels(path, MIMIC)) == [["10000764", "57375967", "", "", "", "test"]]


@pytest.mark.fast
def test_mimic_tables_that_are_missing_ambiguous_or_contradict_are_named(tmp_path: Path) -> None:
    path = write_mimic(tmp_path)
    write(path, ["subject_id", "study_id", "Edema"], [1, 50414267, 1])
    task = dataclasses.replace(MIMIC, labels=("Edema",))
    with pytest.raises(UserError, match=r"line 2: study 50414267 is of subject 10000032 in mimic-cxr-2.0.0-metadata"):
        read_labels(path, task)
    write(path, ["subject_id", "study_id", "Edema"], [1, 2, 1])
    with pytest.raises(UserError, match=r"no study of it is in mimic-cxr-2\.0\.0-metadata\.csv"):
        read_labels(path, task)
    write(path, ["subject_id", "study_id", "Edema"], [1, 2, 1], [1, 2, 0])
    with pytest.raises(UserError, match="study_id '2' is in line 2 and again in line 3"):
        read_labels(path, task)
    (tmp_path / "mimic-cxr-2.0.0-split.csv").rename(tmp_path / "mimic-cxr-2.1.0-split.csv")
    write(tmp_path / "mimic-cxr-2.2.0-split.csv", ["dicom_id", "split"], ["d1-a", "train"])
    with pytest.raises(UserError, match=r"2\.1\.0-split\.csv and mimic-cxr-2\.2\.0-split\.csv fit"):
        read_labels(path, task)
    (tmp_path / "mimic-cxr-2.0.0-metadata.csv").unlink()
    with pytest.raises(UserError, match=r"no mimic-cxr-2\.0\.0-metadata\.csv\[\.gz\] beside it"):
        read_labels(path, task)


# NIH


NIH_HEADER = [
    "Image Index",
    "Finding Labels",
    "Follow-up #",
    "Patient ID",
    "Patient Age",
    "Patient Gender",
    "View Position",
]
NIH_ROWS = [
    ["00000001_000.png", "Cardiomegaly|Emphysema", 0, 1, "58", "M", "PA"],
    ["00000001_001.png", "No Finding", 1, 1, "058Y", "M", "PA"],
    ["00030805_000.png", "Hernia", 0, 30805, "011M", "F", "AP"],
]


def write_lists(folder: Path, train: str, test: str) -> None:
    (folder / "train_val_list.txt").write_text(train)
    (folder / "test_list.txt").write_text(test)


@pytest.mark.fast
@pytest.mark.parametrize("sex", ["Patient Gender", "Patient Sex"])
def test_nih_findings_follow_ups_and_official_lists(tmp_path: Path, sex: str) -> None:
    header = [sex if name == "Patient Gender" else name for name in NIH_HEADER]
    # The header of the published file has brackets with commas in them and, in the first release, an empty end.
    path = write(tmp_path / "Data_Entry_2017.csv", [*header, "x", ""], *([*row, "1", ""] for row in NIH_ROWS))
    write_lists(tmp_path, "00000001_000.png\n00000001_001.png\n", "00030805_000.png")
    table = read_labels(path, NIH)
    assert list(table.about["image_name"]) == [row[0] for row in NIH_ROWS]
    assert about(table) == [
        ["1", "0", "PA", "M", "58", "train"],
        ["1", "1", "PA", "M", "58", "train"],
        ["30805", "0", "AP", "F", "0", "test"],
    ]
    assert cells(table, NIH, "Cardiomegaly", "Emphysema", "Hernia") == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]
    assert table.targets.sum() == 3
    assert table.notes == ()
    assert [NIH.ids_in_name(name) for name in table.about["image_name"]] == [("1", "0"), ("1", "1"), ("30805", "0")]


@pytest.mark.fast
def test_nih_without_its_lists_or_with_images_in_none_says_so(tmp_path: Path) -> None:
    path = write(tmp_path / "Data_Entry_2017.csv", NIH_HEADER, *NIH_ROWS)
    table = read_labels(path, NIH)
    assert set(table.about["split"]) == {""}
    assert "no train_val_list.txt and no test_list.txt beside Data_Entry_2017.csv" in table.notes[0]
    write_lists(tmp_path, "00000001_000.png", "00030805_000.png")
    table = read_labels(path, NIH)
    assert list(table.about["split"]) == ["train", "", "test"]
    assert table.notes == ("1 images of Data_Entry_2017.csv are in neither official list: no split",)
    write_lists(tmp_path, "00000001_000.png", "00000001_000.png")
    with pytest.raises(UserError, match=r"test_list\.txt: 00000001_000\.png is in the other list, too"):
        read_labels(path, NIH)


@pytest.mark.fast
def test_an_unknown_nih_finding_or_label_is_named_with_the_nearest(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", NIH_HEADER, *NIH_ROWS, ["b.png", "Hernia|Pneumonya", 0, 2, 1, "F", "AP"])
    with pytest.raises(UserError, match=r"line 5, column 'Finding Labels': 'Pneumonya' .* nearest is 'Pneumonia'"):
        read_labels(path, NIH)
    write(path, NIH_HEADER, *NIH_ROWS)
    with pytest.raises(UserError, match=r"no row has the label 'Hernja'; the nearest is 'Hernia'"):
        read_labels(path, dataclasses.replace(NIH, labels=("Hernja",)))
    task = dataclasses.replace(NIH, labels=("No Finding", "Hernia"))
    assert read_labels(path, task).targets.tolist() == [[0, 0], [1, 0], [0, 1]]
    write(path, NIH_HEADER, NIH_ROWS[0], ["b.png", "", 0, 2, 1, "F", "AP"])
    with pytest.raises(UserError, match=r"line 3, column 'Atelectasis': '' is blank; --blank"):
        read_labels(path, NIH)
    assert np.isnan(read_labels(path, NIH.with_readings("masked", None)).targets[1]).all()


# PadChest


PADCHEST_HEADER = [
    *("", "ImageID", "ImageDir", "StudyDate_DICOM", "StudyID", "PatientID", "PatientBirth", "PatientSex_DICOM"),
    *("ViewPosition_DICOM", "Projection", "Report", "Labels"),
]


def padchest_row(name: str, labels: str, birth: str = "1930.0", sex: str = "F", view: str = "PA") -> list[object]:
    return [0, name, 54, 20140915, f"s-{name}", f"p-{name}", birth, sex, "nan", view, "sin\nhallazg", labels]


@pytest.mark.fast
def test_padchest_lists_are_read_and_rows_without_one_are_blank(tmp_path: Path) -> None:
    rows = [
        padchest_row("a.png", "['normal']"),
        padchest_row("b.png", "['pneumonia ', ' pleural effusion', \"kyphosis\", 'pneumonia']", sex="nan", view="nan"),
        padchest_row("c.png", "nan", birth="nan"),
        padchest_row("d.png", "['']"),
        padchest_row("e.png", ""),
    ]
    path = write(tmp_path / "PADCHEST.csv.gz", PADCHEST_HEADER, *rows)
    table = read_labels(path, PADCHEST)
    assert about(table)[:3] == [
        ["p-a.png", "s-a.png", "PA", "F", "84", ""],
        ["p-b.png", "s-b.png", "", "", "84", ""],
        ["p-c.png", "s-c.png", "PA", "F", "", ""],
    ]
    assert cells(table, PADCHEST, "pneumonia", "pleural effusion", "nodule") == [[0, 0, 0], [1, 1, 0], *[[-1] * 3] * 3]
    with pytest.raises(UserError, match=r"line 7, column 'cardiomegaly': '' is blank; --blank"):  # reports of two lines
        read_labels(path, PADCHEST.with_readings("error", None))
    chosen = dataclasses.replace(PADCHEST, labels=("kyphosis", "normal")).with_readings("zero", None)
    assert read_labels(path, chosen).targets.tolist() == [[0, 1], [1, 0], [0, 0], [0, 0], [0, 0]]
    with pytest.raises(UserError, match=r"no row has the label 'Kyfosis'; the nearest is 'kyphosis'"):
        read_labels(path, dataclasses.replace(PADCHEST, labels=("Kyfosis",)))


@pytest.mark.fast
@pytest.mark.parametrize(
    "labels",
    ["['a'", "normal", "{'normal': 1}", "[1]", "__import__('os')", "[" * 9999, "[" + "'a'," * 9999 + "]", "['\0']["],
)
def test_a_padchest_cell_that_is_no_list_is_named(tmp_path: Path, labels: str) -> None:
    path = write(
        tmp_path / "x.csv", PADCHEST_HEADER, padchest_row("a.png", "['normal']"), padchest_row("b.png", labels)
    )
    with pytest.raises(UserError, match=r"line 5, column 'Labels': .* is not a list of labels") as caught:
        read_labels(path, PADCHEST)
    assert len(str(caught.value)) < 400


# VinDr-CXR


KAGGLE_HEADER = ["image_id", "class_name", "class_id", "rad_id", "x_min", "y_min", "x_max", "y_max"]


def boxes(image: str, **by_reader: Sequence[str]) -> list[list[object]]:
    return [[image, name, 0, reader, 1, 2, 3, 4] for reader, names in by_reader.items() for name in names]


@pytest.mark.fast
def test_kaggles_boxes_become_what_most_readers_say_or_their_share(tmp_path: Path) -> None:
    rows = [
        *boxes("b2", R8=["Cardiomegaly", "Cardiomegaly"], R9=["Cardiomegaly", "ILD"], R10=["No finding"]),
        *boxes("a1", R8=["No finding"], R9=["No finding"], R10=["ILD"]),
        *boxes("c3", R1=["ILD"], R2=["No finding"]),
    ]
    path = write(tmp_path / "train.csv", KAGGLE_HEADER, *rows[::2], *rows[1::2])
    table = read_labels(path, VINDR)
    assert sorted(table.about["image_name"]) == ["a1", "b2", "c3"]
    assert list(table.about["patient"]) == list(table.about["image_name"])
    order = np.argsort(table.about["image_name"].to_numpy())
    assert np.array(cells(table, VINDR, "Cardiomegaly", "ILD"))[order].tolist() == [[0, 0], [1, 0], [0, -1]]
    with pytest.raises(UserError, match="column 'ILD': '-1' means uncertain"):
        read_labels(path, VINDR.with_readings(None, "error"))
    mean = dataclasses.replace(VINDR, readers="mean")
    shares = np.array(cells(read_labels(path, mean), mean, "Cardiomegaly", "ILD"))[order]
    assert shares == pytest.approx(np.array([[0, 1 / 3], [2 / 3, 1 / 3], [0, 0.5]]), abs=1e-7)
    normal = dataclasses.replace(VINDR, labels=("No finding",))
    assert read_labels(path, normal).targets[order].tolist()[:2] == [[1], [0]]
    with pytest.raises(UserError, match=r"no row has the label 'Cardiomegalie'; the nearest is 'Cardiomegaly'"):
        read_labels(path, dataclasses.replace(VINDR, labels=("Cardiomegalie",)))
    write(path, ["image_id", "class_name"], ["a", "ILD"])
    with pytest.raises(UserError, match="'rad_id' is missing"):
        read_labels(path, VINDR)


@pytest.mark.fast
def test_physionets_reader_rows_and_its_consensus(tmp_path: Path) -> None:
    task = dataclasses.replace(VINDR, labels=("ILD", "COPD"))
    rows = [
        ["a1", "R1", 1, 0],
        ["a1", "R2", 1, 0],
        ["a1", "R3", 0, 1],
        ["b2", "R1", 0, 1],
        ["b2", "R2", 0, ""],
        ["b2", "R3", 1, 0],
    ]
    path = write(tmp_path / "image_labels_train.csv", ["image_id", "rad_id", "ILD", "COPD"], *rows)
    table = read_labels(path, task)
    assert table.about[["image_name", "split"]].to_numpy().tolist() == [["a1", "train"], ["b2", "train"]]
    assert cells(table, task, "ILD", "COPD") == [[1, 0], [0, -1]]  # one of the two that read COPD
    mean = read_labels(path, dataclasses.replace(task, readers="mean"))
    assert mean.targets == pytest.approx(np.array([[2 / 3, 1 / 3], [1 / 3, 1 / 2]]), abs=1e-7)
    test = write(tmp_path / "image_labels_test.csv", ["image_id", "ILD", "COPD"], ["c3", 1, 0], ["d4", "", ""])
    with pytest.raises(UserError, match=r"line 3, column 'ILD': '' is blank"):
        read_labels(test, task)
    table = read_labels(test, task.with_readings("masked", None))
    assert cells(table, task, "ILD", "COPD") == [[1, 0], [-1, -1]]
    assert list(table.about["split"]) == ["test", "test"]


@pytest.mark.fast
def test_a_reader_who_is_there_twice_a_bad_cell_and_a_missing_label_are_named(tmp_path: Path) -> None:
    task = dataclasses.replace(VINDR, labels=("ILD",))
    path = write(tmp_path / "x.csv", ["image_id", "rad_id", "ILD"], ["a", "R1", 1], ["a", "R1", 0])
    with pytest.raises(UserError, match="image 'a' is in line 2 and again in line 3 for reader 'R1'"):
        read_labels(path, task)
    write(path, ["image_id", "rad_id", "ILD"], ["a", "R1", 1], ["a", "R2", "x"])
    with pytest.raises(UserError, match=r"line 3, column 'ILD': 'x' is neither"):
        read_labels(path, task)
    write(path, ["image_id", "rad_id", "ild"], ["a", "R1", 1])
    with pytest.raises(UserError, match=r"'ILD' is missing; the nearest is 'ild'; give --labels ild"):
        read_labels(path, task)


# The real tables, from the torchxrayvision wheel (which is not imported)


def real(name: str) -> Path:
    spec = importlib.util.find_spec("torchxrayvision")
    if spec is None or spec.origin is None:
        pytest.skip("torchxrayvision, whose wheel holds the table, is not installed")
    path = Path(spec.origin).parent / "data" / name
    if not path.is_file():
        pytest.skip(f"this torchxrayvision has no {name}")
    return path


POLICIES: tuple[Any, ...] = ("zero", "one", "masked", 0.6)


def check_policies(task: Task, path: Path, counts: dict[str, tuple[int, int, int, int]]) -> LabelTable:
    """Read by every policy; `counts` of a label: cells that are 1, 0, blank and uncertain. The table it was read as."""
    started = time.process_time()
    cells = published.FORMS[task.format].read(path, task)  # these two are `read_labels`; the policies need only `cells`
    table = label_table(cells, task)
    assert time.process_time() - started < 10
    assert len(table) == sum(counts[task.labels[0]])
    ones, _, blank, uncertain = np.array([counts[label] for label in task.labels]).T
    assert np.array_equal(np.array([sum(counts[label]) for label in task.labels]), [len(table)] * task.num_labels)
    for if_blank, if_uncertain in [*zip(POLICIES, POLICIES, strict=True), *itertools.pairwise(POLICIES)]:
        targets = read_targets(cells, task.with_readings(if_blank, if_uncertain))

        def expected(reading: object, how: tuple[Any, Any] = (if_blank, if_uncertain)) -> Any:
            return blank * (how[0] == reading) + uncertain * (how[1] == reading)

        assert np.isnan(targets).sum(axis=0).tolist() == expected("masked").tolist()
        assert (~np.isnan(targets)).sum(axis=0).tolist() == (len(table) - expected("masked")).tolist()
        assert (targets == 1).sum(axis=0).tolist() == (ones + expected("one")).tolist()
        assert (targets == np.float32(0.6)).sum(axis=0).tolist() == expected(0.6).tolist()
    for kind, number in (("blank", int(blank.sum())), ("uncertain", int(uncertain.sum()))):
        strict = task.with_readings(*(["error", "zero"] if kind == "blank" else ["zero", "error"]))
        if number:
            more = rf" \({number - 1:,} more such cells\)" if number > 1 else ""
            with pytest.raises(UserError, match=rf"line [0-9]+, column .*--{kind} zero.*{more}$"):
                read_targets(cells, strict)
        else:
            assert not np.isnan(read_targets(cells, strict)).any()
    return table


@pytest.mark.slow
def test_the_real_chexpert_table_by_every_policy() -> None:
    path = real("chexpert_train.csv.gz")
    frame = pd.read_csv(path)
    counts = {
        label: tuple(int(n) for n in (column.eq(1).sum(), column.eq(0).sum(), column.isna().sum(), column.eq(-1).sum()))
        for label, column in frame[list(CHEXPERT_LABELS)].items()
    }
    table = check_policies(CHEXPERT, path, counts)  # type: ignore[arg-type]
    assert len(table) == 223_414
    assert table.about["image_name"].tolist() == frame["Path"].tolist()
    assert table.about["patient"].tolist() == frame["Path"].str.split("/").str[2].tolist()
    assert table.about["view"].tolist() == frame["AP/PA"].fillna(frame["Frontal/Lateral"]).tolist()
    assert set(table.about["split"]) == {"train"}


@pytest.mark.slow
def test_the_real_nih_table_by_every_policy() -> None:
    path = real("Data_Entry_2017_v2020.csv.gz")
    frame = pd.read_csv(path)
    ones = frame["Finding Labels"].str.get_dummies("|").sum()
    assert set(ones.index) == {*NIH.labels, "No Finding"}
    counts = {label: (int(ones[label]), len(frame) - int(ones[label]), 0, 0) for label in NIH.labels}
    table = check_policies(NIH, path, counts)
    assert len(table) == 112_120
    assert table.about["patient"].astype(int).tolist() == frame["Patient ID"].tolist()
    assert table.about["study"].astype(int).tolist() == frame["Follow-up #"].tolist()


@pytest.mark.slow
def test_the_real_padchest_table_by_every_policy() -> None:
    """160,861 rows on 166,737 lines: some reports hold a line break."""
    path = real("PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv.gz")
    frame = pd.read_csv(path, usecols=["ImageID", "PatientID", "Labels"], dtype=str, keep_default_na=False)
    lists = frame["Labels"].value_counts()
    blank = int(lists[~lists.index.str.contains("[a-z]", case=False) | (lists.index == "nan")].sum())
    counts = {}
    for label in PADCHEST.labels:
        ones = int(lists[lists.index.str.contains(f"['\"] *{label} *['\"]")].sum())
        counts[label] = (ones, len(frame) - ones - blank, blank, 0)
    table = check_policies(PADCHEST, path, counts)
    assert len(table) == 160_861
    assert table.about["image_name"].tolist() == frame["ImageID"].tolist()
    assert table.about["patient"].tolist() == frame["PatientID"].tolist()


@pytest.mark.parametrize("readers", ["majority", "mean"])
@pytest.mark.slow
def test_the_real_vindr_table_by_every_policy(readers: Any) -> None:
    path = real("vinbigdata-train.csv.gz")
    frame = pd.read_csv(path)
    assert len(frame) == 67_914
    num_readers = frame.groupby("image_id")["rad_id"].nunique()
    votes = frame.drop_duplicates(["image_id", "rad_id", "class_name"]).groupby(["image_id", "class_name"]).size()
    shares = votes.unstack(fill_value=0).div(num_readers, axis=0)[list(VINDR.labels)]
    task = dataclasses.replace(VINDR, readers=readers)
    if readers == "mean":
        table = read_labels(path, task)
        ordered = shares.loc[table.about["image_name"]].to_numpy()
        assert table.targets == pytest.approx(ordered, abs=1e-7)
        return
    counts = {
        label: (int((share > 0.5).sum()), int((share < 0.5).sum()), 0, int((share == 0.5).sum()))
        for label, share in shares.items()
    }
    assert len(check_policies(task, path, counts)) == 15_000  # type: ignore[arg-type]


@pytest.mark.fast
def test_every_public_dataset_has_a_form_and_default_policies() -> None:
    assert set(published.FORMS) == {task.format for task in PUBLISHED.values()} == set(PUBLISHED)
    for task in PUBLISHED.values():
        assert load_again(task) == task


def load_again(task: Task) -> Task:
    return Task.from_json(task.to_json(), "task")
