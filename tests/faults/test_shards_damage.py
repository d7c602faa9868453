"""Damaged, incomplete and hostile shard sets: each is named before anything is decoded, and nothing in them runs."""

import io
import json
import pickle
import re
import shutil
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cxrdist.errors import UserError
from cxrdist.shards.index import open_index
from cxrdist.shards.verify import verify
from cxrdist.task import TASKS

TAR = "train-000001.tar"  # the second shard: 8 images, keys 24 to 31


@pytest.fixture
def shards(uneven_shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(uneven_shards, tmp_path / "div_b"))


def members(path: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(path) as tar:
        found = []
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None
            found.append((member.name, file.read()))
        return found


def rewrite(folder: Path, content: list[tuple[str, bytes]], suit_index: bool = True) -> None:
    """Write the second shard by hand, and with `suit_index` let the JSON expect its new size."""
    with tarfile.open(folder / TAR, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in content:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    if suit_index:
        meta = json.loads((folder / "train.json").read_text())
        meta["shards"][1]["bytes"] = (folder / TAR).stat().st_size
        (folder / "train.json").write_text(json.dumps(meta))


def cut_in_a_member(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 + 99])


def cut_at_a_header(path: Path) -> None:
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[6].offset
    path.write_bytes(path.read_bytes()[:offset])


def damage_a_header(path: Path) -> None:
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[6].offset
    content = bytearray(path.read_bytes())
    content[offset + 100 : offset + 200] = b"x" * 100
    path.write_bytes(content)


def copy_one(path: Path) -> None:
    shutil.copy(path, path.with_name("train-000007.tar"))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (cut_in_a_member, "8 images"),
        (cut_at_a_header, "8 images"),
        (damage_a_header, "00000027.jpg should be at byte"),
        (lambda path: path.write_bytes(b""), "8 images"),
        (Path.unlink, "8 images"),
        (copy_one, "3 shards"),
    ],
)
def test_a_damaged_missing_or_extra_tar_is_named(shards: Path, damage: Callable[[Path], None], told: str) -> None:
    verify(shards, "train", TASKS["b"])
    damage(shards / TAR)
    with pytest.raises(UserError, match=r"train-00000[17]\.tar") as caught:
        verify(shards, "train", TASKS["b"])
    assert told in str(caught.value)


