"""FAULTS 47, 59: every end has a name, a remedy and exit code 2; what has none says that it is a bug."""

import errno
import os
import re
import resource
import signal
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from cxrdist.cli import run_entry
from cxrdist.distributed import environment
from cxrdist.distributed.control import Control
from cxrdist.distributed.ends import LostRankError, named
from cxrdist.distributed.ranks import Ranks
from cxrdist.errors import UserError

ALLOCATOR = "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"
GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.1.1]:5120"
ENDS = {  # what happens -> what the line says
    "a user's mistake": (UserError("x.csv, row 3: no label"), "x.csv, row 3: no label"),
    "memory": (MemoryError(), "out of memory on this machine.*--device-batch-size"),
    "memory of numpy": (MemoryError("Unable to allocate 9 GiB"), "out of memory on this machine.*9 GiB"),
    "memory of torch": (RuntimeError(ALLOCATOR), "out of memory on this machine.*--device-batch-size"),
    "memory, from the system": (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory on this machine"),
    "GPU memory": (torch.OutOfMemoryError("CUDA out of memory. Tried"), "out of memory on the GPU"),
    "GPU memory of a library": (RuntimeError("CUDA error: out of memory"), "out of memory on the GPU"),
    "GPU": (RuntimeError("CUDA error: uncorrectable ECC error encountered"), "the GPU failed.*nvidia-smi"),
    "files": (OSError(errno.EMFILE, "Too many open files", "b.tar"), "too many open files.*ulimit -n"),
    "files of torch": (RuntimeError("unable to open shared memory: Too many open files (24)"), "too many open.*ulimit"),
    "permission": (PermissionError(errno.EACCES, "Permission denied", "/x/y"), "/x/y: Permission denied.*permissions"),
    "a full disk": (OSError(errno.ENOSPC, "No space left", "/x/y"), "/x/y: the disk is full"),
    "a failing disk": (OSError(errno.EIO, "Input/output error", "/x/y"), "/x/y: Input/output error"),
    "an unmounted disk": (OSError(errno.ESTALE, "Stale file handle", "/x/y"), "/x/y: Stale file handle"),
    "a closed pipe": (BrokenPipeError(errno.EPIPE, "Broken pipe"), "whoever read the output closed it"),
    "gloo": (RuntimeError(GLOO), "another process ended.*Connection closed.*network.*AGAIN"),
    "gloo, late": (RuntimeError("Timed out waiting 15000ms for recv operation"), "another process.*AGAIN"),
    "gloo, at start": (RuntimeError("Gloo connectFullMesh failed with no error"), "another process.*AGAIN"),
    "NCCL": (dist.DistBackendError("NCCL error in: x.cpp:33, remote process exited"), "another process.*AGAIN"),
    "the store": (dist.DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed"), "another.*AGAIN"),
    "the store, late": (dist.DistStoreError("wait timeout after 5000ms, keys: /0"), "another process.*AGAIN"),
    "nobody joins": (dist.DistStoreError("Timed out after 61 seconds waiting for clients. 1/2"), "another.*1/2.*AGAIN"),
    "a reset connection": (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), "another.*AGAIN"),
    "a silent rank": (LostRankError("rank 1 stopped responding: silent for 5 s"), "^rank 1 stopped.*network.*AGAIN"),
    "no address": (OSError(-2, "Name or service not known"), "Name or service not known; then AGAIN"),
}
BUGS = [RuntimeError("shape mismatch"), KeyError("x"), AssertionError(), ZeroDivisionError(), IndexError("CUDA")]


def fail(error):
    raise error


@pytest.mark.parametrize("what", ENDS)
def test_an_end_is_one_line_with_its_remedy_and_exit_code_2(what, capsys):
    error, said = ENDS[what]
    assert run_entry(lambda: fail(error), again="AGAIN") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    text = named(error, "AGAIN")
    assert err == f"error: {text}\n"
    assert re.search(said, text), text


@pytest.mark.parametrize("error", BUGS, ids=repr)
def test_a_mistake_of_the_program_keeps_its_traceback_and_says_what_to_report(error, capsys):
    assert run_entry(lambda: fail(error), again="AGAIN") == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    last = err.splitlines()[-1]
    assert f"this is a bug of cxrdist ({type(error).__name__})" in last
    assert "report" in last
    assert "cxrdist doctor" in last


def test_the_agreement_of_ranks_names_what_is_no_user_error_too():
    with pytest.raises(UserError, match="out of memory"), Ranks().agree():
        raise MemoryError
    with pytest.raises(KeyError), Ranks().agree():
        raise KeyError("ours")


@pytest.mark.parametrize(
    ("name", "text"),
    [("LOCAL_WORLD_SIZE", "0"), ("WORLD_SIZE", "-1"), ("RANK", "x"), ("RANK", "2"), ("WORLD_SIZE", "")],
)
def test_what_a_launcher_cannot_have_set_is_named(name, text, monkeypatch, capsys):
    monkeypatch.setenv(name, text)
    assert run_entry(lambda: environment.check_processes(None)) == 2
    assert f"{name}={text}" in capsys.readouterr().err


def test_ctrl_c_advises_once_what_works(monkeypatch, capsys):
    for rank, said in (("0", "interrupted: run it with --resume\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        assert run_entry(lambda: fail(KeyboardInterrupt()), again="run it with --resume") == 130
        assert capsys.readouterr().err == said


def test_the_file_limit_is_raised_to_what_the_machine_allows():
    code = (
        "import resource\nfrom cxrdist.distributed.environment import raise_file_limit\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 200)); raise_file_limit()\n"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "(200, 200)\n"


def test_the_reader_keeps_no_more_files_open_than_the_limit_leaves(monkeypatch):
    from cxrdist.data import reader

    for limit, kept in ((64, 0), (256, 80), (1024, 464), (4096, 512), (resource.RLIM_INFINITY, 512)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        assert reader._most_open() == kept


def steps_until_stop(control, most=20):
    for number in range(1, most):
        if control.after_step().stop:
            return number
    return None


def test_max_steps_counts_the_steps_of_this_session():
    assert steps_until_stop(Control(Ranks(), 1e9, None, max_steps=3)) == 3
    assert steps_until_stop(Control(Ranks(), 1e9, None, max_steps=None)) is None


def test_ctrl_c_stops_at_a_step_and_twice_at_once(monkeypatch):
    control = Control(Ranks(), 1e9, None, None)
    with control.signals():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # the same one, by way of the terminal and of the launcher
        assert control.after_step().stop == "SIGINT"
        monkeypatch.setattr("cxrdist.distributed.control.SAME_SIGNAL_S", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
