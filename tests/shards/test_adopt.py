"""WebDataset tars that others wrote, adopted: read as webdataset reads them, and what it would lose is named."""

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from fsspec.implementations.local import LocalFileSystem
from PIL import Image

from cxrdist import preprocess, verify
from cxrdist.data.fetch import copy_shards
from cxrdist.data.loader import Loader
from cxrdist.errors import UserError
from cxrdist.shards import adopt
from cxrdist.shards.convert import Pixels, resized_to_store
from cxrdist.shards.index import AdoptedMeta, open_index, splits_in
from cxrdist.shards.verify import verify as verify_split

pytestmark = pytest.mark.fast
LABELS = ("Edema", "Mass")
Members = list[tuple[str, bytes]]


def picture(number: int, kind: str = "JPEG", size: tuple[int, int] = (90, 70), mode: str = "L") -> bytes:
    shape = (8, 8) if mode == "L" else (8, 8, 3)
    noise = Image.fromarray(np.random.default_rng(number).integers(0, 255, shape, dtype=np.uint8))
    buffer = io.BytesIO()
    noise.resize(size).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path: Path, members: Members, kind: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def samples(start: int, stop: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Samples of several sizes, kinds and channels, with what their json says."""
    for number in range(start, stop):
        suffix = ("jpg", "jpeg", "png")[number % 3]
        mode = "RGB" if number == 4 else "L"
        image = picture(number, "PNG" if suffix == "png" else "JPEG", (90 + number, 70), mode)
        about = {"Edema": number % 2, "Mass": number % 3 == 0, "who": f"P{number // 2}", "caption": "x"}
        yield f"{number:09d}", {suffix: image, "json": about}


def open_clip_set(folder: Path, num_tars: int = 3, each: int = 4) -> Path:
    """As img2dataset writes for open_clip: image, txt and json members, by plain tarfile."""
    for place in range(num_tars):
        members: Members = []
        for key, sample in samples(place * each, (place + 1) * each):
            suffix, image = next(iter(sample.items()))
            members += [
                (f"{key}.{suffix}", image),
                (f"{key}.txt", b"a chest"),
                (f"{key}.json", json.dumps(sample["json"]).encode()),
            ]
        write_tar(folder / f"{place:05d}.tar", members)
    return folder


def writer_set(folder: Path) -> Path:
    folder.mkdir()
    with wds.ShardWriter(str(folder / "cxr-%06d.tar"), maxcount=4, verbose=0) as writer:
        for key, sample in samples(0, 12):
            writer.write({"__key__": key} | sample)
    return folder


def run(tars: Path | str, *more: str | Path, labels: str = "Edema,Mass") -> None:
    pattern = str(tars / "*.tar") if isinstance(tars, Path) else tars
    preprocess.main(["--adopt", pattern, "--labels", labels, "--workers", "2", *map(str, more)])


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    return open_clip_set(tmp_path / "tars")


@pytest.mark.parametrize("make", [open_clip_set, writer_set])
def test_the_index_says_what_webdataset_yields_and_no_tar_is_touched(
    tmp_path: Path, make: Callable[[Path], Path]
) -> None:
    folder = make(tmp_path / "tars")
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    run(folder, "--patient-column", "who")
    assert before == {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.glob("*.tar")}
    assert sorted(path.name for path in folder.iterdir()) == sorted([*before, "train.index.arrow", "train.json"])
    index = open_index(folder, "train")
    yielded = list(wds.WebDataset([str(path) for path in sorted(folder.glob("*.tar"))], shardshuffle=False))
    assert len(index) == len(yielded) == 12
    for row, sample in enumerate(yielded):
        suffix = next(suffix for suffix in ("jpg", "jpeg", "png") if suffix in sample)
        assert index.image_names[row] == f"{sample['__key__']}.{suffix}"
        with index.tar(int(index.shard_ids[row])).open("rb") as file:
            file.seek(index.offsets[row])
            assert file.read(index.lengths[row]) == sample[suffix]
        about = json.loads(sample["json"])
        assert index.targets is not None
        assert index.targets[row].tolist() == [about["Edema"], about["Mass"]]
        assert index.patients[row] == about["who"]
        assert (index.widths[row], index.heights[row]) == (90 + row, 70)
    assert index.channels.tolist() == [3 if row == 4 else 1 for row in range(12)]
    verify.main(["--shards", str(folder), "--hashes"])
    assert splits_in(folder) == ["train"]


@pytest.mark.parametrize("fit", ["squash", "pad"])
def test_batches_hold_what_preprocessing_would_have_stored_before_jpeg(tars: Path, fit: str) -> None:
    run(tars, "--size", "384", "--fit", fit)
    index = open_index(tars, "train")
    with Loader(index, num_threads=2) as loader:
        batch = next(loader.batches([np.arange(12)]))
    assert batch.images.shape == (12, 3, 384, 384)
    for row in range(12):
        with index.tar(int(index.shard_ids[row])).open("rb") as file:
            file.seek(index.offsets[row])
            stored = resized_to_store(file.read(index.lengths[row]), Pixels("exact", 384, fit))  # type: ignore[arg-type]
        assert np.array_equal(batch.images[row].permute(1, 2, 0).numpy(), np.asarray(stored.convert("RGB")))


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_jpeg_of_the_sets_size_has_the_pixels_of_the_long_way(tmp_path: Path, mode: str) -> None:
    jpegs = [picture(number, size=(400, 400), mode=mode) for number in range(2)]
    grey = Image.open(io.BytesIO(picture(9, size=(400, 400)))).convert("RGB")  # three channels, all equal
    buffer = io.BytesIO()
    grey.save(buffer, "JPEG")
    jpegs.append(buffer.getvalue())
    write_tar(tmp_path / "tars" / "a.tar", [(f"{place}.jpg", jpeg) for place, jpeg in enumerate(jpegs)])
    run(tmp_path / "tars", "--size", "400", "--split", "new")
    index = open_index(tmp_path / "tars", "new")
    assert index.targets is None
    assert index.channels.tolist() == ([1, 1, 1] if mode == "L" else [3, 3, 1])
    with Loader(index, num_threads=0) as loader:
        images = next(loader.batches([np.arange(3)])).images
    for place, jpeg in enumerate(jpegs):
        long = np.asarray(resized_to_store(jpeg, Pixels("exact", 400)).convert(mode))
        assert np.array_equal(images[place].permute(1, 2, 0).numpy().squeeze(), long)


def test_labels_come_from_a_csv_whose_names_come_back_exactly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["a b.jpg", "Röntgen ß.png", "NA.jpg", "007.jpg", "sub/a b.jpg", "x.jpg"]
    write_tar(tmp_path / "tars" / "a.tar", [(f"./{name}", picture(place)) for place, name in enumerate(names)])
    table = tmp_path / "labels.csv"
    rows = ["sub/a b.jpg", "NA", "Röntgen ß.png", "root/a b.jpg", "007", "gone.jpg"]
    table.write_text("file,Edema,Mass\n" + "".join(f"{name},{place % 2},\n" for place, name in enumerate(rows)))
    run(tmp_path / "tars", "--csv", table, "--blank", "masked", "--out", tmp_path / "out", "--name", "own")
    index = open_index(tmp_path / "out", "train")
    assert index.image_names.to_list() == ["root/a b.jpg", "Röntgen ß.png", "NA", "007", "sub/a b.jpg"]
    assert index.targets is not None
    assert index.targets.label(0).tolist() == [1, 0, 1, 0, 0]
    assert np.isnan(index.targets.label(1)).all()
    assert index.left_out == {"gone.jpg": "not in the image folder"}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["train.index.arrow", "train.json"]
    assert [path.name for path in (tmp_path / "tars").iterdir()] == ["a.tar"]
    printed = capsys.readouterr().out
    assert "images there without a row, not used: 1 (first: x.jpg)" in printed
    assert "left out: gone.jpg: not in the image folder\n  5 masked cells\n" in printed
    verify.main(["--shards", str(tmp_path / "out"), "--hashes"])


def test_a_split_column_makes_an_index_a_split_over_the_same_tars(tars: Path, tmp_path: Path) -> None:
    table = tmp_path / "labels.csv"
    lines = [f"{n:09d},{n % 2},0,{'valid' if n % 4 == 3 else 'train'}" for n in range(12)]
    table.write_text("key,Edema,Mass,part\n" + "\n".join(lines))
    run(tars, "--csv", table, "--split-column", "part")
    assert splits_in(tars) == ["train", "valid"]
    assert [len(open_index(tars, split)) for split in ("train", "valid")] == [9, 3]
    assert open_index(tars, "valid").image_names.to_list() == ["000000003", "000000007", "000000011"]
    verify.main(["--shards", str(tars), "--hashes"])


def test_labels_come_from_cls_members_by_place_name_or_value(tmp_path: Path) -> None:
    members: Members = []
    for number, said in enumerate(["0", "1", "Mass", "Edema\n"]):
        members += [(f"{number}.jpg", picture(number)), (f"{number}.cls", said.encode())]
    write_tar(tmp_path / "tars" / "a.tar", members)
    run(tmp_path / "tars", "--out", tmp_path / "two")
    targets = open_index(tmp_path / "two", "train").targets
    assert targets is not None
    assert targets[:].tolist() == [[1, 0], [0, 1], [0, 1], [1, 0]]
    with pytest.raises(UserError, match=r"sample '2' says 'Mass'.*number from 0 to 2"):
        run(tmp_path / "tars", "--out", tmp_path / "three", labels="A,B,C")
    write_tar(tmp_path / "tars" / "a.tar", members[:4])
    run(tmp_path / "tars", "--out", tmp_path / "one", labels="TB")
    targets = open_index(tmp_path / "one", "train").targets
    assert targets is not None
    assert targets[:].tolist() == [[0], [1]]


def test_what_cannot_be_used_is_counted_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = json.dumps({"labels": {"Edema": 1, "Mass": None}}).encode()
    members = [
        ("README", b"x"),
        ("0.jpg", picture(0)),
        ("0.json", good),
        ("1.json", good),
        ("2.jpg", picture(2)),
        ("3.jpg", picture(3)[:200]),
        ("3.json", good),
        ("4.jpg", picture(4)),
        ("4.json", b"[" * 100_000),
        ("5.jpg", picture(5)),
        ("5.json", b'{"Edema": 1, "pad": "' + b"x" * (1 << 20) + b'"}'),
        ("6.jpg", picture(6)),
        ("6.json", b'{"caption": "x"}'),
        ("7.jpg", b"gone"),
        ("7.json", good),
    ]
    write_tar(tmp_path / "tars" / "a.tar", members)
    run(tmp_path / "tars", "--blank", "masked")
    index = open_index(tmp_path / "tars", "train")
    assert index.image_names.to_list() == ["0.jpg"]
    assert index.meta.counts.rows == 7
    told = {name: reason.split(":")[0] for name, reason in index.left_out.items()}
    assert told["2.jpg"] == told["6.jpg"] == "no label"
    assert told["4.jpg"] == told["5.jpg"] == "its json cannot be read"
    assert told["7.jpg"] == "cannot identify image file"
    assert told.keys() == {"2.jpg", "3.jpg", "4.jpg", "5.jpg", "6.jpg", "7.jpg"}
    printed = capsys.readouterr().out
    assert "samples without a .jpg, .jpeg or .png member, not used: 1 (first: '1')" in printed
    assert "members without a key, which webdataset does not read: 1 (first: 'README')" in printed
    assert "7 rows = 1 images indexed + 6 left out" in printed


LOST: dict[str, tuple[list[str], str]] = {
    "cut at the first dot": (["1.2.840.113.jpg", "1.2.840.114.jpg"], "cuts the key of '1.2.840.113.jpg' at its first"),
    "two images": (["1.jpg", "1.png"], "sample '1' has several images, '1.jpg' and '1.png'"),
    "letters of another case": (["1.jpg", "1.JPG"], "member '1.JPG' is there twice"),
    "repeated": (["1.jpg", "1.jpg"], "member '1.jpg' is there twice"),
    "interleaved": (["1.jpg", "2.jpg", "1.json", "2.json"], "sample '1' are not next to each other"),
    "hidden": ([".hidden.jpg"], "member '.hidden.jpg' has no key"),
    "outside": (["../1.jpg"], r"name of member '\.\./1.jpg' must be a relative path"),
    "absolute": (["/1.jpg"], "must be a relative path"),
}


@pytest.mark.parametrize("fault", LOST)
def test_what_webdataset_would_lose_or_merge_is_an_error_that_names_it(tmp_path: Path, fault: str) -> None:
    names, told = LOST[fault]
    write_tar(tmp_path / "tars" / "a.tar", [(name, picture(place)) for place, name in enumerate(names)])
    with pytest.raises(UserError, match=rf"a\.tar: .*{told}.*rename its members") as caught:
        run(tmp_path / "tars", "--split", "new")
    assert "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "tars").iterdir()] == ["a.tar"]


def test_a_key_in_two_tars_is_named(tars: Path) -> None:
    shutil.copy(tars / "00000.tar", tars / "copy.tar")
    with pytest.raises(UserError, match=r"sample '000000000' is in 00000.tar and copy.tar"):
        run(tars)


def header(path: Path, number: int = 6) -> int:
    with tarfile.open(path) as tar:
        return tar.getmembers()[number].offset


def damage_a_header(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[header(path) + 100 : header(path) + 200] = b"x" * 100
    path.write_bytes(content)


def compress(path: Path) -> None:
    import gzip

    path.write_bytes(gzip.compress(path.read_bytes()))


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut in a member": (lambda path: os.truncate(path, path.stat().st_size // 2 + 99), "damaged or cut"),
    "cut at a header": (lambda path: os.truncate(path, header(path)), "without a tar's end mark"),
    "cut in a header": (lambda path: os.truncate(path, header(path) + 99), "is no tar header|end mark"),
    "a damaged header": (damage_a_header, "is no tar header"),
    "empty": (lambda path: os.truncate(path, 0), "empty file"),
    "compressed": (compress, "unpack it to a plain .tar"),
}


@pytest.mark.parametrize("fault", DAMAGES)
def test_a_cut_or_damaged_tar_is_named_when_it_is_adopted_and_afterwards(tars: Path, fault: str) -> None:
    damage, told = DAMAGES[fault]
    run(tars)
    damage(tars / "00001.tar")
    with pytest.raises(UserError, match=r"00001\.tar"):
        verify_split(tars, "train")
    (tars / "train.json").unlink()
    (tars / "train.index.arrow").unlink()
    with pytest.raises(UserError, match=rf"00001\.tar: .*({told})"):
        run(tars)
    assert not (tars / "train.json").exists()


def test_a_missing_or_extra_tar_is_named(tars: Path) -> None:
    run(tars)
    shutil.copy(tars / "00000.tar", tars / "00009.tar")
    with pytest.raises(UserError, match=r"00009\.tar is not of this set of 3 shards"):
        open_index(tars, "train")
    (tars / "00009.tar").unlink()
    (tars / "00002.tar").unlink()
    with pytest.raises(UserError, match=r"00002\.tar: No such file.*4 images"):
        open_index(tars, "train")


def test_a_flipped_byte_is_found_with_its_key_by_verify_and_by_a_read(tars: Path) -> None:
    run(tars)
    index = open_index(tars, "train")
    row = 5
    with index.tar(int(index.shard_ids[row])).open("r+b") as file:
        file.seek(index.offsets[row] + index.lengths[row] // 2)
        file.write(bytes(64))
    verify_split(tars, "train")
    named = r"00001\.tar.*00000005 \(000000005\.png\).*adopt the set again"
    with pytest.raises(UserError, match=named):
        verify_split(tars, "train", hashes=True)
    with Loader(index, num_threads=0) as loader, pytest.raises(UserError, match=named):
        next(loader.batches([np.arange(12)]))


@pytest.mark.parametrize("fault", ["missing", "interleaved", "swapped", "renamed"])
def test_members_that_are_not_those_adopted_are_named(tars: Path, fault: str) -> None:
    run(tars)
    path = tars / "00001.tar"
    with tarfile.open(path) as tar:
        found = [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    changed = {
        "missing": found[:3] + found[4:],
        "interleaved": [found[0], found[3], *found[1:3], *found[4:]],
        "swapped": [*found[3:6], *found[:3], *found[6:]],
        "renamed": [("x.jpeg", found[0][1]), *found[1:]],
    }[fault]
    write_tar(path, changed)
    meta = json.loads((tars / "train.json").read_text())
    meta["shards"][1]["bytes"] = path.stat().st_size
    (tars / "train.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match=r"00001\.tar"):
        verify_split(tars, "train")


def test_links_devices_and_large_records_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "tars"
    folder.mkdir()
    for kind, told in ((tarfile.SYMTYPE, "is a link"), (tarfile.LNKTYPE, "is a link"), (tarfile.FIFOTYPE, "a device")):
        with tarfile.open(folder / "a.tar", "w") as tar:
            member = tarfile.TarInfo("1.jpg")
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
        with pytest.raises(UserError, match=rf"member '1.jpg' at byte 0 {told}|{told}"):
            run(folder, "--split", "new")
    with tarfile.open(folder / "a.tar", "w") as tar:
        member = tarfile.TarInfo("1.jpg")
        member.pax_headers = {"size": "-1536"}
        tar.addfile(member)
    with pytest.raises(UserError, match=r"member '1.jpg' at byte 0 has the size -1,536"):
        run(folder, "--split", "new")
    write_tar(folder / "a.tar", [("n" * 100_000 + ".jpg", b"")])
    with pytest.raises(UserError, match="a header record of"):
        run(folder, "--split", "new")
    real = write_tar(tmp_path / "elsewhere" / "a.tar", [("1.jpg", picture(1))])
    (folder / "a.tar").unlink()
    (folder / "a.tar").symlink_to(real)
    with pytest.raises(UserError, match="is a link or no regular file"):
        run(folder, "--split", "new")


@pytest.mark.parametrize(
    "address", ["pipe:touch hit", "pipe:touch hit; cat a.tar", "https://host/a.tar", "s3://b/a.tar"]
)
def test_only_local_paths_are_taken_and_no_command_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="local paths only"):
        run(address)
    folder = tmp_path / "tars"
    write_tar(folder / "pipe:touch hit.tar", [("1.jpg", picture(1)), ("1.pyd", b"cos\nsystem\n(S'touch hit'\ntR.")])
    run(folder, "--split", "new")
    assert len(open_index(folder, "new")) == 1
    assert not (tmp_path / "hit").exists()


def test_an_interrupted_adoption_reads_the_remaining_tars_only(
    tars: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    undisturbed = open_clip_set(tars.parent / "other")
    run(undisturbed)
    read, numbers = adopt._read_tar, list[int]()

    def stopped(adoption: Any, number: int, *more: Any) -> Any:
        if number == 2 and not numbers.count(2):
            numbers.append(2)
            raise KeyboardInterrupt
        numbers.append(number)
        return read(adoption, number, *more)

    monkeypatch.setattr(adopt, "_read_tar", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(tars)
    assert not (tars / "train.json").exists()
    run(tars)
    assert numbers == [0, 1, 2, 2]
    assert "reused: 2 tars that were read; to do: 1 tars, 4 images" in capsys.readouterr().out
    for name in ("train.index.arrow", "train.json"):
        assert (tars / name).read_bytes() == (undisturbed / name).read_bytes()
    run(tars)
    assert len(numbers) == 4
    assert "reused: 3 tars, of which the index is there" in capsys.readouterr().out
    with pytest.raises(UserError, match="--overwrite"):
        run(tars, "--size", "400")
    run(tars, "--size", "400", "--overwrite")
    assert open_index(tars, "train").size_px == 400


def test_nothing_that_others_wrote_is_replaced(tmp_path: Path, make_division: Any) -> None:
    folder = tmp_path / "tars"
    tar = write_tar(folder / "train-000000.tar", [("1.jpg", picture(1)), ("1.cls", b"1")])
    content = tar.read_bytes()
    for name, told in (("train.json", "not of an adopted set"), ("train.index.arrow", "no JSON says")):
        (folder / name).write_text("{}")
        with pytest.raises(UserError, match=told):
            run(folder, "--overwrite")
        assert (folder / name).read_text() == "{}"
        (folder / name).unlink()
        (folder / name).symlink_to(tmp_path / "target")
        with pytest.raises(UserError, match="nothing is written through links"):
            run(folder)
        (folder / name).unlink()
    run(folder)
    images, table = make_division(["a.jpg"])
    flags = ["--images", str(images), "--csv", str(table), "--out", str(folder), "--workers", "1", "--overwrite"]
    with pytest.raises(UserError, match=r"train-000000\.tar: is named as a file of split 'train', but no record"):
        preprocess.main(["--task", "b", *flags])
    assert tar.read_bytes() == content
    assert not (tmp_path / "target").exists()


def test_our_own_shards_can_be_adopted_too(uneven_shards: Path, tmp_path: Path) -> None:
    own = open_index(uneven_shards, "train")
    flags = ["--task", "b", "--patient-column", "patient", "--study-column", "study", "--workers", "2"]
    preprocess.main(["--adopt", str(uneven_shards / "*.tar"), *flags, "--out", str(tmp_path / "again")])
    index = open_index(tmp_path / "again", "train")
    assert isinstance(index.meta, AdoptedMeta)
    assert index.patients.to_list() == own.patients.to_list()
    assert np.array_equal(index.digests, own.digests)
    assert np.array_equal(index.offsets, own.offsets)
    assert np.array_equal(index.targets, own.targets)
    with Loader(own, num_threads=0) as ours, Loader(index, num_threads=0) as theirs:
        pair = [next(loader.batches([np.arange(48)])).images for loader in (ours, theirs)]
    assert pair[0].equal(pair[1])


def test_the_page_of_an_adopted_set_can_be_written(tars: Path, tmp_path: Path) -> None:
    run(tars, "--patient-column", "who")
    verify.main(["--shards", str(tars), "--report", str(tmp_path / "look.html")])
    assert "as adopted" in (tmp_path / "look.html").read_text()


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("name", "../00001.tar", "is not a shard's file name"),
        ("name", "00001.tar.gz", "is not a shard's file name"),
        ("tars", "a\0b", "holds a control character"),
        ("tars", "/nowhere", r"/nowhere/00000\.tar: No such file"),
        ("size_px", 10**6, "images of 1000000 px are not stored"),
        ("format_version", 2, "the file is damaged"),
    ],
)
def test_a_changed_json_of_an_adopted_set_is_one_named_error(tars: Path, field: str, value: Any, told: str) -> None:
    run(tars)
    meta = json.loads((tars / "train.json").read_text())
    (meta["shards"][1] if field == "name" else meta)[field] = value
    (tars / "train.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match=told) as caught:
        open_index(tars, "train")
    assert "\n" not in str(caught.value)


def test_an_adopted_set_is_fetched_where_its_tars_are_beside_its_index(tars: Path, tmp_path: Path) -> None:
    run(tars)
    copy_shards(LocalFileSystem(), str(tars), tmp_path / "copy", "train")
    verify.main(["--shards", str(tmp_path / "copy"), "--hashes"])
    run(tars, "--out", tmp_path / "elsewhere")
    with pytest.raises(UserError, match="its tars lie in another folder"):
        copy_shards(LocalFileSystem(), str(tmp_path / "elsewhere"), tmp_path / "none", "train")


def test_a_message_points_at_the_cheaper_way_to_read_large_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for size, told in (((500, 500), "with --size 500 none is resized"), ((1000, 700), "made smaller at each read")):
        write_tar(tmp_path / f"{size[0]}" / "a.tar", [("1.jpg", picture(1, size=size))])
        run(tmp_path / f"{size[0]}", "--split", "new")
        assert told in capsys.readouterr().out
