"""Label CSVs and templates: exact names, normalised patients, and errors that name line and column."""

import dataclasses
import gzip
import time
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


@pytest.mark.parametrize("cell", ["2", "x", "-1", "", "nan", "1e0", "1.5", "-0.5", "inf", "0x1", "1_0", "0.5.1"])
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
        (",".join(HEADER) + "\n" + ",".join(row("a.jpg" * 50_000)) + "\n", "line 2: not readable as CSV .field larger"),
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


MINE = Task(name="mine", labels=("Edema", "Pleural effusion"), columns=Columns(image="file", patient="who"))
MINE_TEXT = "file,who,Edema,Pleural effusion\na.png,P1,1,0\nb.png,P2,0,0.25\n"


def test_numbers_between_0_and_1_are_soft_labels(tmp_path: Path) -> None:
    texts = ["0.5", ".25", "1.00", "0.0", "5e-05", "2.5e-01", " 0.75 ", "1"]
    path = write(tmp_path / "a.csv", [[f"{n}.png", text] for n, text in enumerate(texts)], ["Image_name", "Edema"])
    targets = read_label_csv(path, Task(name="mine", labels=("Edema",))).targets
    assert targets.dtype == np.float32
    assert targets.ravel().tolist() == np.float32([0.5, 0.25, 1, 0, 5e-05, 0.25, 0.75, 1]).tolist()


@pytest.mark.parametrize(("separator", "called"), [(";", "';'"), ("\t", "tabs")])
def test_another_separator_is_read_and_said(tmp_path: Path, separator: str, called: str) -> None:
    (tmp_path / "a.csv").write_text(MINE_TEXT.replace(",", separator))
    table = read_label_csv(tmp_path / "a.csv", MINE)
    assert table.targets.tolist() == [[1, 0], [0, 0.25]]
    assert list(table.about["patient"]) == ["P1", "P2"]
    assert len(table.notes) == 1
    assert called in table.notes[0]
    (tmp_path / "b.csv").write_text(MINE_TEXT.replace(",", separator).replace("0.25", "0,25"))
    with pytest.raises(UserError, match=r"line 3, column 'Pleural effusion': '0,25' has a decimal comma"):
        read_label_csv(tmp_path / "b.csv", MINE)


def test_the_separator_is_what_the_header_holds_most_often(tmp_path: Path) -> None:
    (tmp_path / "b.csv").write_text(MINE_TEXT.replace(",", ";").replace("Pleural effusion", "Effusion, any"))
    task = dataclasses.replace(
        MINE, labels=tuple(label.replace("Pleural effusion", "Effusion, any") for label in MINE.labels)
    )
    assert read_label_csv(tmp_path / "b.csv", task).targets.tolist() == [[1, 0], [0, 0.25]]
    (tmp_path / "a.csv").write_text(MINE_TEXT.replace("who", "who;x"))
    task = dataclasses.replace(MINE, columns=Columns(image="file", patient="who;x"))
    assert read_label_csv(tmp_path / "a.csv", task).notes == ()


