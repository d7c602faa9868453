"""Which images get a map, and maps of a model over them."""

import base64
import dataclasses
import io
import re
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from cxrdist.data.loader import Loader
from cxrdist.errors import UserError
from cxrdist.models.architecture import Architecture
from cxrdist.recipes import recipe_for
from cxrdist.report import saliency
from cxrdist.report.saliency import Example
from cxrdist.runs.documents import EpochMeta
from cxrdist.runs.member import LoadedMember
from cxrdist.scoring.evaluation import evaluate
from cxrdist.scoring.tables import ScoreTable, TableMeta
from cxrdist.shards.columns import Texts
from cxrdist.shards.index import open_index
from cxrdist.tables import LabelTable
from cxrdist.task import TASKS, Task
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


def test_confident_images_are_the_extremes_of_those_with_and_without_the_finding(scored):
    table, targets, _ = scored
    examples = saliency.confident_examples(table, targets, range(4))
    rows = {str(name): row for row, name in enumerate(table.image_names)}
    for label in range(4):
        for kind, (_, positive, high) in enumerate(saliency.KINDS):
            found = [example for example in examples if (example.label, example.kind) == (label, kind)]
            probs = table.probs[targets[:, label] == positive, label]
            wanted = np.sort(-probs if high else probs)[: saliency.PER_KIND]
            np.testing.assert_allclose([example.prob for example in found], -wanted if high else wanted)
            assert all(targets[rows[example.image_name], label] == positive for example in found)
    assert {example.kind for example in examples if example.label == 3} == {1}, "no positives: only false alarms"


def test_many_labels_have_one_image_of_each_kind(scored):
    table, targets, _ = scored
    task = Task(name="wide", labels=tuple(f"label {place}" for place in range(20)))
    wide = ScoreTable(table.image_names, np.tile(table.probs, 5), TableMeta(task=task))
    examples = saliency.confident_examples(wide, np.tile(targets, 5), range(20))
    assert len({(example.label, example.kind) for example in examples}) == len(examples)
    assert {example.label for example in examples} == set(range(20))


def test_an_image_whose_label_is_masked_is_neither_right_nor_wrong(scored):
    table, targets, _ = scored
    masked = targets.copy()
    masked[5:] = np.nan
    assert {one.image_name for one in saliency.confident_examples(table, masked, [0])} <= set(table.image_names[:5])


def toy_member(seen: dict[str, Any]) -> LoadedMember:
    def maps(model, images, labels):
        seen.update(images=images, labels=labels)
        return np.arange(len(images) * 16, dtype=np.float32).reshape(-1, 4, 4)

    toy = Architecture(name="toy", create=nn.Linear, saliency=maps, saliency_title="Maps", saliency_about="All.")
    recipe = dataclasses.replace(recipe_for("eva_x_tiny", "b"), image_size=32)
    meta = EpochMeta(epoch=1, recipe="toy", model="toy", task=TASKS["b"], frozen=None)
    return LoadedMember(recipe, TASKS["b"], toy, nn.Identity(), meta)


def test_maps_of_a_model_that_started_from_random_weights_say_so(uneven_shards):
    examples = [Example(open_index(uneven_shards, "train").image_names[0], 0, 0.5)]
    for from_random in (True, False):
        member = dataclasses.replace(toy_member({}), from_random=from_random)
        with Loader(open_index(uneven_shards, "train"), num_threads=1) as loader:
            (page,) = saliency.label_images(loader, examples, ["scar"], member, "Maps").values()
        assert (saliency.FROM_RANDOM in page) is from_random


@pytest.mark.parametrize(("count", "channels"), [(1, 1), (4, 3)])
def test_the_maps_of_any_architecture_are_drawn_for_the_labels_asked_for(count, channels):
    seen: dict[str, Any] = {}
    images = torch.zeros(count, channels, 64, 64, dtype=torch.uint8)
    examples = [Example(f"{i}.jpg", i % 3, 0.5) for i in range(count)]
    maps = {"Maps of <run>@2": saliency.maps_of(toy_member(seen), images, examples)}
    section = saliency.saliency_section(images, examples, LABELS, maps, "All.")
    assert " All. " in section.about
    assert section.body.count("data:image/jpeg") == 2 * count
    assert "Maps of &lt;run&gt;@2" in section.body
    assert seen["images"].shape == (count, 3, 32, 32)
    assert seen["labels"].tolist() == [i % 3 for i in range(count)]


def test_images_of_a_label_are_small_pictures_with_their_maps_and_every_name_is_text(uneven_shards):
    hostile = "<img src=x onerror=alert(1)>\"&'"
    index = open_index(uneven_shards, "train")
    names = Texts([f"{row} {hostile}" for row in range(len(index))])
    index = dataclasses.replace(index, image_names=names)
    examples = [Example(names[row], row % 2, 0.5, row % 3) for row in range(12)]
    with Loader(index, num_threads=1) as loader:
        images = saliency.label_images(loader, examples, [hostile, "scar"], toy_member({}), hostile)
        without = saliency.label_images(loader, examples, [hostile, "scar"])
        with pytest.raises(UserError, match=r"no 'other\.png', which was scored, in split 'train'"):
            saliency.label_images(loader, [Example("other.png", 0, 0.5)], [hostile])
    assert sorted(images) == [0, 1]
    assert sum(page.count('<figure class="pair">') for page in images.values()) == 12
    assert sum(page.count("data:image/jpeg") for page in images.values()) == 24
    assert sum(page.count("data:image/jpeg") for page in without.values()) == 12
    for page in [*images.values(), *without.values()]:
        assert set(re.findall(r"<(\w+)", page)) <= {"div", "h4", "figure", "img", "figcaption", "p"}
        assert "<img src" not in page
        found = re.search(r"base64,([^\"]*)", page)
        assert Image.open(io.BytesIO(base64.b64decode(found[1]))).size == (saliency.SMALL_PX,) * 2
