"""The count of a step's kernels and bytes: by hand on a few operators, and on both published models at full size."""

import dataclasses

import pytest
import torch

from cxrdist import recipes
from cxrdist.bench import __main__ as bench
from cxrdist.bench.traffic import CAST, MATMUL, OTHER, Counting, Traffic, count_step
from tests.training import worker

MB = 1024**2
SHALLOW = dataclasses.replace(worker.tiny_eva_x("b"), model_kwargs=(("depth", 1), ("embed_dim", 24), ("num_heads", 2)))


def counted(act) -> Traffic:
    with torch.no_grad(), Counting(traffic := Traffic()):
        act()
    return traffic


def test_an_operator_reads_its_inputs_and_writes_its_results_once():
    x, y, row = torch.empty(MB), torch.empty(MB), torch.empty(1024)
    table = x.view(1024, 1024)
    out = torch.empty(MB, dtype=torch.bfloat16)
    for act, kind, num_bytes in (
        (lambda: x + y, OTHER, 12 * MB),
        (lambda: x.add_(y), OTHER, 12 * MB),
        (lambda: table + row.expand(1024, 1024), OTHER, 8 * MB + 4096),  # read once, not 1024 times
        (lambda: x.to(torch.bfloat16), CAST, 6 * MB),
        (lambda: out.copy_(x), CAST, 6 * MB),
        (lambda: y.copy_(x), OTHER, 8 * MB),
        (lambda: y.zero_(), OTHER, 4 * MB),
        (lambda: torch.addcmul(x, x, y, out=out), OTHER, 14 * MB),
        (lambda: torch._foreach_mul_([x, y], 2.0), OTHER, 16 * MB),
        (lambda: table @ table, MATMUL, 12 * MB),
    ):
        traffic = counted(act)
        assert dict(traffic.kernels) == {kind: 1}
        assert traffic.num_bytes[kind] == num_bytes


def test_views_and_reserved_memory_are_free():
    x = torch.empty(4, 6)
    assert not counted(lambda: (x.t(), x.reshape(24), x[1:], x.detach(), torch.empty(5), torch.empty_like(x))).kernels


def test_a_step_without_autocast_has_no_cast_and_one_with_it_has():
    plain, half = (count_step(SHALLOW, 14, 4, precision) for precision in ("fp32", "bf16"))
    assert plain.num_bytes[CAST] < 0.001 * plain.no_matmul_bytes  # counters of the optimizer
    assert half.num_bytes[CAST] > 0.05 * half.no_matmul_bytes


def test_bytes_grow_with_the_images_of_a_step():
    sizes = [count_step(SHALLOW, 14, number, "bf16").no_matmul_bytes for number in (4, 8, 12)]
    assert sizes[2] - sizes[1] == pytest.approx(sizes[1] - sizes[0], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "most_gb"), [("eva_x", 120.0), ("chexfound", 60.5)])
def test_a_full_size_step_of_32_images_moves_no_more_than_it_did(model, most_gb):
    """With timm's own layers, and every frozen weight cast in each forward, these were 151.9 and 82.0 GB."""
    traffic = count_step(recipes.recipe_for(model, "b"), 14, 32, "bf16")
    assert 0.9 * most_gb < traffic.no_matmul_bytes / 1e9 < most_gb


@pytest.mark.slow
def test_the_command_prints_the_count(capsys):
    bench.main(["step", "--count", "--model", "eva_x_small", "--batch-size", "2", "--precision", "bf16"])
    printed = capsys.readouterr().out
    for text in ("casts", "matmul and attention", "all but matmul", "kernels", "GB", "bf16, batch 2"):
        assert text in printed
