"""Label CSVs and templates: exact names, normalised patients, and errors that name line and column."""

from pathlib import Path

import numpy as np
import pytest

from cxrdist.errors import UserError
from cxrdist.labels import LABELS, patient_of, read_label_csv, read_template

pytestmark = pytest.mark.fast
HEADER = ["Image_name", "Patient_ID", "Study", *LABELS]


def write(path: Path, rows: list[list[str]], header: list[str] | None = None, prefix: str = "") -> Path:
    lines = [",".join(row) for row in [header or HEADER, *rows]]
    path.write_text(prefix + "\n".join(lines) + "\n", encoding="utf-8")
    return path


def row(name: str, patient: str = "211", **labels: str) -> list[str]:
    return [name, patient, "1", *(labels.get(label.replace(" ", "_"), "0") for label in LABELS)]


def test_names_come_back_exactly(tmp_path: Path) -> None:
    names = ["1.2.840.113.jpg", "1.2.840.114.jpg", " a b.jpg", "Röntgen.png", "NA", "007", "nan.jpg", "'x'.jpg"]
    table = read_label_csv(write(tmp_path / "a.csv", [row(name) for name in names]))
    assert list(table["image_name"]) == names


def test_a_patient_is_the_same_with_and_without_leading_zeros(tmp_path: Path) -> None:
    table = read_label_csv(
        write(tmp_path / "a.csv", [row("a.jpg", "211"), row("b.jpg", "00000211"), row("c.jpg", "211.0")])
    )
    assert set(table["patient"]) == {"00000211"}
    assert patient_of("211_001_000.jpg") == "00000211"
    with pytest.raises(UserError, match=r"x\.jpg"):
        patient_of("x.jpg")


def test_columns_are_read_by_name_in_any_order_and_behind_a_bom(tmp_path: Path) -> None:
    order = [*reversed(LABELS), "Study", "Extra", "Image_name", "Patient_ID"]
    values = {"Image_name": "a.jpg", "Patient_ID": "1", "Study": "2", "Extra": "?", "Edema": "1.0", "Fracture": "1"}
    path = write(tmp_path / "a.csv", [[values.get(name, "0") for name in order]], order, prefix="\ufeff")
    table = read_label_csv(path)
    assert [label for label in LABELS if table[label][0]] == ["Edema", "Fracture"]
    assert table["study"][0] == "002"
    assert table[list(LABELS)].to_numpy().dtype == np.int8
    assert table["view"][0] == "" == table["sex"][0]


@pytest.mark.parametrize("cell", ["2", "x", "-1", "", "nan", "0.5", "1e0"])
def test_a_bad_label_is_named_with_line_and_column(tmp_path: Path, cell: str) -> None:
    path = write(tmp_path / "a.csv", [row("a.jpg"), row("b.jpg", Lung_Opacity=cell), row("c.jpg", Edema=cell)])
    with pytest.raises(UserError, match=r"a\.csv, line 3, column 'Lung Opacity'.*1 more") as caught:
        read_label_csv(path)
    assert "\n" not in str(caught.value)


def test_blanks_and_uncertain_are_read_only_by_choice(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", [row("a.jpg", Edema="", Fracture="-1", Pneumonia="NaN")])
    for wrong in ({}, {"blank": "zero"}, {"uncertain": "one"}):
        with pytest.raises(UserError, match=r"--blank|--uncertain"):
            read_label_csv(path, **wrong)
    table = read_label_csv(path, blank="zero", uncertain="one")
    assert [label for label in LABELS if table[label][0]] == ["Fracture"]
    assert table[list(LABELS)].to_numpy().sum() == 1
    assert read_label_csv(path, blank="zero", uncertain="zero")[list(LABELS)].to_numpy().sum() == 0


def test_a_missing_column_is_named_with_its_near_miss(tmp_path: Path) -> None:
    header = ["Lung opacity" if name == "Lung Opacity" else name for name in HEADER]
    with pytest.raises(UserError, match=r"'Lung Opacity' is missing; the nearest is 'Lung opacity'"):
        read_label_csv(write(tmp_path / "a.csv", [row("a.jpg")], header))


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
        read_label_csv(path)


def test_a_file_that_is_missing_or_no_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such CSV"):
        read_label_csv(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00bad")
    with pytest.raises(UserError, match="not UTF-8"):
        read_label_csv(tmp_path / "b.csv")


def test_a_repeated_name_is_named_with_both_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", [row("a.jpg"), row("b.jpg"), row("a.jpg", "212")])
    with pytest.raises(UserError, match=r"'a\.jpg' is in line 2 and again in line 4"):
        read_label_csv(path)


@pytest.mark.parametrize("name", ["../a.jpg", "/etc/passwd", "..", "x/a.jpg", "x\\a.jpg", "", " ", "a\0.jpg"])
def test_a_name_that_leaves_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="line 2: image name"):
        read_label_csv(write(tmp_path / "a.csv", [row(name)]))


def test_a_template_keeps_its_header_rows_and_label_order(tmp_path: Path) -> None:
    header = ["Image_name", "Edema", "Atelectasis"]
    path = write(tmp_path / "a.csv", [["b.jpg", "0.5", "0"], ["a.jpg", "0", "0"]], header)
    table = read_template(path)
    assert list(table["image_name"]) == ["b.jpg", "a.jpg"]
    assert list(table.columns) == ["image_name", "Edema", "Atelectasis"]
    assert table.attrs["header"] == header


def test_a_template_with_an_unknown_or_no_label_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'edema' is not a label.*'Edema'"):
        read_template(write(tmp_path / "a.csv", [["b.jpg", "0"]], ["Image_name", "edema"]))
    with pytest.raises(UserError, match="no label column"):
        read_template(write(tmp_path / "a.csv", [["b.jpg"]], ["Image_name"]))
