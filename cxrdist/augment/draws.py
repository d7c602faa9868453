"""Random parameters of the training augmentation, as a pure function of (seed, epoch, key).

A counter-based hash gives every image of every epoch its own numbers, so they depend neither on the batch an image is
in nor on ranks, threads, or what was drawn before. Drawn on the host in numpy for all of the batch at once.
Source of the ranges: the published run (albumentations 2.0.8), with the arguments that took effect.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cxrdist.splitmix import GAMMA, mix

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

CROP_TRIES = 10
CROP_AREA = (0.85, 1.0)  # of the image
CROP_LOG_RATIO = (np.log(0.9), np.log(1.1))  # width / height
MAX_ANGLE_DEG = 12.0
CLIP_LIMIT = (1.0, 4.0)
CONTRAST = 0.2
BRIGHTNESS = 0.2  # of 255
SCALE = 0.05
SHIFT = 0.03  # of the side
PROBABILITY = {"flip": 0.5, "rotate": 0.4, "clahe": 0.3, "brightness": 0.3, "holes": 0.2, "shift": 0.25}
MAX_HOLES = 2


HoleMode = Literal["as_run", "as_asked"]
HOLES: dict[HoleMode, tuple[int, float, float]] = {  # at most so many, each side between: px, or of the image's below 1
    "as_run": (2, 0.1, 0.2),  # the library ignored the arguments of the call
    "as_asked": (1, 1, 20),
}


@dataclass(frozen=True)
class Draws:
    """What is done to each of B images, in the published order. A step that an image skips holds its identity."""

    crop: Ints  # (B, 4): x, y, width, height, in source pixels
    flip: Mask  # (B,)
    angle: Floats  # (B,) degrees, positive is counter-clockwise; 0 not rotated
    clip_limit: Floats  # (B,); 0 no CLAHE
    contrast: Floats  # (B,) factor
    brightness: Floats  # (B,) grey levels
    holes: Ints  # (B, 2, 4): x1, y1, x2, y2 in pixels of the model's size, ends excluded; all 0 no hole
    scale: Floats  # (B, 2): x, y
    shift: Ints  # (B, 2): x, y in pixels of the model's size

    @property
    def adjusted(self) -> Mask:
        """(B,) images whose brightness or contrast changes."""
        return np.not_equal(self.contrast, 1.0) | np.not_equal(self.brightness, 0.0)

    @property
    def cut(self) -> Mask:
        """(B,) images with a hole."""
        return np.asarray(self.holes.any((1, 2)), np.bool_)

    @property
    def shifted(self) -> Mask:
        """(B,) images that the last step moves or scales."""
        return np.asarray((self.scale != 1.0).any(1) | (self.shift != 0).any(1), np.bool_)


def uniforms(seed: int, epoch: int, keys: Ints, num: int) -> Floats:
    """(B, num) independent values in [0, 1), the row of a key depending on nothing but (seed, epoch, key).

    Source: the SplitMix64 generator (Steele, Lea, Flood 2014), its state hashed from the three numbers.
    """
    state = np.zeros(len(keys), np.uint64)
    for part in (np.int64(seed), np.int64(epoch), np.asarray(keys, np.int64)):
        state = mix((state ^ np.asarray(part).astype(np.uint64)) + GAMMA)
    counters = np.arange(1, num + 1, dtype=np.uint64) * GAMMA
    return (mix(state[:, None] + counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def draw(
    keys: Ints,
    seed: int,
    epoch: int,
    source_size: tuple[int, int],
    image_size: int,
    *,
    crop_flip_only: bool = False,
    holes: HoleMode = "as_run",
) -> Draws:
    """Parameters of the images `keys` (B,), their numbers in the shard set, in `epoch`.

    Args:
        source_size: height and width of the stored images, px.
        image_size: the model's, px; holes and shifts are in its pixels.
        crop_flip_only: leave the other steps out. Crop and flip are the same as with them.
    """
    values: Iterator[Floats] = iter(uniforms(seed, epoch, keys, 4 * CROP_TRIES + 24).T)

    def between(low: float, high: float) -> Floats:
        return low + (high - low) * next(values)

    def happens(step: str) -> Mask:
        probability = PROBABILITY[step] if step == "flip" or not crop_flip_only else 0.0
        return np.less(next(values), probability, dtype=np.bool_)

    crop = _draw_crop(np.stack([next(values) for _ in range(4 * CROP_TRIES)], 1), source_size)
    flip = happens("flip")
    angle = np.where(happens("rotate"), between(-MAX_ANGLE_DEG, MAX_ANGLE_DEG), 0.0)
    clip_limit = np.where(happens("clahe"), between(*CLIP_LIMIT), 0.0)
    adjust = happens("brightness")
    contrast = np.where(adjust, between(1.0 - CONTRAST, 1.0 + CONTRAST), 1.0)
    brightness = np.where(adjust, between(-BRIGHTNESS * 255.0, BRIGHTNESS * 255.0), 0.0)
    pierced = happens("holes")
    sides = np.stack([next(values) for _ in range(1 + 4 * MAX_HOLES)], 1)
    cut = _draw_holes(pierced, sides, *HOLES[holes], image_size)
    move = happens("shift")
    scale = np.stack([np.where(move, between(1.0 - SCALE, 1.0 + SCALE), 1.0) for _ in "xy"], 1)
    # Integer pixels, cut towards zero as the library's int() does.
    shift = np.stack([np.where(move, np.trunc(between(-SHIFT, SHIFT) * image_size), 0.0) for _ in "xy"], 1)
    return Draws(crop, flip, angle, clip_limit, contrast, brightness, cut, scale, shift.astype(np.int64))


def _draw_crop(values: Floats, source_size: tuple[int, int]) -> Ints:
    """(B, 4) from (B, 4 * tries) uniforms: the first try that fits, else the full image."""
    height, width = source_size
    area, log_ratio, top, left = np.moveaxis(values.reshape(len(values), CROP_TRIES, 4), 2, 0)
    area = (CROP_AREA[0] + (CROP_AREA[1] - CROP_AREA[0]) * area) * height * width
    ratio = np.exp(CROP_LOG_RATIO[0] + (CROP_LOG_RATIO[1] - CROP_LOG_RATIO[0]) * log_ratio)
    widths, heights = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (widths >= 1) & (widths <= width) & (heights >= 1) & (heights <= height)
    first = (np.arange(len(values)), fits.argmax(1))
    some = fits.any(1)
    crop_width, crop_height = np.where(some, widths[first], width), np.where(some, heights[first], height)
    x = np.floor((width - crop_width + 1) * left[first])
    y = np.floor((height - crop_height + 1) * top[first])
    return np.stack([x, y, crop_width, crop_height], 1).astype(np.int64)


def _draw_holes(cut: Mask, values: Floats, most: int, smallest: float, largest: float, image_size: int) -> Ints:
    """(B, MAX_HOLES, 4) from (B, 1 + 4 * MAX_HOLES) uniforms."""
    num = 1 + np.floor(most * values[:, 0])
    used = cut[:, None] & (np.arange(MAX_HOLES) < num[:, None])
    height, width, y, x = np.moveaxis(values[:, 1:].reshape(len(values), MAX_HOLES, 4), 2, 0)
    unit, one = (image_size, 0) if largest < 1 else (1, 1)  # px are drawn up to the longest side itself
    span = min(largest, image_size) - smallest + one
    height, width = (np.floor((smallest + span * side) * unit) for side in (height, width))
    y, x = np.floor((image_size - height + 1) * y), np.floor((image_size - width + 1) * x)
    boxes = np.stack([x, y, x + width, y + height], 2)
    return np.where(used[..., None], boxes, 0.0).astype(np.int64)
