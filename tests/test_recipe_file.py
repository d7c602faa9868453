"""A recipe of the user's own: read, run, checked, copied into the run folder, and compared when the run is resumed."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from cxrdist import recipes, train
from cxrdist.errors import UserError
from cxrdist.recipe_file import read_recipe_file
from cxrdist.runs import member
from cxrdist.runs.documents import OwnRecipe, RunDocument
from tests import training_runs

pytestmark = pytest.mark.fast

MINE = '''
"""Recipes of my own."""
from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from cxrdist.recipes import Group, Inference, Recipe, demo_eva_x


@dataclass
class Rates:
    head: float = 1e-3


def mine(task: str) -> Recipe:
    """Small, with an asymmetric loss."""
    return dataclasses.replace(
        demo_eva_x(task), name="mine", image_size=32, epochs=1, global_batch_size=16, loss="asl", label_smoothing=0.1,
        model_kwargs=[["depth", 2]], groups=(Group(pattern="", lr=Rates().head),),
        inference=Inference(member_epochs=(1,)),
    )
'''
FLAGS = [flag for flag in training_runs.FLAGS if flag not in ("--div", "b")]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "own" / "my_recipes.py"
    path.parent.mkdir()
    path.write_text(MINE)
    return path


def start(shards: Path, run: Path, which: str, *flags: str) -> None:
    place = ("--shards", str(shards), "--out", str(run), "--wandb", "off", "--recipe", which)
    train.main([*FLAGS, *place, *flags])


def test_a_users_recipe_is_checked_as_a_recipe_json_is_and_leaves_nothing_beside_it(file: Path) -> None:
    recipe = read_recipe_file(f"{file}:mine").build("b")
    assert recipe == recipes.from_json(recipes.to_json(recipe))
    assert (recipe.loss, recipe.model_kwargs) == ("asl", (("depth", 2),))
    assert [path.name for path in file.parent.iterdir()] == ["my_recipes.py"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def mina(task): pass", r"mine.py: no function 'mine' in it; did you mean mina\?"),
        ("from cxrdist.recipes import Recipe\nx = 1", "no function 'mine' in it; it has: none"),
        ("mine = 3", "no function 'mine' in it"),
        ("def mine(task):\n  return {'epochs': 3}", "mine.py:mine returns dict, not a Recipe"),
        ("def mine(task):\n  return 1 / 0", "mine.py, line 2: ZeroDivisionError: division by zero"),
        ("def mine():\n  pass", "mine.py:mine: TypeError: .*argument"),
        ("\n1 / 0", "mine.py, line 2: ZeroDivisionError"),
        ("def mine(task)\n  pass", "mine.py, line 1: SyntaxError"),
        ("x = '\0'", "mine.py.*null bytes"),
        ("import sys\nsys.exit(3)", "mine.py, line 2: SystemExit: 3"),
        ("import beside_me", "mine.py, line 1: ModuleNotFoundError: .*; the file is copied into the run folder"),
        (
            "from cxrdist.recipes import Recipe\ndef mine(task):\n  return Recipe(name='x')",
            "line 3: TypeError: .*missing",
        ),
        ("WRONG image_size='big'", "mine.py:mine: image_size: .*valid integer"),
        ("WRONG ema_decay=1.5", "mine.py:mine: ema_decay: .*less than 1"),
        ("WRONG name='../x'", "mine.py:mine: name: .*match pattern"),
        ("WRONG epochs=2", "line 4: UserError: member_epochs=.*epochs run from 1 to 2"),
        ("WRONG ema_decay=object()", "mine.py:mine: TypeError: .*not JSON serializable"),
    ],
)
def test_what_is_wrong_with_a_users_recipe_is_named(tmp_path: Path, text: str, message: str) -> None:
    if text.startswith("WRONG "):
        body = f"  return dataclasses.replace(eva_x(task), {text[6:]})"
        text = f"import dataclasses\nfrom cxrdist.recipes import eva_x\ndef mine(task):\n{body}"
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError, match=message):
        read_recipe_file(f"{tmp_path / 'mine.py'}:mine").build("b")


@pytest.mark.parametrize("text", ["mine", "mine.py", "mine.txt:mine", "mine.py:", "mine.py:a b", ":mine"])
def test_another_spelling_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"write it as FILE\.py:NAME"):
        read_recipe_file(text)


def test_a_missing_file_and_two_recipes_at_once_are_refused(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flags, message in (
        (("--recipe", f"{tmp_path}/gone.py:mine"), "gone.py: no such file"),
        (("--recipe", f"{file}:mine", "--model", "chexfound"), "not allowed with argument"),
    ):
        with pytest.raises(SystemExit) as ended:
            train.main([*FLAGS, "--task", "b", *flags])
        assert ended.value.code == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_a_run_keeps_the_file_and_its_hash_and_is_resumed_while_the_recipe_is_equal(
    file: Path, uneven_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    start(uneven_shards, run, f"{file}:mine", "--max-steps", "1")
    assert (run / "recipe.py").read_bytes() == file.read_bytes()
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert RunDocument.read(run / "run.json").own_recipe == OwnRecipe(file=str(file), function="mine", sha256=digest)
    recipe = member.read_recipe(run)
    assert (recipe.name, recipe.epochs, recipe.ema_decay, recipe.loss) == ("mine", 1, 0.98, "asl")
    (first,) = training_runs.rows(run)
    assert {"loss", "positive", "negative"} <= first.keys()

    file.write_text(MINE.replace("1e-3", "2e-3"))
    with pytest.raises(UserError, match="was started with another recipe: groups: "):
        start(uneven_shards, run, f"{file}:mine", "--resume")
    file.write_text(MINE + "# a remark\n")
    capsys.readouterr()
    start(uneven_shards, run, f"{file}:mine", "--resume", "--max-steps", "2")
    assert f"{file} is not as {run} was begun with it" in capsys.readouterr().out
    assert (run / "recipe.py").read_text() == MINE
    start(uneven_shards, run, f"{run / 'recipe.py'}:mine", "--resume")
    assert "is not as" not in capsys.readouterr().out
    assert (run / "checkpoints" / "epoch_01").exists()


def test_a_start_that_was_interrupted_leaves_no_file_of_another_recipe(
    file: Path, uneven_shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    start(uneven_shards, run, f"{file}:mine", "--max-steps", "1")
    (run / "recipe.json").unlink()
    shutil.rmtree(run / "checkpoints")
    small = ["--set", "image_size=32", "--set", "model_kwargs=depth:1", "--max-steps", "1"]
    place = ("--shards", str(uneven_shards), "--out", str(run), "--wandb", "off", "--model", "demo_eva_x")
    train.main([*FLAGS, *place, *small])
    assert not (run / "recipe.py").exists()
    assert json.loads((run / "run.json").read_text())["own_recipe"] is None


def test_a_file_in_the_run_folder_that_no_run_wrote_is_left_alone(
    file: Path, uneven_shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(file, run / "recipe.py")
    with pytest.raises(UserError, match=r"recipe\.py: is there and of no run"):
        start(uneven_shards, run, f"{run / 'recipe.py'}:mine")


def test_a_run_json_without_the_file_is_read(tmp_path: Path) -> None:
    facts = {"task": "b", "split": "train", "shards": "x", "images": 1, "positives": {}, "folds": None}
    document = {"format_version": 2, "id": "0", "data": facts | {"validate_fold": None}}
    (tmp_path / "run.json").write_text(json.dumps(document))
    assert RunDocument.read(tmp_path / "run.json").own_recipe is None


def test_a_recipe_json_from_before_the_losses_is_read() -> None:
    text = json.loads(recipes.to_json(recipes.eva_x("b")))
    old = {name: value for name, value in text.items() if not name.startswith(("asl_", "label_smoothing"))}
    assert len(text) - len(old) == 4
    assert recipes.from_json(json.dumps(old)) == recipes.eva_x("b")
