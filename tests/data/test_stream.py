"""Streaming: each shard once a node, never above the limit, the same batches as from a folder; and what can fail."""

import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from cxrdist.data import fetch, order, stream
from cxrdist.data.cache import Cache
from cxrdist.data.fetch import Remote, Web
from cxrdist.data.loader import Loader
from cxrdist.data.rows import windows
from cxrdist.data.stream import Node, Stream, needed_bytes, shards_in_order
from cxrdist.errors import UserError
from cxrdist.shards.index import ShardIndex, open_index
from tests.data.streaming import Server, Watch, write_set

pytestmark = pytest.mark.timeout(90)
NUM_SHARDS, PER_SHARD, WINDOW, EPOCHS, BATCH = 12, 8, 2, 2, 6
ROWS = np.arange(NUM_SHARDS * PER_SHARD)
PASSES = [windows(np.arange(NUM_SHARDS), 1, epoch, WINDOW) for epoch in range(EPOCHS)]
Plan = dict[tuple[int, int], set[int]]  # rows of a step of an epoch


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("streamed") / "set"
    write_set(folder, num_shards=NUM_SHARDS, per_shard=PER_SHARD)
    return folder


@pytest.fixture
def server(shards, monkeypatch) -> Iterator[Server]:
    monkeypatch.setattr(fetch, "READ_S", 0.7)
    monkeypatch.setattr(fetch, "PAUSE_S", 0.02)
    monkeypatch.setattr(fetch, "TRIES", 2)
    monkeypatch.setattr(stream, "PAUSE_S", 0.02)
    made = Server(shards)
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture
def remote(server) -> Remote:
    return Remote(Web(), server.url, server.url)


def set_bytes(shards: Path) -> int:
    return sum(path.stat().st_size for path in shards.glob("*.tar"))


def third(shards: Path) -> int:
    """Bytes: a third of the tars, the index, and its JSON twice over."""
    return set_bytes(shards) // 3 + sum(path.stat().st_size for path in shards.glob("*.[aj]*")) + 6000


@pytest.fixture
def cache(shards, tmp_path) -> Cache:
    return Cache(tmp_path / "cache", third(shards))


def opened(cache: Cache, remote: Remote) -> ShardIndex:
    folder = cache.fetch_index(remote, "train")
    assert folder is not None
    return open_index(folder, "train", tars=False)


def batches(index: ShardIndex, epoch: int, rank: int, world_size: int, start_step: int = 0):
    about = {"seed": 1, "epoch": epoch, "shards": index.shard_ids, "window": WINDOW, "start_step": start_step}
    own = {"rank": rank, "world_size": world_size, "global_batch_size": BATCH, "device_batch_size": 3}
    return order.train_batches(ROWS, **about, **own)


def planned(index: ShardIndex) -> Plan:
    found: Plan = {}
    for epoch in range(EPOCHS):
        for micro in batches(index, epoch, 0, 1):
            found.setdefault((epoch, micro.step), set()).update(micro.rows.tolist())
    return found


def made(cache: Cache, remote: Remote, index: ShardIndex, node: Node | None = None, **options) -> Stream:
    options = {"span": 2 * BATCH, "use": "train", "what": "two windows of 2 shards", "node": node} | options
    return Stream(cache, remote, index, ROWS, PASSES, **options)


def train(
    cache: Cache,
    remote: Remote,
    *,
    world_size: int = 1,
    begin: tuple[int, int] = (0, 0),
    stop_after: int | None = None,
    name: str = "run",
    after_epoch: Callable[[int], None] = lambda epoch: None,
) -> Plan:
    """What the ranks of a node, as threads, are given from (epoch, step) on, for so many steps."""
    index, seen, errors = opened(cache, remote), {}, []
    barrier = threading.Barrier(world_size, timeout=60)
    left = [stop_after] * world_size

    def rank_of(rank: int) -> None:
        node = Node(name=name, local_rank=rank, local_world_size=world_size)
        own = made(cache, remote, index, node) if rank == 0 else None
        barrier.wait()
        with own or made(cache, remote, index, node) as source:
            source.start(begin[0], begin[1] * BATCH)
            source.warm()
            with Loader(index, num_threads=1, stream=source) as loader:
                for epoch in range(begin[0], EPOCHS):
                    for batch in loader.batches(
                        batches(index, epoch, rank, world_size, begin[1] * (epoch == begin[0]))
                    ):
                        if batch.weight:
                            seen.setdefault((epoch, batch.step), set()).update(batch.rows.tolist())
                        if batch.last:
                            barrier.wait()
                            if left[rank] is not None:
                                left[rank] -= 1
                                if left[rank] == 0:
                                    return
                    loader.next_pass()
                    barrier.wait()
                    if rank == 0:
                        after_epoch(epoch)

    def guarded(rank: int) -> None:
        try:
            rank_of(rank)
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=guarded, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((error for error in errors if not isinstance(error, threading.BrokenBarrierError)), errors[0])
    return seen