def test_a_flipped_byte_in_a_jpeg_is_found_by_hash_with_its_key(shards: Path) -> None:
    index = open_index(shards, "train", TASKS["b"])
    row = 27
    with (shards / index.shards[index.shard_ids[row]]).open("r+b") as file:
        file.seek(index.offsets[row] + index.lengths[row] // 2)
        file.write(bytes(64))
    verify(shards, "train", TASKS["b"])
    with pytest.raises(UserError, match=rf"{TAR}.*{index.keys[row]:08d} \({re.escape(index.image_names[row])}\)"):
        verify(shards, "train", TASKS["b"], hashes=True)


def test_a_flipped_byte_in_a_sample_json_is_found_by_hash(shards: Path) -> None:
    content = (shards / TAR).read_bytes()
    (shards / TAR).write_bytes(content.replace(b'"study": "001"', b'"study": "002"', 1))
    with pytest.raises(UserError, match=rf"{TAR}.*SHA-256"):
        verify(shards, "train", TASKS["b"], hashes=True)


@pytest.mark.parametrize("fault", ["missing", "repeated", "interleaved", "swapped"])
def test_members_missing_repeated_or_out_of_order_are_named(shards: Path, fault: str) -> None:
    found = members(shards / TAR)
    changed = {
        "missing": found[:3] + found[4:],
        "repeated": found[:4] + found[2:],
        "interleaved": [found[0], found[2], found[1], found[3], *found[4:]],
        "swapped": [*found[2:4], *found[:2], *found[4:]],
    }[fault]
    rewrite(shards, changed, suit_index=False)
    with pytest.raises(UserError, match=TAR):
        verify(shards, "train", TASKS["b"])
    rewrite(shards, changed)
    with pytest.raises(UserError, match=rf"{TAR}.*instead of 0000002[4-6]\.(jpg|json)"):
        verify(shards, "train", TASKS["b"])


@pytest.mark.parametrize("name", ["00000031.pyd", "00000031.pickle", "../outside", "/outside", "pipe:touch hit"])
def test_a_foreign_member_is_refused_and_not_run(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    class Touch:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
            return Path.touch, (tmp_path / "hit",)

    monkeypatch.chdir(tmp_path)
    rewrite(shards, [*members(shards / TAR), (name, pickle.dumps(Touch()))])
    start = time.monotonic()
    with pytest.raises(UserError, match=TAR):
        verify(shards, "train", TASKS["b"])
    assert time.monotonic() - start < 5
    assert not (tmp_path / "hit").exists()


@pytest.mark.parametrize("name", ["pipe:touch hit", "gs://a/b.tar", "http://a/b.tar", "../train-000001.tar", "x.tar"])
def test_a_shard_name_that_is_no_file_of_ours_is_refused_and_not_run(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    meta = json.loads((shards / "train.json").read_text())
    meta["shards"][1]["name"] = name
    (shards / "train.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match="not a shard's file name"):
        open_index(shards, "train", TASKS["b"])
    with pytest.raises(UserError, match="no such folder"):
        open_index(Path(name), "train", TASKS["b"])
    assert not (tmp_path / "hit").exists()


def test_a_damaged_unfinished_or_foreign_index_is_named(shards: Path, tmp_path: Path) -> None:
    index = shards / "train.index.arrow"
    content = index.read_bytes()
    key = content.index(open_index(shards, "train").keys.tobytes())
    for damaged in (content[:-50], content[: key + 9] + b"\1" + content[key + 10 :], b""):
        index.write_bytes(damaged)
        with pytest.raises(UserError, match=r"train\.index\.arrow is damaged"):
            open_index(shards, "train", TASKS["b"])
    index.unlink()
    with pytest.raises(UserError, match=r"train\.index\.arrow: no such file"):
        open_index(shards, "train", TASKS["b"])
    index.write_bytes(content)
    with pytest.raises(UserError, match=r"split 'train' of another task \(task a and b\)"):
        open_index(shards, "train", TASKS["a"])
    with pytest.raises(UserError, match=r"test\.json is missing"):
        open_index(shards, "test", TASKS["b"])
    meta = (shards / "train.json").read_text()
    (shards / "test.json").write_text(meta)
    with pytest.raises(UserError, match=r"test\.json is of split 'train'"):
        open_index(shards, "test", TASKS["b"])
    (shards / "train.json").write_text(meta.replace('"format_version": 2', '"format_version": 4'))
    with pytest.raises(UserError, match="format version 4"):
        open_index(shards, "train", TASKS["b"])
    (shards / "train.json").unlink()
    with pytest.raises(UserError, match=r"train\.json is missing"):
        open_index(shards, "train", TASKS["b"])


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "\ud800",
        lambda text: "[" * 100_000,
        lambda text: text.replace('"size_px"', '"size"'),
        lambda text: text.replace('"size_px": 600', '"size_px": "600"'),
        lambda text: text.replace('"format_version": 2', '"format_version": true'),
        lambda text: text.replace('"count": ', '"count": -0.'),
        lambda text: text.replace('"Edema"', '"Fracture"'),
        lambda text: text.replace('"format_version": 2', '"format_version": 1'),
        lambda text: text.replace("train.index.arrow", "../train.index.arrow"),
    ],
)
def test_a_damaged_json_is_one_named_error(shards: Path, damage: Callable[[str], str]) -> None:
    path = shards / "train.json"
    path.write_bytes(damage(path.read_text()).encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match=r"train\.json: .*the file is damaged: delete it") as caught:
        open_index(shards, "train")
    assert "\n" not in str(caught.value)
