"""Pictures of a report: a place for every label, or for those that say most."""

import math

import numpy as np
import pytest

from cxrdist.report import figures
from cxrdist.report.page import duration_text, number_text
from cxrdist.scoring.evaluation import Evaluation, TableScore
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


@pytest.mark.parametrize(("count", "grid"), [(1, (1, 1)), (3, (1, 3)), (4, (1, 4)), (14, (4, 4)), (48, (12, 4))])
def test_panels_are_as_many_as_labels_in_rows_of_four(count, grid):
    figure, axes = figures._panels(count)
    assert len(axes) == count
    assert figure.get_size_inches().tolist() == pytest.approx([2.75 * grid[1], 2.35 * grid[0]])
    assert sum(axis.axison for axis in figure.axes) == count


def test_of_very_many_labels_those_with_the_most_positives_are_drawn_and_the_page_says_so():
    result = evaluation(1000)
    shown = figures.shown_labels(result)
    assert len(shown) == figures.MAX_SHOWN
    assert shown == sorted(shown)
    assert {result.positives[label] for label in shown} == {6}
    meta = TableMeta(task=Task(name="own", labels=tuple(result.labels)))
    names = np.array([f"{i}.png" for i in range(20)], dtype=object)
    rng = np.random.default_rng(0)
    table = ScoreTable(names, rng.random((20, 1000), dtype=np.float32), meta)
    targets = (rng.random((20, 1000)) < 0.5).astype(np.float64)
    for section in (
        figures.label_section(result),
        figures.curves_section(figures.ROC, [table], targets, result),
        figures.curves_section(figures.PRECISION, [table], targets, result),
    ):
        assert "nly the 48 labels with the most positives." in section.about
    assert "label 999" in figures.label_section(result).body, "the table holds every label"
    assert 'class="scroll tall"' in figures.label_section(result).body, "and scrolls under its head"
    few = figures.label_section(evaluation(48))
    assert "nly the" not in few.about
    assert "tall" not in few.body


def test_long_labels_keep_both_ends_within_their_panel():
    long = "Very long finding of the left upper lobe with calcification"
    texts = {figures.short_label(f"{long} {n}", 26) for n in range(10)}
    assert len(texts) == 10
    assert all(len(text) <= 26 and text.startswith("Very long") for text in texts)
    assert figures.short_label("Enlarged Cardiomediastinum", 26) == "Enlarged Cardiomediastinum"


def test_more_tables_than_colours_are_all_drawn():
    result = evaluation(2)
    result.scores.extend([result.scores[0]] * 20)
    assert figures.summary_section(result, []).body.count("macro AUROC") == 21


def test_numbers_are_written_for_people():
    assert [number_text(math.nan), number_text(0.12345), number_text(0.1, 2, "+")] == ["-", "0.123", "+0.10"]
    assert [duration_text(seconds) for seconds in (89, 90, 5400)] == ["89 s", "1.5 min", "1.5 h"]
