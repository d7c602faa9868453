"""An evaluation's numbers: paired comparisons, calibration on other patients, subgroups."""

import json

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from cxrdist.scoring.evaluation import evaluate
from cxrdist.scoring.metrics import macro_auroc
from cxrdist.scoring.tables import ScoreTable, TableMeta
from cxrdist.tables import LabelTable
from cxrdist.task import TASKS, Task

pytestmark = pytest.mark.fast


def about_images(names):
    about = pd.DataFrame({"image_name": names, "patient": [name[:8] for name in names], "study": "001"})
    about["view"] = np.where(np.arange(len(names)) % 3 == 0, "Lateral", "PA")
    about["sex"], about["age"] = "", [str(30 + i % 60) for i in range(len(names))]
    return about


@pytest.fixture(scope="module")
def result():
    """A good, a nearly as good and a worthless table over 240 images; one label without positives."""
    rng = np.random.default_rng(0)
    num = 240
    names = np.array([f"{i // 3:08d}_001_{i % 3:03d}.jpg" for i in range(num)], dtype=object)
    targets = np.repeat((rng.random((num // 3, 14)) < 0.4).astype(np.float32), 3, axis=0)
    targets[:, 5] = 0
    truth = LabelTable(about_images(names), targets)
    noise = rng.random((num, 14))
    probs = [0.3 * targets + 0.7 * noise, 0.25 * targets + 0.75 * noise, rng.random((num, 14))]
    tables = [
        ScoreTable(names, table.astype(np.float32), TableMeta(member=name, task=TASKS["b"]))
        for name, table in zip(("good", "near", "noise"), probs, strict=True)
    ]
    return evaluate(tables, truth, num_resamples=200), tables, truth


def test_comparisons_are_paired_and_so_sharper_than_the_intervals_of_the_two(result):
    evaluation, tables, truth = result
    assert [score.num_labels for score in evaluation.scores] == [13, 13, 13]
    near, noise = evaluation.comparisons[0], evaluation.comparisons[1]
    assert (near.one, near.other) == ("good", "near")
    assert 0 < near.interval[0] <= near.difference <= near.interval[1] < 0.1
    assert noise.interval[0] > 0.1
    widths = [score.macro_interval[1] - score.macro_interval[0] for score in evaluation.scores[:2]]
    assert near.interval[1] - near.interval[0] < 0.7 * min(widths)
    wanted = macro_auroc(truth.targets, tables[2].probs)[0]
    assert evaluation.scores[2].macro_auroc == pytest.approx(wanted)


def test_averaging_a_study_helps_where_noise_differs_between_its_images(result):
    evaluation, tables, truth = result
    score = evaluation.scores[1]
    average = score.study_averaged
    assert average.num_studies == 80
    assert average.macro_auroc == pytest.approx(score.macro_auroc + average.macro_gain)
    assert 0 < average.macro_gain_interval[0] <= average.macro_gain <= average.macro_gain_interval[1]
    means = tables[1].probs.reshape(80, 3, 14).mean(axis=1)
    wanted = roc_auc_score(truth.targets[::3, 0], means[:, 0])
    assert average.by_study_auroc[0] == pytest.approx(wanted, abs=1e-6)
    assert average.by_study_interval[0][0] <= wanted <= average.by_study_interval[0][1]
    assert average.gain[0] == pytest.approx(wanted - score.auroc[0], abs=1e-6)  # each study has three images
    assert np.isnan(average.gain[5])


def test_an_overconfident_table_is_told_so_and_scaling_on_other_patients_corrects_it(result):
    score = result[0].scores[2]
    assert score.temperature > 2
    assert score.calibration_error_after < 0.6 * score.calibration_error


def test_subgroups_cover_what_is_known_and_the_json_has_null_for_undefined(result):
    evaluation = result[0]
    groups = {(group.kind, group.value): group.num_images for group in evaluation.subgroups}
    assert groups[("view", "Lateral")] == 80
    assert not any(kind == "sex" for kind, _ in groups)
    assert sum(count for (kind, _), count in groups.items() if kind == "age") == 240
    text = json.dumps(evaluation.to_json(), allow_nan=False)
    assert json.loads(text)["scores"][0]["auroc"][5] is None


@pytest.mark.parametrize("num_labels", [1, 3, 40])
def test_any_number_of_labels_is_evaluated(num_labels):
    rng = np.random.default_rng(num_labels)
    names = np.array([f"{i // 2:08d}_001_{i % 2:03d}.jpg" for i in range(60)], dtype=object)
    targets = (rng.random((60, num_labels)) < 0.4).astype(np.float32)
    meta = TableMeta(task=Task(name="own", labels=tuple(f"finding {i}" for i in range(num_labels))))
    table = ScoreTable(names, rng.random((60, num_labels), dtype=np.float32), meta)
    evaluation = evaluate([table], LabelTable(about_images(names), targets), num_resamples=20)
    (score,) = evaluation.scores
    assert evaluation.labels == list(meta.task.labels)
    assert evaluation.positives == targets.sum(axis=0).tolist()
    assert [len(values) for values in (score.auroc, score.auroc_interval, score.average_precision)] == [num_labels] * 3
    assert (score.macro_auroc, score.num_labels) == macro_auroc(targets, table.probs)


def test_without_studies_or_with_one_image_in_each_there_is_no_average(result):
    _, tables, truth = result
    for studies in ("", [str(i) for i in range(240)]):
        labels = LabelTable(truth.about.assign(study=studies), truth.targets)
        assert evaluate(tables[:1], labels, num_resamples=2).scores[0].study_averaged is None


def test_masked_cells_count_nowhere_and_soft_ones_by_their_share(result):
    _, tables, truth = result
    targets = truth.targets.copy()
    targets[:120, 2] = np.nan
    targets[:, 3] = np.nan
    targets[7, 4] = 0.5
    evaluation = evaluate(tables[:1], LabelTable(truth.about, targets), num_resamples=20)
    assert evaluation.observed == [240, 240, 120, 0, *[240] * 10]
    assert evaluation.positives[2] == truth.targets[120:, 2].sum()
    assert evaluation.positives[3] == 0
    assert evaluation.positives[4] == truth.targets[:, 4].sum() - truth.targets[7, 4] + 0.5
    (score,) = evaluation.scores
    wanted = roc_auc_score(truth.targets[120:, 2], tables[0].probs[120:, 2])
    assert score.auroc[2] == pytest.approx(wanted, abs=1e-9)
    assert np.isnan(score.auroc[3])
    assert score.num_labels == 12
    assert np.isfinite([score.calibration_error, score.calibration_error_after, score.temperature]).all()
    assert evaluation.subgroups
    json.dumps(evaluation.to_json(), allow_nan=False)
