"""Weights fitted on out-of-fold tables: what they find, and what is said of their gain."""

import dataclasses

import numpy as np
import pytest

from cxrdist.data.folds import assign_folds
from cxrdist.errors import UserError
from cxrdist.scoring.metrics import macro_auroc
from cxrdist.scoring.tables import ScoreTable, TableMeta, average_tables, sigmoid
from cxrdist.scoring.weights import Fit, equal, fit, search
from cxrdist.shards.columns import Texts
from cxrdist.task import Task

pytestmark = pytest.mark.fast
TASK = Task(name="own", labels=("mass", "nodule", "normal"))


class World:
    """Images, a few for each patient, and members that see the targets through noise of their own."""

    def __init__(self, num_patients: int = 150, images: int = 2, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.images = images
        per_patient = (self.rng.random((num_patients, TASK.num_labels)) < 0.3).astype(np.float32)
        self.targets = np.repeat(per_patient, images, axis=0)
        self.patients = np.repeat([f"{number:04d}" for number in range(num_patients)], images)
        self.names = np.array([f"{number}.png" for number in range(len(self.targets))], dtype=object)

    def member(self, name: str, noise: float, *, by_patient: bool = False, scale: float = 1.0) -> ScoreTable:
        """Logits of 2 x target + noise; by_patient: alike in all images of a patient. scale: of the probabilities."""
        shape = (len(self.targets) // self.images if by_patient else len(self.targets), TASK.num_labels)
        drawn = np.repeat(self.rng.normal(size=shape), self.images if by_patient else 1, axis=0)
        probs = scale * sigmoid((2 * self.targets - 2 + noise * drawn).astype(np.float32))
        meta = TableMeta(member=name, task=TASK, split="train", shards="s", out_of_fold=True)
        return ScoreTable(self.names, probs.astype(np.float32), meta)

    def fit(self, *tables: ScoreTable, how: str = "prob", resamples: int = 300) -> Fit:
        folds = assign_folds(Texts(self.patients), self.targets, 5, seed=0)
        return fit(tables, self.targets, self.patients, folds, how, num_resamples=resamples)  # type: ignore[arg-type]


def test_the_planted_best_blend_is_found_and_its_gain_has_an_interval_above_zero():
    world = World(1500, 1)
    fitted = world.fit(world.member("sharp", 1.0), world.member("dull", 2.0), world.member("blind", 50.0), how="logit")
    assert list(fitted.weights) == ["sharp", "dull", "blind"]
    assert fitted.weights["sharp"] == pytest.approx(0.8, abs=0.1)  # by the inverse variances of the noise: 1 and 1/4
    assert fitted.weights["blind"] <= 1 / 32
    assert min(fitted.weights.values()) >= 0
    assert sum(fitted.weights.values()) == pytest.approx(1)
    assert 0 < fitted.over_equal.interval[0] < fitted.over_equal.difference < fitted.over_equal.interval[1]
    assert fitted.over_single.difference > 0
    assert "zero" not in str(fitted.over_equal)


def test_where_no_member_is_better_the_interval_of_the_gain_includes_zero_and_it_is_said():
    covered = []
    for seed in range(10):
        world = World(seed=seed)
        gain = world.fit(world.member("one", 1.5), world.member("two", 1.5), resamples=200).over_equal
        covered.append(gain.interval[0] <= 0 <= gain.interval[1] or gain.interval[1] < 0)
        assert ("includes zero: equal weights may be as good" in str(gain)) == (
            gain.interval[0] <= 0 <= gain.interval[1]
        )
    assert sum(covered) >= 8


def test_equal_tables_keep_equal_weights_and_gain_nothing():
    world = World(60)
    one = world.member("one", 1.0)
    two = dataclasses.replace(one, meta=dataclasses.replace(one.meta, member="two"))
    fitted = world.fit(one, two)
    assert fitted.weights == {"one": 0.5, "two": 0.5}
    assert (fitted.over_equal.difference, fitted.over_equal.interval) == (0.0, (0.0, 0.0))
    assert "includes zero" in str(fitted.over_equal)


def test_patients_are_resampled_not_images():
    """Eight equal images of each patient are no more evidence than one: the interval stays as wide."""
    widths = []
    for images in (1, 8):
        world = World(80, images, seed=3)
        fitted = world.fit(world.member("one", 1.0, by_patient=True), world.member("two", 3.0, by_patient=True))
        low, high = fitted.over_equal.interval
        widths.append(high - low)
    assert widths[1] > 0.6 * widths[0]  # images drawn one by one would make it 0.35 of that


def test_a_member_on_another_scale_is_weighted_up_and_the_gain_is_not_spoilt_by_it():
    world = World(600, 1)
    fitted = world.fit(world.member("usual", 1.5), world.member("small", 1.5, scale=0.1))
    assert fitted.weights["small"] > 0.75
    assert fitted.over_equal.interval[0] > 0


def test_the_found_weights_are_never_worse_than_equal_ones_where_they_were_found():
    for seed in range(5):
        world = World(40, seed=seed)
        tables = [world.member(str(number), 1.0 + number) for number in range(4)]
        weights = search([table.probs for table in tables], world.targets)
        assert (weights >= 0).all()
        assert weights.sum() == pytest.approx(1)
        found, even = (
            macro_auroc(world.targets, average_tables(tables, list(way)).probs)[0]
            for way in (weights, equal([table.probs for table in tables]))
        )
        assert found >= even - 1e-6


def test_tables_that_are_not_out_of_fold_or_alone_or_without_positives_are_refused():
    world = World(30)
    one, two = world.member("one", 1.0), world.member("two", 2.0)
    seen = dataclasses.replace(two, meta=dataclasses.replace(two.meta, out_of_fold=False))
    with pytest.raises(UserError, match=r"'two' is not out-of-fold.*cxrdist\.folds"):
        world.fit(one, seen)
    with pytest.raises(UserError, match="two members or more"):
        world.fit(one)
    world.targets[:] = 0
    with pytest.raises(UserError, match="no label has both"):
        world.fit(one, two)


def test_a_fit_survives_its_file(tmp_path):
    world = World(30)
    fitted = world.fit(world.member("one", 1.0), world.member("two", 2.0))
    (tmp_path / "fit.json").write_text(fitted.to_json())
    assert Fit.read(tmp_path / "fit.json") == fitted
