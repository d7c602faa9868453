"""What the machine says of itself, also where it is no Linux: a Mac has no /proc and no sched_getaffinity."""

import os
import resource
from pathlib import Path

import numpy as np
import pytest

from cxrdist import doctor
from cxrdist.demo.phantoms import write_division
from cxrdist.distributed.environment import machine_memory, peak_memory
from cxrdist.estimate.report import this_machine

pytestmark = pytest.mark.fast


@pytest.fixture
def mac(monkeypatch):
    """What a Mac lacks is taken away."""
    read, exists = Path.read_text, Path.exists

    def read_without_proc(path, *args, **kwargs):
        if path.is_relative_to("/proc"):
            raise FileNotFoundError(path)
        return read(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", read_without_proc)
    monkeypatch.setattr(Path, "exists", lambda path: not path.is_relative_to("/proc") and exists(path))
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.delattr(os, "sched_getaffinity")


def test_memory_here_is_no_more_than_the_machine_has():
    total, available = machine_memory()
    assert available is not None
    assert 0 < available < total


def test_the_peak_holds_an_array_that_was_there():
    before = peak_memory()
    np.ones(max(2**28, 2 * before) // 8)
    assert 1.5 * before < peak_memory() < machine_memory()[0]


def test_a_mac_says_its_memory_and_gives_its_peak_in_bytes(mac):
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert machine_memory() == (physical, None)
    assert doctor.memory() == f"{physical / 1e9:.0f} GB memory"
    assert peak_memory() == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_a_mac_draws_phantoms_and_estimates(mac, tmp_path):
    written = write_division(tmp_path / "images", tmp_path / "labels.csv", num_patients=2)
    assert written == len([*(tmp_path / "images").iterdir()])
    assert this_machine("fp32").memory_bytes == machine_memory()[0] / 2
