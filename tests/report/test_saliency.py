"""Which images get a map, and maps of a model over them."""

import numpy as np
import pytest
import torch
from torch import nn

from cxrdist.errors import UserError
from cxrdist.models.architecture import Architecture
from cxrdist.report import saliency
from cxrdist.report.saliency import Example
from cxrdist.scoring.evaluation import evaluate
from cxrdist.scoring.tables import ScoreTable, TableMeta
from cxrdist.tables import LabelTable
from cxrdist.task import Task
from tests.scoring.test_evaluation import about_images

pytestmark = pytest.mark.fast
LABELS = ("mass", "No finding", "nodule", "scar")


@pytest.fixture(scope="module")
def scored():
    rng = np.random.default_rng(0)
    names = np.array([f"{i:08d}_001_001.jpg" for i in range(40)], dtype=object)
    targets = (rng.random((40, 4)) < 0.5).astype(np.float32)
    targets[:, 3] = 0
    probs = np.clip(targets * 0.3 + 0.6 * rng.random((40, 4)), 0, 1).astype(np.float32)
    table = ScoreTable(names, probs, TableMeta(task=Task(name="own", labels=LABELS)))
    return table, targets, evaluate([table], LabelTable(about_images(names), targets), num_resamples=2)


def test_examples_are_positive_images_of_different_labels_none_of_which_says_that_there_is_nothing(scored):
    table, targets, result = scored
    examples = saliency.choose_examples([], table, targets, result)
    assert sorted(example.label for example in examples) == [0, 2]
    assert len({example.image_name for example in examples}) == 2
    for example in examples:
        row = table.image_names.tolist().index(example.image_name)
        assert targets[row, example.label] == 1
        assert example.prob == table.probs[row, example.label]


def test_images_asked_for_get_their_highest_scored_true_label(scored):
    table, targets, result = scored
    asked = [str(name) for name in table.image_names[[7, 3]]]
    examples = saliency.choose_examples(asked, table, targets, result)
    assert [example.image_name for example in examples] == asked
    for row, example in zip((7, 3), examples, strict=True):
        true = [label for label in (0, 2) if targets[row, label]]
        assert not true or example.label == max(true, key=lambda label: table.probs[row, label])
    with pytest.raises(UserError, match=r"--show x\.jpg: not among the scored images"):
        saliency.choose_examples(["x.jpg"], table, targets, result)


@pytest.mark.parametrize(("count", "channels"), [(1, 1), (4, 3)])
def test_the_maps_of_any_architecture_are_drawn_for_the_labels_asked_for(count, channels):
    seen = {}

    def maps(model, images, labels):
        seen.update(images=images, labels=labels)
        return np.ones((len(images), 4, 4), np.float32)

    toy = Architecture(name="toy", create=nn.Linear, saliency=maps, saliency_title="Maps", saliency_about="All.")
    images = torch.zeros(count, channels, 64, 64, dtype=torch.uint8)
    examples = [Example(f"{i}.jpg", i % 3, 0.5) for i in range(count)]
    section = saliency.saliency_section("run@2", toy, nn.Identity(), 32, images, examples, LABELS)
    assert section.title == "Maps of run@2"
    assert section.about.startswith("All. ")
    assert "data:image/png" in section.body
    assert seen["images"].shape == (count, 3, 32, 32)
    assert seen["labels"].tolist() == [i % 3 for i in range(count)]
