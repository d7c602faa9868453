import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from timm.loss import AsymmetricLossMultiLabel

from cxrdist import recipes
from cxrdist.demo.phantoms import render, sample_studies
from cxrdist.errors import UserError
from cxrdist.task import TASKS
from cxrdist.training.losses import (
    LOSSES,
    asl,
    bce,
    effective_pos_weight,
    focal_bce,
    label_sums,
    make_criterion,
    part_names,
)

pytestmark = pytest.mark.fast

GOLDEN = Path(__file__).parents[1] / "golden" / "recipe"
RECIPE = recipes.eva_x("b")
NUMBERS = {
    "focal_weight": RECIPE.focal_weight,
    "focal_alpha": RECIPE.focal_alpha,
    "focal_gamma": RECIPE.focal_gamma,
    "bce_weight": RECIPE.bce_weight,
}
ASL = {"gamma_neg": 4.0, "gamma_pos": 1.0, "clip": 0.05}
NUMBERS_OF = {focal_bce: NUMBERS, bce: {}, asl: ASL}
PARTS = {focal_bce: ("focal", "bce"), bce: ("positive", "negative"), asl: ("positive", "negative")}
EVERY_LOSS = pytest.mark.parametrize("function", list(NUMBERS_OF), ids=lambda function: function.__name__)


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in np.load(GOLDEN / "loss.npz").items()}


