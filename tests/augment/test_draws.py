"""Random parameters: their ranges and frequencies are the published ones, and they depend on the key alone."""

import dataclasses

import numpy as np
import pytest

from cxrdist.augment.draws import Draws, draw, uniforms

pytestmark = pytest.mark.fast

MANY = draw(np.arange(20_000), seed=22, epoch=1, source_size=(600, 600), image_size=448)


def test_uniforms_are_uniform_and_unrelated_between_keys_epochs_seeds_and_places() -> None:
    values = uniforms(22, 1, np.arange(20_000), 8)
    assert values.min() >= 0.0
    assert values.max() < 1.0
    counts = np.stack([np.histogram(column, 20, (0, 1))[0] for column in values.T])
    assert np.abs(counts / 1000 - 1).max() < 0.15
    neighbours = [values[:-1, 0], values[1:, 0], values[:-1, 1]]
    neighbours += [uniforms(seed, epoch, np.arange(19_999), 1)[:, 0] for seed, epoch in ((22, 2), (23, 1), (1, 22))]
    off_diagonal = np.corrcoef(neighbours) - np.eye(len(neighbours))
    assert np.abs(off_diagonal).max() < 0.03


def test_steps_happen_as_often_as_published() -> None:
    rates = {
        "flip": MANY.flip.mean(),
        "rotate": (MANY.angle != 0).mean(),
        "clahe": (MANY.clip_limit > 0).mean(),
        "brightness": MANY.adjusted.mean(),
        "holes": MANY.cut.mean(),
        "shift": MANY.shifted.mean(),
    }
    expected = {"flip": 0.5, "rotate": 0.4, "clahe": 0.3, "brightness": 0.3, "holes": 0.2, "shift": 0.25}
    assert rates == pytest.approx(expected, abs=0.015)
    together = (MANY.flip & (MANY.angle != 0) & (MANY.clip_limit > 0)).mean()
    assert together == pytest.approx(0.5 * 0.4 * 0.3, abs=0.01)


def test_parameters_stay_in_the_published_ranges() -> None:
    x, y, width, height = MANY.crop.T
    assert x.min() == y.min() == 0
    assert max((x + width).max(), (y + height).max()) == 600
    assert (width * height / 600**2).mean() == pytest.approx(0.905, abs=0.003)
    assert (width * height / 600**2).min() > 0.848
    assert np.abs(MANY.angle).max() == pytest.approx(12, abs=0.1)
    clahe = MANY.clip_limit[MANY.clip_limit > 0]
    assert clahe.min() == pytest.approx(1, abs=0.01)
    assert clahe.max() == pytest.approx(4, abs=0.01)
    assert np.abs(MANY.contrast - 1).max() == pytest.approx(0.2, abs=0.001)
    assert np.abs(MANY.brightness).max() == pytest.approx(51, abs=0.1)
    assert np.abs(MANY.scale - 1).max() == pytest.approx(0.05, abs=0.001)
    assert np.abs(MANY.shift).max() == 13  # int(.03 * 448)


def test_holes_as_run_and_as_asked() -> None:
    sides = MANY.holes[MANY.cut][..., 2:] - MANY.holes[MANY.cut][..., :2]
    second = (sides[:, 1] > 0).all(1)
    assert second.mean() == pytest.approx(0.5, abs=0.03)
    used = sides[sides[..., 0] > 0]
    assert used.min() == 44  # int(.1 * 448)
    assert used.max() == 89
    assert abs(np.corrcoef(used.T)[0, 1]) < 0.05  # height and width are drawn apart
    asked = draw(np.arange(5000), seed=1, epoch=1, source_size=(600, 600), image_size=448, holes="as_asked")
    assert asked.cut.mean() == pytest.approx(0.2, abs=0.02)
    assert not asked.holes[:, 1].any()
    assert (asked.holes[..., 2:] - asked.holes[..., :2]).max() == 20
    for draws in (MANY, asked):
        assert draws.holes.min() >= 0
        assert draws.holes.max() <= 448


def test_crop_and_flip_alone_are_those_of_the_whole_augmentation() -> None:
    less = draw(np.arange(500), seed=22, epoch=1, source_size=(600, 600), image_size=448, crop_flip_only=True)
    assert np.array_equal(less.crop, MANY.crop[:500])
    assert np.array_equal(less.flip, MANY.flip[:500])
    for skipped in (less.angle, less.clip_limit, less.adjusted, less.cut, less.shifted):
        assert not skipped.any()


def test_a_row_depends_on_its_key_alone() -> None:
    keys = np.array([17, 4, 19_999])
    some = draw(keys, seed=22, epoch=1, source_size=(600, 600), image_size=448)
    for field in dataclasses.fields(Draws):
        assert np.array_equal(getattr(some, field.name), getattr(MANY, field.name)[keys])
