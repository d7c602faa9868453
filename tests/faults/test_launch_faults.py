"""What breaks around a training: too few processes, two jobs in a folder, lost and hung ranks, preemption, no network.

Every case goes through `accelerate launch` with two gloo processes on the CPU, and has a time limit.
"""

import contextlib
import ctypes
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from tests.data.streaming import Server, Watch, certificate, write_set

pytestmark = [pytest.mark.fault, pytest.mark.timeout(240)]

REPOSITORY = Path(__file__).parents[2]
LAUNCH = (sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch")
TWO = ("--config_file", "accel_configs/cpu.yaml", "--num_processes", "2")
EPOCHS = 8
STEPS = 6 * EPOCHS  # 48 images in batches of 8; some seconds, time enough to disturb it
TIMEOUT_S = 15


def train_words(shards: Path | None, run: Path, *flags: str, epochs: int = EPOCHS) -> list[str]:
    """shards: None where flags say them."""
    sizes = ("image_size=112", "model_kwargs=depth=4", "global_batch_size=8")
    fields = (*sizes, f"epochs={epochs}", f"member_epochs={epochs}", "ema_ramp=true")
    settings = [word for field in fields for word in ("--set", field)]
    where = ["--div", "b", "--model", "eva_x_tiny", "--init", "random", "--out", str(run)]
    where += [] if shards is None else ["--shards", str(shards)]
    limits = ["--timeout-s", str(TIMEOUT_S), "--threads", "1", "--precision", "fp32", "--log-every", "1"]
    return ["-m", "cxrdist.train", *where, *settings, *limits, *flags]


class Job:
    """A launched training in a session of its own; its output is collected, and nothing of it survives the test."""

    def __init__(self, words: list[str], log: Path, before: tuple[str, ...] = (), **environment: str) -> None:
        self.log = log
        self._file = log.open("w")
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "WANDB_"))}
        self.process = subprocess.Popen(
            [*before, *words],
            cwd=REPOSITORY,
            env=clean | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "ACCELERATE_USE_CPU": "true"} | environment,
            stdout=self._file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.begun = time.monotonic()

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self, seconds: float) -> int:
        return self.process.wait(seconds)

    def seconds(self) -> float:
        return time.monotonic() - self.begun

    def workers(self) -> list[psutil.Process]:
        """The training processes, by rank."""
        found = {}
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "cxrdist.train" in child.cmdline() and "RANK" in child.environ():
                    found[int(child.environ()["RANK"])] = child
        return [found[rank] for rank in sorted(found)]

    def wait_for_rows(self, run: Path, count: int, seconds: float = 90) -> None:
        wait_until(lambda: len(step_rows(run)) >= count or self.process.poll() is not None, seconds)
        assert self.process.poll() is None, self.output()

    def end(self) -> None:
        processes = [self.process.pid]
        with contextlib.suppress(psutil.Error):
            processes += [child.pid for child in psutil.Process(self.process.pid).children(recursive=True)]
        for pid in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(30)
        self._file.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    jobs: list[Job] = []

    def begin(words: list[str], *, before: tuple[str, ...] = (), **environment: str) -> Job:
        jobs.append(Job(words, tmp_path / f"log{len(jobs)}.txt", before, **environment))
        return jobs[-1]

    yield begin
    for job in jobs:
        job.end()


