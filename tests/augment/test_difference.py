"""What the composed warp changes, as `python -m cxrdist.bench augment_difference` measures it over 2,000 draws."""

import numpy as np
import pytest
import torch

from cxrdist.bench.augment_difference import compare


@pytest.mark.parametrize("num_draws", [150, pytest.param(2000, marks=pytest.mark.slow)])
def test_the_default_keeps_mean_variance_borders_and_holes_of_the_published_steps(
    images: torch.Tensor, num_draws: int
) -> None:
    found = compare(images, num_draws, 96)
    assert np.abs(found.mean[0] - found.mean[1]).mean() < 0.4  # levels
    assert np.median(found.std[0] / found.std[1]) == pytest.approx(1.0, abs=0.02)
    assert 1.0 <= found.gradient[0] / found.gradient[1] < 1.25  # one resampling keeps what three blur
    assert found.black[0].mean() == pytest.approx(found.black[1].mean(), abs=2e-4)
    assert np.abs(found.black[0] - found.black[1]).max() < 0.005  # of the area of one image
    assert found.change["crop and flip"] < 0.5
    assert found.change["rotation"] < 1.5
