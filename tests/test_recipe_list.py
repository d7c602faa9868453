"""`cxrdist recipes`: what there is and what it costs, and every field of one with what it is."""

import dataclasses
import re
from pathlib import Path

import pytest

from cxrdist import recipe_list, recipes
from cxrdist.errors import UserError
from cxrdist.estimate.count import GB, count_cost, memory_bytes
from cxrdist.recipes import Inference, Recipe

pytestmark = pytest.mark.fast

SMALL = {name: recipes.RECIPES[name] for name in ("demo_eva_x", "demo_chexfound")}


def test_every_field_of_a_recipe_is_described_once_and_nothing_else() -> None:
    for kind in (Recipe, Inference):
        described = recipe_list.descriptions(kind)
        assert list(described) == [field.name for field in dataclasses.fields(kind)]
        assert len(set(described.values())) == len(described)


def test_the_table_has_a_row_and_a_command_for_each_recipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(recipe_list, "RECIPES", SMALL)
    recipe_list.main([])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:5:2]] == list(SMALL)
    assert [line.strip() for line in lines[2:5:2]] == ["cxrdist demo"] * 2
    recipe = recipes.demo_eva_x("b")
    cost = count_cost(recipe, 14, "bf16")
    memory = memory_bytes(cost, 16, "cuda", 1) / GB
    assert lines[1].split()[1:4] == [f"{cost.step_flops / 1e9:.3g}", f"{memory:.1f}", "16"]
    assert "six blocks" in lines[1]


def test_one_recipe_is_shown_with_its_docstring_and_every_field_as_set_takes_it() -> None:
    recipe = recipes.demo_chexfound("b")
    text = "\n".join(recipe_list.shown("demo_chexfound"))
    assert "the learning rates with --lr X: the largest becomes X, the others keep their ratio to it" in text
    assert "LayerScale is 1: at its usual 1e-5" in text
    assert "lr none     weight decay 0        '^backbone\\.'" in text
    assert "crop:ratio=(0.9, 1.1),scale=(0.85, 1.0),p=1.0" in text
    fields = dict(re.findall(r"^(\w+) = (.*?) +# ", text, re.MULTILINE))
    names = {field.name for kind in (Recipe, Inference) for field in dataclasses.fields(kind)} - {"inference"}
    assert set(fields) == names
    overrides = [f"{name}={value}" for name, value in fields.items() if name not in ("groups", "augment")]
    again = recipes.with_overrides(recipes.eva_x("a"), overrides)
    assert dataclasses.replace(again, groups=recipe.groups, augment=recipe.augment) == recipe
    assert again.inference == recipe.inference
    plain = [line.split(" #")[0] for line in recipe_list.shown("eva_x_tiny") if line.startswith(("model_kw", "clip"))]
    assert [line.strip() for line in plain] == ["clip_grad_norm = none", "model_kwargs ="]


def test_a_recipe_of_ones_own_is_shown_and_an_unknown_name_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("from cxrdist.recipes import demo_eva_x\ndef mine(task):\n  return demo_eva_x(task)\n")
    text = "\n".join(recipe_list.shown(f"{file}:mine"))
    assert text.startswith("(it has no docstring)")
    assert f"train --div b --recipe {file}:mine" in text
    assert "model = eva_x_tiny" in text
    with pytest.raises(UserError, match="'resnet50' is no recipe: one of eva_x, "):
        list(recipe_list.shown("resnet50"))
