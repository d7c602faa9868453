import json
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from cxrdist import recipes
from cxrdist.errors import UserError
from cxrdist.models import architecture_of
from cxrdist.recipes import Group
from cxrdist.training.optim import GuardedAdamW, lr_factors, param_groups

pytestmark = pytest.mark.fast

GOLDEN = Path(__file__).parents[1] / "golden" / "recipe"


def optimizer_for(model: nn.Module, lr: float = 0.1, **options) -> GuardedAdamW:
    groups = param_groups(model, (Group(pattern="", lr=lr),))
    return GuardedAdamW(groups, betas=(0.9, 0.999), **{"factors": lr_factors("constant", 10, 0)} | options)


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_eva_x_groups_are_the_published_ones_on_the_real_model():
    golden = json.loads((GOLDEN / "evax_param_groups.json").read_text())
    with torch.device("meta"):
        model = architecture_of("eva_x").build(448, 14)
    assert sum(parameter.numel() for parameter in model.parameters()) == golden["total_parameters"]
    found = param_groups(model, recipes.eva_x("b").groups)
    ours = {name: (group.lr, group.weight_decay) for group, members in found for name in members}
    published = {
        name.removeprefix("backbone."): (group["lr"], group["weight_decay"])
        for group in golden["groups"]
        for name in group["names"]
    }
    frozen = {name for name, (lr, _) in ours.items() if lr is None}
    assert {name: rates for name, rates in ours.items() if name not in frozen} == published
    assert frozen == {re.sub(r"^backbone\.", "", str(name)) for name in names(golden["in_no_group_never_updated"])}
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == frozen


def names(entries) -> list[str]:
    return [entry["name"] if isinstance(entry, dict) else entry for entry in entries]


def test_chexfound_trains_what_the_published_run_trained():
    golden = json.loads((GOLDEN / "chexfound_trainable.json").read_text())
    with torch.device("meta"):
        model = architecture_of("chexfound").build(512, 14)
    param_groups(model, recipes.chexfound("b").groups)
    trained = {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad}
    frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    unused = 2 * 1024  # of the official backbone's 304,630,016: the mask token and the class token's position
    assert (sum(trained.values()), frozen + unused) == (golden["trainable_total_as_notebook"], 304_630_016)
    published = [row["numel"] for row in golden["rows"] if row["requires_grad_notebook"]]
    assert sorted(trained.values()) == sorted(published)


def test_a_parameter_that_no_row_matches_is_named():
    with pytest.raises(UserError, match=r"0\.bias"):
        param_groups(nn.Sequential(nn.Linear(2, 2)), (Group(pattern="weight", lr=1.0),))


def test_the_first_matching_row_wins_and_none_freezes():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    found = param_groups(
        model, (Group(pattern=r"^1\.", lr=None), Group(pattern="weight", lr=1.0), Group(pattern="", lr=2.0))
    )
    assert [list(members) for _, members in found] == [["1.weight", "1.bias"], ["0.weight"], ["0.bias"]]
    assert [parameter.requires_grad for parameter in model.parameters()] == [True, True, False, False]
    with pytest.raises(UserError, match="no parameter"):
        param_groups(model, (Group(pattern="", lr=None),))


def test_schedule_warms_up_then_stays_or_falls_to_zero():
    assert lr_factors("constant", 3, 0).tolist() == [1.0] * 4
    cosine = lr_factors("cosine", 10, 2).tolist()
    assert cosine[:3] == [0.5, 1.0, 1.0]
    assert cosine[6] == pytest.approx(0.5)
    assert cosine[10] == pytest.approx(0.0)
    assert lr_factors("constant", 3, 2).tolist() == [0.5, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("loss_scale", [None, 1024.0])
def test_it_is_torchs_adamw_with_clipping_and_schedule(schedule, clip, loss_scale):
    torch.manual_seed(0)
    ours, theirs = nn.Linear(4, 3), nn.Linear(4, 3)
    theirs.load_state_dict(ours.state_dict())
    factors = lr_factors(schedule, 5, 2)
    optimizer = optimizer_for(ours, factors=factors, clip_grad_norm=clip, loss_scale=loss_scale)
    reference = torch.optim.AdamW(theirs.parameters(), lr=0.1, weight_decay=0.0)
    for step in range(5):
        images = torch.randn(6, 4)
        optimizer.backward(ours(images).square().mean(), 1.0)
        norm_ours = optimizer.step()
        reference.zero_grad()
        theirs(images).square().mean().backward()
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), clip or math.inf)
        reference.param_groups[0]["lr"] = 0.1 * float(factors[step])
        reference.step()
        assert float(norm_ours) == 0.0
        assert float(optimizer.grad_norm) == pytest.approx(float(norm), rel=1e-5)
        torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_but_the_counters(poison):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = optimizer_for(model, factors=lr_factors("cosine", 10, 5), loss_scale=8.0)
    images = torch.randn(6, 4)
    optimizer.backward(model(images).mean(), 1.0)
    optimizer.step()
    before, moments = weights(model), {k: v.clone() for k, v in optimizer.state_dict().items() if "/" in k}
    loss = model(images).mean()
    if poison == "loss":  # infinite, with a gradient of 0
        optimizer.backward(loss * 0.0 + torch.tensor(math.inf), 1.0)
    else:
        optimizer.backward(loss, 1.0)
        model.weight.grad[0, 0] = math.inf
    assert float(optimizer.step()) == 1.0
    assert torch.equal(weights(model), before)
    after = optimizer.state_dict()
    assert all(torch.equal(after[name], value) for name, value in moments.items() if not name.startswith("counter"))
    assert [float(after[f"counter/{name}"]) for name in ("num_applied", "num_skipped", "skipped_in_a_row")] == [1, 1, 1]
    assert float(optimizer.loss_scale) == 4.0
    assert float(optimizer.lr_factor()) == 0.4
    optimizer.backward(model(images).mean(), 1.0)
    assert float(optimizer.step()) == 0.0
    assert float(optimizer.skipped_in_a_row) == 0.0
    assert not torch.equal(weights(model), before)


