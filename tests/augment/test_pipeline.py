"""The training augmentation: what depends on what, what each set of steps does, and what may be a step."""

import kornia.augmentation as K
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cxrdist.augment.draws import uniforms
from cxrdist.augment.mixing import mixing_of
from cxrdist.augment.pipeline import MIXES, TrainingAugment, is_step
from cxrdist.augment.steps import PUBLISHED, Flip, PublishedCrop, Rotation, ShiftScale
from cxrdist.augment.views import make_views
from cxrdist.data.order import train_batches
from cxrdist.errors import UserError
from cxrdist.recipes import (
    AUGMENTS,
    FLIP,
    HOLES_AS_ASKED,
    PUBLISHED_STEPS,
    Step,
    demo_eva_x,
    eva_x,
    from_json,
    step,
    to_json,
    with_augment,
)

pytestmark = pytest.mark.fast

KEYS = np.array([3, 70_001, 12, 5, 108_490, 9, 11, 13])


NOISE = step("RandomGaussianNoise", 0.5, std=0.05)
PLASMA = step("RandomPlasmaBrightness", 0.5)  # draws while it runs
MORE = (
    *PUBLISHED_STEPS,
    NOISE,
    PLASMA,
    step("ColorJiggle", 0.5, brightness=0.2, contrast=0.2),
    step("RandomRain", 0.3),
    NOISE,
)


