"""AUROC, average precision and intervals against the golden table, scikit-learn and brute force."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

from cxrdist.scoring import metrics

pytestmark = pytest.mark.fast
GOLDEN = Path(__file__).parent.parent / "golden" / "recipe"


def test_auroc_equals_the_golden_table_with_ties_constants_and_an_undefined_label():
    table = np.load(GOLDEN / "metrics_table.npz")
    golden = json.loads((GOLDEN / "metrics.json").read_text())
    wanted = np.array([np.nan if v is None else v for v in golden["per_label_auroc"].values()])
    values = metrics.auroc_per_label(table["labels"], table["probs"])
    np.testing.assert_allclose(values, wanted, rtol=0, atol=1e-12)
    value, num_defined = metrics.macro_auroc(table["labels"], table["probs"])
    assert num_defined == 13
    assert value == pytest.approx(golden["macro_13_labels_without_undefined"], abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=2, max_size=40))
def test_curves_and_scores_equal_scikit_learn_for_any_pattern_of_ties(rows):
    truth = np.array([[row[0]] for row in rows], dtype=float)
    probs = np.array([[row[1] / 5] for row in rows])
    value = metrics.auroc_per_label(truth, probs)[0]
    if 0 < truth.sum() < len(truth):
        assert value == pytest.approx(roc_auc_score(truth[:, 0], probs[:, 0]), abs=1e-12)
        fpr, tpr = metrics.roc_curve(truth[:, 0], probs[:, 0])
        wanted_fpr, wanted_tpr, _ = roc_curve(truth[:, 0], probs[:, 0], drop_intermediate=False)
        np.testing.assert_allclose((fpr, tpr), (wanted_fpr, wanted_tpr))
        recall, precision = metrics.precision_recall_curve(truth[:, 0], probs[:, 0])
        wanted_precision, wanted_recall, _ = precision_recall_curve(truth[:, 0], probs[:, 0])
        np.testing.assert_allclose((recall[::-1], precision[::-1]), (wanted_recall[:-1], wanted_precision[:-1]))
    else:
        assert np.isnan(value)
    if truth.sum():
        wanted = average_precision_score(truth[:, 0], probs[:, 0])
        assert metrics.average_precision_per_label(truth, probs)[0] == pytest.approx(wanted, abs=1e-12)


def test_bootstrap_equals_scoring_the_repeated_rows_and_is_paired():
    rng = np.random.default_rng(5)
    patients = np.array([f"{i // 3:08d}" for i in range(60)], dtype=object)
    truth = (rng.random((60, 2)) < 0.4).astype(float)
    probs = np.round(rng.random((60, 2)), 1)
    samples = metrics.bootstrap_auroc(truth, [probs, probs], patients, num_resamples=20, seed=3)
    np.testing.assert_array_equal(samples[0], samples[1])
    draws = np.random.default_rng(3).multinomial(20, np.full(20, 1 / 20), size=20)
    for draw, sample in zip(draws, samples[0], strict=True):
        rows = np.repeat(np.arange(60), draw[np.arange(60) // 3])
        np.testing.assert_allclose(sample, metrics.auroc_per_label(truth[rows], probs[rows]), atol=1e-12)


def test_clustered_intervals_are_wider_than_image_intervals_when_images_of_a_patient_are_alike():
    rng = np.random.default_rng(0)
    truth = np.repeat((rng.random((50, 1)) < 0.5).astype(float), 4, axis=0)
    probs = np.repeat(truth[::4] * 0.5 + rng.normal(size=(50, 1)), 4, axis=0)
    widths = []
    for patients in (np.arange(200) // 4, np.arange(200)):
        samples = metrics.bootstrap_auroc(truth, [probs], patients.astype(str), num_resamples=300)
        low, high = metrics.interval(samples[0, :, 0])
        widths.append(high - low)
    assert widths[0] > 1.5 * widths[1]


def test_macro_of_a_resample_is_over_the_labels_it_kept():
    samples = np.array([[[0.5, 0.7, np.nan], [0.5, np.nan, np.nan], [np.nan] * 3]])
    np.testing.assert_allclose(metrics.macro_samples(samples), [[0.6, 0.5, np.nan]])


def test_a_nan_prob_gives_nan_and_wrong_shapes_or_targets_are_refused():
    truth, probs = np.array([[0.0, 1], [1, 0]]), np.array([[0.1, np.nan], [0.9, 0.5]])
    np.testing.assert_array_equal(metrics.auroc_per_label(truth, probs), [1.0, np.nan])
    with pytest.raises(ValueError, match="must be equal"):
        metrics.auroc_per_label(truth, probs[:1])
    with pytest.raises(ValueError, match=r"in .0, 1."):
        metrics.auroc_per_label(truth - 1, probs)


def test_masked_cells_count_nowhere_and_a_soft_cell_is_a_share_of_both_classes():
    rng = np.random.default_rng(2)
    truth = (rng.random((200, 3)) < 0.4).astype(float)
    probs = np.round(rng.random((200, 3)), 2)
    masked = rng.random((200, 3)) < 0.5
    truth[masked] = np.nan
    truth[:, 2] = np.nan
    soft = np.flatnonzero(~masked[:, 1])[:40]
    truth[soft, 1] = rng.random(40)
    for measure, wanted in (
        (metrics.auroc_per_label, roc_auc_score),
        (metrics.average_precision_per_label, average_precision_score),
    ):
        hard, fractional, never = measure(truth, probs)
        seen = ~np.isnan(truth)
        assert hard == pytest.approx(wanted(truth[seen[:, 0], 0], probs[seen[:, 0], 0]), abs=1e-12)
        share, prob = truth[seen[:, 1], 1], probs[seen[:, 1], 1]
        both = np.repeat([1.0, 0.0], len(share)), np.tile(prob, 2)
        assert fractional == pytest.approx(wanted(*both, sample_weight=np.append(share, 1 - share)), abs=1e-12)
        assert np.isnan(never)
    samples = metrics.bootstrap_auroc(truth, [probs], np.arange(200) // 2, num_resamples=8)[0]
    alone = metrics.bootstrap_auroc(truth[:, :1], [probs[:, :1]], np.arange(200) // 2, num_resamples=8)[0]
    np.testing.assert_array_equal(samples[:, :1], alone)
    with pytest.raises(ValueError, match=r"in .0, 1."):
        metrics.auroc_per_label(truth + 1, probs)


def test_quick_intervals_are_those_of_the_bootstrap_over_patients():
    """With images that are alike within a patient, masked and soft targets, and ties."""
    rng = np.random.default_rng(0)
    patients = rng.integers(0, 800, 3000)
    alike = rng.normal(size=(800, 4))[patients]
    targets = (alike + rng.normal(size=alike.shape) > [0.0, 1.0, 2.5, 1.5]).astype(float)
    probs = np.round(targets + 0.7 * alike + rng.normal(size=alike.shape), 1)
    targets[rng.random(3000) < 0.3, 1] = np.nan
    targets[rng.random(3000) < 0.3, 3] = 0.6
    samples = metrics.bootstrap_auroc(targets, [probs], patients, num_resamples=400)[0]
    several, whole = metrics.quick_intervals(targets, probs, patients)
    expected = [*(metrics.interval(column) for column in samples.T), metrics.interval(metrics.macro_samples(samples))]
    for (low, high), (least, most) in zip([*several, whole], expected, strict=True):
        assert abs(low - least) < 0.15 * (most - least)
        assert abs(high - most) < 0.15 * (most - least)
    alone, _ = metrics.quick_intervals(targets, probs, np.arange(3000))
    assert alone[0][1] - alone[0][0] < 0.9 * (several[0][1] - several[0][0])  # patients are fewer than images


def test_quick_intervals_of_labels_without_an_auroc_or_without_doubt():
    patients = np.array([0, 1, 1, 2])
    targets = np.array([[0, 1, np.nan, 0], [1, 1, np.nan, 1], [0, 1, np.nan, 1], [1, 1, np.nan, 0]])
    probs = np.array([[0.1, 0.2, 0.3, 0.4], [0.9, 0.2, 0.3, 0.5], [0.2, 0.2, 0.3, 0.3], [0.8, 0.2, 0.3, 0.2]])
    several, whole = metrics.quick_intervals(targets, probs, patients)
    assert several[0] == (1.0, 1.0)
    assert np.isnan([several[1], several[2]]).all()
    assert 0 < several[3][0] < 0.75 < several[3][1] < 1
    assert 0 < whole[0] < 0.875 < whole[1] < 1
    assert np.isnan(metrics.quick_intervals(targets[:, 1:3], probs[:, 1:3], patients)[1]).all()
