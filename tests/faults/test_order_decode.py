"""FAULTS row 9: an undecodable image is named with shard and key; skipped only if asked, counted, bounded."""

import dataclasses
import hashlib

import numpy as np
import pytest
import xxhash

from cxrdist.data.loader import Loader
from cxrdist.data.order import train_batches
from cxrdist.data.reader import ShardReader
from cxrdist.errors import UserError
from cxrdist.shards.index import ShardIndex, open_index
from cxrdist.task import TASKS

pytestmark = pytest.mark.fault

BAD_ROWS = (3, 40)


@pytest.fixture
def index(uneven_shards) -> ShardIndex:
    """A shard set in which two images were stored as half a JPEG, as its index knows."""
    index = open_index(uneven_shards, "train", TASKS["b"])
    lengths, digests, checksums = index.lengths.copy(), index.digests.copy(), index.checksums.copy()
    for row in BAD_ROWS:
        lengths[row] //= 2
        data = ShardReader(index).read(row)[: lengths[row]]
        digests[row], checksums[row] = bytearray(hashlib.sha256(data).digest()), xxhash.xxh3_64_intdigest(data)
    return dataclasses.replace(index, lengths=lengths, digests=digests, checksums=checksums)


@pytest.mark.parametrize("num_threads", [0, 2])
def test_half_a_jpeg_is_named_with_shard_and_key(index, num_threads):
    with (
        Loader(index, num_threads=num_threads) as loader,
        pytest.raises(UserError, match=r"train-000002\.tar, key 00000056 .*cannot be decoded .*--on-bad skip"),
    ):
        list(loader.batches([np.arange(32, 48)]))


@pytest.mark.parametrize("version", [1, 2])
def test_damage_is_told_apart_and_never_skipped(index, version):
    changed = {"digests": index.digests.copy(), "checksums": index.checksums.copy() if version == 2 else None}
    changed["checksums" if version == 2 else "digests"][3] = 0
    with (
        Loader(dataclasses.replace(index, **changed), on_bad="skip") as loader,
        pytest.raises(UserError, match=r"train-000000\.tar, key 00000003 .*: damaged: .*copy the shard again"),
    ):
        list(loader.batches([np.arange(8)]))


def test_an_image_of_another_size_is_named(index):
    with (
        Loader(dataclasses.replace(index, meta=dataclasses.replace(index.meta, size_px=640))) as loader,
        pytest.raises(UserError, match="600x600 px instead of 640x640"),
    ):
        list(loader.batches([np.arange(2)]))


def test_skipping_is_counted_and_every_rank_keeps_its_number_of_batches(index):
    plan = {"seed": 0, "epoch": 0, "global_batch_size": 16, "device_batch_size": 1, "world_size": 2}
    seen: list[int] = []
    skipped = []
    for rank in range(2):
        micros = list(train_batches(np.arange(len(index)), rank=rank, **plan))
        with Loader(index, on_bad="skip") as loader:
            batches = list(loader.batches(micros))
        assert [(batch.step, batch.last) for batch in batches] == [(micro.step, micro.last) for micro in micros]
        for batch in batches:
            assert batch.images.shape == (1, 1, 600, 600)
            assert (batch.weight == 0) == (batch.rows[0] in BAD_ROWS)
            seen += batch.rows[: int(batch.weight > 0)].tolist()
        skipped += loader.skipped
    assert sorted(seen) == [row for row in range(len(index)) if row not in BAD_ROWS]
    assert sorted(image.row for image in skipped) == list(BAD_ROWS)
    assert all("cannot be decoded" in image.reason for image in skipped)


def test_the_rest_of_a_batch_keeps_its_share_of_the_global_batch(index):
    micros = list(
        train_batches(np.arange(8), seed=0, epoch=0, global_batch_size=8, device_batch_size=8, rank=0, world_size=1)
    )
    with Loader(index, on_bad="skip") as loader:
        (batch,) = loader.batches(micros)
    assert batch.weight == pytest.approx(7 / 8)
    assert len(batch.images) == len(batch.rows) == len(batch.targets) == 7
    assert 3 not in batch.rows


def test_too_many_bad_images_stop_the_run(index):
    with (
        Loader(index, on_bad="skip", max_bad=1) as loader,
        pytest.raises(UserError, match=r"more than 1 images cannot be decoded .*key 00000056"),
    ):
        list(loader.batches([np.arange(len(index))]))


def test_evaluation_drops_a_batch_of_bad_images_only(index):
    with Loader(index, on_bad="skip") as loader:
        batches = list(loader.batches([np.array([3]), np.array([40, 4])]))
    assert [batch.rows.tolist() for batch in batches] == [[4]]
    assert [image.key for image in loader.skipped] == [3, 56]


def test_a_cut_shard_is_never_skipped(index, tmp_path):
    (tmp_path / index.shards[0]).write_bytes(b"")
    with (
        Loader(dataclasses.replace(index, folder=tmp_path), on_bad="skip") as loader,
        pytest.raises(UserError, match=r"train-000000\.tar, key 00000000 .* 0 of"),
    ):
        list(loader.batches([np.arange(2)]))
