"""Label CSVs and templates: exact names, normalised patients, and errors that name line and column."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from cxrdist.errors import UserError
from cxrdist.tables import read_label_csv, read_template
from cxrdist.task import COMPETITION_LABELS as LABELS
from cxrdist.task import TASKS, Columns, Task

pytestmark = pytest.mark.fast
HEADER = ["Image_name", "Patient_ID", "Study", *LABELS]
B = TASKS["b"]


def write(path: Path, rows: list[list[str]], header: list[str] | None = None, prefix: str = "") -> Path:
    lines = [",".join(row) for row in [header or HEADER, *rows]]
    path.write_text(prefix + "\n".join(lines) + "\n", encoding="utf-8")
    return path


def row(name: str, patient: str = "211", **labels: str) -> list[str]:
    return [name, patient, "1", *(labels.get(label.replace(" ", "_"), "0") for label in LABELS)]


def with_rules(task: Task = B, **rules: Any) -> Task:
    return dataclasses.replace(task, **{kind: {"*": value} for kind, value in rules.items()})


def test_names_come_back_exactly(tmp_path: Path) -> None:
    names = [
        "1.2.840.113.jpg",
        "1.2.840.114.jpg",
        " a b.jpg",
        "Röntgen.png",
        "NA",
        "007",
        "nan.jpg",
        "'x'.jpg",
        "x/a.jpg",
    ]
    table = read_label_csv(write(tmp_path / "a.csv", [row(name) for name in names]), B)
    assert list(table.about["image_name"]) == names
    assert len(table) == len(names)


def test_a_patient_is_the_same_with_and_without_leading_zeros(tmp_path: Path) -> None:
    table = read_label_csv(
        write(tmp_path / "a.csv", [row("a.jpg", "211"), row("b.jpg", "00000211"), row("c.jpg", "211.0")]), B
    )
    assert set(table.about["patient"]) == {"00000211"}


def test_columns_are_read_by_name_in_any_order_and_behind_a_bom(tmp_path: Path) -> None:
    order = [*reversed(LABELS), "Study", "Extra", "Image_name", "Patient_ID"]
    values = {"Image_name": "a.jpg", "Patient_ID": "1", "Study": "2", "Extra": "?", "Edema": "1.0", "Fracture": "1"}
    path = write(tmp_path / "a.csv", [[values.get(name, "0") for name in order]], order, prefix="\ufeff")
    table = read_label_csv(path, B)
    assert [label for place, label in enumerate(LABELS) if table.targets[0, place]] == ["Edema", "Fracture"]
    assert table.about["study"][0] == "002"
    assert table.targets.dtype == np.float32
    assert table.about["view"][0] == "" == table.about["sex"][0]


def test_the_first_view_column_that_is_not_blank_counts(tmp_path: Path) -> None:
    header = [*HEADER, "ViewCategory", "ViewPosition", "Sex", "Age"]
    rows = [[*row("a.jpg"), "Frontal", "PA", "Male", " 60 "], [*row("b.jpg"), "Lateral", "", "", ""]]
    about = read_label_csv(write(tmp_path / "a.csv", rows, header), B).about
    assert about[["view", "sex", "age"]].to_numpy().tolist() == [["PA", "Male", "60"], ["Lateral", "", ""]]


@pytest.mark.parametrize("storage", ["python", "pyarrow"])
def test_text_columns_are_python_text_whatever_storage_pandas_prefers(tmp_path: Path, storage: str) -> None:
    with pd.option_context("mode.string_storage", storage):
        about = read_label_csv(write(tmp_path / "a.csv", [row("007"), row("NA")]), B).about
        assert set(about.dtypes) == {np.dtype(object)}
        assert {type(value) for value in about.to_numpy().ravel()} == {str}
        assert about.set_index("image_name").loc[["NA", "007"]].index.tolist() == ["NA", "007"]


@pytest.mark.parametrize("cell", ["2", "x", "-1", "", "nan", "0.5", "1e0"])
def test_a_bad_label_is_named_with_line_and_column(tmp_path: Path, cell: str) -> None:
    path = write(tmp_path / "a.csv", [row("a.jpg"), row("b.jpg", Lung_Opacity=cell), row("c.jpg", Edema=cell)])
    with pytest.raises(UserError, match=r"a\.csv, line 3, column 'Lung Opacity'.*1 more") as caught:
        read_label_csv(path, B)
    assert "\n" not in str(caught.value)


def test_blanks_and_uncertain_are_read_only_by_choice(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", [row("a.jpg", Edema="", Fracture="-1", Pneumonia="NaN")])
    for wrong in ({}, {"blank": "zero"}, {"uncertain": "one"}):
        with pytest.raises(UserError, match=r"--blank|--uncertain"):
            read_label_csv(path, with_rules(**wrong))
    table = read_label_csv(path, with_rules(blank="zero", uncertain="one"))
    assert [label for place, label in enumerate(LABELS) if table.targets[0, place]] == ["Fracture"]
    assert table.targets.sum() == 1
    assert read_label_csv(path, with_rules(blank="zero", uncertain="zero")).targets.sum() == 0


def test_cells_are_masked_or_soft_label_by_label(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", [row("a.jpg", Edema="", Fracture="-1", Pneumonia="-1.0", Pneumothorax=" NA ")])
    task = dataclasses.replace(B, blank={"Edema": "masked", "*": "one"}, uncertain={"Pneumonia": 0.625, "*": "masked"})
    (cells,) = read_label_csv(path, task).targets
    by_label = dict(zip(LABELS, cells.tolist(), strict=True))
    assert np.isnan([by_label["Edema"], by_label["Fracture"]]).all()
    assert (by_label["Pneumonia"], by_label["Pneumothorax"], by_label["Atelectasis"]) == (0.625, 1, 0)


def test_a_missing_column_is_named_with_its_near_miss(tmp_path: Path) -> None:
    header = ["Lung opacity" if name == "Lung Opacity" else name for name in HEADER]
    with pytest.raises(UserError, match=r"'Lung Opacity' is missing; the nearest is 'Lung opacity'"):
        read_label_csv(write(tmp_path / "a.csv", [row("a.jpg")], header), B)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        (",".join(HEADER) + "\n", "no rows"),
        (",".join([*HEADER, "Edema"]) + "\n" + ",".join([*row("a.jpg"), "0"]) + "\n", "'Edema' appears 2 times"),
        (",".join(HEADER) + "\n" + ",".join(row("a.jpg")[:-1]) + "\n", "line 2: 16 cells"),
        (",".join(HEADER) + "\n" + ",".join(row("a.jpg", "x1")) + "\n", "line 2: Patient_ID 'x1'"),
        (",".join(HEADER) + '\n"' + ",".join(row("a.jpg")) + "\n", "line 2"),
    ],
)
def test_a_malformed_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read_label_csv(path, B)


def test_a_file_that_is_missing_or_no_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such CSV"):
        read_label_csv(tmp_path / "a.csv", B)
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00bad")
    with pytest.raises(UserError, match="not UTF-8"):
        read_label_csv(tmp_path / "b.csv", B)


def test_a_repeated_name_is_named_with_both_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", [row("a.jpg"), row("b.jpg"), row("a.jpg", "212")])
    with pytest.raises(UserError, match=r"'a\.jpg' is in line 2 and again in line 4"):
        read_label_csv(path, B)


@pytest.mark.parametrize(
    "name", ["../a.jpg", "/etc/passwd", "..", "x/../a.jpg", "x//a.jpg", "./a.jpg", "x/", "x\\a.jpg", "", " ", "a\0.jpg"]
)
def test_a_name_that_leaves_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="line 2: image name"):
        read_label_csv(write(tmp_path / "a.csv", [row(name)]), B)


def test_without_a_patient_column_each_image_is_its_own_unless_its_name_says_more(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", [["p/a.jpg", "1"], ["7_2_1.jpg", "0"]], ["Image_name", "Edema"])
    task = Task(name="mine", labels=("Edema",))
    assert list(read_label_csv(path, task).about["patient"]) == ["p/a.jpg", "7_2_1.jpg"]
    named = dataclasses.replace(task, names="patient_study_image")
    about = read_label_csv(path, named).about
    assert about[["patient", "study"]].to_numpy().tolist() == [["p/a.jpg", ""], ["00000007", "002"]]


def test_text_patients_are_compared_after_normalising(tmp_path: Path) -> None:
    task = Task(name="mine", labels=("Edema",), columns=Columns(image="f", patient="who"))
    rows = [["a", " Mu\u0308ller ", "0"], ["b", "M\u00fcller", "1"], ["c", "007", "1"], ["d", "7", "1"]]
    table = read_label_csv(write(tmp_path / "a.csv", rows, ["f", "who", "Edema"]), task)
    assert list(table.about["patient"]) == ["Müller", "Müller", "007", "7"]
    for bad, told in ((" ", "is blank"), ("x" * 129, "more than 128"), ("a\x7fb", "control character")):
        with pytest.raises(UserError, match=f"line 2: who .*{told}"):
            read_label_csv(write(tmp_path / "b.csv", [["a", bad, "0"]], ["f", "who", "Edema"]), task)


def test_a_template_keeps_its_header_rows_and_label_order(tmp_path: Path) -> None:
    header = ["Image_name", "Edema", "Atelectasis"]
    path = write(tmp_path / "a.csv", [["b.jpg", "0.5", "0"], ["a.jpg", "0", "0"]], header)
    template = read_template(path, B)
    assert template.image_names == ("b.jpg", "a.jpg")
    assert template.labels == (("Edema", LABELS.index("Edema")), ("Atelectasis", 0))
    assert template.header == tuple(header)
    assert (template.image_column, len(template)) == ("Image_name", 2)


def test_a_template_with_an_unknown_or_no_label_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'edema' is not a label.*'Edema'"):
        read_template(write(tmp_path / "a.csv", [["b.jpg", "0"]], ["Image_name", "edema"]), B)
    with pytest.raises(UserError, match="no label column"):
        read_template(write(tmp_path / "a.csv", [["b.jpg"]], ["Image_name"]), B)
