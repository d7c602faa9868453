"""What a run writes of where it took place."""

import subprocess
from pathlib import Path

import pytest

from cxrdist.runs.start import commit_of

pytestmark = pytest.mark.fast


def test_the_commit_is_that_of_a_clone_and_not_of_a_clone_around_an_installed_package(tmp_path):
    clone = tmp_path.resolve()
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(clone)]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "--message", "first"], check=True)
    installed = clone / ".venv" / "site-packages"
    installed.mkdir(parents=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert commit_of(clone) == head
    assert commit_of(installed) == ""


def test_without_git_or_a_clone_there_is_no_commit(tmp_path, monkeypatch):
    assert commit_of(tmp_path) == ""
    monkeypatch.setenv("PATH", "")
    assert commit_of(Path(__file__).parents[2]) == ""
