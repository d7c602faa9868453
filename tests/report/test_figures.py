"""Tables and panels of a report: a place for every label, or for those that say most."""

import dataclasses
import math
import re

import numpy as np
import pytest

from cxrdist.evaluate import printed
from cxrdist.report import figures
from cxrdist.report.page import duration_text, number_text
from cxrdist.report.plots import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH
from cxrdist.scoring.evaluation import Evaluation, TableScore
from cxrdist.scoring.operating import OperatingPoint, Rate
from cxrdist.scoring.tables import ScoreTable, TableMeta
from cxrdist.task import Task

pytestmark = pytest.mark.fast


def evaluation(num_labels: int) -> Evaluation:
    score = TableScore(
        name="m",
        macro_auroc=0.7,
        macro_interval=(0.6, 0.8),
        num_labels=num_labels - 1,
        auroc=[math.nan, *[0.7] * (num_labels - 1)],
        auroc_interval=[(math.nan, math.nan), *[(0.6, 0.8)] * (num_labels - 1)],
        average_precision=[math.nan, *[0.5] * (num_labels - 1)],
        calibration_error=0.1,
        temperature=1.0,
        calibration_error_after=0.1,
        study_averaged=None,
    )
    labels = [f"label {i}" for i in range(num_labels)]
    return Evaluation(
        num_images=20,
        num_patients=10,
        num_resamples=5,
        labels=labels,
        observed=[20] * num_labels,
        positives=[i % 7 for i in range(num_labels)],
        scores=[score],
        comparisons=[],
        subgroups=[],
    )


def scored(num_labels: int, num_images: int = 20) -> tuple[ScoreTable, np.ndarray]:
    meta = TableMeta(task=Task(name="own", labels=tuple(f"label {i}" for i in range(num_labels))))
    names = np.array([f"{i}.png" for i in range(num_images)], dtype=object)
    rng = np.random.default_rng(0)
    probs = rng.random((num_images, num_labels), dtype=np.float32)
    return ScoreTable(names, probs, meta), (rng.random((num_images, num_labels)) < 0.5).astype(np.float64)


def test_of_very_many_labels_those_with_the_most_positives_have_panels_and_the_page_says_so():
    result = evaluation(1000)
    shown = figures.shown_labels(result)
    assert len(shown) == figures.MAX_SHOWN
    assert shown == sorted(shown)
    assert {result.positives[label] for label in shown} == {6}
    table, targets = scored(1000)
    panels = figures.panel_section([table], targets, result)
    assert panels.body.count("<details") == panels.body.count('aria-label="ROC curves of ') == 48
    labels = figures.label_section(result)
    assert "Only the 48 labels with the most positives." in panels.about
    assert "These are there for the 48 labels with the most positives." in labels.about
    assert "label 999" in labels.body, "the table holds every label"
    assert set(re.findall(r'href="#([^"]*)"', labels.body)) == set(re.findall(r'id="([^"]*)"', panels.body))
    assert 'class="scroll tall"' in labels.body, "and scrolls under its head"
    few = figures.label_section(evaluation(48))
    assert "48 labels" not in few.about
    assert "tall" not in few.body


def test_the_threshold_of_a_label_is_a_ring_on_its_curves_and_two_columns_of_the_table():
    table, targets = scored(2)
    result = evaluation(2)
    rates = [Rate(value, (value - 0.125, value + 0.125)) for value in (0.75, 0.625, 0.875, 0.5)]
    unknown = [Rate(math.nan, None)] * 4
    points = [OperatingPoint("label 0", None, *unknown), OperatingPoint("label 1", 0.3, *rates)]
    panels = figures.panel_section([table], targets, result, points).body.split("<details")
    assert [panel.count('class="ring') for panel in panels] == [0, 0, 2]
    rings = [tuple(map(float, ring)) for ring in re.findall(r'"ring c0" cx="([\d.]+)" cy="([\d.]+)"', panels[2])]
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    for (x, y), (across, up) in zip(rings, ((1 - 0.625, 0.75), (0.75, 0.875)), strict=True):
        assert ((x - LEFT) / width, 1 - (y - TOP) / height) == pytest.approx((across, up), abs=1e-3)
    body = figures.label_section(result, points).body
    assert "<th>sensitivity</th><th>specificity</th>" in body
    assert "0.750<br><small>0.625 to 0.875</small></td><td>0.625<br>" in body
    assert "sensitivity" not in figures.label_section(result).body


def test_labels_of_fewer_than_20_positives_or_negatives_are_marked_and_the_page_and_the_terminal_say_why():
    result = dataclasses.replace(evaluation(4), observed=[60] * 4, positives=[19, 20, 40, 41])
    body = figures.label_section(result).body
    found = re.findall(r"(label \d)</a>(\s\*|)", body)
    assert found == list(zip(result.labels, ("\N{NO-BREAK SPACE}*", "", "", "\N{NO-BREAK SPACE}*"), strict=True))
    assert "</div><p" in body
    assert "* fewer than 20 positives or negatives" in body
    lines = list(printed(dataclasses.replace(result, labels=["a", "b", "c", "d" * 50])))
    assert [line.split("  ")[0] for line in lines[1:5]] == ["a *", "b", "c", "d" * 37 + "~ *"]
    assert lines[5].startswith("* fewer than 20")
    enough = dataclasses.replace(result, positives=[20, 30, 40, 40])
    assert "*" not in figures.label_section(enough).body + "".join(printed(enough))


@pytest.mark.parametrize(("steps", "dots"), [(120, 3), (249, 3), (250, 0), (1000, 0)])
def test_the_loss_of_short_epochs_is_drawn_as_their_means(steps, dots):
    rows = []
    for epoch in (1, 2, 3):
        logged = [step for step in range(50, 3 * steps + 1, 50) if (epoch - 1) * steps < step <= epoch * steps]
        rows += [{"kind": "train", "step": step, "epoch": epoch, "loss": 9 - step / 500} for step in logged]
        rows.append({"kind": "epoch", "step": epoch * steps, "epoch": epoch, "epoch_loss": 1 / epoch})
    body = figures.training_section({"run": rows}, {"run": 0}).body
    assert body.count('class="dot') == dots
    assert ('class="thin' in body) == (not dots)


def test_the_same_scores_make_the_same_bytes():
    table, targets = scored(3)
    one, other = (figures.panel_section([table], targets, evaluation(3)).body for _ in range(2))
    assert one == other


def test_more_tables_than_colours_are_all_drawn():
    result = evaluation(2)
    result.scores.extend([result.scores[0]] * 20)
    assert figures.summary_section(result, []).body.count("macro AUROC") == 21
    table, targets = scored(2)
    panels = figures.panel_section([table] * 21, targets, result).body
    assert panels.count("<details") == 2


def test_numbers_are_written_for_people():
    assert [number_text(math.nan), number_text(0.12345), number_text(0.1, 2, "+")] == ["-", "0.123", "+0.10"]
    assert [duration_text(seconds) for seconds in (89, 90, 5400)] == ["89 s", "1.5 min", "1.5 h"]
