"""A process that leaves mid-epoch, without closing its loader, ends at once and leaves nothing behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.fault

ABANDON = """
import sys
import numpy as np
from pathlib import Path
from cxrdist.data.loader import Loader
from cxrdist.shards.index import open_index

loader = Loader(open_index(Path(sys.argv[1]), "train", "b"), num_threads=2)
batches = loader.batches(np.arange(16) for _ in range(1000))
next(batches)
print("left", flush=True)
raise SystemExit(7)
"""


def test_a_process_that_leaves_mid_epoch_ends_at_once_without_shared_memory(uneven_shards):
    before = set(os.listdir("/dev/shm"))
    result = subprocess.run(
        [sys.executable, "-c", ABANDON, str(uneven_shards)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parents[2],
    )
    assert (result.returncode, result.stdout, result.stderr) == (7, "left\n", "")
    assert not {name for name in set(os.listdir("/dev/shm")) - before if "torch" in name}
