"""Nodes that share a split: slow, killed, late, without locks, or of other minds. The bytes are those of one node."""

import errno
import fcntl
import threading
from pathlib import Path
from typing import Any

import pytest

from cxrdist.bench.nodes import bytes_of, fixed_split_s, run_nodes, write_images
from cxrdist.errors import UserError
from cxrdist.shards import board, convert, writer
from cxrdist.shards.convert import Converted, Pixels
from cxrdist.shards.writer import Source, SplitJob, write_split
from cxrdist.task import TASKS

pytestmark = pytest.mark.fault


def job_of(out: Path, sources: list[Source], rows_per_shard: int = 4) -> SplitJob:
    return SplitJob(out, TASKS["b"], "train", sources, Pixels(size_px=384), rows_per_shard, {})


@pytest.fixture
def sources(tmp_path: Path) -> list[Source]:
    made = write_images(tmp_path / "images", 60)
    Path(made[9].path).write_bytes(b"no image")
    return made


def test_the_others_finish_for_a_slow_and_a_killed_node(sources: list[Source], tmp_path: Path) -> None:
    one, together = job_of(tmp_path / "one", sources), job_of(tmp_path / "nodes", sources)
    write_split(one)
    result = run_nodes(together, [0.2, 2.0, 0.2, 0.2], killed=2, kill_s=1.0, ready={})
    assert [result.exit_codes[rank] for rank in (0, 1, 3)] == [0, 0, 0]
    assert result.exit_codes[2] == -9
    assert bytes_of(together.out) == bytes_of(one.out)
    part = sum(len(group) for number, group in one.groups.items() if number % 4 == 1)
    assert result.converted[1] < part, "the slow node made all of its part by itself"


def test_the_fixed_split_is_as_slow_as_its_slowest_part(sources: list[Source], tmp_path: Path) -> None:
    job = job_of(tmp_path / "one", sources)  # 15 shards of 4: parts of 16, 16, 16 and 12 images
    assert fixed_split_s(job, [1.0, 10.0, 1.0, 1.0], killed=2, kill_s=5.0) == 160
    # Node 3 is free after 12 s, and makes the 12 images of the killed one's three missing shards.
    assert fixed_split_s(job, [1.0, 1.0, 1.0, 1.0], killed=2, kill_s=5.0) == 24


def at_the_same_time(jobs: list[SplitJob]) -> list[BaseException | None]:
    """`write_split` of each job as a node of its own, in threads: what each raised."""
    errors: list[BaseException | None] = [None] * len(jobs)

    def node(rank: int) -> None:
        try:
            write_split(jobs[rank], node_rank=rank, num_nodes=len(jobs))
        except BaseException as error:
            errors[rank] = error

    threads = [threading.Thread(target=node, args=(rank,)) for rank in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return errors


@pytest.fixture
def slowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of 20 ms, and a look at the folder at each."""
    real = convert.convert

    def slow(path: str, pixels: Pixels) -> Converted | str:
        threading.Event().wait(0.02)
        return real(path, pixels)

    monkeypatch.setattr(convert, "convert", slow)
    monkeypatch.setattr(board, "LOOK_S", 0.0)
    monkeypatch.setattr(board, "LOOK_SHARE", 0.0)


@pytest.mark.usefixtures("slowed")
def test_a_file_system_without_locks_costs_time_but_no_byte(
    sources: list[Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_split(job_of(tmp_path / "one", sources))

    def no_locks(*args: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    for attempt in range(4):
        jobs = [job_of(tmp_path / f"nodes{attempt}", sources) for _ in range(3)]
        assert at_the_same_time(jobs) == [None] * 3
        assert bytes_of(jobs[0].out) == bytes_of(tmp_path / "one")


@pytest.mark.usefixtures("slowed")
def test_no_shard_is_made_twice_while_another_is_to_be_made(
    sources: list[Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    write_shard = writer._write_shard

    def noted(job: SplitJob, number: int, *args: Any) -> Any:
        written.append(number)
        return write_shard(job, number, *args)

    monkeypatch.setattr(writer, "_write_shard", noted)
    jobs = [job_of(tmp_path / "nodes", sources, 2) for _ in range(3)]
    assert at_the_same_time(jobs) == [None] * 3
    assert set(written) == set(range(30))
    assert len(set(written[:28])) == 28  # all but the last, which the other two may make again


@pytest.mark.usefixtures("slowed")
def test_nodes_that_make_other_things_of_a_split_are_named(sources: list[Source], tmp_path: Path) -> None:
    jobs = [job_of(tmp_path / "nodes", sources, rows) for rows in (2, 3)]
    errors = at_the_same_time(jobs)
    named = [error for error in errors if error is not None]
    assert named
    for error in named:
        assert isinstance(error, UserError)
        assert "another node makes this split from other images, labels or settings" in str(error)


@pytest.mark.usefixtures("slowed")
def test_a_node_that_comes_while_others_work_takes_a_part(
    sources: list[Source], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = job_of(tmp_path / "nodes", sources)
    first = threading.Thread(target=write_split, args=(job,), kwargs={"num_nodes": 2})
    first.start()
    while len([*job.out.glob("*.tar")]) < 3:
        threading.Event().wait(0.005)
    write_split(job_of(tmp_path / "nodes", sources), node_rank=7, num_nodes=8, show=True)  # it counts others than they
    first.join(60)
    write_split(job_of(tmp_path / "one", sources))
    assert bytes_of(job.out) == bytes_of(tmp_path / "one")
    printed = capsys.readouterr().out
    assert "reused: " in printed
    own, others = (
        int(part.split()[0].strip(";"))
        for part in printed.split("images made by this node: ")[1].split("other nodes: ")
    )
    assert own > 0
    assert others > 0
