"""The preprocess and verify commands: what lands in the shards, what is named, what is reused."""

import csv
import dataclasses
import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import webdataset as wds
from PIL import Image

from cxrdist import preprocess, verify
from cxrdist.distributed.environment import node_of
from cxrdist.errors import UserError
from cxrdist.shards.index import COLUMNS, Counts, ShardIndex, open_index, read_rows, splits_in, task_of
from cxrdist.task import COMPETITION_LABELS as LABELS
from cxrdist.task import TASKS, Columns, Task

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


def run(images: Path, table: Path | None, out: Path, *more: str, task: str = "b") -> None:
    csv_flag = [] if table is None else ["--csv", str(table)]
    preprocess.main(["--task", task, "--images", str(images), *csv_flag, "--out", str(out), "--workers", "1", *more])


def bytes_of(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_names_come_back_exactly_and_equal_stems_stay_apart(make_division: Any, tmp_path: Path) -> None:
    images, table = make_division(ODD_NAMES)
    run(images, table, tmp_path / "out", "--rows-per-shard", "4")
    index = open_index(tmp_path / "out", "train", TASKS["b"])
    assert list(index.image_names) == ODD_NAMES
    assert list(index.keys) == list(range(len(ODD_NAMES)))
    assert len(index.shards) == 3
    assert index.targets is not None
    assert index.targets[1].tolist() == [(1 + place) % 2 for place in range(len(LABELS))]
    assert list(index.patients[:3]) == ["00000001", "00000001", "00000002"]
    assert (index.num_channels, index.views[0], index.sexes[0], index.ages[0]) == (1, "PA", "Female", "60")
    assert index.rows_of(["a.png", "b.png", "NA"]).tolist() == [6, -1, 4]


def test_plain_webdataset_reads_the_shards(make_division: Any, tmp_path: Path) -> None:
    images, table = make_division(ODD_NAMES)
    run(images, table, tmp_path / "out", "--rows-per-shard", "4")
    index = open_index(tmp_path / "out", "train", TASKS["b"])
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


def test_any_number_of_processes_and_nodes_gives_the_same_bytes(
    make_division: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, table = make_division([f"{number}.jpg" for number in range(11)])
    (images / "3.jpg").write_bytes(b"no image")
    flags = ("--rows-per-shard", "2")
    run(images, table, tmp_path / "one", *flags)
    run(images, table, tmp_path / "two", *flags, "--workers", "2")
    for node in ("2", "0"):  # whichever node runs does it all; one that comes late finds it done
        run(images, table, tmp_path / "nodes", *flags, "--num-nodes", "3", "--node-rank", node)
    printed = capsys.readouterr().out
    assert "images made by this node: 10; by other nodes: 0" in printed
    assert "reused: 6 finished shards; to do: 0" in printed
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
    index = open_index(tmp_path / "out", "train", TASKS["b"])
    assert list(index.image_names) == ["a.jpg", "b.jpg"]
    assert list(index.keys) == [0, 6]  # gaps where an image was left out
    assert set(index.left_out) == {*names} - {"a.jpg", "b.jpg"}
    assert "known to be unreadable" in index.left_out[bad]
    assert "link that leaves" in index.left_out["link.jpg"]
    assert index.meta.counts == Counts(rows=7, images=2, left_out=5)
    assert index.meta.source["images_not_in_csv"] == 1
    printed = capsys.readouterr().out
    assert "7 rows = 2 images stored + 5 left out" in printed
    assert "rows of train without an image there: 1: gone.jpg" in printed
    assert "images there without a row, not used: 1 (first: extra.png)" in printed
    for name, reason in index.left_out.items():
        assert f"{name}: {reason}" in printed


def test_a_test_split_comes_from_a_template_or_the_folder(
    make_division: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, _ = make_division(["00000002_001_000.jpg", "00000001_003_001.jpg", "x.png"])
    template = tmp_path / "sample.csv"
    template.write_text("Image_name,Edema\n00000002_001_000.jpg,0\nx.png,0\n00000001_003_001.jpg,0\n")
    run(images, template, tmp_path / "out", "--split", "test")
    index = open_index(tmp_path / "out", "test", TASKS["b"])
    assert list(index.image_names) == ["00000002_001_000.jpg", "x.png", "00000001_003_001.jpg"]
    assert list(index.patients) == ["00000002", "x.png", "00000001"]
    assert list(index.studies) == ["001", "", "003"]
    assert index.targets is None
    assert "\n  2 patients\n" in capsys.readouterr().out, "x.png says none; nothing is masked"
    run(images, None, tmp_path / "folder", "--split", "test")
    assert list(open_index(tmp_path / "folder", "test", TASKS["b"]).image_names) == sorted(index.image_names)
    (images / os.fsdecode(b"\xff.jpg")).write_bytes(b"")
    with pytest.raises(UserError, match="not UTF-8; rename it"):
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
    assert [len(open_index(tmp_path / "out", split, TASKS["b"])) for split in ("train", "test")] == [2, 1]


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
    assert len(open_index(tmp_path / "out", "train", TASKS["b"]).shards) == 2


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, (0, 1, "flags")),
        ({"RANK": "1", "WORLD_SIZE": "2"}, (1, 2, "torchrun or accelerate")),
        (
            {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "3"},
            (2, 4, "a Slurm array"),
        ),
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4"}, (3, 4, "a Slurm step")),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, (0, 1, "flags")),  # a batch script without srun is one process
    ],
)
def test_the_share_of_the_work_comes_from_the_launcher(environ: dict[str, str], expected: tuple[int, int, str]) -> None:
    assert node_of(None, None, environ) == expected
    assert node_of(0, 2, environ) == (0, 2, "flags")
    with pytest.raises(UserError, match="--node-rank 2"):
        node_of(2, 2, environ)


