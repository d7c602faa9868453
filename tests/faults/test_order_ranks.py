"""FAULTS rows 3-6: uneven shards, double sharding, order against world size and threads, more ranks than images.

The order is a pure function over ranks, so most of it is checked in one process; that real processes finish, and that
DDP's gradient is the mean over the global batch, is checked with gloo.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cxrdist.data.loader import Loader
from cxrdist.data.order import train_batches
from cxrdist.errors import UserError
from cxrdist.shards.index import open_index

pytestmark = pytest.mark.fault

REPO = Path(__file__).parents[2]
EPOCH = """
import json, sys
import numpy as np, torch, torch.distributed as dist
from pathlib import Path
from cxrdist.data.loader import Loader
from cxrdist.data.order import train_batches
from cxrdist.shards.index import open_index

folder, out, num_rows, global_batch_size = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
dist.init_process_group("gloo")
rank, world_size = dist.get_rank(), dist.get_world_size()
index = open_index(folder, "train")
torch.manual_seed(0)
alone = torch.nn.Linear(225, 14).double()
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(225, 14).double())
model.module.load_state_dict(alone.state_dict())

def loss(net, images, targets):
    features = images[:, 0, ::40, ::40].flatten(1).double() / 255
    return torch.nn.functional.binary_cross_entropy_with_logits(net(features), targets.double())

plan = list(train_batches(np.arange(num_rows), seed=1, epoch=0, global_batch_size=global_batch_size,
                          device_batch_size=3, rank=rank, world_size=world_size))
seen, worst = [], 0.0
with Loader(index, num_threads=1) as loader, Loader(index, num_threads=1) as whole:
    for batch in loader.batches(plan):
        with model.no_sync() if not batch.last else torch.enable_grad():
            (loss(model, batch.images, batch.targets) * batch.weight).backward()
        seen += [(batch.step, int(key)) for key in batch.keys if batch.weight]
        if batch.last:
            members = [None] * world_size
            dist.all_gather_object(members, [key for step, key in seen if step == batch.step])
            keys = [key for part in members for key in part]
            (full,) = whole.batches([np.searchsorted(index.keys, keys)])
            alone.zero_grad()
            loss(alone, full.images, full.targets).backward()
            for parameter, reference in zip(model.module.parameters(), alone.parameters()):
                worst = max(worst, float((parameter.grad - reference.grad).abs().max()))
            model.zero_grad()
(out / f"{rank}.json").write_text(json.dumps({"seen": seen, "micros": len(plan), "worst": worst}))
dist.destroy_process_group()
"""


def run_ranks(world_size: int, script: str, *arguments: object, cwd: Path) -> None:
    path = cwd / "ranks.py"
    path.write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}", path]
    process = subprocess.Popen(
        [*map(str, command), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output


@pytest.mark.parametrize(
    ("world_size", "num_rows", "global_batch_size"),
    [
        pytest.param(2, 48, 20, id="uneven shards of 24, 8 and 16 images"),
        pytest.param(4, 3, 64, id="more ranks than images, a batch larger than the split"),
    ],
)
def test_processes_take_equal_steps_use_each_image_once_and_average_to_the_global_gradient(
    uneven_shards, tmp_path, world_size, num_rows, global_batch_size
):
    run_ranks(world_size, EPOCH, uneven_shards, tmp_path, num_rows, global_batch_size, cwd=tmp_path)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(world_size)]
    index = open_index(uneven_shards, "train")
    assert len({rank["micros"] for rank in ranks}) == 1
    keys = [key for rank in ranks for _, key in rank["seen"]]
    assert sorted(keys) == index.keys[:num_rows].tolist()
    assert max(rank["worst"] for rank in ranks) < 1e-14


def test_global_batches_hold_the_same_images_at_any_world_size_and_number_of_threads(uneven_shards):
    index = open_index(uneven_shards, "train")
    results = []
    for world_size in (1, 2, 4):
        for num_threads in (0, 1, 3):
            batches: dict[int, list[int]] = {}
            for rank in range(world_size):
                plan = train_batches(
                    np.arange(len(index)),
                    seed=5,
                    epoch=2,
                    global_batch_size=20,
                    device_batch_size=4,
                    rank=rank,
                    world_size=world_size,
                )
                with Loader(index, num_threads=num_threads) as loader:
                    for batch in loader.batches(plan):
                        batches.setdefault(batch.step, []).extend(batch.keys.tolist())
            results.append(batches)
    assert all(result == results[0] for result in results)
    assert sorted(key for keys in results[0].values() for key in keys) == index.keys.tolist()


@pytest.mark.parametrize("world_size", [1, 2, 4, 5])
def test_more_ranks_than_images_still_step_and_an_empty_split_is_named(uneven_shards, world_size):
    index = open_index(uneven_shards, "train")
    plan = {"seed": 0, "epoch": 0, "global_batch_size": 64, "device_batch_size": 16, "world_size": world_size}
    seen = []
    for rank in range(world_size):
        with Loader(index, num_threads=1) as loader:
            batches = list(loader.batches(train_batches(np.arange(3), rank=rank, **plan)))
        assert [batch.last for batch in batches] == [True]
        seen += [row for batch in batches if batch.weight for row in batch.rows.tolist()]
        with pytest.raises(UserError, match="no image"):
            train_batches(np.arange(0), rank=rank, **plan)
    assert sorted(seen) == [0, 1, 2]
