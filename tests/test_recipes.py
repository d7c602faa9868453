import dataclasses
import json

import pytest

from cxrdist import recipes
from cxrdist.errors import UserError
from cxrdist.recipes import (
    DEFAULT_SEED,
    Group,
    Inference,
    differences,
    from_json,
    recipe_for,
    to_json,
    with_largest_lr,
    with_overrides,
    with_scaled_lrs,
)

pytestmark = pytest.mark.fast


def test_the_published_numbers():
    for div, seed in (("a", 48), ("b", 22)):
        recipe = recipes.eva_x(div)
        assert (recipe.image_size, recipe.epochs, recipe.seed, recipe.global_batch_size) == (448, 6, seed, 64)
        assert (recipe.ema_decay, recipe.lr_schedule, recipe.clip_grad_norm) == (0.9997, "constant", None)
        assert (recipe.inference.member_epochs, len(recipe.inference.views)) == ((5, 6), 6)
    for div, seed in (("a", 42), ("b", 32)):
        recipe = recipes.chexfound(div)
        assert (recipe.image_size, recipe.epochs, recipe.seed, recipe.global_batch_size) == (512, 6, seed, 64)
        assert (recipe.ema_decay, recipe.drop_rate, recipe.inference.views) == (0.99967, 0.1, ("plain",))
        assert recipe.groups[-1] == Group(pattern=r"^glori\.", lr=2e-4, weight_decay=1e-5)
    assert (recipe.focal_weight, recipe.focal_alpha, recipe.focal_gamma, recipe.bce_weight) == (0.7, 0.25, 2.0, 0.3)


def test_divisions_differ_in_the_seed_alone():
    for build in (recipes.eva_x, recipes.chexfound):
        changed = {text.split(":")[0] for text in differences(build("a"), build("b"))}
        assert changed == {"seed"}
        assert build("my_task").seed == DEFAULT_SEED


def test_the_dropped_third_member_is_one_replace():
    assert {text.split(":")[0] for text in differences(recipes.eva_x("b"), recipes.eva_x_224("b"))} == {
        "name",
        "image_size",
    }


@pytest.mark.parametrize("name", sorted(recipes.RECIPES))
def test_json_and_back_is_the_same_recipe(name):
    recipe = recipe_for(name, "b")
    back = from_json(to_json(recipe))
    assert (back, back.inference) == (recipe, recipe.inference)


def test_overrides_take_the_type_of_their_field():
    recipe = with_overrides(
        recipes.eva_x("b"),
        ["epochs=8", "clip_grad_norm=1", "member_epochs=7,8", "ema_ramp=true", "model_kwargs=depth:2"],
    )
    assert (recipe.epochs, recipe.clip_grad_norm, recipe.inference.member_epochs, recipe.ema_ramp) == (
        8,
        1.0,
        (7, 8),
        True,
    )
    assert recipe.model_kwargs == (("depth", 2),)
    assert with_overrides(recipe, ["clip_grad_norm=none"]).clip_grad_norm is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ema_deacy=0.9", "no such recipe field"),
        ("epochs=six", "--set epochs=six: epochs: .*valid integer"),
        ("epochs=2.5", "--set epochs=2.5: epochs: .*valid integer"),
        ("epochs", "FIELD=VALUE"),
        ("image_size=160000", "image_size: .*less than or equal to 4096"),
        ("image_size=0", "image_size: .*greater than or equal to 1"),
        ("views=plain,sideways", "inference.views.1: .*'plain', 'hflip'"),
        ("views=", "inference.views.0: .*'plain', 'hflip'"),
        ("member_epochs=7", "epochs run from 1 to 6"),
        ("lr_schedule=linear", "lr_schedule: .*'constant' or 'cosine'"),
        ("groups=1", "no such recipe field"),
        ("inference=1", "no such recipe field"),
        ("ema_ramp=perhaps", "ema_ramp: .*valid boolean"),
        ("name=../../tmp/evil", "name: .*should match pattern"),
        ("model=a/b", "model: .*should match pattern"),
        ("seed=-1", "seed: .*greater than or equal to 0"),
        ("betas=0.9", "betas.1: Field required"),
        ("betas=2,3", "betas.0: .*less than 1"),
        ("ema_decay=1", "ema_decay: .*less than 1"),
        ("clip_grad_norm=0", "clip_grad_norm: .*greater than 0"),
        ("focal_weight=nan", "focal_weight: .*finite"),
        ("focal_gamma=-1", "focal_gamma: .*greater than or equal to 0"),
        ("pos_weight_beta=1", "pos_weight_beta: .*less than 1"),
        ("pos_weight_cap=-1", "pos_weight_cap: .*greater than 0"),
        ("drop_rate=1", "drop_rate: .*less than 1"),
        ("global_batch_size=0", "global_batch_size: .*greater than or equal to 1"),
        ("member_epochs=5,5", "an epoch is there twice"),
        ("member_epochs=0", "member_epochs.0: .*greater than or equal to 1"),
        ("model_kwargs=depth", "model_kwargs.0"),
    ],
)
def test_a_wrong_override_is_named(text, message):
    with pytest.raises(UserError, match=message):
        with_overrides(recipes.eva_x("b"), [text])


def test_another_global_batch_keeps_the_memory_of_the_ema_in_images():
    recipe = with_overrides(recipes.eva_x("b"), ["global_batch_size=256"])
    assert recipe.ema_decay == pytest.approx(0.9997**4)
    explicit = with_overrides(recipes.eva_x("b"), ["global_batch_size=256", "ema_decay=0.9997"])
    assert explicit.ema_decay == 0.9997