@pytest.fixture(scope="module")
def undisturbed(uneven_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that the disturbed ones must equal."""
    folder = tmp_path_factory.mktemp("undisturbed")
    job = Job([*LAUNCH, *TWO, *train_words(uneven_shards, folder / "run")], folder / "log.txt")
    try:
        assert job.wait(120) == 0, job.output()
    finally:
        job.end()
    return folder / "run"


def wait_until(condition: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.05)


def step_rows(run: Path) -> list[dict[str, Any]]:
    with contextlib.suppress(OSError):
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        return [row for row in rows if row["kind"] == "train"]
    return []


def assert_equal_runs(run: Path, other: Path) -> None:
    """Weights, EMA and logged numbers are the same bit for bit."""
    folder = f"checkpoints/epoch_{EPOCHS:02d}"
    for name in ("model", "ema"):
        ours, theirs = (load_file(where / folder / f"{name}.safetensors") for where in (run, other))
        assert ours.keys() == theirs.keys()
        assert all(tensor.equal(theirs[key]) for key, tensor in ours.items())
    assert (run / "metrics.jsonl").read_text() == (other / "metrics.jsonl").read_text()


def test_one_process_instead_of_two_is_named_and_nothing_is_written(
    start: Any, uneven_shards: Path, tmp_path: Path
) -> None:
    """`--cpu --num_processes 2` starts one process and would train on half of the machine, with exit code 0."""
    words = train_words(uneven_shards, tmp_path / "run", "--expect-processes", "2")
    job = start([*LAUNCH, "--cpu", "--num_processes", "2", *words])
    assert job.wait(90) != 0  # 8 s on idle cores
    assert "1 processes were started, 2 expected" in job.output()
    assert "accel_configs" in job.output()
    assert not (tmp_path / "run").exists()


def test_multi_gpu_without_gpu_is_one_job_of_two_and_not_two_of_one(
    start: Any, uneven_shards: Path, tmp_path: Path
) -> None:
    """Without `ACCELERATE_USE_CPU` accelerate makes two jobs of one process each; both would write as rank 0."""
    flags = ("--multi_gpu", "--num_processes", "2", "--mixed_precision", "no", "--dynamo_backend", "no")
    words = train_words(uneven_shards, tmp_path / "run", "--expect-processes", "2")
    job = start([*LAUNCH, *flags, "--main_process_port", str(free_port()), *words])
    code = job.wait(120)
    if code == 0:
        assert "2 processes on cpu" in job.output()
        assert [row["step"] for row in step_rows(tmp_path / "run")] == list(range(1, STEPS + 1))
    else:
        assert "error" in job.output()
        assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_second_job_in_a_run_folder_is_refused_and_the_first_goes_on(
    start: Any, uneven_shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = train_words(uneven_shards, run, epochs=300)
    first = start([*LAUNCH, *TWO, "--main_process_port", str(free_port()), *words])
    first.wait_for_rows(run, 1)
    second = start([*LAUNCH, *TWO, "--main_process_port", str(free_port()), *words, "--resume"])
    assert second.wait(90) != 0
    assert "in use by another run" in second.output()
    first.wait_for_rows(run, len(step_rows(run)) + 3)
    steps = [row["step"] for row in step_rows(run)]
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.timeout(600)
def test_killed_rank_is_restarted_by_the_launcher_with_equal_weights(
    start: Any, uneven_shards: Path, undisturbed: Path, tmp_path: Path
) -> None:
    for attempt in range(3):
        run = tmp_path / f"run{attempt}"
        words = train_words(uneven_shards, run, "--resume", "--checkpoint-minutes", "0")
        port = ("--rdzv_backend", "c10d", "--max_restarts", "1", "--monitor_interval", "1")
        job = start([*LAUNCH, *TWO, *port, *words], TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
        job.wait_for_rows(run, 4 + attempt)
        job.workers()[attempt % 2].send_signal(signal.SIGKILL)
        assert job.wait(100) == 0, job.output()
        assert "resuming from" in job.output()
        assert_equal_runs(run, undisturbed)


def test_hung_rank_ends_the_run_within_the_timeout_and_says_what_to_do(
    start: Any, uneven_shards: Path, tmp_path: Path
) -> None:
    job = start([*LAUNCH, *TWO, *train_words(uneven_shards, tmp_path / "run", epochs=300)])
    job.wait_for_rows(tmp_path / "run", 3)
    workers = job.workers()
    workers[1].send_signal(signal.SIGSTOP)
    stopped = job.seconds()
    assert job.wait(TIMEOUT_S + 45) != 0
    assert job.seconds() - stopped < TIMEOUT_S + 45
    assert "stopped responding" in job.output()
    assert "--resume" in job.output()
    assert psutil.wait_procs(workers, timeout=10)[1] == []  # no orphans


def test_busy_port_is_named(start: Any, uneven_shards: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        group = ("--num_machines", "2", "--machine_rank", "0", "--same_network", "--main_process_ip", "127.0.0.1")
        words = [*group, "--main_process_port", port, *train_words(uneven_shards, tmp_path / "run")]
        job = start([*LAUNCH, *TWO, *words])
        assert job.wait(90) != 0
    assert port in job.output()
    assert "main_process_port" in job.output()
    assert not (tmp_path / "run").exists()


def test_machine_that_never_comes_ends_the_wait(start: Any, uneven_shards: Path, tmp_path: Path) -> None:
    group = ("--num_machines", "2", "--machine_rank", "0", "--same_network", "--main_process_ip", "127.0.0.1")
    wait = ("--main_process_port", str(free_port()), "--rdzv_conf", f"timeout={TIMEOUT_S}")
    job = start([*LAUNCH, *TWO, *group, *wait, *train_words(uneven_shards, tmp_path / "run")])
    assert job.wait(TIMEOUT_S + 45) != 0
    assert "1/2" in job.output()
    assert not (tmp_path / "run").exists()


def test_preempted_run_checkpoints_in_time_and_resumes_equal(
    start: Any, uneven_shards: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = start([*LAUNCH, *TWO, *train_words(uneven_shards, run)])
    job.wait_for_rows(run, 4)
    job.process.send_signal(signal.SIGTERM)
    asked = job.seconds()
    job.wait(30)
    assert job.seconds() - asked < 30
    assert "stopped after step" in job.output(), job.output()
    assert list((run / "checkpoints").glob("step_*/manifest.json"))
    again = start([*LAUNCH, *TWO, *train_words(uneven_shards, run, "--resume")])
    assert again.wait(90) == 0, again.output()
    assert_equal_runs(run, undisturbed)


def test_time_limit_checkpoints_and_ends_well(
    start: Any, uneven_shards: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = start([*LAUNCH, *TWO, *train_words(uneven_shards, run, "--max-hours", "0.0001")])
    assert job.wait(90) == 0, job.output()
    assert "--max-hours" in job.output()
    assert "--resume" in job.output()
    again = start([*LAUNCH, *TWO, *train_words(uneven_shards, run, "--resume")])
    assert again.wait(90) == 0, again.output()
    assert_equal_runs(run, undisturbed)


def test_secret_key_is_in_no_output_and_no_file(start: Any, uneven_shards: Path, tmp_path: Path) -> None:
    canary = "canary" + "0123456789abcdef" * 3
    run = tmp_path / "run"
    environment = {"WANDB_API_KEY": canary, "WANDB_MODE": "offline"}
    words = train_words(uneven_shards, run, "--wandb", "offline", epochs=300)
    job = start([*LAUNCH, *TWO, *words], **environment)
    job.wait_for_rows(run, 3)
    job.workers()[1].send_signal(signal.SIGKILL)
    assert job.wait(60) != 0
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any("wandb" in path.parts for path in files)
    assert [str(path) for path in files if canary.encode() in path.read_bytes()] == []


def test_wandb_without_network_does_not_hold_up_training_and_a_kill_loses_no_row(
    start: Any, uneven_shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with isolated_host() as inside:
        words = train_words(uneven_shards, run, "--wandb", "online", epochs=300)
        key = "0123456789abcdef" * 5
        job = start([*LAUNCH, *TWO, *words], before=inside, WANDB_API_KEY=key, WANDB_MODE="online", **LOOPBACK)
        wait_until((run / "recipe.json").exists, 60)
        begun = job.seconds()
        job.wait_for_rows(run, 1, 15)
        assert job.seconds() - begun <= 15
        wait_until(lambda: "offline" in job.output(), 45)
        job.wait_for_rows(run, 20)
        for worker in job.workers():
            worker.send_signal(signal.SIGKILL)
        job.wait(60)
    steps = [row["step"] for row in step_rows(run)]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= 20


LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=10)


def require_namespaces() -> None:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the ip command")
    name = f"cxr-probe-{os.getpid()}"
    try:
        ip("netns", "add", name)
        ip("netns", "del", name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not permitted here: {error.stderr.decode().strip()}")


@contextlib.contextmanager
def isolated_host() -> Iterator[tuple[str, ...]]:
    """The prefix of a command that runs with a loopback and no route to anywhere."""
    require_namespaces()
    name = f"cxr-alone-{os.getpid()}"
    ip("netns", "add", name)
    try:
        ip("-n", name, "link", "set", "lo", "up")
        yield ("ip", "netns", "exec", name)
    finally:
        ip("netns", "del", name)


@contextlib.contextmanager
def two_hosts() -> Iterator[list[tuple[str, ...]]]:
    """Prefixes of two hosts, 10.77.0.1 and 10.77.0.2, joined by one cable (interfaces cable0 and cable1)."""
    require_namespaces()
    names = [f"cxr-host{number}-{os.getpid()}" for number in (0, 1)]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "cable0", "netns", names[0], "type", "veth", "peer", "name", "cable1", "netns", names[1])
        for number, name in enumerate(names):
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", f"cable{number}")
            ip("-n", name, "link", "set", f"cable{number}", "up")
        yield [("ip", "netns", "exec", name) for name in names]
    finally:
        for name in names:
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "del", name)


@contextlib.contextmanager
def server_at(host: tuple[str, ...], address: str, folder: Path, file: Path) -> Iterator[Server]:
    """A web server on a host, of this process: a socket stays in the namespace of the thread that made it."""

    def listen() -> Server:
        with Path("/run/netns", host[-1]).open() as namespace:
            error = ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0)
        assert error == 0, os.strerror(ctypes.get_errno())
        return Server(folder, certificate(file, address), address)

    with ThreadPoolExecutor(1) as pool:
        server = pool.submit(listen).result(30)
    yield server
    server.shutdown()
    server.server_close()


def start_pair(start: Any, hosts: list[tuple[str, ...]], words: list[str], **environment: str) -> list[Job]:
    group = ("--num_machines", "2", "--same_network", "--main_process_ip", "10.77.0.1", "--main_process_port", "29511")
    return [
        start(
            [*LAUNCH, *TWO, *group, "--machine_rank", str(number), *words],
            before=host,
            **({"GLOO_SOCKET_IFNAME": f"cable{number}"} | environment),
        )
        for number, host in enumerate(hosts)
    ]


def test_two_hosts_train_lose_the_link_and_resume_equal(
    start: Any, uneven_shards: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with two_hosts() as hosts:
        words = train_words(uneven_shards, run, "--resume", "--checkpoint-minutes", "0", "--expect-processes", "2")
        pair = start_pair(start, hosts, words)
        pair[0].wait_for_rows(run, 4)
        ip("-n", hosts[0][-1], "link", "set", "cable0", "down")
        cut = pair[0].seconds()
        for job in pair:
            assert job.wait(TIMEOUT_S + 45) != 0
        assert pair[0].seconds() - cut < TIMEOUT_S + 45
        assert "GLOO_SOCKET_IFNAME" in pair[0].output() + pair[1].output()
        ip("-n", hosts[0][-1], "link", "set", "cable0", "up")
        pair = start_pair(start, hosts, words)
        for job in pair:
            assert job.wait(100) == 0, job.output()
        assert "resuming from" in pair[0].output()
    assert_equal_runs(run, undisturbed)


ELASTIC_EPOCHS = 30  # a node that returns takes part in most of them
ELASTIC = ("--resume", "--checkpoint-minutes", "0.02", "--timeout-s", "8")


def join(start: Any, hosts: list[tuple[str, ...]], number: int, training: list[str], **environment: str) -> Job:
    """Start torchrun on a host, which trains together with those of the other hosts that are there."""
    place = ("--rdzv_backend", "c10d", "--rdzv_endpoint", "10.77.0.1:29517", "--rdzv_id", "elastic")
    conf = f"is_host={number == 0},last_call_timeout=2,join_timeout=120"  # a name would tell it by itself
    limits = ("--rdzv_conf", conf, "--max_restarts", "9", "--monitor_interval", "0.5")
    group = ("--nnodes", "1:2", "--nproc_per_node", "1", "--local_addr", f"10.77.0.{number + 1}")
    return start(
        [sys.executable, "-m", "torch.distributed.run", *place, *limits, *group, *training],
        before=hosts[number],
        GLOO_SOCKET_IFNAME=f"cable{number}",
        TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
        **environment,
    )


def worlds(job: Job) -> list[int]:
    """The number of processes of each start, up to now."""
    return [int(line.split()[0]) for line in job.output().splitlines() if " processes on cpu" in line]


def assert_same_batches(run: Path, undisturbed: Path) -> None:
    """The losses of every step are those of an undisturbed run, which other batches would move by a tenth and more; the
    sum over ranks rounds by their number, so they are not equal bit for bit.
    """
    ours, theirs = step_rows(run), step_rows(undisturbed)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] == list(range(1, 6 * ELASTIC_EPOCHS + 1))
    differences = [abs(one["loss"] / other["loss"] - 1) for one, other in zip(ours, theirs, strict=True)]
    assert max(differences) < 1e-4, max(differences)  # 2e-7


def lose_a_node_that_returns(
    start: Any, hosts: list[tuple[str, ...]], run: Path, trainings: list[list[str]], lose: Any, **environment: str
) -> None:
    """Train on two nodes, on one, and on two again, through torchrun's rendezvous, with nobody at the keyboard.

    trainings: of each node. lose: called with the second node's job when it is time to lose it.
    """
    first, second = (join(start, hosts, number, trainings[number], **environment) for number in (0, 1))
    first.wait_for_rows(run, 8)
    lose(second)
    wait_until(lambda: 1 in worlds(first) or first.process.poll() is not None, 120)
    second = join(start, hosts, 1, trainings[1], **environment)
    assert first.wait(240) == 0, first.output()
    assert second.wait(60) == 0, second.output()
    assert worlds(first)[:3] == [2, 1, 2], first.output()


@pytest.mark.timeout(600)
def test_a_node_is_lost_and_returns_and_torchrun_goes_on_with_the_same_batches(
    start: Any, uneven_shards: Path, tmp_path: Path
) -> None:
    alone = start([*LAUNCH, *TWO, *train_words(uneven_shards, tmp_path / "alone", epochs=ELASTIC_EPOCHS)])
    assert alone.wait(240) == 0, alone.output()
    training = train_words(uneven_shards, tmp_path / "run", *ELASTIC, epochs=ELASTIC_EPOCHS)
    with two_hosts() as hosts:
        lose_a_node_that_returns(start, hosts, tmp_path / "run", [training, training], Job.end)
    assert_same_batches(tmp_path / "run", tmp_path / "alone")


@pytest.mark.timeout(600)
def test_a_node_that_streams_is_lost_amid_a_download_and_returns_and_the_batches_are_those_of_a_folder(
    start: Any, tmp_path: Path
) -> None:
    """Each node has a cache of half the set. The lost one leaves halves of shards in its own, and takes it up again."""
    shards, windows = tmp_path / "shards" / "set", ("--set", "shuffle_window=2")
    write_set(shards, num_shards=12, per_shard=4)
    alone = start([*LAUNCH, *TWO, *train_words(shards, tmp_path / "alone", *windows, epochs=ELASTIC_EPOCHS)])
    assert alone.wait(240) == 0, alone.output()

    tars, about = ([path.stat().st_size for path in shards.glob(kind)] for kind in ("*.tar", "train.[ij]*"))
    limit = sum(tars) // 2 + sum(about) + 5000  # the index and its JSON, the latter once more
    caches = [tmp_path / f"cache{number}" for number in (0, 1)]
    with two_hosts() as hosts, server_at(hosts[0], "10.77.0.1", shards, tmp_path / "certificate") as server:

        def lose(second: Job) -> None:
            server.stall_s = 5.0
            server.faults |= {path.name: ("stall", 99) for path in shards.glob("*.tar")}
            wait_until(lambda: [*caches[1].glob("tars/*.part")], 30)
            second.end()
            server.faults.clear()
            assert [*caches[1].glob("tars/*.part")]

        sources = [
            ("--shards-url", server.url, "--cache", str(cache), "--cache-gb", f"{limit / 1e9:.9f}") for cache in caches
        ]
        trainings = [
            train_words(None, tmp_path / "run", *ELASTIC, *windows, *source, epochs=ELASTIC_EPOCHS)
            for source in sources
        ]
        with Watch(caches[0]) as one, Watch(caches[1]) as other:
            trusted = {"SSL_CERT_FILE": str(tmp_path / "certificate"), "no_proxy": "10.77.0.1"}
            lose_a_node_that_returns(start, hosts, tmp_path / "run", trainings, lose, **trusted)
    assert_same_batches(tmp_path / "run", tmp_path / "alone")
    assert all(limit // 2 < watch.most <= limit for watch in (one, other)), (one.most, other.most, limit)
    left = [path for cache in caches for path in cache.glob("tars/*")]
    assert [path.name for path in left] == [f"{hashlib.sha256(path.read_bytes()).hexdigest()}.tar" for path in left]


def test_wrong_interface_is_named(start: Any, uneven_shards: Path, tmp_path: Path) -> None:
    with two_hosts() as hosts:
        words = train_words(uneven_shards, tmp_path / "run")
        pair = start_pair(start, hosts, words, GLOO_SOCKET_IFNAME="nosuch0")
        for job in pair:
            assert job.wait(60 + 45) != 0  # joining the group is given 60 s at least
        assert "GLOO_SOCKET_IFNAME" in pair[0].output(), pair[0].output()
        assert "nosuch0" in pair[0].output()
    assert not (tmp_path / "run").exists()


SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
pids=()
for node in $(seq 0 $((SLURM_NNODES - 1))); do SLURM_NODEID=$node "$@" & pids+=($!); done
trap 'kill -TERM "${pids[@]}" 2> /dev/null' TERM
code=0
for pid in "${pids[@]}"; do
  wait "$pid" || code=$?
  while kill -0 "$pid" 2> /dev/null; do wait "$pid" || code=$?; done
done
exit "$code"
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> "$REQUEUED"; fi
"""


def slurm(tmp_path: Path, **more: str) -> dict[str, str]:
    """The environment of a job whose Slurm is stand-ins on the path: one that starts a task a node here, one that notes
    the requeue, and `more` scripts by name.
    """
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, **more}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(REPOSITORY)}


