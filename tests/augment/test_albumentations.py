"""The reference mode against the library of the published run, step by step, for the same parameters.

Needs albumentations 2.0.8 and OpenCV (`pip install '.[bench]'`), which training does not.
"""

import importlib.util
import warnings

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cxrdist.augment.draws import draw
from cxrdist.augment.reference import steps

MISSING = [name for name in ("albumentations", "cv2") if not importlib.util.find_spec(name)]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"{' and '.join(MISSING)} not installed (bench extra)")
if not MISSING:
    import albucore
    import albumentations as A
    import cv2
    from albumentations.augmentations.crops import functional as crops
    from albumentations.augmentations.geometric import functional as geometric
    from albumentations.augmentations.pixel import functional as pixels

SIZE = 448


@pytest.fixture(scope="module")
def image() -> NDArray[np.uint8]:
    """(600, 600) a chest-like arch with ribs, an edge and noise."""
    y, x = np.mgrid[-1:1:600j, -1:1:600j]
    field = 150 - 90 * np.exp(-(((np.abs(x) - 0.4) / 0.25) ** 2) - (y / 0.7) ** 2) + 20 * np.sin(22 * y + 4 * x**2)
    field += np.random.default_rng(0).normal(size=x.shape) * 6
    field[:40, :90] = 255
    return np.rint(field).clip(0, 255).astype(np.uint8)


def library_step(name: str, rgb: NDArray[np.uint8], row: int, draws: object) -> NDArray[np.uint8]:
    """What albumentations makes of `rgb` (H, W, 3) with the parameters that row `row` has for step `name`."""
    if name == "crop":
        x, y, width, height = draws.crop[row].tolist()
        return geometric.resize(crops.crop(rgb, x, y, x + width, y + height), (SIZE, SIZE), cv2.INTER_LINEAR)
    if name == "flip":
        return A.HorizontalFlip(p=1).apply(rgb)
    if name in ("rotate", "shift"):
        angle = float(draws.angle[row]) if name == "rotate" else 0.0
        shift, scale = ((0, 0), (1.0, 1.0)) if name == "rotate" else (draws.shift[row], draws.scale[row])
        matrix = geometric.create_affine_transformation_matrix(
            {"x": int(shift[0]), "y": int(shift[1])},
            {"x": 0.0, "y": 0.0},
            {"x": float(scale[0]), "y": float(scale[1])},
            angle,
            geometric.center((SIZE, SIZE)),
        )
        return geometric.warp_affine(rgb, matrix, cv2.INTER_LINEAR, 0, cv2.BORDER_CONSTANT, (SIZE, SIZE))
    if name == "clahe":
        return pixels.clahe(rgb, float(draws.clip_limit[row]), (8, 8))
    if name == "brightness":
        return albucore.multiply_add(rgb, float(draws.contrast[row]), float(draws.brightness[row]))
    if name == "holes":
        return A.CoarseDropout(p=1).apply(rgb, holes=draws.holes[row], seed=0)
    raise AssertionError(name)


def test_every_step_is_within_one_level_of_the_library(image: NDArray[np.uint8]) -> None:
    draws = draw(np.arange(60), seed=22, epoch=1, source_size=image.shape, image_size=SIZE)
    tensor = torch.from_numpy(image)[None, None]
    seen = set()
    for row in range(60):
        before = np.repeat(image[..., None], 3, 2)
        for name, levels in steps(tensor, draws, row, SIZE):
            after = levels[0, 0].numpy()
            expected = library_step(name, before, row, draws)
            difference = np.abs(expected.astype(np.float32) - after[..., None])
            assert difference.max() <= 1, (name, row)
            # CLAHE's way back from L is the formula; OpenCV's own table is off it by one at 10 to 16 of 256 levels.
            assert (difference > 0).mean() < (0.12 if name == "clahe" else 0.005), (name, row)
            before = np.repeat(after.astype(np.uint8)[..., None], 3, 2)
            seen.add(name)
    assert seen == {"crop", "flip", "rotate", "clahe", "brightness", "holes", "shift"}


def test_the_library_draws_from_the_same_distributions() -> None:
    num = 4000
    ours = draw(np.arange(num), seed=1, epoch=1, source_size=(600, 600), image_size=SIZE)
    rgb = np.zeros((600, 600, 3), np.uint8)
    small = np.zeros((SIZE, SIZE, 3), np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        crop = A.RandomResizedCrop((SIZE, SIZE), scale=(0.85, 1.0), ratio=(0.9, 1.1))
        shift = A.ShiftScaleRotate(shift_limit=0.03, scale_limit=0.05, rotate_limit=0)
        holes = A.CoarseDropout(max_holes=1, max_height=20, max_width=20)
    for step in (crop, shift, holes):
        step.set_random_seed(3)
    boxes = np.array([crop.get_params_dependent_on_data({"shape": rgb.shape}, {})["crop_coords"] for _ in range(num)])
    boxes[:, 2:] -= boxes[:, :2]
    _alike(ours.crop, boxes)
    matrices = np.array([shift.get_params_dependent_on_data({"shape": small.shape}, {})["matrix"] for _ in range(num)])
    scale = matrices[:, [0, 1], [0, 1]]
    centre = (SIZE - 1) / 2
    pixels_moved = matrices[:, :2, 2] - centre * (1 - scale)
    _alike(ours.scale[ours.shifted], scale)
    _alike(ours.shift[ours.shifted], np.rint(pixels_moved))
    cut = [holes.get_params_dependent_on_data({"shape": small.shape}, {})["holes"] for _ in range(num)]
    assert np.mean([len(some) for some in cut]) == pytest.approx(1.5, abs=0.04)
    _alike(ours.holes[ours.cut][:, 0], np.array([some[0] for some in cut]))


def _alike(ours: NDArray[np.generic], theirs: NDArray[np.generic]) -> None:
    """Column by column, the quantiles of both samples lie close for their spread."""
    grid = np.linspace(0.02, 0.98, 25)
    for mine, other in zip(np.asarray(ours, float).T, np.asarray(theirs, float).T, strict=True):
        difference = np.abs(np.quantile(mine, grid) - np.quantile(other, grid))
        assert difference.max() <= 0.12 * other.std() + 1.0
