"""Tasks: what is valid, how ids are compared, what is the same, and the files they come from."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxrdist.errors import UserError
from cxrdist.task import LAYOUTS, MAX_LABELS, PUBLISHED, TASKS, Columns, Task, load_task, parse_readings

pytestmark = pytest.mark.fast
B = TASKS["b"]
MINE = Task(name="mine", labels=("x", "y"))


def test_the_built_in_tasks_are_the_competitions_divisions_and_five_public_datasets() -> None:
    assert list(TASKS) == ["a", "b", "chexpert", "mimic", "nih", "padchest", "vindr"]
    assert set(LAYOUTS) == TASKS.keys() - PUBLISHED.keys() == {"a", "b"}
    assert {task.name: task.format for task in PUBLISHED.values()} == {name: name for name in PUBLISHED}
    assert {len(PUBLISHED[name].labels) for name in ("chexpert", "mimic", "nih", "vindr")} == {14}
    policies = {name: (task.blank["*"], task.uncertain["*"]) for name, task in PUBLISHED.items()}
    assert policies == {
        "chexpert": ("zero", "masked"),
        "mimic": ("zero", "masked"),
        "nih": ("error", "error"),
        "padchest": ("masked", "error"),
        "vindr": ("error", "masked"),
    }
    assert B.num_labels == 14
    assert (B.folder, MINE.folder) == ("div_b", "mine")
    assert (TASKS["a"].unreadable, len(B.unreadable)) == ((), 3)
    assert (LAYOUTS["b"].train_csv, LAYOUTS["b"].template_csv) == ("train2.csv", "sample_submission_2.csv")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"name": ""}, "task name"),
        ({"name": "../x"}, "task name"),
        ({"labels": ()}, "0 labels"),
        ({"labels": tuple(map(str, range(MAX_LABELS + 1)))}, "1001 labels"),
        ({"labels": ("x", "x")}, "'x' is there twice"),
        ({"labels": ("x", " ")}, "is blank"),
        ({"labels": ("x", "a\nb")}, "control character"),
        ({"labels": ("x", "a\0b")}, "control character"),
        ({"blank": {"z": "zero"}}, "blank names 'z'"),
        ({"uncertain": {"x": 1.5}}, "not in"),
        ({"blank": {"x": float("nan")}}, "not in"),
        ({"blank": {"*": 2}}, "not in"),
    ],
)
def test_values_that_are_not_valid_are_named(change: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        dataclasses.replace(MINE, **change)


def test_a_patient_of_digits_is_the_same_with_and_without_leading_zeros() -> None:
    assert {B.patient(text) for text in ("211", "00000211", " 211.0 ")} == {"00000211"}
    assert [B.study(text) for text in ("1", "1234", "2.0", "")] == ["001", "1234", "002", ""]
    assert MINE.study("1") == "1"
    for text in ("P1", "123456789", "", "²", "\uff11"):
        with pytest.raises(ValueError, match="at most 8 digits"):
            B.patient(text)


def test_a_patient_of_text_is_compared_as_text() -> None:
    assert [MINE.patient(text) for text in ("007", "7", " a b ", "Mu\u0308", "x" * 128)] == [
        "007",
        "7",
        "a b",
        "Mü",
        "x" * 128,
    ]
    for text, told in (("", "blank"), ("x" * 129, "128"), ("a\tb", "control"), ("\ud800", "control")):
        with pytest.raises(ValueError, match=told):
            MINE.patient(text)


def test_a_name_says_patient_and_study_only_by_the_tasks_rule() -> None:
    assert B.ids_in_name("211_1_000.jpg") == ("00000211", "001")
    assert B.ids_in_name("some/folder/00000211_012_000.png") == ("00000211", "012")
    assert B.ids_in_name("x.jpg") is None
    assert B.ids_in_name("123456789_001_001.jpg") is None
    assert MINE.ids_in_name("211_1_000.jpg") is None


def test_differences_are_those_that_matter_and_name_the_first_label() -> None:
    assert B.differences(dataclasses.replace(B, blank={"*": "zero"}, unreadable=(), columns=Columns())) == []
    assert B.differences(TASKS["a"]) == ["task b and a"]
    assert MINE.differences(dataclasses.replace(MINE, labels=("y", "x"))) == ["label 1: 'x' and 'y'"]
    assert MINE.differences(dataclasses.replace(MINE, labels=("x",))) == ["2 and 1 labels"]


texts = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1, max_size=20)


@given(
    labels=st.lists(texts.filter(str.strip), min_size=1, max_size=5, unique=True),
    columns=st.builds(Columns, image=texts, patient=texts, view=st.lists(texts, max_size=2).map(tuple)),
    reading=st.sampled_from(["error", "zero", "one", "masked"]),
    value=st.floats(0, 1),
)
def test_a_task_comes_back_from_json_and_toml(
    tmp_path_factory: pytest.TempPathFactory, labels: list[str], columns: Columns, reading: Any, value: float
) -> None:
    task = Task(
        name="mine",
        labels=tuple(labels),
        columns=columns,
        blank={labels[0]: reading, "*": value},
        uncertain={labels[-1]: value, "*": reading},
    )
    assert Task.from_json(task.to_json(), "x") == task
    path = tmp_path_factory.mktemp("task") / "mine.toml"
    path.write_text(task.to_toml(), encoding="utf-8")
    assert load_task(str(path)) == task


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('name = "mine"', "labels"),
        ('name = "mine"\nlabels = ["x"]\nlabel = 3', "label"),
        ('name = "mine"\nlabels = ["x", 3]', r"labels\.1"),
        ('name = "mine"\nlabels = ["x", "x"]', "twice"),
        ('name = "mine"\nlabels = "x"', "labels"),
        ('name = "mine"\nlabels = ["x"]\nmetric = "auc"', "metric"),
        ('name = "mine"\nlabels = ["x"]\n[blank]\nx = "maybe"', "blank"),
        ("name = mine", "not readable as TOML"),
        ("when = 2020-01-01", "not readable as TOML"),
    ],
)
def test_a_file_that_is_no_task_is_one_named_error(tmp_path: Path, content: str, told: str) -> None:
    (tmp_path / "mine.toml").write_text(content)
    with pytest.raises(UserError, match=rf"mine\.toml: .*{told}") as caught:
        load_task(str(tmp_path / "mine.toml"))
    assert "\n" not in str(caught.value)


def test_tasks_are_loaded_by_name_or_from_a_json_file(tmp_path: Path) -> None:
    assert load_task("b") is load_task("B") is B
    assert load_task("A") is TASKS["a"]
    with pytest.raises(UserError, match="--task NIH: no such task"):
        load_task("NIH")
    assert load_task("padchest") is TASKS["padchest"]
    (tmp_path / "mine.json").write_text(json.dumps({"name": "mine", "labels": ["x", "y"]}))
    assert load_task(str(tmp_path / "mine.json")) == MINE
    for text, told in (("c", "no such task; one of a, b"), (str(tmp_path / "none.toml"), "no such file")):
        with pytest.raises(UserError, match=told):
            load_task(text)
    (tmp_path / "bad.json").write_bytes(b"\xff{}")
    with pytest.raises(UserError, match=r"bad\.json: "):
        load_task(str(tmp_path / "bad.json"))


@pytest.mark.parametrize(
    ("text", "readings"),
    [
        ("masked", {"*": "masked"}),
        ("0.6", {"*": 0.6}),
        ("1", {"*": 1.0}),
        (".5", {"*": 0.5}),
        (" Zero ", {"*": "zero"}),
        ("Edema=one,Mass=zero", {"Edema": "one", "Mass": "zero"}),
        ("masked, Edema=0.25,", {"*": "masked", "Edema": 0.25}),
        ("Edema=error,zero", {"Edema": "error", "*": "zero"}),
        ("a,b=zero,a=one", {"a,b": "zero", "a": "one"}),  # labels with ',' and '='
        ("x=y=zero,x=one", {"x=y": "zero", "x": "one"}),
        ("masked=one", {"masked": "one"}),
    ],
)
def test_readings_are_for_all_labels_or_for_some(text: str, readings: dict[str, Any]) -> None:
    labels = ("Edema", "Mass", "a", "a,b", "x", "x=y", "masked")
    found = parse_readings(text, labels)
    assert found == readings
    assert all(isinstance(value, str | float) for value in found.values())


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("mask", "'mask' is none of error, zero, one, masked or a number from 0 to 1; the nearest is 'masked'"),
        ("Edema", "'Edema' is none of .*; the nearest is 'Edema'"),
        ("Edma=zero", "there is no label 'Edma'; the nearest is 'Edema'"),
        ("edema=zero", "there is no label 'edema'; the nearest is 'Edema'"),
        ("Edema=two", "'two' is none of"),
        ("1.5", r"'1\.5' is none of"),
        ("-1", "'-1' is none of"),
        ("nan", "'nan' is none of"),
        ("zero,one", "a value for all labels is there twice"),
        ("Edema=one,Edema=one", "'Edema' is there twice"),
        ("Edema=", "'' is none of"),
        ("zero,,one", "'' is none of"),
        ("", "say how to read"),
        (" , ", "is none of"),
    ],
)
def test_a_reading_that_is_not_valid_is_named_with_the_flag(text: str, told: str) -> None:
    with pytest.raises(UserError, match=f"^--uncertain.*: .*{told}") as caught:
        parse_readings(text, ("Edema", "Mass"), "--uncertain")
    assert text.strip() in str(caught.value)


def test_readings_change_all_labels_or_only_those_named() -> None:
    task = dataclasses.replace(MINE, uncertain={"*": "masked", "x": "one"})
    assert task.with_readings(None, None) == task
    assert task.with_readings("zero", 0.5).uncertain == {"*": 0.5}
    assert task.with_readings(None, {"y": "zero"}).uncertain == {"*": "masked", "x": "one", "y": "zero"}
    changed = task.with_readings({"y": 0.25}, {"*": "zero"})
    assert (changed.blank, changed.uncertain) == ({"*": "error", "y": 0.25}, {"*": "zero"})
    assert [changed.reading("blank", label) for label in MINE.labels] == ["error", 0.25]
    with pytest.raises(UserError, match="uncertain names 'z'"):
        task.with_readings(None, {"z": "zero"})


def test_public_datasets_names_say_patient_and_study() -> None:
    for name, image, ids in (
        ("chexpert", "CheXpert-v1.0/train/patient00001/study12/view1_frontal.jpg", ("patient00001", "study12")),
        ("chexpert", "patient00001/study1/view1_frontal.jpg", ("patient00001", "study1")),
        ("mimic", "files/p10/p10000032/s50414267/02aa804e-bde0afdd.jpg", ("10000032", "50414267")),
        ("nih", "images_001/images/00000013_004.png", ("13", "4")),
        ("nih", "00000010_000.png", ("10", "0")),
        ("chexpert", "view1_frontal.jpg", None),
        ("nih", "x.png", None),
        ("padchest", "1_2.png", None),
    ):
        assert TASKS[name].ids_in_name(image) == ids
