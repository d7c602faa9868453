"""The benchmark of many images, on few; and what each process reads to open a set."""

import argparse
from pathlib import Path

import pytest

from cxrdist.bench import scale

pytestmark = pytest.mark.slow


def test_every_block_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "NODE", 2)
    monkeypatch.setattr(scale, "WORLDS", (1,))
    rows = scale.run(argparse.Namespace(images=3000, table_images=600))
    stages = {row.stage for row in rows}
    assert stages == {"index", "1 of a node", "2 of a node", *scale.STAGES, "start-up"}
    assert all(row.note for row in rows)


def test_what_a_process_reads_to_open_a_set_does_not_grow_with_the_world(tmp_path: Path) -> None:
    scale.real_set(tmp_path / "set", num_shards=8, per_shard=100)
    alone, world = scale.reads_of(tmp_path / "set", 1)[0], scale.reads_of(tmp_path / "set", 4)
    print(f"1 process: {alone}; each of 4: {world}")
    for name in ("reads", "bytes", "opens"):
        assert max(one[name] for one in world) < alone[name]  # headers are divided
    assert sum(one["bytes"] for one in world) < 1.3 * alone["bytes"]  # and no file is read by all of them
