"""Dry-run estimates: counted FLOPs equal the known ones, memory and disk refusals name the flag that helps."""

import dataclasses
import functools
from pathlib import Path

import pytest
from torch import nn

from cxrdist import train
from cxrdist.errors import UserError
from cxrdist.estimate.count import GB, allocated_bytes, best_device_batch, count_cost, fitting_batch, memory_bytes
from cxrdist.estimate.report import PUBLISHED_T4, dry_run, infer_dry_run, infer_report, report, require_fit, train_hours
from cxrdist.models import ARCHITECTURES, Architecture
from cxrdist.recipes import Group, chexfound, demo_eva_x, eva_x
from cxrdist.task import TASKS, Task


def test_counted_flops_of_both_models_are_the_known_ones() -> None:
    """157 and 740 GFLOP an image, as counted for the published inference; 86.3 M and 8,723,470 trained parameters."""
    eva, chex = count_cost(eva_x("b"), 14), count_cost(chexfound("b"), 14)
    assert eva.forward_flops / 1e9 == pytest.approx(157, rel=0.01)
    assert chex.forward_flops / 1e9 == pytest.approx(740, rel=0.01)
    assert eva.num_trained == eva.num_parameters
    assert chex.num_trained == 8_723_470
    assert eva.step_flops == pytest.approx(3 * eva.forward_flops, rel=0.05)
    assert chex.step_flops < 1.1 * chex.forward_flops  # the frozen backbone has no backward pass


# The allocator's peaks in GB for batches of 8 and 32: (recipe, precision, checkpointing): (one GPU, under DDP).
PEAKS = {
    (eva_x, "fp32", False): ((6.587, 21.775), (6.924, 22.117)),
    (eva_x, "fp32", True): ((2.284, 4.319), (2.513, 4.659)),
    (eva_x, "bf16", False): ((4.581, 13.448), (4.927, 13.797)),
    (eva_x, "fp16", True): ((2.147, 3.634), (2.361, 3.976)),
    (chexfound, "fp32", False): ((2.034, 3.804), (2.068, 3.836)),
    (chexfound, "fp16", False): ((1.171, 2.199), (1.205, 2.233)),
}


@pytest.mark.parametrize("case", PEAKS, ids=lambda case: f"{case[0].__name__}-{case[1]}-{case[2]}")
def test_estimated_memory_is_what_torch_allocates(case) -> None:
    make, precision, checkpointing = case
    cost = count_cost(make("b"), 14, precision, grad_checkpointing=checkpointing)
    for num_devices, peaks in enumerate(PEAKS[case], 1):
        for batch, peak in zip((8, 32), peaks, strict=True):
            assert allocated_bytes(cost, batch, num_devices) / GB == pytest.approx(peak, rel=0.1)


def test_the_traffic_that_is_no_matrix_multiplication_is_the_one_known() -> None:
    """As a step of 32 images has it, with loss, optimizer and EMA: the estimate multiplies what one image costs."""
    cost = count_cost(eva_x("b"), 14, "bf16")
    assert (32 * cost.step_traffic + cost.update_traffic) / GB == pytest.approx(119.2, rel=0.05)


def test_the_default_device_batch_fits_the_gpu() -> None:
    """32 images of EVA-X nearly fill a T4, so that a share of 32 is two times 16; with checkpointing it is one."""
    cost = count_cost(eva_x("b"), 14, "fp16")
    assert 0.9 * 15.6 * GB < memory_bytes(cost, 32, "cuda", 2) < 15.6 * GB
    assert fitting_batch(eva_x("b"), 14, "fp16", 15.6 * GB, 2) == 16
    assert fitting_batch(eva_x("b"), 14, "fp16", 15.6 * GB, 2, grad_checkpointing=True) == 32
    assert fitting_batch(eva_x("b"), 14, "fp32", 15.6 * GB, 2) == 16
    assert fitting_batch(eva_x("b"), 14, "fp32", 12 * GB, 2) == 11  # three parts of the share
    assert fitting_batch(eva_x("b"), 14, "bf16", 79 * GB, 1) == 32
    assert fitting_batch(chexfound("b"), 14, "fp16", 15.6 * GB, 2) == 32
    with pytest.raises(UserError, match=r"for one image, and the GPU with the least free memory has 2\.0 GB"):
        fitting_batch(eva_x("b"), 14, "fp16", 2 * GB, 2)


