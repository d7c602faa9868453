"""The count of a step's kernels and bytes, on both published models at full size."""

import dataclasses

import pytest

from cxrdist import recipes
from cxrdist.bench import __main__ as bench
from cxrdist.bench.step import count_augmentation, count_step
from cxrdist.estimate.counter import CAST, WEIGHT_CAST
from tests.training import worker

SHALLOW = dataclasses.replace(worker.tiny_eva_x("b"), model_kwargs=(("depth", 1), ("embed_dim", 24), ("num_heads", 2)))


def test_a_step_without_autocast_has_no_cast_and_one_with_it_has():
    plain, half = (count_step(SHALLOW, 14, 4, precision) for precision in ("fp32", "bf16"))
    assert plain.traffic[CAST] + plain.traffic[WEIGHT_CAST] < 0.001 * plain.memory_traffic  # counters of the optimizer
    assert half.traffic[CAST] > 0.05 * half.memory_traffic


def test_bytes_grow_with_the_images_of_a_step():
    sizes = [count_step(SHALLOW, 14, number, "bf16").memory_traffic for number in (4, 8, 12)]
    assert sizes[2] - sizes[1] == pytest.approx(sizes[1] - sizes[0], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "most_gb"), [("eva_x", 120.0), ("chexfound", 60.5)])
def test_a_full_size_step_of_32_images_moves_no_more_than_it_did(model, most_gb):
    """With timm's own layers, and every frozen weight cast in each forward, these were 151.9 and 82.0 GB."""
    counter = count_step(recipes.recipe_for(model, "b"), 14, 32, "bf16")
    assert 0.9 * most_gb < counter.memory_traffic / 1e9 < most_gb


def test_the_augmentation_runs_its_kernels_once_a_batch():
    few, many = (count_augmentation(recipes.eva_x("b"), number) for number in (32, 64))
    assert many.kernels.total() < 1.2 * few.kernels.total()  # a step that few images take may be left out
    assert 1.5 < many.memory_traffic / few.memory_traffic < 2.5


@pytest.mark.slow
def test_the_command_prints_the_count(capsys):
    bench.main(["step", "--count", "--model", "eva_x_small", "--batch-size", "2", "--precision", "bf16"])
    printed = capsys.readouterr().out
    for text in (
        "casts",
        "matmul and attention",
        "all but matmul",
        "kernels",
        "GB",
        "bf16, batch 2",
        "of the step on an H100",
    ):
        assert text in printed
