"""Source images in an object store, by a real S3 API on loopback: the same bytes as from a folder, or a named end."""

import hashlib
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cxrdist import preprocess
from cxrdist.errors import UserError
from cxrdist.shards import convert, store
from cxrdist.shards.convert import Converted
from cxrdist.shards.index import open_index

pytest.importorskip("s3fs", reason="needs s3fs")
moto_server = pytest.importorskip("moto.server", reason="needs moto[server]")

SECRET = "wJalrXUtnFEMI"
NAMES = ["p1/a b.jpg", "p1/Röntgen ß.png", "x#1?.jpg", "50%.JPG", "empty.jpg", "damaged.jpg", "c.jpg"]
NAMES += [f"more/{number}.jpg" for number in range(6)]


class Store:
    """A bucket on a server that can be stopped."""

    def __init__(self, server: Any, client: Any) -> None:
        self.server, self.client, self.url = server, client, "s3://chest-xrays/set 1/images"

    def put(self, name: str, content: bytes) -> None:
        self.client.put_object(Bucket="chest-xrays", Key=f"set 1/images/{name}", Body=content)

    def delete(self, name: str) -> None:
        self.client.delete_object(Bucket="chest-xrays", Key=f"set 1/images/{name}")


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    import boto3

    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    urllib.request.urlopen(f"{endpoint}/moto-api/reset", data=b"").close()  # its buckets are the process's
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "AKIAEXAMPLE",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "eu-west-1",
        "AWS_MAX_ATTEMPTS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(store, "PAUSES_S", (0.01, 0.01))
    store._system.cache_clear()
    client = boto3.client("s3")
    client.create_bucket(Bucket="chest-xrays", CreateBucketConfiguration={"LocationConstraint": "eu-west-1"})
    try:
        yield Store(server, client)
    finally:
        server.stop()
        store._system.cache_clear()
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def division(make_division: Any, s3: Store) -> tuple[Path, Path]:
    """The same images in a folder and in the bucket; and their table."""
    images, table = make_division(NAMES)
    (images / "empty.jpg").write_bytes(b"")
    (images / "damaged.jpg").write_bytes(b"no image")
    for name in NAMES:
        s3.put(name, (images / name).read_bytes())
    s3.put("notes.txt", b"text")
    s3.put("p1/", b"")  # what tools leave for a folder
    s3.client.put_object(Bucket="chest-xrays", Key="set 1/images-2/other.jpg", Body=b"of another folder")
    return images, table


def run(images: object, table: Path | None, out: Path, *more: str) -> None:
    tables = [] if table is None else ["--csv", str(table)]
    flags = ("--rows-per-shard", "3", "--workers", "1")
    words = ["--task", "b", "--images", str(images), *tables, "--out", str(out), *flags, *more]
    if more:  # workers find the store by the environment in which their server was started
        subprocess.run([sys.executable, "-m", "cxrdist.preprocess", *words], check=True)
    else:
        preprocess.main(words)