def test_the_loss_scale_doubles_after_its_interval(monkeypatch):
    monkeypatch.setattr("cxrdist.training.optim.LOSS_SCALE_INTERVAL", 3)
    model = nn.Linear(2, 2)
    optimizer = optimizer_for(model, loss_scale=4.0)
    scales = []
    for _ in range(7):
        optimizer.backward(model(torch.ones(1, 2)).mean(), 1.0)
        optimizer.step()
        scales.append(float(optimizer.loss_scale))
    assert scales == [4.0, 4.0, 8.0, 8.0, 8.0, 16.0, 16.0]


@pytest.mark.parametrize(("interval", "rate"), [(3, 0.2), (2000, 0.05)])
def test_the_loss_scale_is_grad_scalers_within_its_bounds(monkeypatch, interval, rate):
    monkeypatch.setattr("cxrdist.training.optim.LOSS_SCALE_INTERVAL", interval)
    torch.manual_seed(0)
    ours, theirs = nn.Linear(4, 3), nn.Linear(4, 3)
    theirs.load_state_dict(ours.state_dict())
    optimizer = optimizer_for(ours, lr=1e-2, loss_scale=2.0**16, factors=lr_factors("constant", 200, 0))
    reference = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=interval)
    overflows = torch.rand(200) < rate
    for overflow in overflows:
        images = torch.randn(6, 4)
        optimizer.backward(ours(images).square().mean(), 1.0)
        reference.zero_grad()
        scaler.scale(theirs(images).square().mean()).backward()
        if overflow:
            ours.weight.grad[1, 2] = theirs.weight.grad[1, 2] = math.inf
        assert bool(optimizer.step()) == bool(overflow)
        scaler.step(reference)
        scaler.update()
        assert float(optimizer.loss_scale) == scaler.get_scale()
        torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-5, atol=1e-6)


def test_10_000_steps_of_random_overflow_keep_the_scale_in_its_bounds_and_the_weights_finite(monkeypatch):
    monkeypatch.setattr("cxrdist.training.optim.LOSS_SCALE_INTERVAL", 5)
    torch.manual_seed(0)
    model = nn.Linear(2, 1, bias=False)
    optimizer = optimizer_for(model, lr=1e-3, loss_scale=2.0**16)
    rates = torch.tensor([0.5, 0.0]).repeat_interleave(1000).repeat(5)  # long enough either way to pass both bounds
    gradients, overflows = torch.randn(10_000, 1, 2), torch.rand(10_000) < rates
    gradients[overflows, 0, 0] = torch.tensor([math.inf, -math.inf, math.nan]).repeat(10_000)[: int(overflows.sum())]
    scales = []
    for gradient, overflow in zip(gradients, overflows.tolist(), strict=True):
        before = model.weight.detach().clone()
        model.weight.grad = gradient * optimizer.loss_scale
        assert bool(optimizer.step()) == overflow
        assert torch.equal(model.weight, before) == overflow
        scales.append(optimizer.loss_scale)
    assert torch.stack(scales).aminmax() == (1.0, 2.0**24)
    assert int(optimizer.num_skipped) == int(overflows.sum()) > 2000
    assert torch.isfinite(model.weight).all()


def test_a_restored_loss_scale_is_brought_into_its_bounds():
    optimizer = optimizer_for(nn.Linear(2, 1), loss_scale=1.0)
    for stored, taken in ((math.inf, 2.0**24), (0.0, 1.0), (8.0, 8.0)):
        optimizer.load_state_dict(optimizer.state_dict() | {"counter/loss_scale": torch.tensor(stored)})
        assert float(optimizer.loss_scale) == taken


def test_restored_state_continues_bit_for_bit():
    torch.manual_seed(0)
    batches = [torch.randn(6, 4) for _ in range(6)]
    options = {"factors": lr_factors("cosine", 6, 2), "clip_grad_norm": 0.1, "loss_scale": 16.0}

    def run(model, optimizer, part):
        for images in part:
            optimizer.backward(model(images).square().mean(), 1.0)
            optimizer.step()

    model = nn.Linear(4, 3)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole = optimizer_for(model, **options)
    run(model, whole, batches)
    first = nn.Linear(4, 3)
    first.load_state_dict(start)
    halfway = optimizer_for(first, **options)
    run(first, halfway, batches[:3])
    saved = {name: tensor.clone() for name, tensor in halfway.state_dict().items()}
    second = nn.Linear(4, 3)
    second.load_state_dict(first.state_dict())
    resumed = optimizer_for(second, **options)
    resumed.load_state_dict(saved)
    run(second, resumed, batches[3:])
    assert torch.equal(weights(second), weights(model))
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in resumed.state_dict().items())
