"""The count of kernels and bytes, by hand on a few operators."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cxrdist.estimate.counter import CAST, MATMUL, OTHER, WEIGHT_CAST, Counter

MB = 1024**2


def counted(act, weights=()) -> Counter:
    with torch.no_grad(), (counter := Counter(weights)):
        act()
    return counter


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
        counter = counted(act)
        assert dict(counter.kernels) == {kind: 1}
        assert counter.traffic[kind] == num_bytes


def test_views_and_reserved_memory_are_free():
    x = torch.empty(4, 6)
    assert not counted(lambda: (x.t(), x.reshape(24), x[1:], x.detach(), torch.empty(5), torch.empty_like(x))).kernels


def test_casts_of_weights_are_counted_apart_in_traffic_and_memory():
    weight, x = torch.empty(MB), torch.empty(MB)
    counter = counted(lambda: [each.to(torch.bfloat16) for each in (weight, x, weight)], [weight])
    assert counter.kernels == {WEIGHT_CAST: 2, CAST: 1}
    assert counter.traffic == {WEIGHT_CAST: 12 * MB, CAST: 6 * MB}
    assert counter.peaks == {True: 4 * MB, False: 2 * MB}


def test_the_peak_is_of_what_is_alive_at_a_time():
    x = torch.empty(MB)
    assert counted(lambda: [(x + 1) + 1 for _ in range(3)] and None).peaks[False] == 16 * MB


@pytest.mark.parametrize("groups", [1, 4, 16])
def test_a_convolution_costs_twice_as_much_back_whatever_its_groups(groups):
    with FakeTensorMode(), Counter() as counter:
        images = torch.empty(2, 16, 9, 9, requires_grad=True)
        weight = torch.empty(32, 16 // groups, 3, 3, requires_grad=True)
        out = torch.nn.functional.conv2d(images, weight, padding=1, groups=groups)
        forward = counter.flops
        out.sum().backward()
    assert forward == 2 * 2 * 32 * 81 * (16 // groups) * 9
    assert counter.flops == 3 * forward