def bytes_of(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_images_in_a_bucket_give_the_bytes_that_those_in_a_folder_give(
    division: tuple[Path, Path], s3: Store, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    images, table = division
    run(images, table, tmp_path / "folder")
    capfd.readouterr()
    run(s3.url, table, tmp_path / "alone")
    run(s3.url + "/", table, tmp_path / "workers", "--workers", "2")
    printed = capfd.readouterr()
    assert bytes_of(tmp_path / "folder") == bytes_of(tmp_path / "alone") == bytes_of(tmp_path / "workers")
    assert open_index(tmp_path / "alone", "train").left_out == {
        "empty.jpg": "cannot identify image file",
        "damaged.jpg": "cannot identify image file",
    }
    assert "files that are no images, not used: .txt (1); first: notes.txt" in printed.out
    assert SECRET not in printed.out + printed.err


def test_an_image_that_vanished_or_is_closed_is_left_out_with_its_reason(
    division: tuple[Path, Path], s3: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, table = division
    system, _ = store._open(s3.url)
    cat_file = type(system)._cat_file

    async def closed(self: Any, path: str, **range_: Any) -> bytes:
        if path.endswith("/c.jpg"):
            raise PermissionError("The operation is not valid for the object's storage class")
        return await cat_file(self, path, **range_)  # type: ignore[no-any-return]

    jobs_of = preprocess.make_jobs

    def make_jobs(*args: Any) -> Any:
        jobs = jobs_of(*args)
        s3.delete("more/3.jpg")
        return jobs

    monkeypatch.setattr(type(system), "_cat_file", closed)
    monkeypatch.setattr(preprocess, "make_jobs", make_jobs)
    run(s3.url, table, tmp_path / "out")
    left_out = open_index(tmp_path / "out", "train").left_out
    assert left_out["more/3.jpg"] == "cannot be read: No such file or directory"
    assert left_out["c.jpg"] == "cannot be read: Permission denied"
    assert len(left_out) == 4


@pytest.mark.parametrize("end", ["stopped", "bucket gone", "not listed"])
def test_a_store_that_no_longer_answers_ends_the_command_and_nothing_is_left_out(
    division: tuple[Path, Path], s3: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    images, table = division
    convert_one = convert.convert

    def refused(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError("The provided token has expired")

    def until_the_end(path: str, pixels: convert.Pixels) -> Converted | str:
        if path.endswith("more/0.jpg"):
            if end == "stopped":
                s3.server.stop()
            elif end == "bucket gone":
                for page in s3.client.get_paginator("list_objects_v2").paginate(Bucket="chest-xrays"):
                    for found in page["Contents"]:
                        s3.client.delete_object(Bucket="chest-xrays", Key=found["Key"])
                s3.client.delete_bucket(Bucket="chest-xrays")
            else:
                system, _ = store._open(s3.url)
                for name in ("_cat_file", "find"):
                    patched.setattr(system, name, refused)
        return convert_one(path, pixels)

    with monkeypatch.context() as patched:
        patched.setattr(convert, "convert", until_the_end)
        told = {"stopped": "Connect", "bucket gone": "its bucket cannot be listed any more", "not listed": "expired"}
        with pytest.raises(UserError, match=rf"s3://chest-xrays/.*{told[end]}.*run the same command again") as caught:
            run(s3.url, table, tmp_path / "out")
    assert SECRET not in str(caught.value)
    assert len([*(tmp_path / "out").glob("*.tar")]) == 2  # finished shards stay
    assert not (tmp_path / "out" / "train.json").exists()
    run(images, table, tmp_path / "out")  # where the images lie does not count: the rest from elsewhere
    run(images, table, tmp_path / "whole")
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_what_passes_is_tried_again(
    division: tuple[Path, Path], s3: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, table = division
    system, _ = store._open(s3.url)
    cat_file, tries = type(system)._cat_file, dict[str, int]()

    async def sometimes(self: Any, path: str, **range_: Any) -> bytes:
        tries[path] = tries.get(path, 0) + 1
        if tries[path] < 3:
            raise OSError("Please reduce your request rate")
        return await cat_file(self, path, **range_)  # type: ignore[no-any-return]

    monkeypatch.setattr(type(system), "_cat_file", sometimes)
    run(s3.url, table, tmp_path / "out")
    run(images, table, tmp_path / "folder")
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "folder")
    assert min(tries.values()) == 3


def test_no_more_than_the_limit_is_read_of_an_object(s3: Store) -> None:
    s3.put("a.jpg", b"0123456789")
    assert store.read(f"{s3.url}/a.jpg", 4) == b"01234"[:4]
    assert store.read(f"{s3.url}/a.jpg", 10) == store.read(f"{s3.url}/a.jpg", 11) == b"0123456789"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--images", "https://host/images"], r"a folder, s3:// or gs:// \(a web server does not list its files\)"),
        (["--images", "s3://key:secret@bucket/x"], "credentials belong into the environment"),
        (["--images", "s3://"], "BUCKET/FOLDER"),
        (["--images", "simplecache::s3://bucket/x"], "are read from a folder"),
        (["--images", "s3://no-such-bucket/x"], r"s3://no-such-bucket/x: cannot be listed \(FileNotFoundError"),
        (["--images", "s3://chest-xrays/none"], "no .png, .*file in this image folder"),
    ],
)
def test_an_address_that_cannot_be_used_is_named(s3: Store, tmp_path: Path, words: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told) as caught:
        preprocess.main(["--task", "b", *words, "--split", "test", "--out", str(tmp_path / "out")])
    assert "secret" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_table_at_an_address_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        preprocess.main(["--task", "b", "--images", "s3://bucket/x", "--csv", "s3://bucket/t.csv"])
    assert "s3://bucket/t.csv: tables are read from a disk; copy it here first" in capsys.readouterr().err


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import fsspec

    def absent(*args: Any, **kwargs: Any) -> Any:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "filesystem", absent)
    store._system.cache_clear()
    with pytest.raises(UserError, match=r"s3:// needs: pip install 'cxrdist\[s3\]'"):
        preprocess.main(["--task", "b", "--images", "s3://bucket/x", "--split", "test", "--out", str(tmp_path / "out")])
    assert not os.listdir(tmp_path)
