"""Every published step against the library of the published run, for the same parameters, on grey and colour images.

Needs albumentations 2.0.8 and OpenCV (`pip install '.[bench]'`), which training does not.
"""

import importlib.util
import warnings

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cxrdist.augment.pipeline import Stage, stages_of
from cxrdist.recipes import HOLES_AS_ASKED, PUBLISHED_STEPS

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
Image = NDArray[np.uint8]


def picture(kind: str) -> Image:
    """(600, 600, 3) a chest-like arch with ribs, an edge and noise: grey, tinted, or of strong colours."""
    y, x = np.mgrid[-1:1:600j, -1:1:600j]
    field = 150 - 90 * np.exp(-(((np.abs(x) - 0.4) / 0.25) ** 2) - (y / 0.7) ** 2) + 20 * np.sin(22 * y + 4 * x**2)
    field += np.random.default_rng(0).normal(size=x.shape) * 6
    field[:40, :90] = 255
    tint = {"grey": np.ones((600, 600, 3)), "tinted": np.array([1.0, 0.93, 0.85]) * np.ones((600, 600, 3))}
    tint["colour"] = 0.6 + 0.5 * np.stack([np.sin(3 * x + 2 * y), np.cos(4 * y), np.sin(5 * x)], 2)
    return np.rint(field[..., None] * tint[kind]).clip(0, 255).astype(np.uint8)


def library_step(name: str, rgb: Image, params: dict[str, NDArray[np.generic]]) -> Image:
    """What albumentations makes of `rgb` (H, W, 3) with one image's parameters for step `name`."""
    if name == "crop":
        x, y, width, height = params["window"][0].astype(int).tolist()
        return geometric.resize(crops.crop(rgb, x, y, x + width, y + height), (SIZE, SIZE), cv2.INTER_LINEAR)
    if name == "flip":
        return A.HorizontalFlip(p=1).apply(rgb)
    if name in ("rotate", "shift"):
        angle = float(params["degrees"][0]) if name == "rotate" else 0.0
        shift, scale = ((0, 0), (1.0, 1.0)) if name == "rotate" else (params["translations"][0], params["scale"][0])
        matrix = geometric.create_affine_transformation_matrix(
            {"x": int(shift[0]), "y": int(shift[1])},
            {"x": 0.0, "y": 0.0},
            {"x": float(scale[0]), "y": float(scale[1])},
            angle,
            geometric.center((SIZE, SIZE)),
        )
        return geometric.warp_affine(rgb, matrix, cv2.INTER_LINEAR, 0, cv2.BORDER_CONSTANT, (SIZE, SIZE))
    if name == "clahe":
        return pixels.clahe(rgb, float(params["clip_limit"][0]), (8, 8))
    if name == "brightness":
        return albucore.multiply_add(rgb, float(params["factor"][0]), float(params["offset"][0]))
    if name == "holes":
        return A.CoarseDropout(p=1).apply(rgb, holes=params["boxes"][0].astype(int), seed=0)
    raise AssertionError(name)


def always(stage: Stage) -> Stage:
    return Stage(stage.name, 1.0, stage.module, stage.start, stage.stream, stage.one_by_one)


@pytest.mark.parametrize("kind", ["grey", "tinted", "colour"])
@pytest.mark.parametrize("stage", stages_of((*PUBLISHED_STEPS, HOLES_AS_ASKED), SIZE), ids=lambda stage: stage.name)
def test_every_step_is_within_one_level_of_the_library(stage: Stage, kind: str) -> None:
    stored = picture(kind)
    before = stored if stage.name == "crop" else np.ascontiguousarray(stored[76:524, 60:508])
    batch = torch.from_numpy(before.transpose(2, 0, 1).copy())[None].expand(8, -1, -1, -1)
    if kind == "grey":
        batch = batch[:, :1]
    _, params = always(stage).draw(np.arange(8), 22, 1, (before.shape[0], before.shape[1]))
    after = stage(batch if stage.name == "crop" else batch.float(), params).numpy()
    off = []
    for row, image in enumerate(after):
        expected = library_step(stage.name, before, params[row])
        off.append(np.abs(expected.astype(np.float32) - image.transpose(1, 2, 0)))
    worst = np.array(off)
    assert worst.max() <= 1
    # By one: the exact weights of the crop against 11 bits, and three channels of a grey image after the CLAHE.
    clahe = 0.05 if kind == "grey" else 1e-9
    assert (worst > 0).mean() < {"crop": 0.15, "clahe": clahe}.get(stage.name, 0.005)


def test_the_library_draws_from_the_same_distributions() -> None:
    num = 4000
    names, sizes = {"crop": "window", "holes": "boxes", "shift": "scale translations"}, {"crop": 600}
    ours = {}
    for stage in stages_of([step for step in PUBLISHED_STEPS if step.name in names], SIZE):
        px = sizes.get(stage.name, SIZE)
        _, params = stage.draw(np.arange(num), 1, 1, (px, px))
        ours |= {name: np.concatenate([each[name] for each in params]) for name in names[stage.name].split()}
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
    _alike(ours["window"], boxes)
    matrices = np.array([shift.get_params_dependent_on_data({"shape": small.shape}, {})["matrix"] for _ in range(num)])
    scale = matrices[:, [0, 1], [0, 1]]
    centre = (SIZE - 1) / 2
    pixels_moved = matrices[:, :2, 2] - centre * (1 - scale)
    _alike(ours["scale"], scale)
    _alike(ours["translations"], np.rint(pixels_moved))
    cut = [holes.get_params_dependent_on_data({"shape": small.shape}, {})["holes"] for _ in range(num)]
    used = (ours["boxes"] != 0).any(2).sum(1)
    assert used.mean() == pytest.approx(np.mean([len(some) for some in cut]), abs=0.06)
    _alike(ours["boxes"][:, 0], np.array([some[0] for some in cut]))


def _alike(ours: NDArray[np.generic], theirs: NDArray[np.generic]) -> None:
    """Column by column, the quantiles of both samples lie close for their spread."""
    grid = np.linspace(0.02, 0.98, 25)
    for mine, other in zip(np.asarray(ours, float).T, np.asarray(theirs, float).T, strict=True):
        difference = np.abs(np.quantile(mine, grid) - np.quantile(other, grid))
        assert difference.max() <= 0.15 * other.std() + 1.0
