"""Calibration and thresholds: a known error is found, what was asked for is reached, what was seen is refused."""

import dataclasses

import numpy as np
import pytest

from cxrdist.errors import UserError
from cxrdist.scoring import operating
from cxrdist.scoring.calibration import fitted_line, reliability
from cxrdist.scoring.tables import Checkpoint, ScoreTable, TableMeta
from cxrdist.task import Task

pytestmark = pytest.mark.fast

TASK = Task(name="t", labels=("A", "B", "C"))
NUM = 6000


def made(slope: float = 1.0, intercept: float = 0.0, seed: int = 0, num: int = NUM):
    """Probabilities whose true log odds are slope * logit(prob) + intercept, targets drawn from these, patients."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(-1, 1.6, (num, 3))
    truth = (rng.random((num, 3)) < 1 / (1 + np.exp(-(slope * logits + intercept)))).astype(np.float64)
    return (1 / (1 + np.exp(-logits))).astype(np.float32), truth, np.arange(num) // 3


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_a_known_temperature_is_recovered_within_5_percent(temperature) -> None:
    probs, targets, patients = made(1 / temperature, num=200_000)  # its own standard error is then 1 %
    fitted = operating.fit(probs, targets, patients, task=TASK, method="temperature", num_resamples=0)
    for each in fitted.labels:
        assert 1 / each.slope == pytest.approx(temperature, rel=0.05)
        assert each.intercept == 0
        assert not each.shared


def test_platt_recovers_slope_and_shift_and_its_interval_holds_them() -> None:
    probs, targets, patients = made(0.6, -1.2)
    fitted = operating.fit(probs, targets, patients, task=TASK, num_resamples=100)
    for each in fitted.labels:
        assert each.slope == pytest.approx(0.6, abs=0.08)
        assert each.intercept == pytest.approx(-1.2, abs=0.12)
        assert each.slope_interval[0] < 0.6 < each.slope_interval[1]
        assert each.slope_interval[0] < each.slope < each.slope_interval[1]


def test_the_line_is_the_one_of_scikit_learn() -> None:
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(5)
    logits, weights = rng.normal(size=500), rng.integers(0, 4, 500).astype(float)
    targets = (rng.random(500) < 1 / (1 + np.exp(-2 * logits + 0.5))).astype(float)
    theirs = LogisticRegression(C=1e12, fit_intercept=False).fit(logits[:, None], targets, weights).coef_[0, 0]
    ours, _ = fitted_line(logits, targets, weights, with_intercept=False)
    assert ours == pytest.approx(theirs, rel=1e-3)


def test_calibration_error_falls_on_other_patients_and_no_order_changes() -> None:
    probs, targets, patients = made(0.5, -1)
    half = patients % 2 == 0
    fitted = operating.fit(probs[half], targets[half], patients[half], task=TASK, num_resamples=10)
    calibrated = fitted.apply(probs[~half])
    before, after = (reliability(targets[~half], each).expected_error for each in (probs[~half], calibrated))
    assert after < 0.02 < before
    for label in range(3):
        assert (np.diff(calibrated[np.argsort(probs[~half, label]), label]) >= 0).all()


@pytest.mark.parametrize("rule", ["sensitivity=0.9", "sensitivity=0.6", "specificity=0.95"])
def test_a_threshold_reaches_what_was_asked_for_on_other_patients_within_its_interval(rule) -> None:
    probs, targets, patients = made(0.8, -0.5)
    half = patients % 2 == 0
    fitted = operating.fit(probs[half], targets[half], patients[half], task=TASK, rule=rule, num_resamples=100)
    decided = fitted.decide(fitted.apply(probs[~half]))
    name, _, wanted = rule.partition("=")
    for place, each in enumerate(fitted.labels):
        positive = targets[~half, place] == 1
        reached = {"sensitivity": (decided[positive, place] == 1).mean()}
        reached["specificity"] = (decided[~positive, place] == 0).mean()
        low, high = getattr(each, f"{name}_interval")
        spread = high - low  # the other half varies as much again
        assert getattr(each, name) == pytest.approx(float(wanted), abs=0.02)
        assert low - spread / 2 <= reached[name] <= high + spread / 2


@pytest.mark.parametrize("rule", ["youden", "f1"])
def test_a_rule_chooses_the_best_of_all_thresholds(rule) -> None:
    probs, targets, patients = made(num=200)
    fitted = operating.fit(probs, targets, patients, task=TASK, rule=rule, num_resamples=5)

    def value(called: np.ndarray, truth: np.ndarray) -> float:
        found, alarms = (called & (truth == 1)).sum(), (called & (truth == 0)).sum()
        if rule == "f1":
            return 2 * found / (2 * found + alarms + ((truth == 1) & ~called).sum())
        return found / (truth == 1).sum() - alarms / (truth == 0).sum()

    decided = fitted.decide(fitted.apply(probs)) == 1
    for place in range(3):
        best = max(value(probs[:, place] >= cut, targets[:, place]) for cut in probs[:, place])
        assert value(decided[:, place], targets[:, place]) == pytest.approx(best, abs=1e-12)


def test_few_cases_share_the_line_of_all_labels_and_none_have_no_threshold() -> None:
    probs, targets, patients = made(0.6, -1.2)
    targets[:, 1] = 0
    targets[:5, 1] = 1
    targets[:, 2] = np.nan
    targets[:40, 2] = 0
    fitted = operating.fit(probs, targets, patients, task=TASK, num_resamples=5)
    first, few, none = fitted.labels
    assert (first.shared, few.shared, none.shared) == (False, True, True)
    assert (few.slope, few.intercept) == (none.slope, none.intercept) != (first.slope, first.intercept)
    assert few.threshold is not None
    assert none.threshold is None
    assert (fitted.decide(fitted.apply(probs))[:, 2] == operating.NO_THRESHOLD).all()


def test_scores_worse_than_chance_are_not_turned_round() -> None:
    probs, targets, patients = made()
    targets[:, 0] = 1 - targets[:, 0]
    fitted = operating.fit(probs, targets, patients, task=TASK, num_resamples=5)
    assert fitted.labels[0].shared
    assert all(each.slope > 0 for each in fitted.labels)


def test_masked_cells_change_nothing() -> None:
    probs, targets, patients = made()
    more = np.concatenate([probs, probs[:500]]), np.concatenate([targets, np.full((500, 3), np.nan)])
    one = operating.fit(probs, targets, patients, task=TASK, num_resamples=0)
    two = operating.fit(*more, np.concatenate([patients, patients[:500]]), task=TASK, num_resamples=0)
    assert one.labels == two.labels


def test_a_calibration_survives_its_file_and_is_refused_when_it_is_not_one(tmp_path) -> None:
    fitted = operating.fit(*made(), task=TASK, num_resamples=5)
    path = tmp_path / operating.FILE
    path.write_text(fitted.to_json())
    assert operating.Calibration.read(path) == fitted
    wrong = dataclasses.replace(fitted.labels[0], slope=1.0)
    for change in ({"slope": -1.0}, {"label": "D"}):
        text = dataclasses.replace(wrong, **change)
        with pytest.raises(UserError):
            dataclasses.replace(fitted, labels=(text, *fitted.labels[1:]))


def checkpoint(sha256: str = "a", trained_on: str = "", **more) -> Checkpoint:
    return Checkpoint(
        source=f"runs/{sha256}@1",
        sha256=sha256,
        backbone_sha256=None,
        image_size=64,
        views={"plain": 1.0},
        trained_on=trained_on,
        **more,
    )


def table(**meta) -> ScoreTable:
    about = TableMeta(member="m", task=TASK, **meta)
    return ScoreTable(np.array(["x"], object), np.zeros((1, 3), np.float32), about)


def test_a_table_of_images_that_the_model_was_trained_on_is_refused() -> None:
    seen = table(checkpoints=(checkpoint(trained_on="s"),), shards="s", split="train")
    for trusted in (False, True):
        with pytest.raises(UserError, match="was trained on these very images"):
            operating.check_unseen([seen], trusted=trusted)
    for fine in (
        table(checkpoints=(checkpoint(trained_on="s"),), shards="s", split="train", out_of_fold=True),
        table(checkpoints=(checkpoint(trained_on="s"),), shards="other", split="valid"),
    ):
        assert operating.check_unseen([fine], trusted=False) == []
    unknown = table(checkpoints=(checkpoint(),), shards="s", split="train")
    with pytest.raises(UserError, match="--unseen"):
        operating.check_unseen([unknown], trusted=False)
    assert "the user's word" in operating.check_unseen([unknown], trusted=True)[0]


def test_an_identity_is_of_weights_views_and_shares_alone() -> None:
    a, b = checkpoint("a"), checkpoint("b")
    whole = operating.identity([(1.0, [a]), (1.0, [b])], "prob")
    assert whole == operating.identity([(3.0, [b]), (3.0, [a])], "prob")
    assert whole == operating.identity([(1.0, [dataclasses.replace(a, source="moved@1")]), (1.0, [b])], "prob")
    others = (
        operating.identity([(2.0, [a]), (1.0, [b])], "prob"),
        operating.identity([(1.0, [a]), (1.0, [b])], "logit"),
        operating.identity([(1.0, [a, b])], "prob"),
        operating.identity([(1.0, [dataclasses.replace(a, views={"hflip": 1.0})]), (1.0, [b])], "prob"),
    )
    assert len({whole, *others}) == 5


def test_performance_is_what_counting_says() -> None:
    probs, targets, patients = made(num=900)
    targets[::7, 0] = np.nan
    fitted = operating.fit(probs, targets, patients, task=TASK, num_resamples=5)
    points = operating.performance(fitted, probs, targets, patients, num_resamples=50)
    called = fitted.decide(fitted.apply(probs)) == 1
    for place, point in enumerate(points):
        rows = ~np.isnan(targets[:, place])
        truth, positive = targets[rows, place] == 1, called[rows, place]
        assert point.sensitivity.value == pytest.approx(positive[truth].mean())
        assert point.specificity.value == pytest.approx((~positive)[~truth].mean())
        assert point.ppv.value == pytest.approx(truth[positive].mean())
        assert point.npv.value == pytest.approx((~truth)[~positive].mean())
        for rate in (point.sensitivity, point.specificity, point.ppv, point.npv):
            assert rate.interval[0] <= rate.value <= rate.interval[1]


@pytest.mark.parametrize("text", ["best", "sensitivity", "sensitivity=2", "sensitivity=0", "f1=0.3", "specificity=-1"])
def test_a_rule_that_there_is_not_is_refused(text) -> None:
    with pytest.raises(UserError, match="give youden, f1"):
        operating.parse_rule(text)
