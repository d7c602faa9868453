"""An evaluation's numbers: paired comparisons, calibration on other patients, subgroups."""

import json

import numpy as np
import pandas as pd
import pytest

from cxrdist.labels import LABELS
from cxrdist.scoring.evaluation import evaluate
from cxrdist.scoring.metrics import macro_auroc
from cxrdist.scoring.tables import ScoreTable

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module")
def result():
    """A good, a nearly as good and a worthless table over 240 images; one label without positives."""
    rng = np.random.default_rng(0)
    num = 240
    names = np.array([f"{i // 3:08d}_001_{i % 3:03d}.jpg" for i in range(num)], dtype=object)
    truth = pd.DataFrame({"image_name": names, "patient": [name[:8] for name in names], "study": "001"})
    truth["view"] = np.where(np.arange(num) % 3 == 0, "Lateral", "PA")
    truth["sex"], truth["age"] = "", [str(30 + i % 60) for i in range(num)]
    targets = np.repeat((rng.random((num // 3, 14)) < 0.4).astype(np.int8), 3, axis=0)
    targets[:, 5] = 0
    truth[list(LABELS)] = targets
    noise = rng.random((num, 14))
    probs = [0.3 * targets + 0.7 * noise, 0.25 * targets + 0.75 * noise, rng.random((num, 14))]
    tables = [
        ScoreTable(names, table.astype(np.float32), {"member": name})
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
    wanted = macro_auroc(truth[list(LABELS)].to_numpy(), tables[2].probs)[0]
    assert evaluation.scores[2].macro_auroc == pytest.approx(wanted)


def test_averaging_a_study_helps_where_noise_differs_between_its_images(result):
    score = result[0].scores[1]
    assert score.study_averaged_auroc > score.macro_auroc


def test_an_overconfident_table_is_told_so_and_scaling_on_other_patients_mends_it(result):
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
