"""`cxrdist COMMAND`: every command is there by its name and runs as its module does."""

import argparse
import importlib
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import cxrdist
from cxrdist import __main__ as commands
from tests.test_house import ENTRIES, PACKAGE

pytestmark = [
    pytest.mark.fast,
    pytest.mark.filterwarnings("ignore:.*found in sys.modules"),  # other tests of this process import the commands
]


NAMES = [name for names in commands.COMMANDS.values() for name in names]


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["cxrdist", *words])
    with pytest.raises(SystemExit) as ended:
        commands.main()
    return ended.value.code


def test_the_commands_are_the_entries() -> None:
    assert {commands.RENAMED.get(name, name) for name in NAMES} == ENTRIES
    assert all(map(commands.about, NAMES))


@pytest.mark.parametrize("name", NAMES)
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
    assert "there is no command 'recipe' (did you mean recipes?)" in capsys.readouterr().err


def test_the_version_is_the_packages(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"cxrdist {cxrdist.__version__}\n"
    assert importlib.metadata.version("cxrdist") == cxrdist.__version__


def test_a_commands_mistakes_end_it_as_they_end_its_module(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "recipes", str(PACKAGE / "none.py:mine")) == 2
    assert "none.py: no such file" in capsys.readouterr().err


def test_help_and_mistakes_need_neither_torch_nor_pandas() -> None:
    heavy = "torch", "pandas", "pyarrow", "matplotlib", "kornia", "timm", "accelerate"
    code = f"""
import sys
from cxrdist import __main__ as commands
for name in {[name for name in NAMES if name != "bench"]}:
    try:
        commands.parsed(name, ["--help"])
    except SystemExit:
        pass
raise SystemExit(str(sorted(set({heavy}) & set(sys.modules)) or ""))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (1, "") or done.returncode == 0, done.stderr


def test_a_mistyped_flag_is_named_also_where_it_was_a_required_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "average", "--form", "runs/a@1,2") == 2
    assert "required: --from, --out (you wrote --form: did you mean --from?)" in capsys.readouterr().err


def test_every_default_stands_in_the_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (name for name in NAMES if name != "bench"):
        parser = importlib.import_module(f"cxrdist.flags.{name}").parser()
        text = " ".join(parser.format_help().split())
        assert "default []" not in text, name
        for action in parser._actions:
            if action.option_strings and action.default not in (None, False, [], argparse.SUPPRESS):
                assert f"default {action.default}" in text or "default" in action.help, (name, action.dest)


def test_a_shell_completes_commands_and_their_flags(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(monkeypatch, "completion", "bash") in (0, None)
    script = tmp_path / "cxrdist.bash"
    script.write_text(capsys.readouterr().out)
    asked = 'COMP_WORDS=(cxrdist "$@"); COMP_CWORD=$#; _shtab_cxrdist; echo "${COMPREPLY[@]}"'
    for words, completed in ((["train", "--device-b"], "--device-batch-size"), (["calib"], "calibrate")):
        call = ["bash", "-c", f"source {script}; {asked}", "bash", *words]
        assert subprocess.run(call, capture_output=True, text=True).stdout.strip() == completed
