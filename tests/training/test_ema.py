from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cxrdist.training.ema import Ema

pytestmark = pytest.mark.fast

GOLDEN = Path(__file__).parents[1] / "golden" / "recipe"


@pytest.mark.parametrize("decay", [0.9, 0.99967, 0.9997])
def test_twenty_published_updates_replayed(decay):
    golden = np.load(GOLDEN / f"ema_decay{decay}.npz")
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3))

    def put(stage: str) -> None:
        model.load_state_dict({name: torch.from_numpy(golden[f"{stage}/{name}"]) for name in model.state_dict()})

    put("init")
    ema = Ema(model, decay)
    exact = {name: tensor.double().numpy() for name, tensor in ema.state_dict().items() if tensor.is_floating_point()}
    for step in range(20):
        put(f"model{step:02d}")
        ema.update()
        exact = {name: decay * value + (1 - decay) * golden[f"model{step:02d}/{name}"] for name, value in exact.items()}
    for name, value in exact.items():
        average = ema.state_dict()[name].numpy()
        np.testing.assert_allclose(average, golden[f"ema_final/{name}"], rtol=0, atol=1e-6)
        # the published float32 loop itself drifts from the exact average in these 20 updates
        np.testing.assert_allclose(average, value, rtol=0, atol=2e-6)
    # The published loop rounded this counter down at every update; a count is copied here.
    assert int(ema.state_dict()["1.num_batches_tracked"]) == int(golden["model19/1.num_batches_tracked"])


def test_only_trained_parameters_and_buffers_are_tracked():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[0].bias.requires_grad_(False)
    assert set(Ema(model, 0.9, frozen=frozenset({"1.running_var"})).state_dict()) == {
        "0.weight",
        "1.weight",
        "1.bias",
        "1.running_mean",
        "1.num_batches_tracked",
    }


def test_a_skipped_step_is_no_update():
    model = nn.Linear(2, 2)
    ema = Ema(model, 0.5, ramp=True)
    before = ema.state_dict()["weight"].clone()
    model.weight.data.add_(1.0)
    ema.update(torch.tensor(1.0))
    assert torch.equal(ema.state_dict()["weight"], before)
    assert float(ema.num_updates) == 0.0
    ema.update(torch.tensor(0.0))
    torch.testing.assert_close(ema.state_dict()["weight"], before + 0.9)  # decay of update 0: 1 / 10


def test_the_ramp_ends_at_the_decay():
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.zero_()
    ema = Ema(model, 0.3, ramp=True)
    model.weight.data.fill_(1.0)
    expected = 0.0
    for step in range(8):
        ema.update(torch.tensor(0.0))
        decay = min(0.3, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay)
        assert float(ema.state_dict()["weight"]) == pytest.approx(expected, rel=1e-6)


def test_it_follows_parameters_that_got_other_memory():
    # DDP's preparation does that; views of the old memory would leave the average where it began
    model = nn.Linear(2, 2)
    ema = Ema(model, 0.0)
    model.weight.data = model.weight.data.clone() + 1.0
    ema.update()
    assert torch.equal(ema.state_dict()["weight"], model.weight)


def test_the_models_own_weights_come_back_after_use():
    model = nn.Linear(2, 2)
    ema = Ema(model, 0.9)
    average = ema.state_dict()["weight"].clone()
    model.weight.data.add_(1.0)
    own = model.weight.detach().clone()
    with ema.applied():
        assert torch.equal(model.weight, average)
    assert torch.equal(model.weight, own)