def test_a_gzipped_table_is_known_by_its_bytes_and_bounded(tmp_path: Path) -> None:
    for name in ("a.csv.gz", "a.csv"):
        (tmp_path / name).write_bytes(gzip.compress(MINE_TEXT.encode()))
        assert len(read_label_csv(tmp_path / name, MINE)) == 2
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(MINE_TEXT.encode() * 100)[:-20])
    with pytest.raises(UserError, match="damaged or incomplete gzip file"):
        read_label_csv(tmp_path / "b.csv.gz", MINE)
    bomb = b"file,who,Edema,Pleural effusion,text\n" + b"a.png,P1,1,0," + b"x" * 100_000 + b"\n"
    bomb = gzip.compress(bomb) + gzip.compress((b"a.png,P1,1,0," + b"x" * 100_000 + b"\n") * 700)
    (tmp_path / "c.csv.gz").write_bytes(bomb)
    with pytest.raises(UserError, match=r"the unpacked table has more than 67,108,864 characters"):
        read_label_csv(tmp_path / "c.csv.gz", MINE)
    (tmp_path / "d.csv.gz").write_bytes(gzip.compress(b"0" * 2**25))
    with pytest.raises(UserError, match=r"a line has more than 16,777,216 characters"):
        read_label_csv(tmp_path / "d.csv.gz", MINE)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (MINE_TEXT.encode("utf-16"), "not UTF-8 text but UTF-16"),
        (MINE_TEXT.encode("utf-16-le"), "not UTF-8 text but UTF-16"),
        (
            MINE_TEXT.replace("P2", "M\u00fcller").encode("cp1252"),
            r"not UTF-8 text .line 3, Windows-1252 .*'M\u00fcller'",
        ),
        (gzip.compress(MINE_TEXT.replace("P2", "\u00fc").encode("cp1252"), mtime=0), "not UTF-8 text .line 3"),
        (MINE_TEXT.encode() + b"c\x81,P,0,0", r"not UTF-8 text \(line 4\)"),
        (b"PK\x03\x04 and so on", "a ZIP or Excel file"),
    ],
)
def test_text_that_is_not_utf8_is_named_for_what_it_is(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(UserError, match=told) as caught:
        read_label_csv(tmp_path / "a.csv", MINE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("header", "flags"),
    [
        ("File,who,Edema,Pleural effusion", "'file' is missing; the nearest is 'File'; give --image-column File,"),
        ("image_id,who,Edema,Pleural effusion", "'file' is missing; give --image-column image_id,"),
        ("x,who,Edema,Pleural effusion", "--image-column x, or rename"),  # its first cell is the name of an image
        ("file,Patient ID,Edema,Pleural effusion", "'who' is missing; give --patient-column 'Patient ID', or"),
        ("file,who,edema,Pleural Effusion", "(and 1 more: Pleural effusion); give --labels 'edema,Pleural Effusion',"),
        (
            "Bild.png,subject,Edema,Pleural_effusion",
            "give --image-column Bild.png --patient-column subject --labels Ed",
        ),
        ("file,who,Edema,other", "give --labels A,B,C; its columns: file, who, Edema, other"),
        ("file,x,Edema,Pleural effusion", "'who' is missing; give --patient-column NAME; its columns: file, x, Edema"),
        ('file,who,Edema,"Pleural,effusion"', "give --labels @FILE (a label a line)"),
    ],
)
def test_columns_that_are_nearly_right_are_answered_with_the_flags(tmp_path: Path, header: str, flags: str) -> None:
    (tmp_path / "a.csv").write_text(header + "\na.png,P1,1,0\n")
    with pytest.raises(UserError) as caught:
        read_label_csv(tmp_path / "a.csv", MINE)
    assert flags in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path / 'a.csv'}: column ")
    assert "\n" not in str(caught.value)


def test_the_flags_of_study_and_split_are_named_too(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(
        MINE_TEXT.replace("who", "Accession,Partition").replace("P1", "1,x").replace("P2", "2,")
    )
    task = dataclasses.replace(MINE, columns=Columns(image="file", study="exam_no", split="set"))
    with pytest.raises(UserError, match="give --study-column Accession --split-column Partition, or rename"):
        read_label_csv(tmp_path / "a.csv", task)


def test_a_tables_own_split_column_is_read(tmp_path: Path) -> None:
    splits = ["train", " Train", "Validation", "val", "validate", "TEST", "", "fold1"]
    path = write(tmp_path / "a.csv", [[f"{n}", s, "0"] for n, s in enumerate(splits)], ["Image_name", "set", "Edema"])
    task = Task(name="mine", labels=("Edema",), columns=Columns(split="set"))
    read = ["train", "train", "valid", "valid", "valid", "test", "", "fold1"]
    assert list(read_label_csv(path, task).about["split"]) == read
    assert set(read_label_csv(path, dataclasses.replace(task, columns=Columns())).about["split"]) == {""}


def test_a_table_of_bad_cells_is_refused_in_seconds(tmp_path: Path) -> None:
    rows = [[f"{n}.png", "1", "1", *(f"bad{n}" for _ in LABELS)] for n in range(30_000)]
    path = write(tmp_path / "a.csv", rows)
    started = time.process_time()
    with pytest.raises(UserError, match=rf"line 2, column '{LABELS[0]}': 'bad0' .*419,999 more"):
        read_label_csv(path, B)
    assert time.process_time() - started < 5


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
