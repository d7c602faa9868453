"""`cxrdist COMMAND`: every command is there by its name and runs as its module does."""

import importlib.metadata
import sys

import pytest

import cxrdist
from cxrdist import __main__ as commands
from tests.test_house import ENTRIES, PACKAGE

pytestmark = [
    pytest.mark.fast,
    pytest.mark.filterwarnings("ignore:.*found in sys.modules"),  # other tests of this process import the commands
]


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["cxrdist", *words])
    with pytest.raises(SystemExit) as ended:
        commands.main()
    return ended.value.code


def test_the_commands_are_the_entries() -> None:
    assert set(commands.MODULES.values()) == ENTRIES
    assert all(commands.about(module) for module in ENTRIES)


@pytest.mark.parametrize("name", sorted(commands.MODULES))
def test_each_command_explains_itself(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, name, "--help") in (0, None)
    assert capsys.readouterr().out.startswith("usage: ")


def test_without_a_command_they_are_listed_and_an_unknown_one_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch) == 0
    assert "  recipes     List the recipes" in capsys.readouterr().out
    assert run(monkeypatch, "recipe") == 2
    assert "invalid choice: 'recipe'" in capsys.readouterr().err


def test_the_version_is_the_packages(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"cxrdist {cxrdist.__version__}\n"
    assert importlib.metadata.version("cxrdist") == cxrdist.__version__


def test_a_commands_mistakes_end_it_as_they_end_its_module(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "recipes", str(PACKAGE / "none.py:mine")) == 2
    assert "none.py: no such file" in capsys.readouterr().err
