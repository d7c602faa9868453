"""What a command writes where nobody said where: git does not see it."""

import argparse
import importlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from cxrdist.flags import COMMANDS

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parents[2]
ELSEWHERE = {  # commands that write nothing of their own, nowhere without a flag, or into a folder that they were given
    *("verify", "recipes", "average", "calibrate", "predict", "app", "export", "doctor", "bench", "completion", "watch")
}
BESIDE = {"submission.csv": ["submission.json"], "report": ["report/report.html", "report/metrics.json"]}


def places(action: argparse.Action) -> list[str]:
    """The default places of an `--out`: its default, else those that its help names."""
    found = [str(action.default)] if action.default is not None else []
    if not found and (said := re.search(r"\(default: (.*)\)", action.help or "")):
        found = re.findall(r"\w+/[<>\w/]+", said[1])
    return [re.sub(r"<\w+>", "any", place) for place in found]


def defaults() -> dict[str, list[str]]:
    """The default outputs of every command that has some."""
    found = {}
    for command in (name for names in COMMANDS.values() for name in names if name not in ELSEWHERE):
        actions = importlib.import_module(f"cxrdist.flags.{command}").parser()._actions
        (out,) = (action for action in actions if "--out" in action.option_strings)
        found[command] = places(out)
    script = (ROOT / "launch.sh").read_text()
    found["launch.sh"] = re.findall(r"--json (\w+\.json)", script)
    return found


def test_every_default_output_is_ignored_by_git() -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    found = defaults()
    assert all(found.values()), found
    assert found["train"] == ["runs/any_any"]
    for command, named in found.items():
        for place in named:
            paths = [*BESIDE.get(place, []), place if Path(place).suffix else f"{place}/file"]
            for path in paths:
                ignored = subprocess.run(["git", "-C", str(ROOT), "check-ignore", "-q", "--no-index", path])
                assert ignored.returncode == 0, f"{command} writes {path}, which git would add"


def test_the_source_itself_is_not_ignored() -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    kept = ["cxrdist/demo/__init__.py", "cxrdist/report/page.py", "shards/README.md", "cxrdist/runs/start.py"]
    for path in kept:
        assert subprocess.run(["git", "-C", str(ROOT), "check-ignore", "-q", "--no-index", path]).returncode == 1, path
