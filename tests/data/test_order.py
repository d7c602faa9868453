import gc
import itertools
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxrdist.data.order import MicroBatch, accum_steps, epoch_order, eval_batches, num_steps, train_batches
from cxrdist.data.rows import Chosen, EpochOrder, in_pieces, windows
from cxrdist.errors import UserError

pytestmark = pytest.mark.fast


def flat(lists: list[list]) -> list:
    return list(itertools.chain.from_iterable(lists))


def global_batches(
    rows: np.ndarray, *, world_size: int, start_step: int = 0, stop_step: int | None = None, **plan: int
) -> list[list[int]]:
    """The global batches that all ranks together would see, checked to be consistent over ranks."""
    per_rank = [
        list(train_batches(rows, rank=rank, world_size=world_size, start_step=start_step, **plan))
        for rank in range(world_size)
    ]
    assert len({len(micros) for micros in per_rank}) == 1
    batches: dict[int, list[list[int]]] = {}
    for micros in per_rank:
        slices: dict[int, list[int]] = {}
        for micro in micros:
            assert 1 <= len(micro.rows) <= plan["device_batch_size"]
            slices.setdefault(micro.step, []).extend(micro.rows.tolist() if micro.weight else [])
        for step, own in slices.items():
            batches.setdefault(step, []).append(own)
    for micros in zip(*per_rank, strict=True):
        assert len({(micro.step, micro.last, micro.epoch) for micro in micros}) == 1
    for slices_of_step in batches.values():
        assert max(map(len, slices_of_step)) - min(map(len, slices_of_step)) <= 1
    return [flat(batches[step]) for step in sorted(batches) if stop_step is None or step < stop_step]


@settings(deadline=None, max_examples=120)
@given(
    num_rows=st.integers(1, 90),
    seed=st.integers(0, 2**63),
    epoch=st.integers(0, 5),
    global_batch_size=st.integers(1, 40),
    worlds=st.lists(st.integers(1, 8), min_size=1, max_size=4),
    device_batch_sizes=st.lists(st.integers(1, 9), min_size=4, max_size=4),
    cuts=st.lists(st.integers(0, 90), max_size=3),
)
def test_interruptions_on_changing_world_sizes_use_each_image_once_in_the_same_global_batches(
    num_rows, seed, epoch, global_batch_size, worlds, device_batch_sizes, cuts
):
    rows = np.arange(num_rows, dtype=np.int64) * 3 + 1
    plan = {"seed": seed, "epoch": epoch, "global_batch_size": global_batch_size}
    steps = num_steps(num_rows, global_batch_size)
    bounds = [0, *sorted(min(cut, steps) for cut in cuts), steps]
    seen: list[list[int]] = []
    for i, (start, stop) in enumerate(itertools.pairwise(bounds)):
        world_size = worlds[i % len(worlds)]
        seen += global_batches(
            rows,
            world_size=world_size,
            start_step=start,
            stop_step=stop,
            device_batch_size=device_batch_sizes[i % 4],
            **plan,
        )
    undisturbed = global_batches(rows, world_size=1, device_batch_size=global_batch_size, **plan)
    assert seen == undisturbed
    assert sorted(flat(seen)) == rows.tolist()
    assert len(seen) == steps >= 1


@settings(deadline=None, max_examples=120)
@given(
    sizes=st.lists(st.integers(1, 17), min_size=1, max_size=9),
    window=st.sampled_from([1, 2, 3, 9, 100]),
    seed=st.integers(0, 2**63),
    epoch=st.integers(0, 5),
    global_batch_size=st.integers(1, 40),
    worlds=st.lists(st.integers(1, 8), min_size=1, max_size=4),
    device_batch_sizes=st.lists(st.integers(1, 9), min_size=4, max_size=4),
    cuts=st.lists(st.integers(0, 90), max_size=3),
    left_out=st.integers(0, 5),
)
def test_windows_change_nothing_of_that_and_a_shard_is_read_in_one_window(
    sizes, window, seed, epoch, global_batch_size, worlds, device_batch_sizes, cuts, left_out
):
    shards = np.repeat(np.arange(len(sizes)) * 2, sizes)  # some shards without a row
    rows = np.arange(len(shards), dtype=np.int64)[min(left_out, len(shards) - 1) :]
    plan = {"seed": seed, "epoch": epoch, "global_batch_size": global_batch_size, "shards": shards, "window": window}
    steps = num_steps(len(rows), global_batch_size)
    bounds = [0, *sorted(min(cut, steps) for cut in cuts), steps]
    seen: list[list[int]] = []
    for i, (start, stop) in enumerate(itertools.pairwise(bounds)):
        device, world = device_batch_sizes[i % 4], worlds[i % len(worlds)]
        parts = {"world_size": world, "start_step": start, "stop_step": stop}
        seen += global_batches(rows, device_batch_size=device, **parts, **plan)
    order = flat(seen)
    assert sorted(order) == rows.tolist()
    position = 0
    for group in windows(np.unique(shards[rows]), seed, epoch, window):
        count = int(np.isin(shards[rows], group).sum())
        assert set(shards[order[position : position + count]].tolist()) == set(group.tolist())
        position += count
    assert position == len(rows)
    if window >= len(np.unique(shards[rows])):
        assert order == epoch_order(rows, seed, epoch).tolist()


