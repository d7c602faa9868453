"""Small images that show what a warp does to them."""

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate


@pytest.fixture(scope="session")
def images() -> torch.Tensor:
    """(8, 1, 120, 120) uint8 smooth fields."""
    field = np.random.default_rng(0).normal(size=(8, 1, 15, 15)).astype(np.float32)
    smooth = interpolate(torch.from_numpy(field), (120, 120), mode="bicubic")
    return (smooth * 40 + 120).clamp(0, 255).byte()
