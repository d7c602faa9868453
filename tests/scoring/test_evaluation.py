"""An evaluation's numbers: paired comparisons, calibration on other patients, subgroups."""

import json

import numpy as np
import pandas as pd
import pytest

from cxrdist.errors import UserError
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
    score = result[0].scores[1]
    assert score.study_averaged_auroc > score.macro_auroc


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


def test_studies_come_from_the_label_table_and_unknown_ones_give_no_score(result):
    _, tables, truth = result
    known = evaluate(tables[:1], truth, num_resamples=2).scores[0].study_averaged_auroc
    split = LabelTable(truth.about.assign(study=[str(i) for i in range(240)]), truth.targets)
    singly = evaluate(tables[:1], split, num_resamples=2).scores[0]
    assert singly.study_averaged_auroc == pytest.approx(singly.macro_auroc, abs=1e-12)
    assert known != singly.study_averaged_auroc
    unknown = LabelTable(truth.about.assign(study=""), truth.targets)
    assert np.isnan(evaluate(tables[:1], unknown, num_resamples=2).scores[0].study_averaged_auroc)


def test_masked_and_soft_labels_are_refused_by_name_of_the_flag(result):
    _, tables, truth = result
    for value in (np.nan, 0.5):
        targets = truth.targets.copy()
        targets[3, 2] = value
        with pytest.raises(UserError, match="masked and soft labels cannot be scored; name another --task"):
            evaluate(tables[:1], LabelTable(truth.about, targets), num_resamples=2)