def test_published_t4_epochs_are_within_the_stated_factor_of_two() -> None:
    minutes = {"eva_x": (eva_x("b"), 57.7), "chexfound": (chexfound("b"), 173.0)}
    for recipe, published in minutes.values():
        estimate = 60 * train_hours(count_cost(recipe, 14, "fp16"), 108_491, 1, PUBLISHED_T4, 16)
        assert 0.5 < estimate / published < 2.0
    t4 = PUBLISHED_T4
    cost = count_cost(eva_x("b"), 14, "fp16")
    assert best_device_batch(cost, 64, t4.kind, t4.num_devices, t4.memory_bytes) == 16  # what the published run used


def test_run_that_cannot_fit_names_the_flag_that_helps() -> None:
    recipe, cost = eva_x("b"), count_cost(eva_x("b"), 14)
    with pytest.raises(UserError, match="use --device-batch-size 16"):
        require_fit(cost, recipe, PUBLISHED_T4, 64, 1e12)
    with pytest.raises(UserError, match="smaller --model"):
        require_fit(cost, recipe, dataclasses.replace(PUBLISHED_T4, memory_bytes=1.5 * GB), None, 1e12)
    with pytest.raises(UserError, match="--out"):
        require_fit(cost, recipe, PUBLISHED_T4, None, 1e9)
    require_fit(cost, recipe, PUBLISHED_T4, 16, 1e12)
    assert memory_bytes(cost, 16, "cuda", 2) > memory_bytes(cost, 8, "cuda", 2)


def test_inference_at_the_published_speed_costs_the_share_of_passes_that_is_left() -> None:
    text = infer_report(TASKS["b"], 47_927, PUBLISHED_T4)
    assert "passes: 10 of eva_x, 1 of chexfound" in text
    row = next(line for line in text.splitlines() if "published inference" in line)
    hours = float(row.split(" h ")[0].split()[-1])
    left = (10 * 157 + 740) / (12 * 157 + 2 * 740)
    assert hours == pytest.approx(6.8 * left, abs=0.06)


def test_report_marks_its_times_as_estimates() -> None:
    text = report(demo_eva_x("b"), functools.partial(count_cost, demo_eva_x("b"), 14), 480, PUBLISHED_T4, None, 1e12)
    assert "estimates" in text
    assert "factor of two" in text
    assert "H100 x 8" in text


def test_dry_run_prints_estimates_writes_nothing_and_refuses_what_cannot_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    train.main(["--div", "b", "--dry-run"])
    text = capsys.readouterr().out
    assert "157 GFLOP" in text
    assert "108,491" in text
    assert "T4 x 2" in text
    with pytest.raises(UserError, match="--device-batch-size"):
        train.main(["--div", "b", "--dry-run", "--device-batch-size", "4096"])
    assert "T4 x 2" in capsys.readouterr().out  # a machine that is too small learns which would do
    assert list(tmp_path.iterdir()) == []


def test_a_task_without_published_counts_needs_shards(tmp_path: Path) -> None:
    task = Task(name="mine", labels=("one", "two", "three"))
    with pytest.raises(UserError, match=r"no train shards in .*preprocess task mine first"):
        dry_run(eva_x("mine"), task, tmp_path, tmp_path, device_batch_size=None, precision="fp32")
    with pytest.raises(UserError, match="no test shards in "):
        infer_dry_run(task, tmp_path, "fp32")


def test_any_architecture_is_counted_with_its_labels_and_the_size_of_its_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def create(image_size: int, num_classes: int, drop_rate: float) -> nn.Module:
        features = (nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return nn.Sequential(*features, nn.Dropout(drop_rate), nn.Linear(4, num_classes))

    monkeypatch.setitem(ARCHITECTURES, "toy", Architecture(name="toy", create=create))
    groups = (Group(pattern="", lr=1e-3),)
    recipe = dataclasses.replace(eva_x("b"), name="toy", model="toy", image_size=10, groups=groups)
    cost = count_cost(recipe, 3, size_px=100)
    assert cost.forward_flops == 2 * 3 * 4 * 10 * 10 + 2 * 4 * 3
    assert cost.num_trained == cost.num_parameters == 3 * 4 + 2 * 4 + 4 * 3 + 3
    more = memory_bytes(count_cost(recipe, 3, size_px=300), 1, "cpu", 1) - memory_bytes(cost, 1, "cpu", 1)
    assert more == 3 * (300 * 300 - 100 * 100)  # three decoded batches


def test_what_is_not_trained_costs_no_backward_pass() -> None:
    recipe = dataclasses.replace(demo_eva_x("b"), model_kwargs=(("depth", 4),))
    costs = {train: count_cost(dataclasses.replace(recipe, train=train), 14) for train in ("head", "last:2", "all")}
    assert costs["head"].num_trained == 192 * 14 + 14
    for name in ("num_trained", "step_flops", "activation_bytes", "update_traffic"):
        head, last, everything = (getattr(cost, name) for cost in costs.values())
        assert head < last < everything, name
