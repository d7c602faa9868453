"""The demo's bookkeeping: what is reused, what is resumed, what is made again, and how patients are held out."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cxrdist.demo import __main__ as demo
from cxrdist.demo import steps as demo_steps
from cxrdist.demo.__main__ import Files, hold_out
from cxrdist.demo.phantoms import CSV_COLUMNS
from cxrdist.demo.steps import Step, run_command, run_steps
from cxrdist.errors import UserError
from cxrdist.tables import read_label_csv, read_template
from cxrdist.task import TASKS

pytestmark = pytest.mark.fast


class Workshop:
    """Three steps in a row that copy and count; `calls` says which of them ran."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls: list[str] = []
        self.source = folder / "source.txt"
        self.source.write_text("one")
        self.break_at = ""

    def steps(self) -> list[Step]:
        def call(name: str, before: Path) -> Callable[[], None]:
            def run() -> None:
                self.calls.append(name)
                if name == self.break_at:
                    raise KeyboardInterrupt
                (self.folder / name).write_text(before.read_text() + name)

            return run

        names = ("first", "second", "third")
        before = (self.source, self.folder / "first", self.folder / "second")
        return [
            Step(
                name=name,
                words=(),
                call=call(name, path),
                needs=names[:number][-1:],
                inputs=(self.source,) if number == 0 else (),
                results=(self.folder / name,),
            )
            for number, (name, path) in enumerate(zip(names, before, strict=True))
        ]

    def run(self) -> list[str]:
        self.calls.clear()
        run_steps(self.steps(), self.folder, {})
        return list(self.calls)


def test_second_run_reuses_finished_steps_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workshop = Workshop(tmp_path)
    assert workshop.run() == ["first", "second", "third"]
    assert workshop.run() == []
    assert capsys.readouterr().out.count("reused") == 3


def test_interrupted_run_resumes_at_the_step_that_was_interrupted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workshop = Workshop(tmp_path)
    workshop.break_at = "second"
    with pytest.raises(KeyboardInterrupt):
        workshop.run()
    workshop.break_at = ""
    assert workshop.run() == ["second", "third"]
    assert "second: interrupted before, resumed" in capsys.readouterr().out


def test_changed_input_repeats_what_depends_on_it(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)
    workshop.run()
    workshop.source.write_text("two")
    assert workshop.run() == ["first", "second", "third"]
    assert (tmp_path / "third").read_text() == "twofirstsecondthird"


def test_lost_result_or_damaged_stamp_repeats_the_step(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)
    workshop.run()
    (tmp_path / "second").unlink()
    assert workshop.run() == ["second", "third"]
    (tmp_path / "steps" / "third.json").write_text("{")
    assert workshop.run() == ["third"]


def test_failed_command_is_named_with_its_exit_code() -> None:
    with pytest.raises(UserError, match="step 'look' ended with exit code 2"):
        run_command("look", ["python", "-c", "raise SystemExit(2)"], {})


def test_training_is_resumed_only_when_the_same_training_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def fail_once(name: str, words: list[str], environment: dict[str, str]) -> None:
        commands.append(words)
        (tmp_path / "run").mkdir(exist_ok=True)
        if len(commands) == 1:
            raise UserError("killed")
        (tmp_path / "run" / "done").touch()

    monkeypatch.setattr(demo_steps, "run_command", fail_once)

    def step(recipe: str) -> Step:
        run = tmp_path / "run"
        return Step(name="train", words=("train",), inputs=(recipe,), results=(run / "done",), folder=run, resume=True)

    with pytest.raises(UserError):
        run_steps([step("a")], tmp_path, {})
    run_steps([step("a")], tmp_path, {})
    (tmp_path / "run" / "old").touch()
    run_steps([step("b")], tmp_path, {})
    assert commands == [["train"], ["train", "--resume"], ["train"]]
    assert not (tmp_path / "run" / "old").exists()


def test_held_out_patients_are_disjoint_and_nothing_is_lost(tmp_path: Path) -> None:
    rows = [
        [f"{patient:08d}_001_{image:03d}.jpg", patient, 1, "", "", "Frontal", "PA"]
        + [int((patient + column) % 5 == 0) for column in range(TASKS["b"].num_labels)]
        for patient in range(40)
        for image in range(1 + patient % 3)
    ]
    source, task = tmp_path / "all.csv", TASKS["b"]
    files = Files.below(tmp_path / "demo", task)
    with source.open("w", newline="") as file:
        csv.writer(file).writerows([list(CSV_COLUMNS), *rows])
    hold_out(source, files, task, seed=0)
    train, test = (read_label_csv(path, task).about for path in (files.train_csv, files.truth))
    assert sorted([*train["image_name"], *test["image_name"]]) == sorted(row[0] for row in rows)
    assert not set(train["patient"]) & set(test["patient"])
    assert 0.1 < len(test) / len(rows) < 0.3
    names = list(read_template(files.template, task).image_names)
    assert sorted(names) == sorted(test["image_name"])
    assert names != sorted(names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "nowhere", "--csv", "l.csv"], "nowhere: no such folder"),
        (["--images", "empty", "--csv", "l.csv"], "holds no .png, .jpg or .jpeg"),
        (["--images", "images", "--csv", "l.csv"], "Pneumothorax"),
        (["--images", "images"], "--csv FILE go together"),
        (["--patients", "3"], "too few"),
    ],
)
def test_mistake_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").touch()
    header = [name for name in CSV_COLUMNS if name != "Pneumothorax"]
    (tmp_path / "l.csv").write_text(",".join(header) + "\n" + ",".join(["1"] * len(header)) + "\n")
    with pytest.raises(UserError, match=message):
        demo.main(arguments)
    assert not (tmp_path / "demo").exists()


def test_stamp_keeps_the_command_for_the_reader(tmp_path: Path) -> None:
    Workshop(tmp_path).run()
    stamp = json.loads((tmp_path / "steps" / "first.json").read_text())
    assert stamp["finished"] > 0
    assert {"command", "seconds", "key"} <= set(stamp)