@pytest.mark.parametrize("world_size", [1, 3])
def test_an_epoch_of_a_set_three_times_the_cache_is_fetched_once_and_fits_at_any_time(
    server, remote, cache, shards, world_size
):
    fetched = []
    with Watch(cache.folder) as watch:
        seen = train(cache, remote, world_size=world_size, after_epoch=lambda _: fetched.append(server.tar_bytes()))
    assert seen == planned(opened(cache, remote))
    # the next epoch's first windows are fetched ahead
    assert set_bytes(shards) <= fetched[0] <= set_bytes(shards) + max(map(len, PASSES[1][:2])) * max_tar(shards) * 2
    assert all(1 <= server.asked[path.name] <= EPOCHS for path in shards.glob("*.tar"))
    assert 0 < watch.most <= cache.limit_bytes
    assert not list((cache.folder / "uses").iterdir())


def max_tar(shards: Path) -> int:
    return max(path.stat().st_size for path in shards.glob("*.tar"))


def test_stopped_and_resumed_on_other_ranks_the_batches_are_the_same_and_little_is_fetched_again(
    server, remote, cache, shards
):
    seen, place = {}, 0
    wanted = planned(opened(cache, remote))
    steps = len(wanted) // EPOCHS
    for number, (count, world_size) in enumerate([(5, 2), (9, 1), (4, 4), (None, 2)]):
        begin = divmod(place, steps)
        part = train(cache, remote, world_size=world_size, begin=begin, stop_after=count, name=f"run{number}")
        assert not part.keys() & seen.keys()
        seen |= part
        place += count or 0
    assert seen == wanted
    assert server.tar_bytes() <= (EPOCHS + 1) * set_bytes(shards)


def test_what_was_left_by_a_killed_process_is_used_or_removed(server, remote, cache, shards):
    index = opened(cache, remote)
    first, second, *_ = index.meta.shards
    for file in (first, second):
        tar = cache.take(file)
        assert tar is not None
        assert cache.is_empty(tar)
        if file is first:
            tar.write((shards / first.name).read_bytes())
            tar.flush()
            cache.keep(file, tar)
        tar.close()  # as the end of a process does: the second is a stub
    (cache.folder / "uses" / "dead-0-train").write_bytes((10**15).to_bytes(8, "little") + bytes(24))
    assert train(cache, remote) == planned(index)
    assert server.asked[first.name] < EPOCHS + 1
    assert not list((cache.folder / "tars").glob("*.part"))


def test_two_runs_share_a_cache_that_holds_the_need_of_both_and_else_the_second_is_named(remote, shards, tmp_path):
    cache = Cache(tmp_path / "cache", third(shards) * 2)
    results: dict[str, Plan] = {}
    with Watch(cache.folder) as watch:
        runs = [
            threading.Thread(target=lambda name=name: results.update({name: train(cache, remote, name=name)}))
            for name in ("one", "other")
        ]
        for run in runs:
            run.start()
        for run in runs:
            run.join()
    assert results["one"] == results["other"] == planned(opened(cache, remote))
    assert watch.most <= cache.limit_bytes
    small, index = Cache(tmp_path / "cache", third(shards)), opened(cache, remote)
    with (
        made(small, remote, index, Node(name="one")),
        pytest.raises(UserError, match=r"too small: .* for two windows of 2 shards, .* for other runs that use it now"),
    ):
        made(small, remote, index, Node(name="other"))


def test_a_cache_smaller_than_the_need_is_named_with_the_number_before_any_shard_is_fetched(
    server, remote, shards, tmp_path
):
    index_bytes = third(shards) - set_bytes(shards) // 3
    cache = Cache(tmp_path / "cache", index_bytes + 3 * max_tar(shards))
    index = opened(cache, remote)
    with pytest.raises(
        UserError, match=r"--cache-gb [\d.]+ is too small: .*give --cache-gb ([\d.]+), or less"
    ) as caught:
        made(cache, remote, index, remedy=", or less")
    enough = float(re.search(r"give --cache-gb ([\d.]+)", str(caught.value))[1])
    made(Cache(tmp_path / "cache", round(enough * 1e9)), remote, index).close()
    assert server.tar_bytes() == 0


def test_a_cache_larger_than_its_disk_is_named(tmp_path):
    with pytest.raises(UserError, match="is more than its disk has"):
        Cache(tmp_path / "cache", 10**18)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("corrupt", "SHA-256 differs"),
        ("403", "HTTP 403"),
        ("404", "HTTP 404"),
        ("503", "HTTP 503"),
        ("stall", "no answer"),
    ],
)
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_shard_that_stays_unreachable_is_named_with_its_address_where_it_is_needed(
    server, remote, cache, fault, says, world_size
):
    late = int(PASSES[0][3][0])
    name = f"train-{late:06d}.tar"
    server.faults[name], server.stall_s = (fault, 999), 2.0
    with pytest.raises(UserError, match=says) as caught:
        train(cache, remote, world_size=world_size)
    assert f"{server.url}/{name}" in str(caught.value)
    assert not list((cache.folder / "tars").glob("*.part"))


