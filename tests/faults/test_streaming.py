"""Trainings and inferences whose shards are streamed, over HTTPS and from a real S3 API, against local ones: killed,
resumed, out of a cache three times smaller than the set, and ended with a name where what is needed cannot be had.
"""

import contextlib
import os
import re
import secrets
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import training_runs
from tests.data.streaming import Server, Watch, certificate, write_set

pytestmark = [pytest.mark.fault, pytest.mark.timeout(600)]
NUM_SHARDS, PER_SHARD = 40, 6
WINDOWS = ("--set", "shuffle_window=4", "--device-batch-size", "3", "--checkpoint-minutes", "0")
ONCE = ("--set", "epochs=1", "--set", "member_epochs=1")
FOLD = ("--set", "epochs=2", "--set", "member_epochs=2", "--validate-fold", "1", "--folds", "4")


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("streamed") / "set"
    write_set(folder, num_shards=NUM_SHARDS, per_shard=PER_SHARD)
    return folder


@pytest.fixture(scope="module")
def local(shards, tmp_path_factory) -> Path:
    """An epoch from the local folder, on two processes."""
    run = tmp_path_factory.mktemp("local") / "run"
    ended = training_runs.train(shards, run, *WINDOWS, *ONCE)
    assert ended.code == 0, ended.output
    return run


@pytest.fixture
def server(shards, tmp_path, monkeypatch) -> Iterator[Server]:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate(tmp_path / "certificate")))
    server = Server(shards, tmp_path / "certificate")
    yield server
    server.shutdown()
    server.server_close()


