"""The evaluation resize and the test-time views, against views made by running the published code."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cxrdist.augment.views import VIEWS, distinct_views, make_views, normalise, resize, view_levels
from cxrdist.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden" / "tta"
STORED = np.load(GOLDEN / "views_uint8.npz")
OUR_NAME = {"original": "plain"}

pytestmark = pytest.mark.fast


def source(index: int) -> torch.Tensor:
    pixels = np.array(Image.open(GOLDEN / f"src{index}.png"))
    return torch.from_numpy(pixels.reshape(600, 600, -1)).permute(2, 0, 1)[None]


@pytest.mark.parametrize("stored", STORED.files)
def test_every_published_view_is_equal(stored: str) -> None:
    size, image, view = stored.split("_")
    name = OUR_NAME.get(view, view)
    ((_, levels),) = view_levels(source(int(image[3:])), [name], int(size))
    expected = torch.from_numpy(STORED[stored].reshape(int(size), int(size), -1)).permute(2, 0, 1)
    assert torch.equal(levels[0], expected.float())


def test_the_chexfound_resize_is_equal() -> None:
    stored = np.load(GOLDEN / "chexfound_512_uint8.npz")
    assert np.array_equal(resize(source(0), 512)[0, 0].numpy(), stored["img0"])
    colour = resize(source(2), 512)[0, :, ::2, ::2].permute(1, 2, 0).numpy()
    assert np.array_equal(colour, stored["img2"])


def test_normalisation_is_the_published_one() -> None:
    levels = torch.from_numpy(STORED["128_img2_original"]).permute(2, 0, 1)[None]
    expected = np.load(GOLDEN / "normalized_128_img2_original.npz")["x"]
    np.testing.assert_allclose(normalise(levels)[0].numpy(), expected, atol=1e-6)


def test_one_grey_channel_gives_what_three_equal_channels_give() -> None:
    grey = source(0)
    for (name, one), (_, three) in zip(
        make_views(grey, VIEWS, 128), make_views(grey.repeat(1, 3, 1, 1), VIEWS, 128), strict=True
    ):
        assert one.shape == (1, 3, 128, 128)
        assert torch.equal(one, three), name


def test_a_view_that_equals_another_is_computed_once_with_its_weight() -> None:
    weights = distinct_views(VIEWS)
    assert list(weights) == ["plain", "hflip", "center1.1", "bright0.95", "bright1.05"]
    assert weights["plain"] == pytest.approx(2 / 6)
    assert sum(weights.values()) == pytest.approx(1.0)
    assert [name for name, _ in make_views(source(0), VIEWS, 64)] == list(weights)
    assert distinct_views(["center1.0"]) == {"plain": 1.0}


def test_views_stay_float32_under_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ((_, images),) = make_views(source(0), ["center1.1"], 64)
    assert images.dtype == torch.float32


@pytest.mark.parametrize("views", [["plain", "vflip"], []])
def test_an_unknown_view_is_refused_by_name(views: list[str]) -> None:
    with pytest.raises(UserError, match="choose from plain, hflip"):
        distinct_views(views)
