"""The training augmentation: what depends on what, and what each mode does."""

import numpy as np
import pytest
import torch

from cxrdist.augment.training import TrainingAugment
from cxrdist.augment.views import make_views
from cxrdist.data.order import train_batches
from cxrdist.errors import UserError

pytestmark = pytest.mark.fast

KEYS = np.array([3, 70_001, 12, 5, 108_490, 9, 11, 13])


@pytest.mark.parametrize("mode", ["published", "crop_flip", "none"])
@pytest.mark.parametrize("reference", [False, True])
def test_a_key_gets_the_same_augmentation_in_any_batch(images: torch.Tensor, mode: str, reference: bool) -> None:
    augment = TrainingAugment(96, mode, seed=22, reference=reference)  # type: ignore[arg-type]
    whole = augment(images, KEYS, epoch=4)
    assert whole.shape == (8, 3, 96, 96)
    assert whole.dtype == torch.float32
    other = TrainingAugment(96, mode, seed=22, reference=reference)  # type: ignore[arg-type]
    other(images, KEYS + 1, epoch=0)  # what was drawn before must not matter
    for rows in ([5], [7, 2, 0], [1, 3]):
        assert torch.equal(other(images[rows], KEYS[rows], epoch=4), whole[rows])


def test_epoch_seed_and_key_each_change_the_augmentation(images: torch.Tensor) -> None:
    augment = TrainingAugment(96, "published", seed=22)
    first = augment.levels(images, KEYS, epoch=1)
    assert not torch.equal(first, augment.levels(images, KEYS, epoch=2))
    assert not torch.equal(first, TrainingAugment(96, "published", seed=23).levels(images, KEYS, epoch=1))
    assert not torch.equal(first, augment.levels(images, KEYS + 1, epoch=1))


def test_none_is_the_evaluation_input(images: torch.Tensor) -> None:
    ((_, plain),) = make_views(images, ["plain"], 96)
    assert torch.equal(TrainingAugment(96, "none", seed=1)(images, KEYS, epoch=3), plain)


def test_an_unknown_mode_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="augment='strong' is unknown; one of published, crop_flip, none"):
        TrainingAugment(96, "strong", seed=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_threads_and_batch_sizes_show_each_key_the_same_picture(images: torch.Tensor, world_size: int) -> None:
    """FAULTS row 5, for the augmentation: what one process shows the model, several show it too."""

    def pictures(world_size: int, device_batch_size: int) -> dict[int, torch.Tensor]:
        shown = {}
        for rank in range(world_size):
            augment = TrainingAugment(96, "published", seed=22)  # each rank makes its own
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