@pytest.mark.parametrize("fault", ["corrupt", "403", "503", "stall"])
def test_what_fails_and_is_not_needed_yet_is_tried_again_until_it_comes(server, remote, cache, fault):
    late = int(PASSES[0][1][0])
    server.faults[f"train-{late:06d}.tar"], server.stall_s = (fault, 5), 1.5
    with made(cache, remote, index := opened(cache, remote)) as source:
        source.start()
        source.warm()
        end = time.monotonic() + 60
        while not source.file(late).exists() and time.monotonic() < end:
            time.sleep(0.02)
        assert server.asked[f"train-{late:06d}.tar"] == 6
    assert train(cache, remote, name="again") == planned(index)


def test_a_vanished_server_is_named(server, remote, cache):
    index = opened(cache, remote)
    server.shutdown()
    server.server_close()
    with made(cache, remote, index) as source:
        source.start()
        with pytest.raises(UserError, match=r"http://127\.0\.0\.1:\d+/set/train-0000\d\d\.tar: cannot be fetched"):
            source.warm()


def test_closing_a_loader_whose_threads_wait_for_a_shard_ends_at_once(server, remote, cache, monkeypatch):
    monkeypatch.setattr(fetch, "READ_S", 30)
    server.faults |= {f"train-{n:06d}.tar": ("stall", 99) for n in range(NUM_SHARDS)}
    index = opened(cache, remote)
    with made(cache, remote, index) as source:
        source.start()
        loader = Loader(index, num_threads=2, stream=source)
        found = loader.batches(batches(index, 0, 0, 1))
        threading.Timer(0.3, loader.close).start()
        with pytest.raises(RuntimeError, match="closed"):
            next(found)


def test_a_wait_is_said_with_the_shard_that_is_missing(server, remote, cache, monkeypatch):
    monkeypatch.setattr(stream, "SAY_S", 0.05)
    server.bytes_per_s = 2e6
    said: list[str] = []
    with made(cache, remote, opened(cache, remote), say=said.append) as source:
        source.start()
        source.warm()
    assert re.fullmatch(r"waiting for http://.*/train-0000\d\d\.tar: [12] of 2 shards needed now are missing", said[0])
    assert source.wait_s > 0.05


def test_rows_in_their_order_stream_shard_by_shard_and_pass_by_pass(server, remote, cache):
    index, rows = opened(cache, remote), ROWS[5:50]
    passes = [shards_in_order(np.bincount(index.shard_ids[rows]))] * 3
    seen: list[list[int]] = []
    with Stream(cache, remote, index, rows, passes, span=8, use="valid", what="shards") as source:
        source.start(1)
        with Loader(index, num_threads=1, stream=source) as loader:
            for _ in range(2):
                seen.append([row for b in loader.batches(order.eval_batches(rows, 4, 0, 1)) for row in b.rows.tolist()])
                loader.next_pass()
    assert seen == [rows.tolist()] * 2


def test_a_set_that_changed_at_its_address_is_another_one(server, remote, cache, shards, tmp_path):
    before = opened(cache, remote).fingerprint
    write_set(tmp_path / "new", num_shards=2, per_shard=3)
    server.folder = tmp_path / "new"
    index = opened(cache, remote)
    assert index.fingerprint != before
    assert len(index) == 6
    server.folder = tmp_path
    with pytest.raises(UserError, match=r"train\.json: cannot be fetched"):
        cache.fetch_index(remote, "train")
    assert cache.fetch_index(remote, "train", optional=True) is None
    assert not list(cache.set_folder(remote).glob("*.json"))


def test_a_hash_that_is_a_path_is_refused(server, cache, remote, shards, tmp_path):
    text = (shards / "train.json").read_text()
    sha256 = open_index(shards, "train").meta.shards[0].sha256
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "train.json").write_text(text.replace(sha256, "../../outside"))
    server.folder = tmp_path / "bad"
    with pytest.raises(UserError, match="has no SHA-256"):
        cache.fetch_index(remote, "train")


def test_files_of_others_in_the_cache_are_left_alone(cache, remote):
    own = cache.folder / "tars" / "mine.tar"
    own.write_bytes(bytes(1000))
    train(cache, remote)
    assert own.read_bytes() == bytes(1000)


@pytest.mark.parametrize(
    ("sizes", "passes", "span", "ahead", "needed"),
    [
        ([1, 1, 1, 1], [[[0, 1], [2, 3]]], 10, 1, 4),  # two windows
        ([5, 1, 1, 1], [[[0], [1], [2], [3]]], 10, 1, 6),
        ([5, 1, 1, 1], [[[3], [2], [1], [0]]], 25, 1, 8),  # a batch over three groups
        ([1, 1, 1, 1], [[[0, 1, 2, 3]], [[0, 1, 2, 3]]], 10, 1, 4),  # all of it, epoch after epoch
        ([1, 2, 4, 8], [[[0], [3]], [[3], [0]]], 1, 1, 9),  # the same shard at the end and the begin of an epoch
        ([1, 1, 1, 1], [[[0], [1], [2], [3]]], 1, 2, 3),
    ],
)
def test_the_need_is_the_largest_sum_of_what_is_held_at_once(sizes, passes, span, ahead, needed):
    groups = [[np.array(group) for group in one] for one in passes]
    assert needed_bytes(groups, np.array(sizes), np.full(4, 10), span, ahead) == needed