def test_of_two_overrides_of_a_field_the_last_one_counts():
    recipe = with_overrides(
        recipes.eva_x("b"), ["member_epochs=1,2", "model_kwargs=depth=3", "member_epochs=3", "seed=1", "seed=2"]
    )
    assert (recipe.inference.member_epochs, recipe.model_kwargs, recipe.seed) == ((3,), (("depth", 3),), 2)


def test_learning_rates_scale_with_the_batch_only_on_request():
    recipe = recipes.eva_x("b")
    assert with_scaled_lrs(recipe, 4.0, "none") == recipe
    for rule, factor in (("sqrt", 2.0), ("linear", 4.0)):
        scaled = with_scaled_lrs(recipe, 4.0, rule)
        assert scaled.groups[0].lr is None
        assert [group.lr for group in scaled.groups[1:]] == [group.lr * factor for group in recipe.groups[1:]]


@pytest.mark.parametrize("name", sorted(recipes.RECIPES))
def test_a_given_learning_rate_is_that_of_the_largest_row_and_the_others_keep_their_ratio(name):
    recipe = recipe_for(name, "b")
    changed = with_largest_lr(recipe, 3e-3)
    before, after = ([group.lr for group in one.groups] for one in (recipe, changed))
    assert max(lr for lr in after if lr) == 3e-3
    largest = max(lr for lr in before if lr)
    for old, new in zip(before, after, strict=True):
        assert (old is None) == (new is None)
        assert old is None or new == pytest.approx(3e-3 * old / largest, rel=1e-12)
    assert dataclasses.replace(changed, groups=recipe.groups) == recipe
    assert with_largest_lr(recipe, largest) == recipe
    assert from_json(to_json(changed)) == changed


def test_a_learning_rate_that_cannot_be_is_named():
    for lr in (0.0, -1.0, 2000000.5):
        with pytest.raises(UserError, match=f"--lr {lr:g} is not possible.*above 0".replace("+", r"\+")):
            with_largest_lr(recipes.eva_x("b"), lr)
    still = dataclasses.replace(recipes.eva_x("b"), groups=(Group(pattern="", lr=None),))
    with pytest.raises(UserError, match="no row of recipe eva_x has a learning rate above 0"):
        with_largest_lr(still, 1e-3)
    for name in ("lr", "groups"):
        with pytest.raises(UserError, match=f"--set {name}: no such recipe field; learning rates: --lr X"):
            with_overrides(recipes.eva_x("b"), [f"{name}=1e-3"])


def test_a_recipe_is_told_in_one_line():
    assert recipes.summary(recipes.eva_x("b")) == (
        "recipe eva_x: eva_x at 448 px, 6 epochs, 64 images a step; lr 1e-06 to 8e-05 (constant); loss focal_bce; "
        "EMA 0.9997; augmentation: published"
    )
    changed = with_overrides(recipes.demo_eva_x("b"), ["augment=+RandomGaussianNoise", "loss=asl", "layer_decay=0.8"])
    told = recipes.summary(changed)
    assert "lr 0.0005 (cosine, x 0.8 a layer down); loss asl; EMA 0.98 with a ramp" in told
    assert told.endswith("augmentation: crop, flip, RandomGaussianNoise")
    assert recipes.summary(with_overrides(changed, ["augment=none"])).endswith("augmentation: none")


def test_an_unknown_model_or_file_is_named():
    with pytest.raises(UserError, match="eva_y"):
        recipe_for("eva_y", "b")
    with pytest.raises(UserError, match=r"old\.json is not a recipe"):
        from_json('{"groups": []}', "old.json")


def test_what_only_inference_uses_is_no_difference_of_what_is_learned():
    recipe = recipes.eva_x("b")
    other = dataclasses.replace(recipe, inference=Inference(member_epochs=(4,)))
    assert differences(recipe, other) == []
    assert recipe == other


def test_the_window_of_the_order_is_a_number_of_shards_or_none_and_old_recipes_have_none():
    recipe = recipes.eva_x("b")
    assert with_overrides(recipe, ["shuffle_window=8"]).shuffle_window == 8
    assert differences(recipe, with_overrides(recipe, ["shuffle_window=none"])) == []
    for wrong in ("0", "-1", "2.5", "all"):
        with pytest.raises(UserError, match=f"--set shuffle_window={wrong}"):
            with_overrides(recipe, [f"shuffle_window={wrong}"])
    before = {name: value for name, value in json.loads(to_json(recipe)).items() if name != "shuffle_window"}
    assert from_json(json.dumps(before)) == recipe


def test_each_field_of_another_type_is_named():
    text = to_json(recipes.eva_x("b"))
    for name in json.loads(text):
        for wrong in (None, [], {}, "text", 1e400):
            data = json.loads(text)
            if (name in ("clip_grad_norm", "layer_decay", "shuffle_window") and wrong is None) or (
                name in ("groups", "model_kwargs", "augment") and wrong == []
            ):
                continue
            if (isinstance(data[name], str) and isinstance(wrong, str)) or (name == "inference" and wrong == {}):
                continue
            with pytest.raises(UserError, match=rf"r\.json.*({name}|version)"):
                from_json(json.dumps(data | {name: wrong}), "r.json")


def test_a_recipe_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipes.eva_x("b").epochs = 7


def test_other_epochs_move_the_epochs_that_are_averaged():
    members = {
        text: recipes.with_overrides(recipes.eva_x("b"), text.split()).inference.member_epochs
        for text in ("epochs=12", "epochs=2", "epochs=1", "epochs=3 member_epochs=1", "seed=1")
    }
    assert list(members.values()) == [(11, 12), (1, 2), (1,), (1,), (5, 6)]
