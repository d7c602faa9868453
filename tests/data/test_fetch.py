import json
import threading
from pathlib import Path

import fsspec
import pytest

from cxrdist.data import fetch
from cxrdist.data.fetch import copy_shards, fetch_shards
from cxrdist.errors import UserError
from cxrdist.shards.index import open_index
from cxrdist.task import TASKS

pytestmark = pytest.mark.fast


@pytest.fixture
def bucket(uneven_shards):
    """A memory file system with a shard set, and its folder there."""
    source = fsspec.filesystem("memory")
    source.store.clear()
    for path in uneven_shards.iterdir():
        if path.is_file():
            source.pipe_file(f"/bucket/{path.name}", path.read_bytes())
    return source


def copied(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name[0] != "."}


def test_a_copy_equals_the_source_and_opens(bucket, uneven_shards, tmp_path):
    copy_shards(bucket, "/bucket", tmp_path / "new", "train", TASKS["b"])
    files = copied(tmp_path / "new")
    assert set(files) == {"train.json", "train.index.arrow", *(f"train-00000{n}.tar" for n in range(3))}
    assert all((uneven_shards / name).read_bytes() == content for name, content in files.items())
    new, old = (open_index(folder, "train", TASKS["b"]) for folder in (tmp_path / "new", uneven_shards))
    assert new.fingerprint == old.fingerprint


def test_a_second_call_and_a_call_after_an_interruption_fetch_only_what_is_missing(bucket, tmp_path):
    copy_shards(bucket, "/bucket", tmp_path, "train", TASKS["b"])
    before = copied(tmp_path)
    for name in ("train.json", "train-000001.tar"):
        (tmp_path / name).unlink()
    for name in ("train-000000.tar", "train-000002.tar", "train.index.arrow"):
        bucket.rm_file(f"/bucket/{name}")
    copy_shards(bucket, "/bucket", tmp_path, "train", TASKS["b"])
    assert copied(tmp_path) == before


def test_processes_that_call_together_do_not_disturb_each_other(bucket, tmp_path):
    errors = []

    def call() -> None:
        try:
            copy_shards(bucket, "/bucket", tmp_path, "train", TASKS["b"])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    open_index(tmp_path, "train", TASKS["b"])


@pytest.mark.parametrize("damage", [lambda tar: tar[:-1], lambda tar: tar + b"x", lambda tar: b"x" + tar[1:]])
def test_a_file_that_is_not_what_its_hash_says_is_named_and_leaves_no_split(bucket, tmp_path, monkeypatch, damage):
    monkeypatch.setattr(fetch, "PAUSE_S", 0.0)
    bucket.pipe_file("/bucket/train-000001.tar", damage(bucket.cat_file("/bucket/train-000001.tar")))
    with pytest.raises(UserError, match=r"/bucket/train-000001\.tar: .*(SHA-256 differs|ended after [0-9,]+ of )"):
        copy_shards(bucket, "/bucket", tmp_path, "train", TASKS["b"])
    assert not (tmp_path / "train.json").exists()
    assert not (tmp_path / "train-000001.tar").exists()


def test_a_missing_file_is_named(bucket, tmp_path):
    bucket.rm_file("/bucket/train-000002.tar")
    with pytest.raises(UserError, match=r"/bucket/train-000002\.tar: cannot be fetched"):
        copy_shards(bucket, "/bucket", tmp_path, "train", TASKS["b"])


def test_the_folder_of_another_shard_set_is_left_alone(bucket, tmp_path):
    copy_shards(bucket, "/bucket", tmp_path, "train", TASKS["b"])
    (tmp_path / "train.json").write_text("{}")
    before = copied(tmp_path)
    with pytest.raises(UserError, match="another shard set"):
        copy_shards(bucket, "/bucket", tmp_path, "train", TASKS["b"])
    assert copied(tmp_path) == before


def test_another_task_is_refused_before_anything_is_fetched(bucket, tmp_path):
    with pytest.raises(UserError, match=r"another task \(task a and b\)"):
        copy_shards(bucket, "/bucket", tmp_path, "train", TASKS["a"])
    assert not list(tmp_path.glob("*.tar"))


def test_a_name_that_leaves_the_folder_is_refused(bucket, tmp_path):
    meta = json.loads(bucket.cat_file("/bucket/train.json"))
    for entry in (meta["shards"][0], meta["index"]):
        name = entry["name"]
        entry["name"] = "../outside.tar"
        bucket.pipe_file("/bucket/train.json", json.dumps(meta).encode())
        with pytest.raises(UserError, match=r"\.\./outside\.tar"):
            copy_shards(bucket, "/bucket", tmp_path / "in", "train", TASKS["b"])
        assert not (tmp_path / "outside.tar").exists()
        entry["name"] = name


@pytest.mark.parametrize(
    "url",
    [
        "pipe:touch touched",
        "ftp://bucket/div_b",
        "http://host/div_b",
        "simplecache::https://host/div_b",
        "https://x::file:///etc",
        "/some/folder",
        "https://user:secret@host/div_b",
    ],
)
def test_other_addresses_are_refused_and_secrets_not_repeated(url, tmp_path):
    with pytest.raises(UserError) as caught:
        fetch_shards(url, tmp_path / "new", "train", TASKS["b"])
    assert "secret" not in str(caught.value)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("url", "package"), [("s3://bucket/x", "s3"), ("gs://bucket/x", "gs")])
def test_a_package_that_is_missing_is_named_with_the_command(url, package, tmp_path, monkeypatch):
    def missing(*_: object) -> None:
        raise ImportError(f"Install {package}")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(UserError, match=rf"{url}: .*pip install 'cxrdist\[{package}\]'"):
        fetch_shards(url, tmp_path, "train")


def test_a_set_of_version_1_is_copied_as_it_is(tmp_path):
    version_1 = Path(__file__).parents[1] / "golden" / "version1" / "shards"
    source = fsspec.filesystem("file")
    copy_shards(source, str(version_1), tmp_path, "test", None)
    assert all((version_1 / name).read_bytes() == content for name, content in copied(tmp_path).items())
    assert len(open_index(tmp_path, "test")) == 5
