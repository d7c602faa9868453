"""Help is true for the command that shows it: no flag tells of another command, none is silent."""

import argparse
import importlib
import re

import pytest

from cxrdist.bench import __main__ as bench
from cxrdist.cli import SHARED_FLAGS
from cxrdist.flags import COMMANDS
from cxrdist.task import LAYOUTS

pytestmark = pytest.mark.fast

NAMES = [name for names in COMMANDS.values() for name in names if name != "bench"]


def actions_of(command: str) -> list[argparse.Action]:
    return [*importlib.import_module(f"cxrdist.flags.{command}").parser()._actions]


@pytest.mark.parametrize("command", NAMES)
def test_every_flag_says_what_it_is_and_every_output_where_it_goes(command: str) -> None:
    parser = importlib.import_module(f"cxrdist.flags.{command}").parser()
    for action in parser._actions:
        assert action.help, action.dest
        if action.dest == "out":
            assert action.required or action.default is not None or "(default: " in action.help, action.help
            assert action.help != SHARED_FLAGS["--out"]["help"]
    text = parser.format_help()
    assert "%%" not in text
    assert "cxrdist." not in re.sub(r"accelerate launch -m cxrdist\.\w+|cxrdist\.load", "", text), "a module's name"


def test_the_competitions_folder_is_drawn_with_every_name_in_it() -> None:
    text = importlib.import_module("cxrdist.flags.preprocess").parser().format_help()
    for layout in LAYOUTS.values():
        for name in (layout.train_csv, f"{layout.train_images}/", f"{layout.test_images}/", layout.template_csv):
            assert f"DIR/{name}" in text


def test_a_shared_flag_says_what_is_true_for_its_command() -> None:
    helps = {name: {action.dest: action.help or "" for action in actions_of(name)} for name in NAMES}
    said = {name: texts.get("csv", "") for name, texts in helps.items()}
    assert all("submission" not in text for text in said.values())
    assert all("dropout" not in helps[name]["device_batch_size"] for name in ("infer", "predict"))
    assert all("accelerate" not in helps[name]["precision"] for name in ("predict", "app"))
    assert "--resume" in helps["train"]["backbone"]
    assert "--resume" not in helps["infer"]["backbone"]


def test_every_benchmark_is_listed_with_what_it_measures_and_says_its_flags(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--help"])
    listed = capsys.readouterr().out
    for name in bench.NAMES:
        assert f"  {name:<12}{bench.about(name)}" in listed
        parser = argparse.ArgumentParser()
        importlib.import_module(f"cxrdist.bench.{name}").add_arguments(parser)
        assert all(action.help for action in parser._actions), name
