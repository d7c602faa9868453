import dataclasses
import gc
import io
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from cxrdist.data.loader import Loader
from cxrdist.data.order import eval_batches, train_batches
from cxrdist.data.reader import ShardReader
from cxrdist.distributed import environment
from cxrdist.errors import UserError
from cxrdist.shards.index import ShardIndex, open_index
from cxrdist.task import TASKS

pytestmark = pytest.mark.fast

PLAN = {"seed": 3, "epoch": 0, "global_batch_size": 20, "device_batch_size": 8, "rank": 0, "world_size": 1}


@pytest.fixture
def index(uneven_shards) -> ShardIndex:
    return open_index(uneven_shards, "train", TASKS["b"])


def pixels(index: ShardIndex, row: int, mode: str = "L") -> np.ndarray:
    image = Image.open(io.BytesIO(ShardReader(index).read(row))).convert(mode)
    array = np.asarray(image)
    return array[None] if mode == "L" else array.transpose(2, 0, 1)


@pytest.mark.parametrize("num_threads", [0, 1, 3])
def test_batches_hold_the_planned_images_and_labels_whatever_the_threads(index, num_threads):
    plan = list(train_batches(np.arange(len(index)), **PLAN))
    with Loader(index, num_threads=num_threads) as loader:
        batches = list(loader.batches(plan))
    assert [len(batch.rows) for batch in batches] == [8, 8, 4, 8, 8, 4, 8]
    for micro, batch in zip(plan, batches, strict=True):
        assert np.array_equal(batch.rows, micro.rows)
        assert np.array_equal(batch.keys, index.keys[micro.rows])
        assert (batch.weight, batch.last, batch.step, batch.epoch) == (micro.weight, micro.last, micro.step, 0)
        assert batch.images.dtype == torch.uint8
        assert batch.images.is_contiguous()
        assert torch.equal(batch.targets, torch.from_numpy(index.targets[micro.rows]))
        for row, image in zip(batch.rows, batch.images.numpy(), strict=True):
            assert np.array_equal(image, pixels(index, row))


def test_evaluation_reads_each_image_once_in_plain_row_arrays(index):
    with Loader(index) as loader:
        batches = list(loader.batches(eval_batches(np.arange(len(index)), 10, 0, 1)))
    assert np.concatenate([batch.keys for batch in batches]).tolist() == index.keys.tolist()
    assert [batch.step for batch in batches] == list(range(5))
    assert all(batch.weight == 1.0 and batch.last for batch in batches)


def test_a_split_with_one_colour_image_comes_in_three_channels(index):
    channels = index.channels.copy()
    channels[5] = 3
    with Loader(dataclasses.replace(index, channels=channels)) as loader:
        (batch,) = loader.batches([np.arange(4)])
    assert batch.images.shape == (4, 3, 600, 600)
    assert np.array_equal(batch.images[2].numpy(), pixels(index, 2, "RGB"))


def test_a_test_split_has_no_targets(index):
    with Loader(dataclasses.replace(index, targets=None)) as loader:
        (batch,) = loader.batches([np.arange(4)])
    assert batch.targets is None


def test_a_kept_batch_or_view_is_never_overwritten_and_memory_is_used_again(index):
    with Loader(index, num_threads=2) as loader:
        kept, copies, addresses = [], [], set()
        for batch in loader.batches(np.arange(4) + i % 12 * 4 for i in range(40)):
            addresses.add(batch.images.data_ptr())
            if batch.step % 8 == 0:
                kept.append(batch.images[1, 0, ::2])
                copies.append(kept[-1].clone())
        assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))
    assert len(addresses) <= len(kept) + 5


def decode_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


def test_closing_or_dropping_an_abandoned_loader_leaves_no_thread_and_no_open_file(index, monkeypatch):
    with Loader(index, num_threads=3) as loader:
        for _ in loader.batches(train_batches(np.arange(len(index)), **PLAN)):
            break
        files = list(loader._reader._files.values())
        assert files
        assert decode_threads()
    assert not decode_threads()

    loader = Loader(index, num_threads=3)
    batches = loader.batches(train_batches(np.arange(len(index)), **PLAN))
    next(batches)
    del loader, batches
    gc.collect()
    deadline = time.monotonic() + 5
    while decode_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not decode_threads()


def test_an_iterator_of_a_closed_loader_raises_instead_of_waiting(index):
    loader = Loader(index, num_threads=1)
    batches = loader.batches(train_batches(np.arange(len(index)), **PLAN))
    next(batches)
    loader.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(batches)
    with pytest.raises(RuntimeError, match="closed"):
        next(loader.batches([np.arange(2)]))


def test_threads_share_the_cores_among_the_ranks_of_the_node_where_the_entry_says_so(index, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(12)))
    for ranks, threads in ((1, 8), (2, 6), (8, 1), (16, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        assert environment.decode_threads() == threads
        with Loader(index) as loader:  # does not read the environment
            assert loader.num_threads == 8
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {3})
    with Loader(index) as loader:
        assert loader.num_threads == 1


def test_reading_works_beyond_the_number_of_files_kept_open(index, monkeypatch):
    monkeypatch.setattr("cxrdist.data.reader.MAX_OPEN", 1)
    reader = ShardReader(index)
    first = [reader.read(row) for row in (0, 30, 40)]
    assert first == [reader.read(row) for row in (0, 30, 40)]
    assert len(reader._files) == 1


def test_a_shard_cut_after_it_was_opened_is_named(index, tmp_path):
    (tmp_path / index.shards[0]).write_bytes((index.folder / index.shards[0]).read_bytes()[:2000])
    with pytest.raises(UserError, match=r"train-000000\.tar, key 00000007 .* bytes are there"):
        ShardReader(dataclasses.replace(index, folder=tmp_path)).read(7)
    with pytest.raises(UserError, match=r"train-000002\.tar, key 00000048 .* No such file"):
        ShardReader(dataclasses.replace(index, folder=tmp_path)).read(32)


@pytest.mark.gpu
def test_on_a_gpu_batches_are_the_same_and_not_overwritten_while_kept(index):
    plan = [np.arange(4) + i % 12 * 4 for i in range(60)]
    with Loader(index, num_threads=2) as on_cpu, Loader(index, "cuda", num_threads=2) as on_gpu:
        kept = []
        for expected, batch in zip(on_cpu.batches(plan), on_gpu.batches(plan), strict=True):
            assert batch.images.device.type == "cuda"
            assert torch.equal(batch.targets.cpu(), expected.targets)
            kept.append((batch.images * 1, expected.images.clone(), batch.images))
        for used_at_once, expected_images, used_later in kept:
            assert torch.equal(used_at_once.cpu(), expected_images)
            assert torch.equal(used_later.cpu(), expected_images)
        assert len(on_gpu._buffers._free) <= 4


SECOND_GPU = """
import sys, torch
from pathlib import Path
from cxrdist.data.loader import Loader
from cxrdist.shards.index import open_index
from cxrdist.task import TASKS
torch.cuda.set_device(1)
with Loader(open_index(Path(sys.argv[1]), "train"), "cuda") as loader:
    assert [batch.images.device.index for batch in loader.batches([torch.arange(4).numpy()])] == [1]
print(torch._C._cuda_hasPrimaryContext(0))
"""


@pytest.mark.gpu
def test_the_loader_of_the_second_gpu_opens_no_context_on_the_first(uneven_shards):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    done = subprocess.run([sys.executable, "-c", SECOND_GPU, str(uneven_shards)], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