@pytest.mark.parametrize("weighted", [True, False])
def test_the_published_loss_and_its_gradient_to_the_digit(golden, weighted):
    logits = golden["logits"].clone().requires_grad_()
    loss = focal_bce(logits, golden["targets"], golden["pos_weight"] if weighted else None, **NUMBERS)
    loss["total"].backward()
    suffix = "" if weighted else "_nopw"
    torch.testing.assert_close(loss["total"].detach(), golden[f"total{suffix}"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits.grad, golden[f"total{suffix}_grad"], rtol=0, atol=1e-6)


def test_its_two_parts_and_their_gradients(golden):
    for part in ("focal", "bce"):
        logits = golden["logits"].clone().requires_grad_()
        loss = focal_bce(logits, golden["targets"], golden["pos_weight"], **NUMBERS)[part]
        loss.backward()
        torch.testing.assert_close(loss.detach(), golden[part], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(logits.grad, golden[f"{part}_grad"], rtol=0, atol=1e-6)


def test_half_precision_logits_are_summed_in_float32(golden):
    half = golden["logits"].half()
    total = focal_bce(half, golden["targets"], golden["pos_weight"], **NUMBERS)["total"]
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, golden["total_from_half_logits"], rtol=1e-5, atol=1e-6)


def test_focal_at_gamma_0_is_scaled_cross_entropy():
    torch.manual_seed(0)
    logits, targets = torch.randn(5, 14), (torch.rand(5, 14) < 0.3).float()
    loss = focal_bce(logits, targets, None, focal_weight=1.0, focal_alpha=0.25, focal_gamma=0.0, bce_weight=0.0)
    torch.testing.assert_close(loss["total"], 0.25 * F.binary_cross_entropy_with_logits(logits, targets))


def test_class_weights_from_effective_numbers_as_published():
    for case in json.loads((GOLDEN / "effective_weights.json").read_text()):
        weights = effective_pos_weight(torch.tensor(case["positive_counts"]), case["n"], case["beta"])
        expected = torch.tensor(case["weights_float32"])
        assert weights.dtype == torch.float32
        torch.testing.assert_close(weights, expected, rtol=1e-6, atol=1e-6)


def test_an_impossible_count_is_refused():
    with pytest.raises(ValueError, match=r"13.0"):
        effective_pos_weight(torch.tensor([1.0, 13.0]), 12)


def test_the_published_loss_names_its_parts_in_order_and_an_unknown_one_is_refused():
    targets = (np.random.default_rng(0).random((30, 5)) < 0.4).astype(np.float32)
    criterion = make_criterion(RECIPE, label_sums([targets]), torch.device("cpu"))
    assert part_names(criterion, 5) == ("total", "focal", "bce")
    for name, function in zip(LOSSES, NUMBERS_OF, strict=True):
        criterion = make_criterion(
            recipes.with_overrides(RECIPE, [f"loss={name}"]), label_sums([targets]), torch.device("cpu")
        )
        assert part_names(criterion, 5) == ("total", *PARTS[function])
    with pytest.raises(UserError, match="loss='hinge' is unknown; one of focal_bce"):
        make_criterion(recipes.with_overrides(RECIPE, ["loss=hinge"]), label_sums([targets]), torch.device("cpu"))


def masked_case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(12, 5, generator=generator)
    targets = (torch.rand(12, 5, generator=generator) < 0.4).float()
    targets[0, 0] = 0.3
    targets[torch.rand(12, 5, generator=generator) < 0.5] = torch.nan
    targets[:, 4] = torch.nan
    return logits, targets, torch.tensor([1.0, 4.0, 0.5, 2.0, 3.0])


@EVERY_LOSS
def test_the_loss_of_masked_targets_is_that_of_the_observed_cells_alone(function):
    logits, targets, pos_weight = masked_case()
    logits.requires_grad_()
    loss = function(logits, targets, pos_weight, **NUMBERS_OF[function], masked=True)
    loss["total"].backward()
    seen = ~torch.isnan(targets)
    alone = logits.detach()[seen].requires_grad_()
    wanted = function(alone, targets[seen], pos_weight.expand(12, 5)[seen], **NUMBERS_OF[function])
    wanted["total"].backward()
    assert tuple(loss) == ("total", *PARTS[function])
    for part in loss:
        torch.testing.assert_close(loss[part], wanted[part], rtol=0, atol=1e-6)
    torch.testing.assert_close(logits.grad[seen], alone.grad, rtol=0, atol=1e-6)
    assert not logits.grad[~seen].any()


@EVERY_LOSS
def test_without_an_observed_cell_the_loss_is_0_and_so_is_its_gradient(function):
    logits = torch.tensor([[1.0, torch.inf]], requires_grad=True)
    loss = function(logits, torch.full((1, 2), torch.nan), None, **NUMBERS_OF[function], masked=True)
    loss["total"].backward()
    assert loss["total"] == 0
    assert logits.grad.tolist() == [[0, 0]]


def test_a_soft_target_of_the_published_loss_follows_the_plain_formula():
    logits, share, weight = torch.tensor([[0.7]]), 0.3, 4.0
    bce = -(weight * share * torch.log(torch.sigmoid(logits)) + (1 - share) * torch.log(torch.sigmoid(-logits)))
    plain = -(share * torch.log(torch.sigmoid(logits)) + (1 - share) * torch.log(torch.sigmoid(-logits)))
    focal = 0.25 * (1 - torch.exp(-plain)) ** 2 * plain
    loss = focal_bce(logits, torch.full((1, 1), share), torch.tensor([weight]), **NUMBERS)
    torch.testing.assert_close(loss["bce"], bce.squeeze())
    torch.testing.assert_close(loss["focal"], focal.squeeze())


def test_class_weights_count_the_observed_cells_alone():
    targets = (np.random.default_rng(3).random((400, 2)) < 0.2).astype(np.float32)
    masked = targets.copy()
    masked[100:, 1] = np.nan
    both = make_criterion(RECIPE, label_sums([masked]), torch.device("cpu")).keywords["pos_weight"]
    ones = [
        make_criterion(RECIPE, label_sums([rows[:, None]]), torch.device("cpu"))
        for rows in (targets[:, 0], targets[:100, 1])
    ]
    assert both.tolist() == [one.keywords["pos_weight"].item() for one in ones]
    assert [one.keywords["masked"] for one in ones] == [False, False]


@pytest.mark.parametrize("num_labels", [1, 2, 14])
@pytest.mark.parametrize("soft", [False, True])
def test_sums_of_targets_in_parts_are_to_the_bit_those_of_all(num_labels, soft):
    rng = np.random.default_rng(0)
    targets = rng.random((10_000, num_labels), np.float32)
    targets = targets if soft else (targets < 0.3).astype(np.float32)
    targets[rng.random(targets.shape) < 0.1] = np.nan
    sums = label_sums(np.array_split(targets, [1, 700, 700, 4096]))
    assert sums.positives.tobytes() == np.nansum(targets, axis=0).tobytes()
    assert sums.observed.tolist() == (~np.isnan(targets)).sum(axis=0).tolist()
    assert sums.num == len(targets)


def weighted_recipe(*overrides: str) -> recipes.Recipe:
    return recipes.with_overrides(RECIPE, list(overrides))


@pytest.mark.parametrize("numbers", [ASL, {"gamma_neg": 2.0, "gamma_pos": 0.0, "clip": 0.0}])
@pytest.mark.parametrize("soft", [False, True])
def test_the_asymmetric_loss_and_its_gradient_are_timms_over_the_number_of_cells(numbers, soft):
    generator = torch.Generator().manual_seed(2)
    values = 6 * torch.randn(20, 14, generator=generator)
    targets = torch.rand(20, 14, generator=generator)
    targets = targets if soft else (targets < 0.3).float()
    overrides = [f"asl_{name}={value}" for name, value in numbers.items()]
    recipe = weighted_recipe("loss=asl", "pos_weight_beta=0", *overrides)
    ours, theirs = values.clone().requires_grad_(), values.clone().requires_grad_()
    loss = make_criterion(recipe, label_sums([(targets > 0.2).float().numpy()]), torch.device("cpu"))(ours, targets)
    loss["total"].backward()
    expected = AsymmetricLossMultiLabel(**numbers)(theirs.reshape(1, -1), targets.reshape(1, -1)) / targets.numel()
    expected.backward()
    torch.testing.assert_close(loss["total"], expected)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(loss["total"], loss["positive"] + loss["negative"])


def test_a_soft_target_and_class_weights_of_bce_and_the_asymmetric_loss_by_hand():
    logits, share, weight = torch.tensor([[0.7]]), 0.3, torch.tensor([4.0])
    prob = float(torch.sigmoid(logits))
    targets = torch.full((1, 1), share)
    found = bce(logits, targets, weight)
    assert float(found["positive"]) == pytest.approx(-4.0 * share * np.log(prob))
    assert float(found["negative"]) == pytest.approx(-(1 - share) * np.log(1 - prob))
    absent = 1 - prob + 0.05
    focus = (1 - share * prob - (1 - share) * absent) ** (1.0 * share + 4.0 * (1 - share))
    found = asl(logits, targets, weight, **ASL)
    assert float(found["positive"]) == pytest.approx(-4.0 * share * np.log(prob) * focus, rel=1e-5)
    assert float(found["negative"]) == pytest.approx(-(1 - share) * np.log(absent) * focus, rel=1e-5)
    assert float(found["total"]) == pytest.approx(float(found["positive"] + found["negative"]))


def test_bce_is_torchs_and_the_asymmetric_loss_without_powers_and_clip():
    logits, targets, pos_weight = masked_case()
    targets = targets.nan_to_num(0.5)
    expected = F.binary_cross_entropy_with_logits(logits, targets, pos_weight=pos_weight)
    torch.testing.assert_close(bce(logits, targets, pos_weight)["total"], expected)
    plain = {"gamma_neg": 0.0, "gamma_pos": 0.0, "clip": 0.0}
    torch.testing.assert_close(asl(logits, targets, pos_weight, **plain)["total"], expected)


@EVERY_LOSS
def test_extreme_half_precision_logits_have_a_finite_loss_and_gradient(function):
    logits = torch.tensor([[6e4, -6e4, 0.0, 6e4, -6e4]], dtype=torch.float16, requires_grad=True)
    numbers = NUMBERS_OF[function] | ({"gamma_neg": 0.5, "gamma_pos": 0.5, "clip": 0.0} if function is asl else {})
    loss = function(logits, torch.tensor([[1.0, 0.0, 1.0, 0.0, 1.0]]), torch.ones(5), **numbers)
    loss["total"].backward()
    assert {value.dtype for value in loss.values()} == {torch.float32}
    assert torch.isfinite(torch.stack([*loss.values()])).all()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_smoothed_targets_are_t_times_1_minus_s_plus_s_over_2_and_masked_cells_stay_so(name):
    logits, targets, _ = masked_case()
    recipe = weighted_recipe(f"loss={name}", "label_smoothing=0.2")
    train, valid = (
        make_criterion(recipe, label_sums([targets.numpy()]), torch.device("cpu"), smooth=smooth)
        for smooth in (True, False)
    )
    by_hand = torch.where(torch.isnan(targets), torch.nan, 0.8 * targets + 0.1)
    assert by_hand[0].isnan().equal(targets[0].isnan())
    assert train(logits, targets) == valid(logits, by_hand)
    assert train(logits, targets)["total"] != valid(logits, targets)["total"]
    assert part_names(train, 5) == part_names(valid, 5)
    alone = make_criterion(
        weighted_recipe(f"loss={name}"), label_sums([targets.numpy()]), torch.device("cpu"), smooth=True
    )
    assert alone(logits, targets) == valid(logits, targets)


@pytest.fixture(scope="module")
def phantoms() -> tuple[torch.Tensor, torch.Tensor]:
    """32 phantoms of 24 x 24 px, standardised (N, 576), and their targets (N, K) with some cells masked or soft."""
    views = [(study, view) for study in sample_studies(30, 0) for view in range(len(study.views))][:32]
    small = [np.asarray(Image.fromarray(render(*each, 0)).resize((24, 24)), np.float32).ravel() for each in views]
    images = torch.from_numpy(np.stack(small))
    labels = TASKS["b"].labels
    targets = torch.tensor([[float(label in study.findings) for label in labels] for study, _ in views])
    targets[::5, 3], targets[::7, 2] = torch.nan, 0.6
    return (images - images.mean(0)) / (images.std(0) + 1.0), targets


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_each_loss_learns_the_phantoms(name, phantoms):
    """A linear model, 60 steps, all images in each."""
    images, targets = phantoms
    torch.manual_seed(0)
    model = torch.nn.Linear(images.shape[1], targets.shape[1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    criterion = make_criterion(
        weighted_recipe(f"loss={name}", "label_smoothing=0.05"), label_sums([targets.numpy()]), torch.device("cpu")
    )
    losses = []
    for _ in range(60):
        loss = criterion(model(images), targets)
        optimizer.zero_grad()
        loss["total"].backward()
        optimizer.step()
        losses.append(float(loss["total"].detach()))
    assert losses[-1] < 0.7 * losses[0]
    assert losses[-1] < losses[20] < losses[0]