class Bucket:
    """A set on moto's S3 server. sent: bytes of answers to GET, by name."""

    def __init__(self, shards: Path) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        self.sent: Counter[str] = Counter()
        app = DomainDispatcherApplication(create_backend_app)

        def counting(environ, start_response):
            parts = app(environ, start_response)
            for part in parts:
                if environ["REQUEST_METHOD"] == "GET":
                    self.sent[environ["PATH_INFO"].rsplit("/", 1)[-1]] += len(part)
                yield part

        self._server = make_server("127.0.0.1", 0, counting, threaded=True)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.shards, self.name = shards, f"lungs-{secrets.token_hex(4)}"  # moto's servers share what they hold

    def fill(self) -> str:
        import s3fs

        self.files = s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True)
        self.files.mkdir(self.name, region_name="eu-west-1")
        for path in self.shards.iterdir():
            if path.is_file():
                self.files.pipe_file(f"{self.name}/set/{path.name}", path.read_bytes())
        self.sent.clear()
        return f"s3://{self.name}/set"

    def tar_bytes(self) -> int:
        return sum(count for name, count in self.sent.items() if name.endswith(".tar"))

    def remove(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.files.rm(self.name, recursive=True)

    def close(self) -> None:
        self._server.shutdown()


@pytest.fixture
def bucket(shards, monkeypatch) -> Iterator[Bucket]:
    for package in ("s3fs", "moto", "flask_cors"):
        pytest.importorskip(package, reason="needs `pip install s3fs 'moto[s3]' flask flask-cors`")
    made = Bucket(shards)
    for name, value in (("AWS_ACCESS_KEY_ID", "canary-id"), ("AWS_SECRET_ACCESS_KEY", "canary-secret")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", made.endpoint)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    yield made
    made.close()


def set_bytes(shards: Path) -> int:
    return sum(path.stat().st_size for path in shards.glob("*.tar"))


def limit_bytes(shards: Path) -> int:
    """A third of the tars, and the index with its JSON."""
    return set_bytes(shards) // 3 + sum(path.stat().st_size for path in shards.glob("train.[ij]*")) + 10_000


def streamed(url: str, cache: Path, shards: Path, times: float = 1) -> tuple[str, ...]:
    return "--shards-url", url, "--cache", str(cache), "--cache-gb", f"{limit_bytes(shards) * times / 1e9:.9f}"


def test_an_epoch_over_https_fetches_the_set_once_a_node_and_learns_the_same(server, shards, local, tmp_path):
    with Watch(tmp_path / "cache") as watch:
        ended = training_runs.train(
            None, tmp_path / "run", *streamed(server.url, tmp_path / "cache", shards), *WINDOWS, *ONCE
        )
    assert ended.code == 0, ended.output
    training_runs.assert_same_result(tmp_path / "run", local)
    assert server.tar_bytes() == set_bytes(shards)
    assert server.sent["train.index.arrow"] == (shards / "train.index.arrow").stat().st_size
    assert set_bytes(shards) // 4 < watch.most <= limit_bytes(shards)


def test_killed_twice_and_resumed_with_a_fold_that_is_validated_it_is_the_undisturbed_run(server, shards, tmp_path):
    ended = training_runs.train(shards, tmp_path / "local", *WINDOWS, *FOLD)
    assert ended.code == 0, ended.output
    # a fold's few images of a shard: a validation batch reaches over many shards
    flags = (*streamed(server.url, tmp_path / "cache", shards, 2), *WINDOWS, *FOLD, "--resume")
    with Watch(tmp_path / "cache") as watch:
        for kill in ({"rank": 0, "at": "step", "count": 7}, {"rank": 1, "at": "validate", "count": 1}, None):
            ended = training_runs.train(None, tmp_path / "run", *flags, fault={"kill": kill} if kill else {})
            assert (ended.code == 0) == (kill is None), ended.output
    training_runs.assert_same_result(tmp_path / "run", tmp_path / "local")
    assert watch.most <= 2 * limit_bytes(shards)


def test_an_epoch_from_s3_is_the_local_one_also_when_it_is_killed_and_resumed(bucket, shards, local, tmp_path):
    flags = (*streamed(bucket.fill(), tmp_path / "cache", shards), *WINDOWS, *ONCE, "--resume")
    with Watch(tmp_path / "cache") as watch:
        ended = training_runs.train(None, tmp_path / "run", *flags)
        assert ended.code == 0, ended.output
        training_runs.assert_same_result(tmp_path / "run", local)
        assert bucket.tar_bytes() == set_bytes(shards)
        kill = {"rank": 0, "at": "step", "count": 9}
        assert training_runs.train(None, tmp_path / "other", *flags, fault={"kill": kill}).code != 0
        ended = training_runs.train(None, tmp_path / "other", *flags)
        assert ended.code == 0, ended.output
    training_runs.assert_same_result(tmp_path / "other", local)
    assert watch.most <= limit_bytes(shards)
    assert "canary" not in ended.output


def test_two_nodes_with_a_cache_each_fetch_the_set_once_each_and_learn_the_same(server, shards, local, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = []
    for node in range(2):
        group = ("--nnodes", "2", "--nproc_per_node", "1", "--node_rank", str(node))
        launcher = ("-m", "torch.distributed.run", *group, "--master_addr", "127.0.0.1", "--master_port", str(port))
        flags = (*streamed(server.url, tmp_path / f"cache{node}", shards), *WINDOWS, *ONCE)
        nodes.append(training_runs.start(None, tmp_path / "run", *flags, launcher=launcher))
    with contextlib.ExitStack() as stack:
        watches = [stack.enter_context(Watch(tmp_path / f"cache{node}")) for node in range(2)]
        ended = [training_runs.finish(node) for node in nodes]
    assert [node.code for node in ended] == [0, 0], ended
    training_runs.assert_same_result(tmp_path / "run", local)
    assert server.tar_bytes() == 2 * set_bytes(shards)
    assert all(set_bytes(shards) // 4 < watch.most <= limit_bytes(shards) for watch in watches)


@pytest.mark.parametrize("what", ["a vanished bucket", "no such bucket"])
def test_a_bucket_that_is_not_there_is_named(bucket, shards, tmp_path, what):
    url = bucket.fill()
    flags = (*streamed(url, tmp_path / "cache", shards), *WINDOWS, *ONCE)
    if what == "no such bucket":
        bucket.remove()
        ended = training_runs.train(None, tmp_path / "run", *flags, processes=1)
        assert f"{url}/train.json: cannot be fetched" in ended.output
    else:
        process = training_runs.start(None, tmp_path / "run", *flags, processes=1, fault={"slow_s": 0.3})
        while process.poll() is None and not (tmp_path / "run" / "checkpoints" / "step_2").exists():
            pass
        bucket.remove()
        ended = training_runs.finish(process)
        assert f"error: {url}/train-0000" in ended.output
    assert ended.code == 2, ended.output
    assert "canary" not in ended.output
    assert "Traceback" not in ended.output


@pytest.mark.parametrize("fault", ["corrupt", "403", "stall"])
def test_a_shard_that_cannot_be_had_ends_both_ranks_with_its_address(server, shards, tmp_path, fault):
    server.faults["train-000017.tar"], server.stall_s = (fault, 99), 60.0
    short = {"set": {"data.fetch": {"READ_S": 1.0, "PAUSE_S": 0.1, "TRIES": 2}}}
    flags = (*streamed(server.url, tmp_path / "cache", shards), *WINDOWS, *ONCE)
    ended = training_runs.train(None, tmp_path / "run", *flags, fault=short)
    assert ended.code != 0
    says = {"corrupt": "SHA-256 differs", "403": "HTTP 403", "stall": "no answer"}[fault]
    assert f"{server.url}/train-000017.tar: " in ended.output
    assert says in ended.output


def test_a_stall_of_a_minute_is_waited_out(server, shards, local, tmp_path):
    server.faults["train-000017.tar"], server.stall_s = ("stall", 1), 60.0
    flags = (*streamed(server.url, tmp_path / "cache", shards), *WINDOWS, *ONCE)
    ended = training_runs.train(None, tmp_path / "run", *flags, "--timeout-s", "120", timeout=300)
    assert ended.code == 0, ended.output
    assert "waiting for https://" in ended.output
    assert "train-000017.tar: 1 of 4 shards needed now are missing" in ended.output
    training_runs.assert_same_result(tmp_path / "run", local)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (ONCE, r"too small: .* all 40 shards, .*shuffle_window=none.*or --set shuffle_window=6, another order"),
        ((*WINDOWS, *ONCE, "--set", "shuffle_window=9"), r"two windows of 9 shards.*or --set shuffle_window=6"),
    ],
)
def test_what_does_not_fit_the_cache_is_refused_with_the_remedy_before_any_shard_is_fetched(
    server, shards, tmp_path, flags, says
):
    ended = training_runs.train(
        None, tmp_path / "run", *streamed(server.url, tmp_path / "cache", shards), *flags, processes=1
    )
    assert ended.code == 2
    assert server.tar_bytes() == 0
    assert not (tmp_path / "run").exists()
    assert re.search(says, ended.output), ended.output


def test_inference_streams_in_order_and_gives_the_same_scores(server, shards, local, tmp_path):
    environment = os.environ | {"PROGRAM": "infer", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(training_runs.REPOSITORY)
    common = ["--div", "b", "--split", "train", "--member", f"one={local}@1:plain", "--device-batch-size", "4"]
    parts = (streamed(server.url, tmp_path / "cache", shards), ("--shards", str(shards)))
    for name, where in zip(("streamed", "local"), parts, strict=True):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command = [*launcher, str(training_runs.WORKER), *common, *where, "--out", str(tmp_path / name)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    assert server.tar_bytes() == set_bytes(shards)
    tables = [(tmp_path / name / "scores" / "one.csv").read_bytes() for name in ("streamed", "local")]
    assert tables[0] == tables[1]
