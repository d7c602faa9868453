"""500 mutated inputs of every kind, and proof that the fuzz sees each failure that it counts."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def fuzz(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "tests.fuzz", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)


def test_500_inputs_are_fine_or_named() -> None:
    done = fuzz("--inputs", "500", "--seed", "14")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^all +500 ", done.stdout, re.MULTILINE), done.stdout


@pytest.mark.parametrize("kind", ["traceback", "slow", "memory", "wrong", "traceback of a dead process"])
def test_a_failure_is_seen_and_can_be_repeated(kind: str) -> None:
    done = fuzz("--inputs", "1", "--kinds", f"fails: {kind}", "--workers", "1")
    assert done.returncode == 1
    assert f"{kind.split()[0]}: --kinds 'fails: {kind}' --seed 0 --case 0" in done.stdout, done.stdout + done.stderr
