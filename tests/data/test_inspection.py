"""What is suspicious is found, in a set with one of each; in a set without any nothing is."""

import csv
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from cxrdist import preprocess, verify
from cxrdist.cli import run_entry
from cxrdist.data.inspection import (
    FINE_CELLS,
    MAX_COARSE,
    MAX_FINE,
    MAX_NEIGHBOURS,
    Finding,
    Splits,
    difference_hash,
    findings,
    look,
    near_pairs,
)
from cxrdist.errors import UserError
from cxrdist.shards.convert import Pixels
from cxrdist.shards.index import open_index, splits_in
from cxrdist.shards.writer import Source, SplitJob, write_split
from cxrdist.task import COMPETITION_LABELS as LABELS
from cxrdist.task import Columns, Task

pytestmark = pytest.mark.fast

SIDE = 400
FEW = "Labels with fewer than 20 positive or negative images"


def picture(seed: int, width: int = SIDE, height: int = SIDE) -> Image.Image:
    noise = np.random.default_rng(seed).integers(20, 230, (20, 20), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


class Maker:
    """Collects images and rows, then makes a split of them with the command that people use."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.rows = folder, list[dict[str, Any]]()
        (folder / "images").mkdir()

    def add(self, patient: int, number: int, image: Image.Image, exif: int = 0, name: str = "", **cells: Any) -> None:
        name = name or f"{patient:08d}_001_{number:03d}.png"
        tags = Image.Exif()
        tags[0x0112] = exif or 1
        image.save(self.folder / "images" / name, **({"exif": tags} if exif else {}))
        place = len(self.rows)
        row = {"Image_name": name, "Patient_ID": patient, "Study": 1, "Sex": "Female", "Age": 60, "ViewCategory": "PA"}
        row |= {label: (place + k) % 2 for k, label in enumerate(LABELS)}
        self.rows.append(row | cells)

    def make(self, split: str) -> None:
        table = self.folder / f"{split}.csv"
        with table.open("w", encoding="utf-8", newline="") as file:
            header = ["Image_name", "Patient_ID", "Study", "Sex", "Age", "ViewCategory", "ViewPosition", *LABELS]
            writer = csv.DictWriter(file, header)
            writer.writeheader()
            writer.writerows(self.rows)
        where = ["--images", str(self.folder / "images"), "--csv", str(table), "--out", str(self.folder / "set")]
        preprocess.main(["--task", "b", "--split", split, "--workers", "1", *where])
        self.rows.clear()


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    maker = Maker(tmp_path_factory.mktemp("clean"))
    for seed in range(8):
        maker.add(seed // 2 + 1, seed % 2 + 1, picture(seed), Sex="M" if seed < 2 else "")
    maker.make("train")
    for seed in range(20, 24):
        maker.add(seed, 1, picture(seed))
    maker.make("valid")
    return maker.folder / "set"


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    maker = Maker(tmp_path_factory.mktemp("planted"))
    for seed in range(4):
        maker.add(seed + 1, 1, picture(seed))
    maker.add(50, 1, picture(0))  # patient 1's image under another id; at an even distance: the same labels
    maker.add(2, 2, picture(1))  # stored twice, the same labels
    maker.add(3, 2, picture(2), **{LABELS[0]: 1})
    maker.add(3, 3, picture(2), **{LABELS[0]: 0})
    copy = ImageEnhance.Brightness(picture(3)).enhance(1.08).resize((300, 300))
    maker.add(51, 1, copy)
    maker.add(60, 1, Image.new("L", (SIDE, SIDE), 3))
    maker.add(61, 1, Image.new("L", (SIDE, SIDE), 250))
    maker.add(62, 1, Image.new("L", (SIDE, SIDE), 128))
    maker.add(63, 1, picture(63, 90, 90))
    maker.add(64, 1, picture(64, 1300, 400))
    maker.add(65, 1, picture(65), exif=6)
    maker.add(66, 1, picture(66), Patient_ID=67)
    maker.add(68, 1, picture(68), Sex="Male")
    maker.add(68, 2, picture(69), Sex="F")
    maker.add(70, 1, picture(70))
    maker.make("train")
    maker.add(70, 2, picture(71), name="00000070_001_002.png")  # a leak
    maker.add(72, 1, picture(70))  # and another: the same pixels
    for row in maker.rows:
        row |= {LABELS[3]: 1, LABELS[4]: 0}
    maker.make("valid")
    return maker.folder / "set"


def inspect(folder: Path) -> tuple[Splits, dict[str, Finding]]:
    splits = Splits([open_index(folder, split) for split in splits_in(folder)])
    return splits, {finding.title: finding for finding in findings(splits, look(splits))}


def test_nothing_but_its_size_is_suspicious_in_a_clean_set(clean: Path) -> None:
    assert list(inspect(clean)[1]) == [FEW]


def test_labels_with_fewer_than_20_of_a_kind_are_named_with_their_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(5).save(tmp_path / "a.png")
    size = (tmp_path / "a.png").stat().st_size
    for split, counts in (("train", (19, 20, 0)), ("valid", (41, 40, 39))):
        task = Task(name="own", labels=("one", "two", "three"), columns=Columns(image="image"))
        sources = [
            Source(row, f"{row}.png", str(tmp_path / "a.png"), size, "", targets=tuple(float(row < n) for n in counts))
            for row in range(60)
        ]
        write_split(SplitJob(tmp_path / "set", task, split, sources, Pixels(), 60, {}))
    found = inspect(tmp_path / "set")[1]
    notes = ["one in train: 19 positive, 41 negative", "one in valid: 41 positive, 19 negative"]
    assert [example.note for example in found[FEW].examples] == notes
    assert [example.note for example in found["Labels without a positive image"].examples] == ["three in train"]
    verify.main(["--shards", str(tmp_path / "set"), "--report", str(tmp_path / "look.html")])
    assert f"suspicious: {FEW}: 2 labels in a split\n" in capsys.readouterr().out


def test_each_planted_thing_is_found_with_its_images(planted: Path) -> None:
    splits, found = inspect(planted)
    shown = {
        title: [tuple(re.sub(r"0*(\d+)_001_00(\d)\.png", r"\1/\2", splits.names[image]) for image in example.images)
                for example in finding.examples]
        for title, finding in found.items()
    }  # fmt: skip
    del shown["Labels without a positive image"], shown["Labels without a negative image"], shown[FEW]
    assert shown == {
        "Equal images under different patients": [("1/1", "50/1"), ("70/1", "72/1")],
        "Equal images with different labels": [("3/1", "3/2", "3/3"), ("70/1", "72/1")],
        "Equal images in several splits": [("70/1", "72/1")],
        "Images stored more than once": [("2/1", "2/2")],
        "Patients in several splits": [("70/1", "70/2")],
        "Nearly equal images under different patients": [("4/1", "51/1")],
        "Ids that contradict the image's name": [("66/1",)],
        "Patients with contradictory sex": [("68/1", "68/2")],
        "Nearly black images": [("60/1",)],
        "Nearly white images": [("61/1",)],
        "Nearly uniform images": [("62/1",)],
        "Tiny source images": [("63/1",)],
        "Extreme aspect ratios": [("64/1",)],
        "Images with an EXIF rotation": [("65/1",)],
    }
    assert "00000066 / 001; table: 00000067 / 001" in found["Ids that contradict the image's name"].examples[0].note
    for kind, label in (("positive", LABELS[4]), ("negative", LABELS[3])):
        assert [example.note for example in found[f"Labels without a {kind} image"].examples] == [f"{label} in valid"]


def test_the_command_writes_one_page_and_a_line_for_each_finding(
    planted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "new" / "look.html"
    verify.main(["--shards", str(planted), "--report", str(page)])
    told = capsys.readouterr().out
    assert "suspicious: Equal images under different patients: 2 groups of images\n" in told
    text = page.read_text()
    assert text.startswith("<!DOCTYPE html>")
    assert not re.search(r"""(src|href)="(?!data:|#)|url\(|@import""", text)
    assert "holds images of patients and their ids" in text
    assert len(text) < 3_000_000
    verify.main(["--shards", str(planted), "--report", str(page), "--split", "valid"])  # an older page is replaced
    assert "Nearly black" not in page.read_text()
    assert sorted(os.listdir(page.parent)) == [".cxrdist", "look.html"]


