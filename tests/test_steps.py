"""Steps: what is reused, what is resumed, what is made again, and what is kept."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cxrdist import steps
from cxrdist.errors import UserError
from cxrdist.steps import Step, run_command, run_steps, unfinished

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
        run_steps(self.steps(), self.folder)
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
        run_command("look", ["python", "-c", "raise SystemExit(2)"])


def test_training_is_resumed_only_when_the_same_training_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def fail_once(name: str, words: list[str]) -> None:
        commands.append(words)
        (tmp_path / "run").mkdir(exist_ok=True)
        if len(commands) == 1:
            raise UserError("killed")
        (tmp_path / "run" / "done").touch()

    monkeypatch.setattr(steps, "run_command", fail_once)

    def step(recipe: str) -> Step:
        run = tmp_path / "run"
        return Step(name="train", words=("train",), inputs=(recipe,), results=(run / "done",), folder=run, resume=True)

    with pytest.raises(UserError):
        run_steps([step("a")], tmp_path)
    run_steps([step("a")], tmp_path)
    (tmp_path / "run" / "old").touch()
    run_steps([step("b")], tmp_path)
    assert commands == [["train"], ["train", "--resume"], ["train"]]
    assert not (tmp_path / "run" / "old").exists()


def test_stamp_keeps_the_command_for_the_reader(tmp_path: Path) -> None:
    Workshop(tmp_path).run()
    stamp = json.loads((tmp_path / "steps" / "first.json").read_text())
    assert stamp["finished"] > 0
    assert {"command", "seconds", "key"} <= set(stamp)


def test_what_is_unfinished_is_what_would_run(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)
    assert unfinished(workshop.steps(), tmp_path) == ["first", "second", "third"]
    workshop.run()
    assert unfinished(workshop.steps(), tmp_path) == []
    (tmp_path / "second").unlink()
    assert unfinished(workshop.steps(), tmp_path) == ["second", "third"]
    workshop.source.write_text("two")
    assert unfinished(workshop.steps(), tmp_path) == ["first", "second", "third"] == workshop.run()


def test_words_that_change_no_result_are_not_compared_and_a_folder_to_keep_is_renamed(tmp_path: Path) -> None:
    calls: list[str] = []

    def step(word: str, result: str) -> list[Step]:
        def call() -> None:
            calls.append(word)
            (tmp_path / "run").mkdir()

        run = tmp_path / "run"
        words = ("train", word)
        return [Step(name="s", words=words, identity=(result,), call=call, results=(run,), folder=run, keep=True)]

    run_steps(step("--threads=1", "one"), tmp_path)
    (tmp_path / "run" / "checkpoint").touch()
    run_steps(step("--threads=2", "one"), tmp_path)
    run_steps(step("--threads=2", "two"), tmp_path)
    assert calls == ["--threads=1", "--threads=2"]
    assert [path.parent.name[:10] for path in tmp_path.glob("*/checkpoint")] == ["run_until_"]