@settings(deadline=None, max_examples=60)
@given(
    num_rows=st.integers(1, 40),
    global_batch_size=st.integers(1, 24),
    device_batch_size=st.integers(1, 8),
    world_size=st.integers(1, 8),
)
def test_weighted_gradient_over_ranks_is_the_mean_over_the_global_batch(
    num_rows, global_batch_size, device_batch_size, world_size
):
    rng = np.random.default_rng(num_rows)
    features, wanted, weights = rng.normal(size=(num_rows, 5)), rng.normal(size=num_rows), rng.normal(size=5)

    def mean_gradient(rows: np.ndarray) -> np.ndarray:
        residual = features[rows] @ weights - wanted[rows]
        return 2.0 * features[rows].T @ residual / len(rows)

    plan = {"seed": 7, "epoch": 0, "global_batch_size": global_batch_size, "device_batch_size": device_batch_size}
    gradients: dict[int, np.ndarray] = {}
    members: dict[int, list[int]] = {}
    for rank in range(world_size):
        for micro in train_batches(np.arange(num_rows), rank=rank, world_size=world_size, **plan):
            share = micro.weight * mean_gradient(micro.rows) / world_size  # DDP takes the mean over ranks
            gradients[micro.step] = gradients.get(micro.step, 0.0) + share
            members.setdefault(micro.step, []).extend(micro.rows.tolist() if micro.weight else [])
    for step, gradient in gradients.items():
        np.testing.assert_allclose(gradient, mean_gradient(np.array(members[step])), rtol=1e-10, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(
    num_rows=st.integers(1, 30),
    global_batch=st.integers(1, 12),
    device_batch=st.integers(1, 5),
    world=st.integers(1, 5),
)
def test_masked_cells_give_the_gradient_of_the_observed_ones_of_the_global_batch(
    num_rows, global_batch, device_batch, world
):
    rng = np.random.default_rng(num_rows)
    cells = rng.normal(size=(num_rows, 3))
    cells[rng.random((num_rows, 3)) < 0.6] = np.nan
    observed = (~np.isnan(cells)).sum(axis=1)
    plan = {"seed": 3, "epoch": 1, "global_batch_size": global_batch, "device_batch_size": device_batch}
    sums: dict[int, float] = {}
    members: dict[int, list[int]] = {}
    for rank in range(world):
        own = train_batches(
            np.arange(num_rows),
            rank=rank,
            world_size=world,
            count_cells=lambda rows, epoch: int(observed[rows].sum()),
            **plan,
        )
        for micro, plain in zip(
            own, train_batches(np.arange(num_rows), rank=rank, world_size=world, **plan), strict=True
        ):
            mean = np.nansum(cells[micro.rows]) / max(1, observed[micro.rows].sum())
            sums[micro.step] = sums.get(micro.step, 0.0) + micro.weight * mean / world
            members.setdefault(micro.step, []).extend(micro.rows.tolist() if plain.weight else [])
    for step, total in sums.items():
        rows = members[step]
        wanted = np.nansum(cells[rows]) / max(1, observed[rows].sum())
        np.testing.assert_allclose(total, wanted, rtol=1e-10, atol=1e-12)


@given(
    num_rows=st.integers(1, 60),
    device_batch_size=st.integers(1, 9),
    world_size=st.integers(1, 8),
)
def test_eval_batches_hold_each_row_once_and_are_the_same_at_any_world_size(num_rows, device_batch_size, world_size):
    rows = np.arange(num_rows)[::-1].copy()
    dealt = [[b.tolist() for b in eval_batches(rows, device_batch_size, r, world_size)] for r in range(world_size)]
    alone = [batch.tolist() for batch in eval_batches(rows, device_batch_size, 0, 1)]
    assert sorted(flat(dealt)) == sorted(alone)
    assert sorted(flat(alone)) == list(range(num_rows))


def test_order_changes_with_epoch_and_seed_but_not_with_the_order_of_the_rows():
    rows = np.arange(1000)
    order = epoch_order(rows, seed=1, epoch=0)
    assert np.array_equal(order, epoch_order(rows[::-1], seed=1, epoch=0))
    assert not np.array_equal(order, epoch_order(rows, seed=1, epoch=1))
    assert not np.array_equal(order, epoch_order(rows, seed=2, epoch=0))
    assert not np.array_equal(order, rows)


def test_order_is_the_one_that_checkpoints_in_the_world_were_written_with():
    assert epoch_order(np.arange(12), seed=48, epoch=3).tolist() == [2, 5, 4, 8, 3, 7, 6, 1, 0, 9, 10, 11]


@pytest.mark.parametrize("sorted_at_once", [1, 7, 100, 1000, 5000])
@pytest.mark.parametrize("num_rows", [1, 2, 999, 5000])
def test_the_order_is_that_of_one_sort_whatever_is_sorted_at_once(monkeypatch, sorted_at_once, num_rows):
    rows = range(num_rows)
    expected = epoch_order(rows, seed=5, epoch=3)
    monkeypatch.setattr("cxrdist.data.rows.SORTED_AT_ONCE", sorted_at_once)
    order = EpochOrder(rows, seed=5, epoch=3)
    assert np.array_equal(order[:], expected)
    for start in (0, num_rows // 3, num_rows - 1, num_rows):  # a resumed epoch begins anywhere
        assert np.array_equal(order[start : start + 11], expected[start : start + 11])


def test_a_part_of_the_rows_has_the_same_order_as_a_mask_and_as_numbers(monkeypatch):
    mask = np.random.default_rng(0).random(3000) < 0.7
    expected = epoch_order(np.flatnonzero(mask), seed=1, epoch=0)
    monkeypatch.setattr("cxrdist.data.rows.SORTED_AT_ONCE", 100)
    monkeypatch.setattr("cxrdist.shards.columns.ROWS_AT_ONCE", 64)
    assert len(Chosen(mask)) == mask.sum()
    assert np.array_equal(epoch_order(Chosen(mask), seed=1, epoch=0), expected)
    assert np.array_equal(np.concatenate(list(in_pieces(Chosen(mask)))), np.flatnonzero(mask))


def test_an_epoch_holds_the_order_of_a_part_only():
    """10 million rows as numbers would be 80 MB."""
    tracemalloc.start()
    order = EpochOrder(range(2_000_000), seed=0, epoch=0)
    order[1_000_000:1_000_064]
    gc.collect()
    held, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 4_000_000
    assert most < 14_000_000


def test_windows_are_those_that_checkpoints_in_the_world_were_written_with():
    shards = np.repeat(np.arange(6), 2)
    assert epoch_order(np.arange(12), 48, 3, shards, 2).tolist() == [8, 1, 0, 9, 7, 6, 10, 11, 2, 5, 4, 3]
    assert [group.tolist() for group in windows(np.arange(6), 48, 3, 4)] == [[0, 4, 3, 5], [2, 1]]


def test_windows_come_in_another_order_in_each_epoch_and_say_nothing_of_the_rows():
    shards = np.repeat(np.arange(500), 40)
    first, second = (np.concatenate(windows(np.arange(500), 1, epoch, 8)) for epoch in (0, 1))
    rows = epoch_order(np.arange(500), 1, 0)
    for other in (second, rows, np.arange(500)):
        assert abs(np.corrcoef(np.argsort(first), np.argsort(other))[0, 1]) < 4 / np.sqrt(500)
    order = epoch_order(np.arange(len(shards)), 1, 0, shards, 8)
    inside = order[:320]  # of the first window
    assert abs(np.corrcoef(inside[:-1], inside[1:])[0, 1]) < 4 / np.sqrt(320)


def test_order_is_evenly_spread_and_successive_epochs_are_unrelated():
    rows = np.arange(20_000)
    first, second = (np.argsort(epoch_order(rows, 0, epoch)) for epoch in (0, 1))
    standard_error = 1 / np.sqrt(len(rows))
    assert abs(np.corrcoef(rows, first)[0, 1]) < 4 * standard_error
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 * standard_error
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 4 * standard_error


def test_starting_late_costs_no_batches_before_it():
    start = time.perf_counter()
    rows = np.arange(1_000_000)
    plan = {"seed": 0, "epoch": 0, "global_batch_size": 1, "device_batch_size": 1, "rank": 0, "world_size": 1}
    assert next(train_batches(rows, start_step=999_999, **plan)).step == 999_999
    assert time.perf_counter() - start < 3


def test_a_rank_without_an_image_runs_a_placeholder_of_weight_zero():
    plan = {"seed": 0, "epoch": 0, "global_batch_size": 8, "device_batch_size": 4, "world_size": 4}
    micros: list[MicroBatch] = [next(train_batches(np.arange(3), rank=rank, **plan)) for rank in range(4)]
    assert sorted(micro.weight for micro in micros) == pytest.approx([0, 4 / 3, 4 / 3, 4 / 3])
    assert all(len(micro.rows) == 1 and micro.last for micro in micros)


def test_accumulation_covers_the_slice_where_nothing_divides():
    assert accum_steps(64, 16, 2) == 2
    assert accum_steps(64, 16, 3) == 2
    assert accum_steps(64, 64, 8) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rows": np.arange(0)}, "no image"),
        ({"start_step": 4}, "3 steps"),
        ({"device_batch_size": 0}, "--device-batch-size 0"),
        ({"global_batch_size": 0}, "global batch size 0"),
    ],
)
def test_plans_that_cannot_be_are_named_at_once(change, words):
    plan = {"seed": 0, "epoch": 0, "global_batch_size": 4, "device_batch_size": 4, "rank": 0, "world_size": 1}
    with pytest.raises(UserError, match=words):
        train_batches(**({"rows": np.arange(10)} | plan | change))
