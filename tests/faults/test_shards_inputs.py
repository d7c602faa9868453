"""Bad tables and hostile image folders given to `preprocess`: named before anything is written."""

import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import pytest

from cxrdist import preprocess
from cxrdist.errors import UserError
from cxrdist.shards.index import open_index
from cxrdist.task import TASKS


def run(images: Path, table: Path, out: Path) -> None:
    preprocess.main(["--div", "b", "--images", str(images), "--csv", str(table), "--out", str(out), "--workers", "1"])


def edit(table: Path, old: str, new: str) -> None:
    text = table.read_text(encoding="utf-8")
    assert old in text
    table.write_text(text.replace(old, new, 1), encoding="utf-8")


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("b.jpg,1,1,Female,60,Frontal,PA,1", "b.jpg,1,1,Female,60,Frontal,PA,2", "line 3, column 'Atelectasis': '2'"),
        ("b.jpg,1,1,Female,60,Frontal,PA,1", "b.jpg,1,1,Female,60,Frontal,PA,x", "line 3, column 'Atelectasis': 'x'"),
        ("b.jpg,1,1,Female,60,Frontal,PA,1", "b.jpg,1,1,Female,60,Frontal,PA,", "line 3, column 'Atelectasis': ''"),
        ("b.jpg,1,1,Female,60,Frontal,PA,1", "b.jpg,1,1,Female,60,Frontal,PA,-1", "--uncertain"),
        ("b.jpg,1,1,Female,60,Frontal,PA,1", "b.jpg,1,1,Female,60,Frontal,PA,NaN", "--blank"),
        ("Edema", "edema", "column 'Edema' is missing; the nearest is 'edema'"),
        ("b.jpg,1,", "a.jpg,1,", "'a.jpg' is in line 2 and again in line 3"),
        ("b.jpg,1,", "../b.jpg,1,", "line 3: image name '../b.jpg'"),
        ("b.jpg,1,", "b.jpg,P1,", "line 3: Patient_ID 'P1'"),
    ],
)
def test_a_bad_table_is_named_and_nothing_is_written(
    make_division: Any, tmp_path: Path, old: str, new: str, told: str
) -> None:
    images, table = make_division(["a.jpg", "b.jpg"])
    edit(table, old, new)
    with pytest.raises(UserError) as caught:
        run(images, table, tmp_path / "out")
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_reordered_columns_and_a_bom_change_nothing(make_division: Any, tmp_path: Path) -> None:
    images, table = make_division(["a.jpg", "b.jpg"])
    run(images, table, tmp_path / "out")
    rows = [line.split(",") for line in table.read_text(encoding="utf-8").splitlines()]
    table.write_text("\ufeff" + "\n".join(",".join(reversed(row)) for row in rows), encoding="utf-8")
    run(images, table, tmp_path / "again")
    first, second = (open_index(tmp_path / name, "train", TASKS["b"]) for name in ("out", "again"))
    assert first.fingerprint == second.fingerprint


def test_a_bomb_is_left_out_by_name_in_bounded_time_and_memory(make_division: Any, tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    images, table = make_division(["a.jpg", "bomb.png"])
    side, packer = 19_000, zlib.compressobj(9)
    rows = b"".join([packer.compress(bytes(side + 1)) for _ in range(side)] + [packer.flush()])
    header = side.to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    assert len(bomb) < 400_000
    (images / "bomb.png").write_bytes(bomb)
    # 300 MB above what the imports take: the bomb's pixels take 361 MB.
    code = (
        "import resource, sys, webdataset; from cxrdist import preprocess; "
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize(); "
        "resource.setrlimit(resource.RLIMIT_AS, (used + 300_000_000,) * 2); preprocess.main(sys.argv[1:])"
    )
    arguments = ["--div", "b", "--images", str(images), "--csv", str(table), "--out", str(tmp_path / "out")]
    subprocess.run([sys.executable, "-c", code, *arguments, "--workers", "1"], check=True, timeout=60)
    index = open_index(tmp_path / "out", "train", TASKS["b"])
    assert list(index.image_names) == ["a.jpg"]
    assert "361000000 pixels" in index.left_out["bomb.png"]
    start = time.monotonic()
    from cxrdist.shards.convert import convert

    convert(str(images / "bomb.png"))
    assert time.monotonic() - start < 1


def test_nothing_is_read_or_written_outside_the_folders(make_division: Any, tmp_path: Path) -> None:
    images, table = make_division(["a.jpg", "b.jpg", "c.jpg"])
    secret = tmp_path / "secret.jpg"
    (images / "b.jpg").rename(secret)
    (images / "b.jpg").symlink_to(secret)
    (images / "c.jpg").rename(images / "real.jpg")
    (images / "c.jpg").symlink_to("real.jpg")  # stays inside
    out, victim = tmp_path / "out", tmp_path / "victim"
    out.mkdir()
    victim.write_bytes(b"precious")
    for name in ("train-000000.tar", "train.json", "train.index.arrow"):
        (out / name).symlink_to(victim)
    with pytest.raises(UserError, match="symbolic link"):
        run(images, table, out)
    assert victim.read_bytes() == b"precious"
    run(images, table, out := tmp_path / "empty")
    assert list(open_index(out, "train", TASKS["b"]).image_names) == ["a.jpg", "c.jpg"]
    linked = tmp_path / "linked"
    linked.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (linked / ".train.work").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="symbolic link"):
        run(images, table, linked)
    assert list((tmp_path / "elsewhere").iterdir()) == []
