"""FAULTS row 53: a remote that fails is tried again where that can help, then named in one line; every read ends."""

import contextlib
import http.server
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from cxrdist import shard_sets, train
from cxrdist.data import fetch
from cxrdist.data.fetch import Web, copy_shards, fetch_shards
from cxrdist.errors import UserError, redacted
from cxrdist.shards.convert import Pixels
from cxrdist.shards.index import open_index
from cxrdist.shards.writer import Source, SplitJob, write_split
from cxrdist.task import TASKS, Task

pytestmark = [pytest.mark.fault, pytest.mark.timeout(60)]
TAR = "train-000001.tar"
DRIPS_S = 0.05


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.folder`; `server.faults` says by file name what happens instead, and how often."""

    protocol_version = "HTTP/1.0"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        name = self.path.rsplit("/", 1)[-1]
        self.server.asked.append(name)  # type: ignore[attr-defined]
        fault, left = self.server.faults.get(name, ("", 0))  # type: ignore[attr-defined]
        if left:
            self.server.faults[name] = (fault, left - 1)  # type: ignore[attr-defined]
        file = self.server.folder / name  # type: ignore[attr-defined]
        content = file.read_bytes() if file.is_file() else None
        with contextlib.suppress(OSError):
            self.answer(fault if left else "", content)

    def answer(self, fault: str, content: bytes | None) -> None:
        if content is None:
            self.send_error(404)
            return
        if fault.isdigit():
            self.send_error(int(fault))
            return
        if fault == "loop":
            self.send_response(302)
            self.send_header("Location", self.path)
            self.end_headers()
            return
        if fault == "closed":
            self.connection.close()
            return
        if fault == "header drips":
            for _ in range(200):
                self.wfile.write(b"H")
                time.sleep(DRIPS_S)
            return
        if fault == "not http":
            self.wfile.write(b"\x00\xff" * 1000)
            return
        body = {"short": content[:-9], "long": content + b"x", "other": bytes(len(content)), "empty": b""}
        if fault == "silent":
            time.sleep(200 * DRIPS_S)
        self.send_response(200)
        if fault != "no length":
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if fault == "drips":
            for byte in content[:200]:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                time.sleep(DRIPS_S)
            return
        self.wfile.write(body.get(fault, content))


@pytest.fixture
def server(uneven_shards, monkeypatch):
    """A web server with a training split, and short times."""
    monkeypatch.setattr(fetch, "READ_S", 0.7)
    monkeypatch.setattr(fetch, "PAUSE_S", 0.0)
    monkeypatch.setattr(fetch, "TRIES", 3)
    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.daemon_threads = True
    made.folder, made.faults, made.asked = uneven_shards, {}, []
    made.url = f"http://127.0.0.1:{made.server_port}/div_b"
    threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name[0] != "."}


@pytest.mark.parametrize(
    ("fault", "says", "tries"),
    [
        ("401", "HTTP 401", 1),
        ("403", "HTTP 403", 1),
        ("404", "HTTP 404", 1),
        ("410", "HTTP 410", 1),
        ("loop", "HTTP 302", 1),
        ("429", "HTTP 429", 3),
        ("500", "HTTP 500", 3),
        ("503", "HTTP 503", 3),
        ("short", "ended after", 3),
        ("empty", "ended after", 3),
        ("closed", "cannot be fetched", 3),
        ("not http", "cannot be fetched", 3),
        ("silent", "TimeoutError|timed out", 3),
        ("drips", "TimeoutError", 3),
        ("header drips", "TimeoutError", 3),
        ("other", "SHA-256 differs", 1),
    ],
)
@pytest.mark.parametrize("name", [TAR, "train.json"])
def test_a_server_that_fails_is_named_in_time_and_leaves_no_split(server, tmp_path, name, fault, says, tries):
    if name == "train.json" and fault in ("short", "empty", "other"):
        says, tries = r"train\.json", 1  # nothing says how long it is: it is read as what it is
    server.faults[name] = (fault, 99)
    start = time.monotonic()
    with pytest.raises(UserError, match=says) as caught:
        copy_shards(Web(), server.url, tmp_path, "train", TASKS["b"])
    assert time.monotonic() - start < 20
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)
    if fault != "loop":  # which asks again by itself
        assert server.asked.count(name) == tries
    assert not names_in(tmp_path) & {"train.json", name}


@pytest.mark.parametrize("fault", ["500", "429", "short", "closed", "drips"])
def test_what_passes_is_fetched_all_the_same(server, tmp_path, fault):
    server.faults[TAR] = server.faults["train.json"] = (fault, 1)
    if fault == "short":  # of a JSON it cannot be known
        del server.faults["train.json"]
    copy_shards(Web(), server.url, tmp_path, "train", TASKS["b"])
    assert len(open_index(tmp_path, "train", TASKS["b"])) == 48


@pytest.mark.parametrize("fault", ["no length", "long"])
def test_a_wrong_or_missing_length_is_judged_by_the_hash(server, tmp_path, fault):
    server.faults[TAR] = (fault, 99)
    copy_shards(Web(), server.url, tmp_path, "train", TASKS["b"])
    assert (tmp_path / TAR).read_bytes() == (server.folder / TAR).read_bytes()


def test_an_endless_json_is_refused_by_size(server, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch.documents, "MAX_BYTES", 100)
    with pytest.raises(UserError, match=r"train\.json: more than 100 bytes"):
        copy_shards(Web(), server.url, tmp_path, "train", TASKS["b"])


@pytest.mark.parametrize("fault", ["", "403"])
def test_a_split_that_is_not_there_is_left_out_only_where_it_is_optional(server, tmp_path, capsys, fault):
    if fault:
        server.folder = tmp_path / "elsewhere"
        server.folder.mkdir()
        (server.folder / "valid.json").write_text("{}")
        server.faults["valid.json"] = (fault, 99)
    copy_shards(Web(), server.url, tmp_path / "new", "valid", TASKS["b"], optional=True)
    assert "valid.json: not there" in capsys.readouterr().out
    assert names_in(tmp_path / "new") == set()
    with pytest.raises(UserError, match=r"valid\.json: cannot be fetched"):
        copy_shards(Web(), server.url, tmp_path / "new", "valid", TASKS["b"])
    server.faults["valid.json"] = ("500", 99)
    server.folder = server.folder if fault else tmp_path
    (server.folder / "valid.json").write_text("{}")
    with pytest.raises(UserError, match="HTTP 500"):
        copy_shards(Web(), server.url, tmp_path / "new", "valid", TASKS["b"], optional=True)


@pytest.mark.parametrize(("own", "more"), [(True, ()), (True, ("--validate-fold", "0")), (False, ())])
def test_training_fetches_the_split_it_will_validate_on(server, tmp_path, monkeypatch, own, more):
    if own:
        server.folder, task = tmp_path / "set", Task(name="own", labels=("mass",))
        for split in ("train", "valid"):
            Image.new("L", (30, 30), 99).save(path := tmp_path / f"{split}.png")
            source = Source(0, path.name, str(path), path.stat().st_size, "", "1", "1", targets=(1.0,))
            write_split(SplitJob(server.folder, task, split, [source], Pixels(), 24, {}))
    monkeypatch.setattr(
        shard_sets, "fetch_shards", lambda url, *args, **options: copy_shards(Web(), server.url, *args, **options)
    )
    with pytest.raises(UserError, match="nope"):  # named after what is fetched
        train.main(["--shards-url", "https://host/x", "--shards", str(tmp_path / "new"), "--model", "nope", *more])
    assert (tmp_path / "new" / "train.json").is_file()
    assert (tmp_path / "new" / "valid.json").is_file() == (own and not more)
    assert ("valid.json" in server.asked) == (own and not more)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:secret@host/div_b: HTTP 403", "https://***@host/div_b: HTTP 403"),
        ("at s3://key:sec/ret@bucket/x", "at s3://***@bucket/x"),
        ("'https://host/x?token=secret' failed", "'https://host/x?***' failed"),
        ("https://secret@host:8080/x", "https://***@host:8080/x"),
        ("https://host:8080/x: no answer", "https://host:8080/x: no answer"),
        ("runs/eva_x_b@5,6 and C://x", "runs/eva_x_b@5,6 and C://x"),
    ],
)
def test_secrets_in_addresses_are_never_shown(text, shown):
    assert redacted(text) == str(UserError(text)) == shown


@pytest.mark.parametrize("url", ["https://user:secret@host/x", "gs://user:secret@host/x", "http://h/x?sig=secret"])
def test_an_address_with_a_secret_is_refused_without_it(tmp_path, url):
    with pytest.raises(UserError) as caught:
        fetch_shards(url, tmp_path / "new", "train", TASKS["b"])
    assert "secret" not in str(caught.value)
