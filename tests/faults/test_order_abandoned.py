"""A process that leaves or is killed mid-epoch, its loader open, ends at once and leaves no shared memory behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.fault

ABANDON = """
import os, signal, sys
import numpy as np
from pathlib import Path
from cxrdist.data.loader import Loader
from cxrdist.shards.index import open_index

loader = Loader(open_index(Path(sys.argv[1]), "train"), num_threads=2)
batches = loader.batches(np.arange(16) for _ in range(1000))
next(batches)
print("left", flush=True)
if sys.argv[2] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
raise SystemExit(7)
"""


@pytest.mark.parametrize(("how", "code"), [("leaves", 7), ("killed", -9)])
def test_a_process_that_ends_mid_epoch_leaves_no_shared_memory(uneven_shards, how, code):
    before = set(os.listdir("/dev/shm"))
    result = subprocess.run(
        [sys.executable, "-c", ABANDON, str(uneven_shards), how],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parents[2],
    )
    assert (result.returncode, result.stdout, result.stderr) == (code, "left\n", "")
    assert not {name for name in set(os.listdir("/dev/shm")) - before if "torch" in name}
