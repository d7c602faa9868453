"""The page about a shard set: every name is text, few labels and many are legible."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cxrdist.data.inspection import Example, Finding, Splits, findings, label_counts, look
from cxrdist.report import dataset
from cxrdist.shards.columns import Targets, Texts
from cxrdist.shards.index import LeftOut, ShardIndex, open_index
from cxrdist.task import Task

pytestmark = pytest.mark.fast

HOSTILE = "<script>alert('x')</script>\"&.png"


def changed(index: ShardIndex, labels: tuple[str, ...], **more: Any) -> ShardIndex:
    """The index as if its set were of another task; what the page shows of it needs no tar of that task."""
    task = Task(name="own", labels=labels)
    targets = (np.random.default_rng(0).random((len(index), len(labels))) < 0.2).astype(np.float32)
    targets[0] = np.nan
    targets[1] = 0.6
    meta = dataclasses.replace(index.meta, task=task)
    return dataclasses.replace(index, **{"task": task, "meta": meta, "targets": Targets(targets.T)} | more)


def page(path: Path, *indexes: ShardIndex, found: tuple[Finding, ...] = ()) -> str:
    dataset.write_dataset_report(path, Splits(indexes), found)
    return path.read_text()


@pytest.mark.parametrize(
    ("count", "together"),
    [
        (1, "The task has one label."),
        (14, '<table class="heat">'),
        (30, '<table class="heat small">'),
        (200, "pairs of labels"),
    ],
)
def test_few_labels_and_many_have_their_form(uneven_shards: Path, tmp_path: Path, count: int, together: str) -> None:
    index = changed(open_index(uneven_shards, "train"), tuple(f"Finding {place}" for place in range(count)))
    text = page(tmp_path / "look.html", index)
    assert together in text
    assert len(text) < 3_000_000
    for place in range(count):
        assert f"<td>Finding {place}</td>" in text
        assert f"<h3>Finding {place}</h3>" in text
    images = text.count("<figure>")
    assert 0 < images <= max(dataset.SHEET_IMAGES, count)


def test_a_thousand_labels_still_make_a_small_page(uneven_shards: Path, tmp_path: Path) -> None:
    index = changed(open_index(uneven_shards, "train"), tuple(f"Finding {place}" for place in range(1000)))
    text = page(tmp_path / "look.html", index)
    assert text.count("<figure>") <= dataset.SHEET_IMAGES
    assert "240 random ones of 1,000 labels" in text
    assert len(text) < 3_000_000


def test_every_name_is_text(uneven_shards: Path, tmp_path: Path) -> None:
    index = open_index(uneven_shards, "train")
    texts = Texts([f"{row} {HOSTILE}" for row in range(len(index))])
    more = {"image_names": texts, "patients": texts, "views": texts, "sexes": texts}
    index = changed(index, (HOSTILE, "B $x$"), **more)
    left_out = (LeftOut(key=1, image_name=HOSTILE, reason=HOSTILE),)
    index = dataclasses.replace(index, meta=dataclasses.replace(index.meta, left_out=left_out))
    finding = Finding(HOSTILE, 1, HOSTILE, HOSTILE, HOSTILE, (Example(HOSTILE, (3,)),))
    text = page(tmp_path / "look.html", index, found=(finding,))
    assert text.count("<script") == 1, "the page's own"
    assert text.count("&lt;script&gt;alert(") > 20
    assert {tag for tag in re.findall(r"<([a-z0-9]+)", text)} <= {
        *("html", "head", "meta", "title", "style", "body", "header", "div", "h1", "h2", "h3", "p", "b", "nav", "a"),
        *("section", "span", "table", "thead", "tbody", "tr", "th", "td", "br", "small", "img", "figure", "figcaption"),
        *("footer", "script"),
    }


def test_observed_masked_soft_and_prevalence_are_counted_in_observed_cells() -> None:
    targets = np.array([[1, 0, np.nan], [0.5, np.nan, np.nan], [0.25, 0, np.nan], [np.nan, 1, np.nan]], np.float32)
    counts = label_counts(Targets(targets.T))
    assert counts.observed.tolist() == [3, 3, 0]
    assert counts.positive.tolist() == [2, 1, 0]
    assert counts.soft.tolist() == [2, 0, 0]
    assert counts.total.tolist() == [1.75, 1, 0]


def test_the_sheet_is_the_same_again_and_another_seed_gives_another(uneven_shards: Path, tmp_path: Path) -> None:
    splits = Splits([open_index(uneven_shards, "train")])
    pages = []
    for seed in (0, 0, 1):
        dataset.write_dataset_report(tmp_path / "look.html", splits, (), seed)
        pages.append((tmp_path / "look.html").read_bytes())
    assert pages[0] == pages[1] != pages[2]


def test_sizes_that_are_as_frequent_are_in_the_order_of_their_numbers(uneven_shards: Path, tmp_path: Path) -> None:
    index = open_index(uneven_shards, "train")
    sides = np.resize([1455, 421, 10_400], len(index) // 3 * 3).astype(index.widths.dtype)
    rest = np.zeros(len(index) - len(sides), sides.dtype)
    index = changed(index, ("one",), widths=np.append(sides, rest), heights=np.append(sides, rest))
    rows = re.findall(r"<td>\s*([\d,]+) x\s+([\d,]+) px</td>", page(tmp_path / "look.html", index))
    assert rows == [("421", "421"), ("1,455", "1,455"), ("10,400", "10,400")]


def test_a_set_of_version_1_has_its_page_which_says_what_it_does_not_know(tmp_path: Path) -> None:
    folder = Path(__file__).parents[1] / "golden" / "version1" / "shards"
    indexes = [open_index(folder, split) for split in ("train", "test")]
    splits = Splits(indexes)
    titles = [finding.title for finding in findings(splits, look(splits))]
    assert titles == ["Labels with fewer than 20 positive or negative images"]
    text = page(tmp_path / "look.html", *indexes)
    assert "sizes and rotations are not known" in text
    assert "The first 1</h3>" in text, "the image that was left out"


def test_a_split_without_labels_shows_random_images(uneven_shards: Path, tmp_path: Path) -> None:
    index = dataclasses.replace(open_index(uneven_shards, "train"), targets=None)
    text = page(tmp_path / "look.html", index)
    assert "no split has labels" in text
    assert text.count("<figure>") == 32


@pytest.mark.parametrize(
    ("text", "decade"),
    [
        ("64", " 60 to 69"),
        ("064Y", " 60 to 69"),
        ("5.0", "  0 to 9"),
        ("103", "100 to 109"),
        ("", ""),
        ("018M", ""),
        ("old", ""),
    ],
)
def test_ages_are_read_in_years(text: str, decade: str) -> None:
    assert dataset._decade(text) == decade