def test_a_page_replaces_nothing_but_a_page(clean: Path, tmp_path: Path) -> None:
    other, link = tmp_path / "notes.html", tmp_path / "link.html"
    other.write_text("mine")
    link.symlink_to(other)
    for path, told in (
        (other, "not as cxrdist wrote it"),
        (link, "is a symbolic link"),
        (tmp_path, "ends with .html"),
        (clean / "look.html", "input"),
        (tmp_path / "train.csv", "ends with .html"),
    ):
        with pytest.raises(UserError, match=told):
            verify.main(["--shards", str(clean), "--report", str(path)])
    assert other.read_text() == "mine"


def test_damage_and_an_interruption_leave_no_page(
    clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    folder, page = tmp_path / "set", tmp_path / "out" / "look.html"
    shutil.copytree(clean, folder)
    arguments = ["--shards", str(folder), "--report", str(page)]

    def interrupted(*_: object) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Splits, "read", interrupted)
        assert run_entry(lambda: verify.main(arguments)) == 130
    index = open_index(folder, "train")
    with (folder / index.shards[0]).open("r+b") as tar:  # a flipped bit that only the hash shows
        tar.seek(int(index.offsets[3]) + int(index.lengths[3]) // 2)
        byte = tar.read(1)[0]
        tar.seek(-1, os.SEEK_CUR)
        tar.write(bytes([byte ^ 1]))
    assert run_entry(lambda: verify.main(arguments)) == 2
    assert index.image_names[3] in capsys.readouterr().err
    assert not page.parent.exists()


def test_pairs_by_bands_are_those_of_comparing_all() -> None:
    rng = np.random.default_rng(0)
    size, words = 600, FINE_CELLS**2 // 64
    coarse = rng.integers(0, 2**63, size, dtype=np.uint64)
    fine = rng.integers(0, 2**63, (size, words), dtype=np.uint64)
    for image in range(200, 600):  # copies with up to 6 and up to 80 flipped bits
        coarse[image], fine[image] = coarse[image % 200], fine[image % 200]
        for bit in rng.integers(0, 64, rng.integers(0, 7)):
            coarse[image] ^= np.uint64(1) << np.uint64(bit)
        for bit in rng.integers(0, 64 * words, rng.integers(0, 81)):
            fine[image, bit // 64] ^= np.uint64(1) << np.uint64(bit % 64)
    first, second = np.triu_indices(size, 1)
    far = np.bitwise_count(fine[first] ^ fine[second]).sum(axis=1)
    near = (np.bitwise_count(coarse[first] ^ coarse[second]) <= MAX_COARSE) & (far <= MAX_FINE)
    pairs, distances = near_pairs(coarse, fine)
    assert near.sum() > 50
    assert {tuple(pair) for pair in pairs.tolist()} == set(
        zip(first[near].tolist(), second[near].tolist(), strict=True)
    )
    assert distances.tolist() == sorted(far[near].tolist())


def test_one_picture_a_thousand_times_is_compared_with_few_neighbours_only() -> None:
    pairs, _ = near_pairs(np.zeros(1000, np.uint64), np.zeros((1000, 16), np.uint64))
    assert 1000 <= len(pairs) < 1000 * MAX_NEIGHBOURS


@pytest.mark.parametrize(
    "change",
    [
        lambda image: ImageEnhance.Brightness(image).enhance(1.1),
        lambda image: ImageEnhance.Contrast(image).enhance(0.8),
        lambda image: image.resize((150, 150)).resize((SIDE, SIDE)),
        lambda image: image.point(lambda level: int(255 * (level / 255) ** 1.3)),
    ],
)
def test_a_changed_copy_is_near_and_another_picture_is_not(change: Callable[[Image.Image], Image.Image]) -> None:
    def distance(first: Image.Image, second: Image.Image, cells: int) -> int:
        hashes = [difference_hash(np.asarray(image.resize((75, 75), 4)), cells) for image in (first, second)]
        return int(np.bitwise_count(hashes[0] ^ hashes[1]).sum())

    assert distance(picture(0), change(picture(0)), 8) <= MAX_COARSE
    assert distance(picture(0), change(picture(0)), 32) <= MAX_FINE
    assert distance(picture(0), picture(1), 32) > 5 * MAX_FINE


def test_an_unknown_patient_is_no_other_patient(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    picture(5).save(path)
    almost = tmp_path / "b.png"
    ImageEnhance.Brightness(picture(5)).enhance(1.08).resize((300, 300)).save(almost)
    task = Task(name="own", labels=("one",), columns=Columns(image="image"))
    sources = [
        Source(key, f"{key}.png", str(file), file.stat().st_size, "", patient, "", targets=(0.0,))
        for key, (file, patient) in enumerate([(path, "P0"), (path, ""), (almost, "")])
    ]
    write_split(SplitJob(tmp_path / "set", task, "train", sources, Pixels(), 24, {}))
    titles = inspect(tmp_path / "set")[1]
    assert "Images stored more than once" in titles
    assert not [title for title in titles if "different patients" in title]
