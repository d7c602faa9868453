"""MixUp and CutMix in a run of two processes: resumed bit for bit; a device batch that splits a group is refused."""

from pathlib import Path

import pytest

from tests.training_runs import assert_same_result, rows, train

GROUPS = ("--set", "global_batch_size=8", "--set", "mix_group=4", "--device-batch-size", "4")


@pytest.mark.slow
@pytest.mark.parametrize("mix", ["+RandomMixUpV2:p=0.8", "+RandomCutMixV2:p=0.8"])
def test_a_mixed_run_resumes_bit_for_bit(uneven_shards: Path, tmp_path: Path, mix: str) -> None:
    flags = ("--augment", mix, *GROUPS, "--set", "epochs=2", "--set", "member_epochs=2")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    ended = train(uneven_shards, whole, *flags)
    assert ended.code == 0, ended.output
    ended = train(uneven_shards, parts, *flags, "--max-steps", "8")  # ends inside the second epoch
    assert ended.code == 0, ended.output
    assert len(rows(parts)) == 8
    ended = train(uneven_shards, parts, *flags, "--resume")
    assert ended.code == 0, ended.output
    assert_same_result(parts, whole)


def test_a_device_batch_that_splits_a_group_is_refused(uneven_shards: Path, tmp_path: Path) -> None:
    ended = train(uneven_shards, tmp_path / "run", "--augment", "+RandomMixUpV2", *GROUPS[:-1], "6", processes=1)
    assert ended.code == 2
    assert "--device-batch-size 6 would split the groups of 4 images that are mixed" in ended.output
