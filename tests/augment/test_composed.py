"""One composed warp against the published steps: the same picture, with black where the published order puts it."""

from typing import Any

import numpy as np
import pytest
import torch

from cxrdist.augment.composed import composed
from cxrdist.augment.draws import Draws, draw
from cxrdist.augment.reference import stepwise

pytestmark = pytest.mark.fast

SIZE = 96


def draws_of(**changes: Any) -> Draws:
    """Parameters of one image that change nothing but what is named."""
    identity: dict[str, Any] = {
        "crop": [0, 0, 120, 120],
        "flip": False,
        "angle": 0.0,
        "clip_limit": 0.0,
        "contrast": 1.0,
        "brightness": 0.0,
        "holes": np.zeros((2, 4), np.int64),
        "scale": [1.0, 1.0],
        "shift": [0, 0],
    }
    return Draws(**{name: np.array([value]) for name, value in (identity | changes).items()})


def default(images: torch.Tensor, draws: Draws) -> torch.Tensor:
    return torch.cat([levels for _, levels in composed(images, draws, SIZE)])


HOLES = np.array([[10, 20, 30, 35], [60, 0, 72, 14]])
STEPS = {
    "resize": {},
    "crop": {"crop": [7, 3, 109, 113]},
    "flip": {"crop": [7, 3, 109, 113], "flip": True},
    "rotate": {"crop": [7, 3, 109, 113], "flip": True, "angle": 11.0},
    "shift": {"crop": [7, 3, 109, 113], "scale": [1.03, 0.96], "shift": [2, -2]},
    "rotate and shift": {"angle": -8.0, "scale": [0.95, 1.05], "shift": [-2, 1]},
    "clahe": {"clip_limit": 2.5},
    "brightness": {"contrast": 1.2, "brightness": -31.0},
    "holes": {"holes": HOLES},
    "holes and shift": {"holes": HOLES, "scale": [1.03, 0.96], "shift": [2, -2]},
    "rotate, brightness, holes, shift": {
        "angle": 9.0,
        "contrast": 0.9,
        "brightness": 40.0,
        "holes": HOLES,
        "shift": [2, -2],
    },
}


@pytest.mark.parametrize("step", STEPS)
def test_each_step_looks_as_published_on_a_smooth_image(images: torch.Tensor, step: str) -> None:
    draws = draws_of(**STEPS[step])
    difference = (default(images[:1], draws) - stepwise(images[:1], draws, SIZE)).abs()
    # One resampling less moves the levels of a smooth image by about one (which CLAHE then spreads), and those at a
    # hard edge by more.
    edges = any(name in STEPS[step] for name in ("holes", "angle", "scale"))
    assert difference.mean() < (3.0 if step == "clahe" else 1.0)
    if step != "clahe":
        assert (difference > 3).float().mean() < (0.03 if edges else 1e-9)


def test_rotation_leaves_black_that_brightness_lifts_and_shift_leaves_black_that_it_does_not() -> None:
    white = torch.full((1, 1, 120, 120), 200, dtype=torch.uint8)
    turned = default(white, draws_of(angle=10.0, brightness=40.0))[0, 0]
    assert turned[0, 0] == turned[-1, -1] == 40
    assert turned[48, 48] == 240
    moved = default(white, draws_of(brightness=40.0, shift=[2, -1]))[0, 0]
    assert torch.equal(moved[:, :2], torch.zeros(SIZE, 2))
    assert torch.equal(moved[-1], torch.zeros(SIZE))
    assert torch.equal(moved[:-1, 2:], torch.full((SIZE - 1, SIZE - 2), 240.0))


def test_nothing_outside_the_crop_window_is_seen() -> None:
    image = torch.full((1, 1, 120, 120), 255, dtype=torch.uint8)
    image[..., 5:110, 8:112] = 100
    for changes in ({}, {"flip": True}, {"angle": 12.0}, {"angle": -5.0, "scale": [0.95, 0.95], "shift": [2, 2]}):
        assert default(image, draws_of(crop=[8, 5, 104, 105], **changes)).max() == 100


def test_holes_are_cut_to_the_pixel_and_move_with_the_shift() -> None:
    white = torch.full((1, 1, 120, 120), 200, dtype=torch.uint8)
    expected = torch.full((SIZE, SIZE), 200.0)
    for left, top, right, bottom in HOLES.tolist():
        expected[top:bottom, left:right] = 0.0
    assert torch.equal(default(white, draws_of(holes=HOLES))[0, 0], expected)
    moved = default(white, draws_of(holes=HOLES, shift=[2, -1]))[0, 0]
    assert torch.equal(moved[:-1, 2:], expected[1:, :-2])


def test_three_equal_channels_give_what_one_gives(images: torch.Tensor) -> None:
    draws = draw(np.arange(8), seed=3, epoch=1, source_size=(120, 120), image_size=SIZE)
    one = default(images, draws)
    three = default(images.repeat(1, 3, 1, 1), draws)
    assert one.shape == (8, 1, SIZE, SIZE)
    assert three.shape == (8, 3, SIZE, SIZE)
    difference = (three - one).abs().amax((1, 2, 3))
    assert difference[torch.from_numpy(draws.clip_limit == 0)].max() <= 1  # rounding
    assert difference.max() <= 2  # and CLAHE's way through LAB and back


def test_levels_are_whole_and_in_range(images: torch.Tensor) -> None:
    for epoch in range(5):
        levels = default(images, draw(np.arange(8), seed=3, epoch=epoch, source_size=(120, 120), image_size=SIZE))
        assert levels.dtype == torch.float32
        assert levels.min() >= 0
        assert levels.max() <= 255
        assert torch.equal(levels, levels.round())


@pytest.mark.gpu
def test_the_device_gives_the_hosts_picture_and_never_waits(images: torch.Tensor) -> None:
    draws = draw(np.arange(8), seed=3, epoch=1, source_size=(120, 120), image_size=SIZE)
    on_device = images.cuda()
    default(on_device, draws)  # the constants go to the device once
    torch.cuda.set_sync_debug_mode("error")
    try:
        levels = default(on_device, draws)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    difference = (levels.cpu() - default(images, draws)).abs()
    assert (difference > 1).float().mean() < 0.001