def test_wrong_paths_and_folders_are_named_in_one_line(make_division: Any, tmp_path: Path) -> None:
    images, table = make_division(["a.jpg"])
    (tmp_path / "empty" / "train2").mkdir(parents=True)
    other = tmp_path / "other"
    other.mkdir()
    (other / "z.png").write_bytes(b"")
    for folder, csv_path, message in (
        (tmp_path / "none", table, "no such image folder"),
        (images, tmp_path / "none.csv", "no such CSV"),
        (tmp_path / "empty", table, "no .png, .jpg, .jpeg, .*file .* or below; it holds the folder 'train2'"),
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
    assert len(open_index(tmp_path / "out", "train", TASKS["b"])) == 2


def test_batches_have_three_channels_as_soon_as_one_image_has(make_division: Any, tmp_path: Path) -> None:
    images, table = make_division(["a.jpg", "b.jpg"])
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[:20, :, 0] = 255
    Image.fromarray(pixels).save(images / "b.jpg")
    run(images, table, tmp_path / "out")
    index = open_index(tmp_path / "out", "train", TASKS["b"])
    assert index.channels.tolist() == [1, 3]
    assert index.num_channels == 3


def test_images_in_nested_folders_keep_their_paths_and_links_are_not_entered(
    make_division: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["p10/p1/s1/02aa.jpg", "p10/p2/s1/02aa.jpg", "p 11/Röntgen.v2.png", "top.jpg", "link/x.jpg", "p10/gone.jpg"]
    images, table = make_division(names)
    (tmp_path / "elsewhere").mkdir()
    (images / "link" / "x.jpg").rename(tmp_path / "elsewhere" / "x.jpg")
    (images / "link").rmdir()
    (images / "link").symlink_to(tmp_path / "elsewhere")
    (images / "p10" / "gone.jpg").unlink()
    (images / "loop").symlink_to(images)
    run(images, table, tmp_path / "out")
    index = open_index(tmp_path / "out", "train")
    assert index.image_names.to_list() == names[:4]
    assert index.left_out == dict.fromkeys(names[4:], "not in the image folder")
    assert "linked folders, not entered: 2 (first: 'link')" in capsys.readouterr().out
    run(images, None, tmp_path / "out", "--split", "test")
    assert open_index(tmp_path / "out", "test").image_names.to_list() == sorted(names[:4])


def test_a_task_of_three_labels_with_text_patients_and_masked_or_soft_cells_comes_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    names = [f"{number}.jpg" for number in range(4)]
    for name in names:
        Image.fromarray(np.full((20, 30), 99, np.uint8)).save(tmp_path / "images" / name)
    (tmp_path / "labels.csv").write_text(
        'path,who,Nodule,No Finding,"Mass, large"\n'
        "0.jpg,P-ä/1,1,0,-1\n1.jpg,P-ä/1,0,,1\n2.jpg,007,-1,1.0,0\n3.jpg,7,0,0,0\n"
    )
    task = Task(
        name="mine",
        labels=("No Finding", "Nodule", "Mass, large"),
        columns=Columns(image="path", patient="who"),
        blank={"*": "masked"},
        uncertain={"Nodule": 0.25, "*": "masked"},
    )
    (tmp_path / "mine.toml").write_text(task.to_toml())
    run(tmp_path / "images", tmp_path / "labels.csv", tmp_path / "soft", task=str(tmp_path / "mine.toml"))
    index = open_index(tmp_path / "soft", "train", task)
    nan = float("nan")
    expected = np.array([[0, 1, nan], [nan, 0, 1], [1, 0.25, 0], [0, 0, 0]], np.float32)
    assert np.array_equal(index.targets, expected, equal_nan=True)
    assert index.patients.to_list() == ["P-ä/1", "P-ä/1", "007", "7"]
    assert "4 rows = 4 images stored + 0 left out\n  3 patients; 2 masked cells\n" in capsys.readouterr().out
    assert task_of(tmp_path / "soft") == index.task == task
    assert labels_stored(index) == {pa.float32()}
    samples = list(wds.WebDataset(str(tmp_path / "soft" / index.shards[0]), shardshuffle=False))
    labels = [json.loads(sample["json"])["labels"] for sample in samples]
    assert labels[0] == {"No Finding": 0, "Nodule": 1, "Mass, large": None}
    assert labels[2] == {"No Finding": 1, "Nodule": 0.25, "Mass, large": 0}

    arguments = ("--uncertain", "one")
    run(tmp_path / "images", tmp_path / "labels.csv", tmp_path / "hard", *arguments, task=str(tmp_path / "mine.toml"))
    index = open_index(tmp_path / "hard", "train", task)
    expected[[0, 2], [2, 1]] = 1
    assert np.array_equal(index.targets, expected, equal_nan=True)
    assert labels_stored(index) == {pa.uint8()}


def labels_stored(index: ShardIndex) -> set[pa.DataType]:
    rows = read_rows(index.folder, index.meta)
    return {rows.schema.field(f"label:{label}").type for label in index.task.labels}


def test_further_splits_have_names_of_their_own_and_do_not_mix(make_division: Any, tmp_path: Path) -> None:
    images, table = make_division(["a.jpg", "b.jpg"])
    for split in ("train", "valid", "train-2"):
        run(images, table, tmp_path / "out", "--split", split)
    assert splits_in(tmp_path / "out") == ["train", "train-2", "valid"]
    assert [len(open_index(tmp_path / "out", split)) for split in splits_in(tmp_path / "out")] == [2, 2, 2]
    for split, told in (("../x", "not valid"), ("valid", "--csv FILE")):
        with pytest.raises(UserError, match=told):
            run(images, None, tmp_path / "out", "--split", split)
    with pytest.raises(UserError, match="give --images DIR"):
        preprocess.competition_inputs(dataclasses.replace(TASKS["b"], name="mine"), images, None)


def test_verify_prints_the_index_as_csv(make_division: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, table = make_division(['a "b", c.jpg', "b.jpg"])
    run(images, table, tmp_path / "out")
    capsys.readouterr()
    verify.main(["--shards", str(tmp_path / "out"), "--split", "train", "--table"])
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    index = open_index(tmp_path / "out", "train")
    assert tuple(rows[0]) == (*COLUMNS, *LABELS)
    for row, cells in enumerate(rows):
        assert cells["image_name"] == index.image_names[row]
        assert (cells["key"], cells["shard"]) == (index.key_text(row), "train-000000.tar")
        assert (cells["sha256"], cells["xxh3_64"]) == (index.sha256(row), str(index.xxh3(row)))
        assert [float(cells[label]) for label in LABELS] == index.targets[row].tolist()