def test_slurm_script_starts_a_launcher_a_node_checkpoints_on_the_signal_and_requeues(
    start: Any, uneven_shards: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run, requeued = tmp_path / "run", tmp_path / "requeued"
    environment = {
        **slurm(tmp_path),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "node[0-1]",
        "CXRDIST_PYTHON": sys.executable,
        "CXRDIST_PROCESSES_PER_NODE": "1",
        "CXRDIST_ACCEL_CONFIG": "accel_configs/cpu.yaml",
        "REQUEUED": str(requeued),
    }
    words = ["bash", "accel_configs/slurm.sh", "train", *train_words(uneven_shards, run)[2:]]
    job = start(words, **environment)
    job.wait_for_rows(run, 4)
    job.process.send_signal(signal.SIGUSR1)
    assert job.wait(60) != 0
    assert "stopped after step" in job.output()
    assert requeued.read_text().split() == ["requeue", environment["SLURM_JOB_ID"]]
    again = start(words, **environment)
    assert again.wait(120) == 0, again.output()
    assert "2 processes on cpu" in again.output()
    assert_equal_runs(run, undisturbed)


def test_slurm_array_task_of_folds_starts_one_process_passes_the_signal_on_and_requeues(
    start: Any, tmp_path: Path
) -> None:
    """A stand-in python notes how it is called, and ends as cxrdist.folds does on SIGTERM."""
    python = '#!/usr/bin/env bash\ntrap "exit 130" TERM\necho "$@"\nfor i in $(seq 600); do sleep 0.1; done\n'
    requeued = tmp_path / "requeued"
    environment = {
        **slurm(tmp_path, python=python),
        "SLURM_JOB_ID": "17",
        "SLURM_NNODES": "1",
        "SLURM_JOB_NODELIST": "node0",
        "CXRDIST_PYTHON": str(tmp_path / "bin" / "python"),
        "CXRDIST_PROCESSES_PER_NODE": "1",
        "REQUEUED": str(requeued),
    }
    words = ["bash", "accel_configs/slurm.sh", "folds", "--task", "b", "--folds", "5"]
    job = start(words, **environment)
    for _ in range(200):
        if "cxrdist.folds" in job.output():
            break
        time.sleep(0.1)
    job.process.send_signal(signal.SIGUSR1)
    assert job.wait(60) == 130
    assert "-m cxrdist.folds --task b --folds 5\n" in job.output()
    assert requeued.read_text().split() == ["requeue", "17"]
    assert start(words, **environment | {"SLURM_NNODES": "2"}).wait(60) == 2


def test_slurm_array_tasks_of_preprocess_are_nodes_that_share_the_work(
    start: Any, make_division: Any, tmp_path: Path
) -> None:
    """Three tasks of an array of four: the fourth never starts. No GPU is asked for."""
    images, table = make_division([f"{number}.jpg" for number in range(12)])
    environment = {
        **slurm(tmp_path),
        "SLURM_NNODES": "1",
        "SLURM_ARRAY_TASK_COUNT": "4",
        "SLURM_ARRAY_TASK_MIN": "0",
        "CXRDIST_PYTHON": sys.executable,
    }
    words = [
        "bash",
        "accel_configs/slurm.sh",
        "preprocess",
        "--task",
        "b",
        "--images",
        str(images),
        "--csv",
        str(table),
    ]
    words += ["--out", str(tmp_path / "out"), "--rows-per-shard", "1", "--workers", "1"]
    tasks = [
        start(words, **environment | {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_JOB_ID": str(task)}) for task in range(3)
    ]
    for number, task in enumerate(tasks):
        assert task.wait(120) == 0, task.output()
        assert f"node {number} of 4 (from a Slurm array)" in task.output()
        assert "12 rows = 12 images stored" in task.output()
    assert len([*(tmp_path / "out").glob("*.tar")]) == 12
    two_nodes = {"SLURM_NNODES": "2", "SLURM_ARRAY_TASK_ID": "0", "SLURM_JOB_ID": "9"}
    assert start(words, **environment | two_nodes).wait(60) == 2
