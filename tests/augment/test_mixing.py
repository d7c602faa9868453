"""MixUp and CutMix: partners do not depend on ranks or device batches; targets and masks follow the pixels."""

import numpy as np
import pytest
import torch

from cxrdist.augment.mixing import Mixing
from cxrdist.data.order import train_batches
from cxrdist.errors import UserError
from cxrdist.recipes import Step, step

STEPS = [step("RandomMixUpV2", 0.7, lambda_val=(0.2, 0.4)), step("RandomCutMixV2", 0.7, beta=1.0)]
KEYS = np.arange(22) * 7 + 3
IMAGES = torch.rand(22, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TARGETS = torch.rand(22, 5, generator=torch.Generator().manual_seed(1)).round()


def mixed(mixing: Mixing, world_size: int, device_batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All images and targets of one global batch of 22, by row, as `world_size` ranks mix them."""
    images, targets = torch.zeros_like(IMAGES), torch.zeros_like(TARGETS)
    sizes = {"global_batch_size": 24, "device_batch_size": device_batch_size, "world_size": world_size}
    for rank in range(world_size):
        for micro in train_batches(np.arange(22), seed=1, epoch=2, rank=rank, group=4, **sizes):
            if micro.weight:
                rows = torch.from_numpy(micro.rows)
                images[rows], targets[rows] = mixing(IMAGES[rows], TARGETS[rows], KEYS[micro.rows], 2)
    return images, targets


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_ranks_and_device_batches_mix_the_same_images(step: Step) -> None:
    mixing = Mixing(step, 4, 32, seed=22)
    images, targets = mixed(mixing, 1, 24)
    assert 0 < (images == IMAGES).flatten(1).all(1).float().mean() < 0.7  # some groups stay as they are
    for world_size, device_batch_size in ((2, 12), (3, 4), (1, 8)):
        torch.manual_seed(world_size)
        other = mixed(mixing, world_size, device_batch_size)
        assert torch.equal(other[0], images)
        assert torch.equal(other[1], targets)
    again = Mixing(step, 4, 32, seed=23)
    assert not torch.equal(mixed(again, 1, 24)[0], images)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_targets_are_mixed_as_the_pixels_are(step: Step) -> None:
    """An image of one level and a target equal to it: the mean of the mixed image is its mixed target."""
    level = torch.rand(16, generator=torch.Generator().manual_seed(2))
    images = level.view(-1, 1, 1, 1).expand(-1, 1, 32, 32)
    out, targets = Mixing(step, 8, 32, seed=1)(images, level.view(-1, 1), np.arange(16), 0)
    assert torch.allclose(out.mean((1, 2, 3)), targets[:, 0], atol=1e-5)
    assert (targets[:, 0] != level).any()


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_a_cell_masked_in_either_image_is_masked_and_not_counted(step: Step) -> None:
    masked = TARGETS.clone()
    masked[::3, 1] = torch.nan
    masked[5] = torch.nan
    mixing = Mixing(step, 4, 32, seed=22)
    partners, shares, _ = mixing.draw(KEYS, 0)
    _, targets = mixing(IMAGES, masked, KEYS, 0)
    assert torch.equal(targets.isnan(), masked.isnan() | masked[partners].isnan())
    assert (partners // 4 == torch.arange(22) // 4).all()
    assert (partners[shares == 0] == torch.arange(22)[shares == 0]).all()
    assert np.array_equal(mixing.partners(KEYS, 0), partners)


def test_a_batch_that_would_split_a_group_is_refused() -> None:
    sizes = {"seed": 1, "epoch": 0, "rank": 0, "world_size": 2, "group": 4}
    with pytest.raises(UserError, match="--device-batch-size 6 would split the groups of 4 images"):
        train_batches(np.arange(64), global_batch_size=16, device_batch_size=6, **sizes)
    with pytest.raises(UserError, match="global_batch_size 18 would split"):
        train_batches(np.arange(64), global_batch_size=18, device_batch_size=4, **sizes)
