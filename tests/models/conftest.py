from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

GOLDEN = Path(__file__).parents[1] / "golden"
EVA_X_SIZES: dict[str, Any] = {"embed_dim": 48, "depth": 2, "num_heads": 3}
CHEXFOUND_SIZES: dict[str, Any] = {"embed_dim": 32, "depth": 8, "num_heads": 4, "decoder_dim": 16, "num_queries": 40}


@pytest.fixture(scope="session")
def golden() -> Path:
    return GOLDEN


@pytest.fixture(scope="session")
def pattern() -> Callable[[int, int], torch.Tensor]:
    """The images the golden numbers were made from, (2, 3, height, width)."""

    def images(height: int, width: int) -> torch.Tensor:
        b, k, i, j = np.ogrid[0:2, 0:3, 0:height, 0:width]
        u = (37 * (i // 7) + 59 * (j // 5) + (i * j) // 97 + 83 * k + 131 * b) % 256
        return torch.from_numpy((u / 127.5 - 1).astype(np.float32))

    return images


@pytest.fixture(scope="session")
def max_abs() -> Callable[[torch.Tensor, np.ndarray], float]:
    def difference(ours: torch.Tensor, theirs: np.ndarray) -> float:
        assert tuple(ours.shape) == theirs.shape
        return float(np.abs(ours.detach().numpy() - theirs).max())

    return difference


@pytest.fixture
def small_eva_x() -> Callable[..., torch.nn.Module]:
    from cxrdist.models import architecture_of

    names = {"base": "eva_x", "tiny": "eva_x_tiny"}
    return lambda variant, size: architecture_of(names[variant]).build(size, 14, **EVA_X_SIZES).eval()


@pytest.fixture
def small_chexfound() -> Callable[..., torch.nn.Module]:
    from cxrdist.models import architecture_of

    return lambda size, num_classes=14, **kwargs: (
        architecture_of("chexfound").build(size, num_classes, **(CHEXFOUND_SIZES | kwargs)).eval()
    )
