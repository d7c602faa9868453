import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cxrdist import recipes
from cxrdist.errors import UserError
from cxrdist.training.losses import effective_pos_weight, focal_bce, make_criterion, part_names

pytestmark = pytest.mark.fast

GOLDEN = Path(__file__).parents[1] / "golden" / "recipe"
RECIPE = recipes.eva_x("b")
NUMBERS = {
    "focal_weight": RECIPE.focal_weight,
    "focal_alpha": RECIPE.focal_alpha,
    "focal_gamma": RECIPE.focal_gamma,
    "bce_weight": RECIPE.bce_weight,
}


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
    criterion = make_criterion(RECIPE, targets, torch.device("cpu"))
    assert part_names(criterion, 5) == ("total", "focal", "bce")
    with pytest.raises(UserError, match="loss='hinge' is unknown; one of focal_bce"):
        make_criterion(recipes.with_overrides(RECIPE, ["loss=hinge"]), targets, torch.device("cpu"))


def masked_case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(12, 5, generator=generator)
    targets = (torch.rand(12, 5, generator=generator) < 0.4).float()
    targets[0, 0] = 0.3
    targets[torch.rand(12, 5, generator=generator) < 0.5] = torch.nan
    targets[:, 4] = torch.nan
    return logits, targets, torch.tensor([1.0, 4.0, 0.5, 2.0, 3.0])


def test_the_loss_of_masked_targets_is_that_of_the_observed_cells_alone():
    logits, targets, pos_weight = masked_case()
    logits.requires_grad_()
    loss = focal_bce(logits, targets, pos_weight, **NUMBERS, masked=True)
    loss["total"].backward()
    seen = ~torch.isnan(targets)
    alone = logits.detach()[seen].requires_grad_()
    wanted = focal_bce(alone, targets[seen], pos_weight.expand(12, 5)[seen], **NUMBERS)
    wanted["total"].backward()
    for part in ("total", "focal", "bce"):
        torch.testing.assert_close(loss[part], wanted[part], rtol=0, atol=1e-6)
    torch.testing.assert_close(logits.grad[seen], alone.grad, rtol=0, atol=1e-6)
    assert not logits.grad[~seen].any()


def test_without_an_observed_cell_the_loss_is_0_and_so_is_its_gradient():
    logits = torch.tensor([[1.0, torch.inf]], requires_grad=True)
    loss = focal_bce(logits, torch.full((1, 2), torch.nan), None, **NUMBERS, masked=True)
    loss["total"].backward()
    assert loss["total"] == 0
    assert logits.grad.tolist() == [[0, 0]]


def test_a_soft_target_follows_the_plain_formula():
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
    both = make_criterion(RECIPE, masked, torch.device("cpu")).keywords["pos_weight"]
    ones = [make_criterion(RECIPE, rows[:, None], torch.device("cpu")) for rows in (targets[:, 0], targets[:100, 1])]
    assert both.tolist() == [one.keywords["pos_weight"].item() for one in ones]
    assert [one.keywords["masked"] for one in ones] == [False, False]
