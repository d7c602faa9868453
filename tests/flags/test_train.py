"""Flags of `cxrdist train`: what they make of a recipe, and which cannot be together."""

import pytest

from cxrdist import train
from cxrdist.errors import UserError
from cxrdist.flags.train import GROUPS, OWN_FLAGS, parser
from cxrdist.recipes import Recipe

pytestmark = pytest.mark.fast


def asked_for(*words: str) -> Recipe:
    return train.asked_for(parser().parse_args(words), "b", None)[1]


def test_epochs_are_set_and_the_epochs_that_are_averaged_move_along() -> None:
    for count, averaged in ((3, (2, 3)), (1, (1,)), (12, (11, 12))):
        recipe = asked_for("--epochs", str(count))
        assert (recipe.epochs, recipe.inference.member_epochs) == (count, averaged)
        same = asked_for("--set", f"epochs={count}")
        assert (same, same.inference) == (recipe, recipe.inference)
    assert asked_for("--epochs", "3", "--set", "member_epochs=1").inference.member_epochs == (1,)


def test_a_learning_rate_is_set_whatever_else_is() -> None:
    recipe = asked_for("--lr", "4e-5", "--set", "global_batch_size=128", "--epochs", "2")
    assert max(group.lr for group in recipe.groups if group.lr) == 4e-5
    assert recipe.groups[1].lr == pytest.approx(0.5e-6)
    plain = asked_for("--model", "timm:resnet18", "--lr", "1e-3")
    assert [group.lr for group in plain.groups] == [1e-3]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--lr 1e-4 --scale-lr sqrt", "--lr says the learning rate itself, --scale-lr changes the recipe's"),
        ("--lr 0", "--lr 0 is not possible: give a number above 0"),
        ("--epochs 3 --set epochs=4", "--epochs N is --set epochs=N: give one of them"),
        (
            "--folds 3 --div b",
            "--folds 3 would change nothing, as task b is trained on all.*`cxrdist folds`.*--validate-fold K",
        ),
        ("--folds 3 --validate-fold none", "--folds 3 would change nothing, as --validate-fold none.*`cxrdist folds`"),
    ],
)
def test_flags_that_contradict_each_other_or_do_nothing_are_named(words: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        asked_for(*words.split())


def test_folds_are_taken_where_they_mean_something() -> None:
    for words in ("--folds 3 --div b --validate-fold 1", "--folds 3 --shards shards/own", "--div B"):
        parser().parse_args(words.split())


def test_every_flag_stands_under_one_title_and_none_is_lost() -> None:
    named = [name for names in GROUPS.values() for name in names]
    assert len(named) == len(set(named))
    assert set(OWN_FLAGS) <= set(named)
    flags = parser()
    loose = {name for action in flags._optionals._group_actions for name in action.option_strings}
    assert loose == {"-h", "--help"}
    assert {*named, "--recipe", "--model"} <= set(flags._option_string_actions)
