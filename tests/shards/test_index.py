"""The index file: mapped, not read; checked before it is believed; version 1 as it is."""

import dataclasses
import gc
import hashlib
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import xxhash

from cxrdist import preprocess, verify
from cxrdist.data.loader import Loader
from cxrdist.data.order import train_batches
from cxrdist.data.reader import ShardReader
from cxrdist.errors import UserError
from cxrdist.shards import convert
from cxrdist.shards.columns import Texts
from cxrdist.shards.convert import Converted, Pixels
from cxrdist.shards.index import (
    COLUMNS,
    LABEL,
    ShardMeta,
    SplitMeta,
    arrow_bytes,
    index_rows,
    open_index,
    read_meta,
    read_rows,
    task_of,
)
from cxrdist.shards.verify import check_headers
from cxrdist.shards.verify import verify as check_shards
from cxrdist.task import TASKS

pytestmark = pytest.mark.fast
VERSION_1 = Path(__file__).parents[1] / "golden" / "version1" / "shards"


@pytest.fixture
def shards(uneven_shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(uneven_shards, tmp_path / "div_b"))


def rewrite(folder: Path, batch: pa.RecordBatch, meta: SplitMeta | None = None) -> None:
    """Replace the index, and let the JSON expect it."""
    content, meta = arrow_bytes(batch), meta or read_meta(folder, "train")
    (folder / meta.index.name).write_bytes(content)
    entry = dataclasses.replace(meta.index, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    (folder / "train.json").write_text(dataclasses.replace(meta, index=entry).to_json())


def test_every_image_has_the_hashes_of_its_bytes(uneven_shards: Path) -> None:
    index = open_index(uneven_shards, "train", TASKS["b"])
    for row in (0, 31, 47):
        jpeg = ShardReader(index).read(row)
        assert index.sha256(row) == hashlib.sha256(jpeg).hexdigest()
        assert index.xxh3(row) == xxhash.xxh3_64_intdigest(jpeg)
    assert (index.key_text(47), index.size_px, index.num_channels) == ("00000063", 600, 1)
    assert f"{10**8:08d}" == "100000000"


def test_the_index_is_uncompressed_without_nulls_and_the_same_bytes_again(uneven_shards: Path) -> None:
    meta = read_meta(uneven_shards, "train")
    batch = read_rows(uneven_shards, meta)
    assert [field.name for field in batch.schema] == [*COLUMNS, *(LABEL + label for label in meta.task.labels)]
    assert not any(field.nullable for field in batch.schema)
    assert arrow_bytes(batch) == (uneven_shards / "train.index.arrow").read_bytes()


def large_set(folder: Path, num_rows: int) -> SplitMeta:
    """A set of that many rows whose tars are holes."""
    folder.mkdir()
    per_shard = 1000
    number = np.arange(num_rows)
    columns: dict[str, Any] = {
        "key": number,
        "image_name": [f"p{row // 3}/{row}.jpg" for row in range(num_rows)],
        "patient": [f"p{row // 3}" for row in range(num_rows)],
        "shard": number // per_shard,
        "offset": number % per_shard * 90_000 + 512,
        "length": np.full(num_rows, 80_000),
        "sha256": [bytes(32)] * num_rows,
        "xxh3_64": number,
        **{name: np.ones(num_rows) for name in ("channels", "width", "height", "orientation")},
        **{name: [""] * num_rows for name in ("study", "view", "sex", "age")},
    }
    targets = np.zeros((num_rows, TASKS["b"].num_labels), np.float32)
    shards = []
    for shard in range(-(-num_rows // per_shard)):
        with (folder / f"train-{shard:06d}.tar").open("wb") as file:
            file.truncate(per_shard * 90_000)
        shards.append(ShardMeta(name=f"train-{shard:06d}.tar", bytes=per_shard * 90_000, sha256="", count=per_shard))
    fields = {"format_version": 2, "task": TASKS["b"], "split": "train", "left_out": (), "inputs": {}, "source": {}}
    old = read_meta(VERSION_1, "train")
    counts = dataclasses.replace(old.counts, rows=num_rows, images=num_rows)
    index = dataclasses.replace(old.index, name="train.index.arrow")
    meta = dataclasses.replace(old, **fields, shards=tuple(shards), counts=counts, index=index)
    rewrite(folder, index_rows(columns, TASKS["b"].labels, targets), meta)
    return meta


def test_opening_maps_the_file_and_makes_no_object_per_row(tmp_path: Path) -> None:
    num_rows = 50_000
    large_set(tmp_path / "large", num_rows)
    gc.collect()
    allocated = pa.total_allocated_bytes()
    tracemalloc.start()
    index = open_index(tmp_path / "large", "train")
    gc.collect()
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert index.targets is not None
    assert len(index) == num_rows
    assert held < 200_000  # an object per row would be 2.5 MB or more
    assert pa.total_allocated_bytes() - allocated < 100_000
    for column in (index.keys, index.offsets, index.digests, index.shard_ids, *index.targets.columns):
        assert not column.flags.owndata
        assert not column.flags.writeable


def place_in_file(path: Path, name: str) -> list[tuple[int, int]]:
    """Where in the index file the buffers of a column lie: (first byte, bytes) each."""
    content = pa.memory_map(str(path)).read_buffer()
    column = pa.ipc.open_file(content).get_batch(0).column(name)
    return [(buffer.address - content.address, buffer.size) for buffer in column.buffers()[1:] if buffer.size]


def overwrite(path: Path, name: str) -> None:
    with path.open("r+b") as file:
        for start, size in place_in_file(path, name):
            file.seek(start)
            file.write(b"\xff" * size)


def test_training_reads_no_text_and_whoever_does_is_told_that_it_is_damaged(shards: Path) -> None:
    labels = [LABEL + label for label in TASKS["b"].labels]
    used = ["key", "shard", "offset", "length", "xxh3_64", "channels", *labels]
    for name in COLUMNS.keys() - set(used):
        overwrite(shards / "train.index.arrow", name)
    index = open_index(shards, "train")
    check_headers(index, 0, 1)
    plan = train_batches(range(48), seed=0, epoch=0, global_batch_size=16, device_batch_size=16, rank=0, world_size=1)
    with Loader(index, num_threads=1) as loader:
        keys = [batch.keys for batch in loader.batches(plan) if batch.targets is not None]
    assert sorted(np.concatenate(keys).tolist()) == index.keys.tolist()
    for use in (lambda: index.image_names[0], lambda: index.patients.codes(), index.about):
        with pytest.raises(UserError, match=r"train\.index\.arrow is damaged: column '(image_name|patient)'"):
            use()
    with pytest.raises(UserError, match=r"train\.index\.arrow is damaged: its SHA-256"):
        check_shards(shards, "train")


@pytest.mark.parametrize("name", ["key", "shard", "offset", "length", "xxh3_64", "channels", f"{LABEL}Edema"])
def test_one_bit_in_a_column_that_training_uses_is_named(shards: Path, name: str) -> None:
    path = shards / "train.index.arrow"
    ((start, size),) = place_in_file(path, name)
    content = bytearray(path.read_bytes())
    content[start + size // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"train\.index\.arrow is damaged: column '{name}' does not have its hash"):
        open_index(shards, "train")


def test_an_index_that_another_process_checked_is_not_read_again(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = open_index(shards, "train")
    for name in ("check_column", "_check_tars", "_check_columns", "read_rows"):
        monkeypatch.setattr(f"cxrdist.shards.index.{name}", lambda *_: pytest.fail("checked again"))
    index = open_index(shards, "train", checked=True)
    assert np.array_equal(index.offsets, expected.offsets)
    assert index.num_channels == expected.num_channels
    assert np.array_equal(index.targets, expected.targets)


def test_the_index_of_another_set_is_named_though_it_is_intact(shards: Path) -> None:
    meta = read_meta(shards, "train")
    rewrite(shards, read_rows(shards, meta), dataclasses.replace(meta, inputs={"0": "other"}))
    with pytest.raises(UserError, match=r"train\.index\.arrow is not of the set in train\.json"):
        open_index(shards, "train")


def test_an_index_without_hashes_of_its_columns_is_checked_as_a_whole(shards: Path) -> None:
    meta = read_meta(shards, "train")
    expected = open_index(shards, "train").image_names.to_list()
    rewrite(shards, read_rows(shards, meta).replace_schema_metadata(None))
    assert open_index(shards, "train").image_names.to_list() == expected
    overwrite(shards / "train.index.arrow", "view")
    with pytest.raises(UserError, match=r"train\.index\.arrow is damaged: its SHA-256"):
        open_index(shards, "train")


def changed(name: str, row: int, value: Any) -> Callable[[dict[str, list[Any]]], None]:
    def change(columns: dict[str, list[Any]]) -> None:
        columns[name][row] = value

    return change


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (changed("key", 5, 4), r"row 5 .*key is not larger"),
        (changed("key", 0, -1), r"row 0 .*key is not larger"),
        (changed("shard", 30, 3), r"row 30 .*shard is not one of the split"),
        (changed("shard", 30, -1), r"row 30 .*shard is not one of the split"),
        (changed("shard", 5, 1), r"row 6 .*shard comes after a later one"),
        (changed("offset", 9, 0), r"row 9 .*lies outside its tar"),
        (changed("offset", 9, 2**62), r"row 9 .*lies outside its tar"),
        (changed("length", 9, -1), r"row 9 .*lies outside its tar"),
        (changed("length", 9, 2**63 - 1), r"row 9 .*lies outside its tar"),
        (changed("channels", 7, 2), r"row 7 .*channels are not 1 or 3"),
        (changed("image_name", 7, "00000000_001_000.png"), r"row 7 \('00000000_001_000.png'\): .*there twice"),
        (changed(f"{LABEL}Edema", 11, 2), r"row 11, label 'Edema': 2 is not a label"),
    ],
)
def test_numbers_that_cannot_be_are_named_with_their_row(shards: Path, change: Any, told: str) -> None:
    meta = read_meta(shards, "train")
    batch = read_rows(shards, meta)
    columns = batch.to_pydict()
    change(columns)
    rewrite(shards, pa.record_batch(columns, schema=batch.schema))
    with pytest.raises(UserError, match=rf"train\.index\.arrow, {told}"):
        open_index(shards, "train").about()  # names are not looked at before


@pytest.mark.parametrize("value", [-0.1, 1.5])
def test_a_soft_label_outside_0_and_1_is_named(shards: Path, value: float) -> None:
    meta = read_meta(shards, "train")
    columns = read_rows(shards, meta).to_pydict()
    targets = np.full((48, meta.task.num_labels), 0.5, np.float32)
    targets[3, 2] = value
    rewrite(shards, index_rows(columns, meta.task.labels, targets))
    with pytest.raises(UserError, match=rf"row 3, label '{meta.task.labels[2]}'"):
        open_index(shards, "train")


@pytest.mark.parametrize(
    "damage",
    [
        lambda batch: batch.drop_columns(["age"]),
        lambda batch: batch.drop_columns(["label:Edema"]),
        lambda batch: batch.append_column("more", batch["age"]),
        lambda batch: batch.set_column(0, "key", batch["key"].cast(pa.int32())),
        lambda batch: batch.set_column(1, "image_name", pa.array([None] * len(batch), pa.large_string())),
    ],
)
def test_other_columns_or_missing_cells_are_named(shards: Path, damage: Any) -> None:
    rewrite(shards, damage(read_rows(shards, read_meta(shards, "train"))))
    with pytest.raises(UserError, match="its columns are not those of the format and task"):
        open_index(shards, "train")


def test_an_index_that_is_hostile_but_hashed_is_named(shards: Path) -> None:
    meta = read_meta(shards, "train")
    content = bytearray((shards / meta.index.name).read_bytes())
    names = read_rows(shards, meta).column("image_name")
    start = content.index(names.buffers()[1].to_pybytes())
    content[start + 8 : start + 16] = (2**40).to_bytes(8, "little")  # an offset far outside the text
    for damaged in (bytes(content), bytes(content[:-100]), b"ARROW1", b""):
        (shards / meta.index.name).write_bytes(damaged)
        entry = dataclasses.replace(meta.index, sha256=hashlib.sha256(damaged).hexdigest())
        (shards / "train.json").write_text(dataclasses.replace(meta, index=entry).to_json())
        with pytest.raises(UserError, match=r"train\.index\.arrow is damaged: (not readable as an index|column 'im)"):
            open_index(shards, "train").about()


def test_texts_are_a_sequence_and_count_their_distinct_texts_in_order() -> None:
    texts = Texts(["b", "", "ä", "a b", "b", "Z"])
    assert (len(texts), texts[0], texts[np.int64(2)], texts[-1]) == (6, "b", "ä", "Z")
    assert list(texts) == texts.to_list() == ["b", "", "ä", "a b", "b", "Z"]
    assert texts[np.array([4, 1])].to_list() == ["b", ""]
    assert texts[np.array([True, False] * 3)].to_list() == ["b", "ä", "b"]
    assert texts[1:3].to_list() == ["", "ä"]
    codes, distinct = texts.codes()
    names, expected = np.unique(np.array(texts.to_list()), return_inverse=True)
    assert distinct.to_list() == names.tolist()
    assert codes.tolist() == expected.tolist()
    assert texts.has_distinct(5)
    assert not texts.has_distinct(6)
    assert texts.first_repeated() == 4
    assert texts[:4].first_repeated() is None


def test_texts_take_pandas_columns_of_either_kind() -> None:
    for kind in (object, "string[pyarrow]", "str"):
        frame = pd.DataFrame({"patient": ["2", "1", "2"]}).astype({"patient": kind})
        assert Texts(frame["patient"]).codes()[0].tolist() == [1, 0, 1]


def test_a_set_of_version_1_opens_verifies_and_prints(capsys: pytest.CaptureFixture[str]) -> None:
    index = open_index(VERSION_1, "train", TASKS["b"])
    table = pd.read_csv(VERSION_1 / "train.index.csv", dtype=str, keep_default_na=False)
    assert (index.meta.format_version, index.task, task_of(VERSION_1)) == (1, TASKS["b"], TASKS["b"])
    for name, texts in (("image_name", index.image_names), ("patient", index.patients), ("study", index.studies)):
        assert texts.to_list() == table[name].tolist()
    for name, texts in (("view", index.views), ("sex", index.sexes), ("age", index.ages)):
        assert texts.to_list() == table[name].tolist()
    assert index.keys.tolist() == table["key"].astype(int).tolist()
    assert [index.sha256(row) for row in range(len(index))] == table["sha256"].tolist()
    assert [index.shards[number] for number in index.shard_ids] == table["shard"].tolist()
    assert np.array_equal(index.targets, table[list(TASKS["b"].labels)].astype(np.float32))
    assert index.channels.tolist() == table["channels"].astype(int).tolist()
    assert (index.xxh3(0), index.size_px) == (None, 600)
    test = open_index(VERSION_1, "test", TASKS["b"])
    assert test.targets is None
    assert list(test.left_out) == ["00000300_001_001.jpg"]
    verify.main(["--shards", str(VERSION_1), "--hashes"])
    capsys.readouterr()
    verify.main(["--shards", str(VERSION_1), "--table"])
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(index) + 1
    assert printed[1].startswith(f"{index.key_text(0)},{index.image_names[0]},")
    with pytest.raises(UserError, match="another task"):
        open_index(VERSION_1, "train", TASKS["a"])


def test_preprocess_does_not_replace_a_set_of_version_1_unasked(make_division: Any, tmp_path: Path) -> None:
    images, table = make_division(["a.jpg", "b.jpg"])
    out = Path(shutil.copytree(VERSION_1, tmp_path / "out"))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    arguments = ["--div", "b", "--images", str(images), "--csv", str(table), "--out", str(out), "--workers", "1"]
    with pytest.raises(UserError, match=r"of format version 1 is here.*--overwrite"):
        preprocess.main(arguments)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    preprocess.main([*arguments, "--overwrite"])
    assert open_index(out, "train").meta.format_version == 2
    assert not (out / "train.index.csv").exists()
    assert len(open_index(out, "test")) == 5  # the other split stays as it is


def test_a_damaged_record_of_a_shard_lets_it_be_made_again(
    make_division: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    images, table = make_division([f"{number}.jpg" for number in range(8)])
    shared = ["--div", "b", "--images", str(images), "--csv", str(table), "--rows-per-shard", "2", "--workers", "1"]
    preprocess.main([*shared, "--out", str(tmp_path / "one")])

    def interrupted(path: str, pixels: Pixels) -> Converted | str:
        if path.endswith("4.jpg"):
            raise KeyboardInterrupt
        return convert.convert_bytes(Path(path).read_bytes(), pixels)

    with monkeypatch.context() as patched:
        patched.setattr(convert, "convert", interrupted)
        with pytest.raises(KeyboardInterrupt):
            preprocess.main([*shared, "--out", str(tmp_path / "interrupted")])
    record = min((tmp_path / "interrupted" / ".train.work").glob("*.tar.json"))
    text = record.read_text()
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    for damaged in (text[:-9], text.replace('"images"', '"image"'), text.replace('"size": ', '"size": "x'), "[]", "\0"):
        record.write_text(damaged)
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(tmp_path / "interrupted", out)
        capsys.readouterr()
        preprocess.main([*shared, "--out", str(out)])
        assert "reused: 1 finished shards; to do: 3" in capsys.readouterr().out
        assert sorted(path.name for path in out.iterdir()) == names
        assert all((out / name).read_bytes() == (tmp_path / "one" / name).read_bytes() for name in names)