@pytest.mark.parametrize("steps", [PUBLISHED_STEPS, AUGMENTS["crop_flip"], (), MORE])
def test_a_key_gets_the_same_augmentation_in_any_batch(images: torch.Tensor, steps: tuple[Step, ...]) -> None:
    if steps is MORE:
        images = torch.cat([images, images // 2, 255 - images], 1)
    augment = TrainingAugment(96, steps, seed=22)
    whole = augment(images, KEYS, epoch=4)
    assert whole.shape == (8, 3, 96, 96)
    assert whole.dtype == torch.float32
    other = TrainingAugment(96, steps, seed=22)
    torch.manual_seed(99)
    other(images, KEYS + 1, epoch=0)  # what was drawn before must not matter
    before = torch.get_rng_state()
    for rows in ([5], [7, 2, 0], [1, 3]):
        assert torch.equal(other(images[rows], KEYS[rows], epoch=4), whole[rows])
    assert torch.equal(torch.get_rng_state(), before)  # nor does the augmentation move dropout's numbers


def test_draws_leave_the_generators_of_gpus_alone(images: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeding a GPU's generator in the middle of a step would repeat its dropout masks."""
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    TrainingAugment(96, (*PUBLISHED_STEPS, step("RandomGaussianNoise")), seed=22)(images, KEYS, epoch=4)
    mixing = mixing_of((step("RandomMixUpV2"),), 4, 96, 1)
    assert mixing is not None
    mixing.draw(KEYS, 0)
    assert seeded == []


def drawn(steps: tuple[Step, ...], epoch: int = 4) -> dict[str, tuple[list[int], list[dict[str, list[float]]]]]:
    """What each step draws for 200 keys, its numbers as lists."""
    found = {}
    for place, stage in enumerate(TrainingAugment(96, steps, seed=22).stages):
        rows, params = stage.draw(np.arange(200), 22, epoch, (96, 96))
        name = f"{stage.name}/{sum(each.name == stage.name for each in steps[:place])}"
        found[name] = (rows.tolist(), [{key: value.tolist() for key, value in each.items()} for each in params])
    return found


@given(st.permutations(range(1, len(MORE))), st.integers(0, len(MORE) - 1))
@settings(max_examples=6, deadline=None)
def test_other_steps_leave_the_draws_of_a_step_as_they_are(order: list[int], kept: int) -> None:
    everything = drawn(MORE)
    some = (MORE[0], *(MORE[place] for place in order[:kept]))
    for name, draws in drawn(some).items():
        assert draws == everything[name]
    assert len({str(rows) for rows, _ in everything.values()}) == len(MORE)  # no two steps share their numbers


def test_draws_happen_as_often_and_lie_where_the_recipe_says() -> None:
    augment = TrainingAugment(448, (*PUBLISHED_STEPS, HOLES_AS_ASKED), seed=22)
    keys = np.arange(20_000)
    rates, numbers = {}, {}
    for stage in augment.stages[:7]:
        rows, params = stage.draw(keys, 22, 1, (600, 600) if stage.name == "crop" else (448, 448))
        rates[stage.name] = len(rows) / len(keys)
        for name in params[0]:
            numbers[f"{stage.name} {name}"] = np.concatenate([each[name] for each in params])
    expected = {each.name: each.p for each in PUBLISHED_STEPS}
    assert rates == pytest.approx(expected, abs=0.015)
    x, y, width, height = numbers["crop window"].T
    assert x.min() == y.min() == 0
    assert max((x + width).max(), (y + height).max()) == 600
    assert (width * height / 600**2).mean() == pytest.approx(0.905, abs=0.003)
    assert (width * height / 600**2).min() > 0.848
    assert np.abs(numbers["rotate degrees"]).max() == pytest.approx(12, abs=0.1)
    assert np.quantile(numbers["clahe clip_limit"], [0, 1]) == pytest.approx([1, 4], abs=0.01)
    assert np.abs(numbers["brightness factor"] - 1).max() == pytest.approx(0.2, abs=0.001)
    assert np.abs(numbers["brightness offset"]).max() == pytest.approx(51, abs=0.1)
    assert np.abs(numbers["shift scale"] - 1).max() == pytest.approx(0.05, abs=0.001)
    assert np.abs(numbers["shift translations"]).max() == 13  # int(.03 * 448)
    sides = numbers["holes boxes"][..., 2:] - numbers["holes boxes"][..., :2]
    assert (sides[:, 1] > 0).all(1).mean() == pytest.approx(0.5, abs=0.03)
    used = sides[sides[..., 0] > 0]
    assert (used.min(), used.max()) == (44, 89)  # int(.1 * 448)
    assert abs(np.corrcoef(used.T)[0, 1]) < 0.05  # height and width are drawn apart
    _, asked = augment.stages[7].draw(keys, 22, 1, (448, 448))
    boxes = np.concatenate([each["boxes"] for each in asked])
    assert boxes.shape[1:] == (1, 4)
    assert (boxes[..., 2:] - boxes[..., :2]).max() == 20
    assert (boxes.min() >= 0, boxes.max() <= 448) == (True, True)


def test_the_uniform_numbers_are_uniform_and_unrelated() -> None:
    values = uniforms(22, 1, np.arange(20_000), 8)
    assert (values.min() >= 0.0, values.max() < 1.0) == (True, True)
    counts = np.stack([np.histogram(column, 20, (0, 1))[0] for column in values.T])
    assert np.abs(counts / 1000 - 1).max() < 0.15
    neighbours = [values[:-1, 0], values[1:, 0], values[:-1, 1]]
    others = ((22, 2, ""), (23, 1, ""), (1, 22, ""), (22, 1, "a/0"), (22, 1, "a/1"))
    neighbours += [uniforms(seed, epoch, np.arange(19_999), 1, stream=name)[:, 0] for seed, epoch, name in others]
    assert np.abs(np.corrcoef(neighbours) - np.eye(len(neighbours))).max() < 0.03
    assert np.array_equal(uniforms(22, 1, np.arange(5), 3, start=4), values[:5, 3:6])


def test_epoch_seed_and_key_each_change_the_augmentation(images: torch.Tensor) -> None:
    augment = TrainingAugment(96, PUBLISHED_STEPS, seed=22)
    first = augment.levels(images, KEYS, epoch=1)
    assert not torch.equal(first, augment.levels(images, KEYS, epoch=2))
    assert not torch.equal(first, TrainingAugment(96, PUBLISHED_STEPS, seed=23).levels(images, KEYS, epoch=1))
    assert not torch.equal(first, augment.levels(images, KEYS + 1, epoch=1))


def test_none_is_the_evaluation_input(images: torch.Tensor) -> None:
    ((_, plain),) = make_views(images, ["plain"], 96)
    assert torch.equal(TrainingAugment(96, (), seed=1)(images, KEYS, epoch=3), plain)


def test_each_step_runs_alone_in_a_kornia_pipeline_and_moves_masks_with_the_image(images: torch.Tensor) -> None:
    unit = images.float() / 255.0
    for kind in PUBLISHED.values():
        module = kind(size=96) if kind is PublishedCrop else kind(p=0.5)
        torch.manual_seed(3)
        out, mask = K.AugmentationSequential(module, data_keys=["input", "mask"])(unit, unit)
        assert out.dtype == torch.float32
        assert (out >= 0).all()
        assert (out <= 1).all()
        moves = kind in (PublishedCrop, Flip, Rotation, ShiftScale)
        assert (mask - (out if moves else unit)).abs().mean() < 0.02, kind  # a mask takes the nearest pixel
        assert (out != unit).float().mean() > 0 if out.shape == unit.shape else out.shape[-1] == 96


def test_the_crop_matrix_says_where_a_pixel_goes() -> None:
    image = torch.zeros(1, 1, 60, 60)
    image[0, 0, 20:26, 30:36] = 1.0
    crop = PublishedCrop(size=120)
    params = {"window": torch.tensor([[10.0, 5.0, 40.0, 50.0]])}
    out = crop.apply_transform(image, params, {})
    y, x = (out[0, 0] > 0.5).nonzero().double().mean(0)
    matrix = crop.compute_transformation(image, params, {})[0].double()
    assert torch.allclose(
        matrix @ torch.tensor([32.5, 22.5, 1.0]).double(), torch.stack([x, y, torch.ones_like(x)]), atol=0.6
    )


REASONS = {  # every class of kornia.augmentation that is no step for grey images, and the word that says why
    **dict.fromkeys(
        ["Resize", "LongestMaxSize", "SmallestMaxSize", "PadTo", "CenterCrop", "RandomCrop", "RandomResizedCrop"],
        "size",
    ),
    **dict.fromkeys(["Normalize", "Denormalize"], "normalised"),
    "RandomTransplantation": "masks",
    **dict.fromkeys(["RandomMosaic", "PatchMix"], "labels"),
    "RandomDissolving": "diffusers",
    **dict.fromkeys(MIXES, "mixed"),
    **dict.fromkeys(["RandomHue", "RandomSaturation", "RandomRGBShift"], "three channels"),
    **dict.fromkeys(["RandomPlanckianJitter", "RandomSnow", "RandomJPEG"], "three channels"),
}
ARGS = {  # that a class needs, or needs to do anything
    "ColorJiggle": {"brightness": 0.5},
    "ColorJitter": {"contrast": 0.5},
    "RandomAffine": {"degrees": 9},
    "RandomBrightness": {"brightness": (1.1, 1.3)},
    "RandomContrast": {"contrast": (1.1, 1.3)},
    "RandomFisheye": {"center_x": (-0.3, 0.3), "center_y": (-0.3, 0.3), "gamma": (0.5, 0.6)},
    "RandomGamma": {"gamma": (1.5, 2.0)},
    "RandomGaussianBlur": {"kernel_size": (3, 3), "sigma": (1.0, 2.0)},
    "RandomHue": {"hue": (0.2, 0.4)},
    "RandomMotionBlur": {"kernel_size": 5, "angle": 35.0, "direction": 0.5},
    "RandomRotation": {"degrees": 9},
    "RandomRotation90": {"times": (1, 1)},
    "RandomSaturation": {"saturation": (2.0, 3.0)},
    "RandomShear": {"shear": 9.0},
    "RandomTranslate": {"translate_x": (0.1, 0.2)},
}
NO_EFFECT_ON_GREY = ("RandomChannelShuffle", "RandomGrayscale")


@pytest.mark.parametrize("name", [name for name in vars(K) if is_step(name)])
def test_every_class_of_kornia_runs_by_name_or_is_refused_with_the_reason(images: torch.Tensor, name: str) -> None:
    this = step(name, **ARGS.get(name, {}))
    steps = (*AUGMENTS["crop_flip"], this, FLIP) if name in MIXES else (*AUGMENTS["crop_flip"], this)
    small = images[:2, :, :64, :64]
    if name in REASONS:
        with pytest.raises(UserError, match=REASONS[name]):
            TrainingAugment(64, steps, seed=1, colour=False)
        if REASONS[name] != "three channels":
            return
        small = torch.cat([small, small // 2, 255 - small], 1)
    out = TrainingAugment(64, steps, seed=1, colour=name in REASONS).levels(small, KEYS[:2], epoch=0)
    assert out.shape == small.shape
    assert torch.equal(out, out.round())
    before = TrainingAugment(64, AUGMENTS["crop_flip"], seed=1).levels(small, KEYS[:2], epoch=0)
    assert torch.equal(out, before) == (name in NO_EFFECT_ON_GREY)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ("+RandomGausianNoise", "RandomGaussianNoise"),
        ("+RandomGaussianNoise:sdt=0.1", "it takes no 'sdt'; std?"),
        ("+RandomGaussianNoise:std=much", "std='much' is not valid"),
        ("+RandomGaussianNoise:std", "write numbers as NAME=VALUE"),
        ("+RandomGaussianNoise:p=2", "less than or equal to 1"),
        ("+RandomRotation3D", "no such step for images"),
        ("+RandomRotation", "it needs degrees: write RandomRotation:degrees=VALUE"),
        ("+crop", "make it the first step"),
        ("crop:p=0.5", "make it the first step, p=1"),
        ("-rotation", "the recipe has no step 'rotation'; it has crop, flip"),
        ("rotate:p=0.5", "to add one: \\+rotate:p=0.5"),
        ("strong", "the recipe has no step 'strong'"),
        ("+RandomCutMixV2:num_mix=2", "an image has one partner"),
    ],
)
def test_a_wrong_step_is_refused_by_name(edit: str, said: str) -> None:
    def use() -> None:
        recipe = with_augment(demo_eva_x("b"), [edit])
        mixing_of(recipe.augment, 8, 96, 1)
        TrainingAugment(96, recipe.augment, seed=1)

    with pytest.raises(UserError, match=said):
        use()


def test_edits_change_the_recipe_step_by_step() -> None:
    edits = [
        "-clahe",
        "rotate:degrees=20,p=0.1",
        "+RandomGaussianNoise:std=0.03,p=0.2",
        "+RandomAffine:degrees=3,scale=(0.9,1.1)",
    ]
    recipe = with_augment(eva_x("b"), edits)
    assert [each.name for each in recipe.augment] == [
        *("crop", "flip", "rotate", "brightness", "holes", "shift", "RandomGaussianNoise", "RandomAffine")
    ]
    assert recipe.augment[2] == step("rotate", 0.1, degrees=20)
    assert recipe.augment[6] == step("RandomGaussianNoise", 0.2, std=0.03)
    assert recipe.augment[7].args == (("degrees", 3), ("scale", (0.9, 1.1)))
    assert from_json(to_json(recipe)) == recipe
    assert with_augment(recipe, ["none"]).augment == ()
    assert with_augment(recipe, ["published"]).augment == PUBLISHED_STEPS


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_threads_and_batch_sizes_show_each_key_the_same_picture(images: torch.Tensor, world_size: int) -> None:
    """FAULTS row 5, for the augmentation: what one process shows the model, several show it too."""

    def pictures(world_size: int, device_batch_size: int) -> dict[int, torch.Tensor]:
        shown = {}
        for rank in range(world_size):
            augment = TrainingAugment(96, PUBLISHED_STEPS, seed=22)  # each rank makes its own
            plan = train_batches(
                np.arange(8),
                seed=22,
                epoch=3,
                global_batch_size=8,
                device_batch_size=device_batch_size,
                rank=rank,
                world_size=world_size,
            )
            for micro in plan:
                if micro.weight > 0:
                    batch = augment(images[micro.rows], KEYS[micro.rows], micro.epoch)
                    shown |= dict(zip(KEYS[micro.rows].tolist(), batch, strict=True))
        return shown

    alone = pictures(1, 8)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(num_threads + 1)
    try:
        together = pictures(world_size, 1)
    finally:
        torch.set_num_threads(num_threads)
    assert alone.keys() == together.keys() == set(KEYS.tolist())
    assert all(torch.equal(alone[key], together[key]) for key in alone)
