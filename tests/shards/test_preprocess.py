"""The preprocess and verify commands: what lands in the shards, what is named, what is reused."""

import csv
import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from cxrdist import preprocess, verify
from cxrdist.errors import UserError
from cxrdist.labels import LABELS
from cxrdist.shards.index import COLUMNS, open_index

pytestmark = pytest.mark.fast
ODD_NAMES = [
    "1.2.840.113.jpg",
    "1.2.840.114.jpg",
    "a b.jpg",
    "Röntgen ß.png",
    "NA",
    "007",
    "a.png",
    "a.jpg",
    ".hidden.jpg",
]


def run(images: Path, table: Path | None, out: Path, *more: str) -> None:
    csv_flag = [] if table is None else ["--csv", str(table)]
    preprocess.main(["--div", "b", "--images", str(images), *csv_flag, "--out", str(out), "--workers", "1", *more])


def bytes_of(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_names_come_back_exactly_and_equal_stems_stay_apart(make_division: Any, tmp_path: Path) -> None:
    images, table = make_division(ODD_NAMES)
    run(images, table, tmp_path / "out", "--rows-per-shard", "4")
    index = open_index(tmp_path / "out", "train", "b")
    assert list(index.image_names) == ODD_NAMES
    assert list(index.keys) == list(range(len(ODD_NAMES)))
    assert len(index.shards) == 3
    assert index.targets is not None
    assert index.targets[1].tolist() == [(1 + place) % 2 for place in range(14)]
    assert list(index.patients[:3]) == ["00000001", "00000001", "00000002"]
    assert (index.num_channels, index.views[0], index.sexes[0], index.ages[0]) == (1, "PA", "Female", "60")
    with (tmp_path / "out" / "train.index.csv").open(encoding="utf-8", newline="") as file:
        assert tuple(next(csv.reader(file))) == COLUMNS


def test_plain_webdataset_reads_the_shards(make_division: Any, tmp_path: Path) -> None:
    images, table = make_division(ODD_NAMES)
    run(images, table, tmp_path / "out", "--rows-per-shard", "4")
    index = open_index(tmp_path / "out", "train", "b")
    tars = [str(index.folder / name) for name in index.shards]
    samples = list(wds.WebDataset(tars, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"{key:08d}" for key in index.keys]
    for row, sample in enumerate(samples):
        meta = json.loads(sample["json"])
        assert meta["image_name"] == index.image_names[row]
        assert index.targets is not None
        assert [meta["labels"][label] for label in LABELS] == index.targets[row].tolist()
        assert Image.open(io.BytesIO(sample["jpg"])).size == (600, 600)
        with open(tars[index.shard_ids[row]], "rb") as file:
            file.seek(index.offsets[row])
            assert file.read(index.lengths[row]) == sample["jpg"]


def test_any_number_of_processes_and_nodes_gives_the_same_bytes(make_division: Any, tmp_path: Path) -> None:
    images, table = make_division([f"{number}.jpg" for number in range(11)])
    (images / "3.jpg").write_bytes(b"no image")
    flags = ("--rows-per-shard", "2")
    run(images, table, tmp_path / "one", *flags)
    run(images, table, tmp_path / "two", *flags, "--workers", "2")
    for node in ("2", "0", "1"):
        assert not (tmp_path / "nodes" / "train.json").exists()
        run(images, table, tmp_path / "nodes", *flags, "--num-nodes", "3", "--node-rank", node)
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two") == bytes_of(tmp_path / "nodes")
    verify.main(["--div", "b", "--shards", str(tmp_path / "nodes"), "--hashes"])


def test_every_image_left_out_is_listed_and_the_counts_add_up(
    make_division: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = "00043046_001_001.jpg"  # known to be unreadable in division B
    names = ["a.jpg", bad, "empty.jpg", "gone.jpg", "link.jpg", "pipe.jpg", "b.jpg"]
    images, table = make_division(names)
    (images / "empty.jpg").write_bytes(b"")
    (tmp_path / "outside.jpg").write_bytes((images / "a.jpg").read_bytes())
    for name in ("gone.jpg", "link.jpg", "pipe.jpg"):
        (images / name).unlink()
    (images / "link.jpg").symlink_to(tmp_path / "outside.jpg")
    os.mkfifo(images / "pipe.jpg")
    (images / "extra.png").write_bytes(b"")
    run(images, table, tmp_path / "out")
    index = open_index(tmp_path / "out", "train", "b")
    assert list(index.image_names) == ["a.jpg", "b.jpg"]
    assert list(index.keys) == [0, 6]  # gaps where an image was left out
    assert set(index.left_out) == {*names} - {"a.jpg", "b.jpg"}
    assert "known to be unreadable" in index.left_out[bad]
    assert "link that leaves" in index.left_out["link.jpg"]
    assert index.meta["counts"] == {"rows": 7, "images": 2, "left_out": 5}
    assert index.meta["source"]["images_not_in_csv"] == 1
    printed = capsys.readouterr().out
    assert "7 rows = 2 images stored + 5 left out" in printed
    assert "1 of the rows have no image there: gone.jpg" in printed
    assert "1 images there are in no row" in printed
    for name, reason in index.left_out.items():
        assert f"{name}: {reason}" in printed


def test_a_test_split_comes_from_a_template_or_the_folder(make_division: Any, tmp_path: Path) -> None:
    images, _ = make_division(["00000002_001_000.jpg", "00000001_003_001.jpg", "x.png"])
    template = tmp_path / "sample.csv"
    template.write_text("Image_name,Edema\n00000002_001_000.jpg,0\nx.png,0\n00000001_003_001.jpg,0\n")
    run(images, template, tmp_path / "out", "--split", "test")
    index = open_index(tmp_path / "out", "test", "b")
    assert list(index.image_names) == ["00000002_001_000.jpg", "x.png", "00000001_003_001.jpg"]
    assert list(index.patients) == ["00000002", "", "00000001"]
    assert list(index.studies) == ["001", "", "003"]
    assert index.targets is None
    run(images, None, tmp_path / "folder", "--split", "test")
    assert list(open_index(tmp_path / "folder", "test", "b").image_names) == sorted(index.image_names)
    (images / os.fsdecode(b"\xff.jpg")).write_bytes(b"")
    with pytest.raises(UserError, match="not valid UTF-8; rename it"):
        run(images, None, tmp_path / "bytes", "--split", "test")


def test_the_competition_layout_gives_both_splits(make_division: Any, tmp_path: Path) -> None:
    images, table = make_division(["00000001_001_001.jpg", "00000002_001_001.jpg"])
    images.rename(tmp_path / "train2")
    table.rename(tmp_path / "train2.csv")
    arguments = ["--div", "b", "--data", str(tmp_path), "--out", str(tmp_path / "out"), "--workers", "1"]
    with pytest.raises(UserError, match=r"no folder test2 in it.*--split train"):
        preprocess.main(arguments)
    (tmp_path / "test2").mkdir()
    with pytest.raises(UserError, match=r"test2: no \.png"):
        preprocess.main(arguments)
    assert not (tmp_path / "out").exists()
    (tmp_path / "test2" / "00000003_001_001.jpg").write_bytes(
        (tmp_path / "train2" / "00000001_001_001.jpg").read_bytes()
    )
    preprocess.main(arguments)
    assert [len(open_index(tmp_path / "out", split, "b")) for split in ("train", "test")] == [2, 1]


def test_a_finished_split_is_reused_repaired_and_not_replaced_unasked(
    make_division: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, table = make_division([f"{number}.jpg" for number in range(6)])
    flags = ("--rows-per-shard", "2")
    run(images, table, tmp_path / "out", *flags)
    before = bytes_of(tmp_path / "out")
    stamps = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    run(images, table, tmp_path / "out", *flags)
    assert "reused: 3 finished shards" in capsys.readouterr().out
    assert stamps == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    (tmp_path / "out" / "train-000001.tar").write_bytes(b"cut")
    run(images, table, tmp_path / "out", *flags)
    assert "reused: 2 finished shards; to do: 1" in capsys.readouterr().out
    assert bytes_of(tmp_path / "out") == before
    with pytest.raises(UserError, match="--overwrite"):
        run(images, table, tmp_path / "out", "--rows-per-shard", "3")
    assert bytes_of(tmp_path / "out") == before
    run(images, table, tmp_path / "out", "--rows-per-shard", "3", "--overwrite")
    assert len(open_index(tmp_path / "out", "train", "b").shards) == 2


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, (1, 2)),
        ({"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "3"}, (2, 4)),
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4"}, (3, 4)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, (0, 1)),  # a batch script without srun runs alone
    ],
)
def test_the_share_of_the_work_comes_from_the_launcher(environ: dict[str, str], expected: tuple[int, int]) -> None:
    assert preprocess.node_of(None, None, environ) == expected
    assert preprocess.node_of(0, 2, environ) == (0, 2)
    with pytest.raises(UserError, match="--node-rank 2"):
        preprocess.node_of(2, 2, environ)


def test_wrong_paths_and_folders_are_named_in_one_line(make_division: Any, tmp_path: Path) -> None:
    images, table = make_division(["a.jpg"])
    (tmp_path / "empty" / "train2").mkdir(parents=True)
    other = tmp_path / "other"
    other.mkdir()
    (other / "z.png").write_bytes(b"")
    for folder, csv_path, message in (
        (tmp_path / "none", table, "no such image folder"),
        (images, tmp_path / "none.csv", "no such CSV"),
        (tmp_path / "empty", table, "no .png, .jpg, .jpeg file .* holds the folder 'train2'"),
        (other, table, r"none of the 1 images .* \(first: 'a.jpg'\)"),
        (images, None, "--csv FILE"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            run(folder, csv_path, tmp_path / "out")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_read_only_inputs_are_enough(make_division: Any, tmp_path: Path) -> None:
    images, table = make_division(["a.jpg", "b.jpg"])
    for path in (images / "a.jpg", images / "b.jpg", table):
        path.chmod(0o444)
    images.chmod(0o555)
    run(images, table, tmp_path / "out")
    images.chmod(0o755)
    assert len(open_index(tmp_path / "out", "train", "b")) == 2


def test_batches_have_three_channels_as_soon_as_one_image_has(make_division: Any, tmp_path: Path) -> None:
    images, table = make_division(["a.jpg", "b.jpg"])
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[:20, :, 0] = 255
    Image.fromarray(pixels).save(images / "b.jpg")
    run(images, table, tmp_path / "out")
    index = open_index(tmp_path / "out", "train", "b")
    assert index.channels.tolist() == [1, 3]
    assert index.num_channels == 3
