"""How fast the GPUs of this machine add up gradients."""

import os
import socket
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

NUM_BYTES = 2**28
ROUNDS = 20


def all_reduce_bandwidth(num_gpus: int) -> float:
    """Bytes per second of an all-reduce of 256 MB over `num_gpus` GPUs, counted as a ring moves them; own processes."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        result = Path(folder) / "seconds"
        spawn(_all_reduce, (num_gpus, port, str(result)), nprocs=num_gpus)  # type: ignore[no-untyped-call]
        seconds = float(result.read_text())
    return 2 * (num_gpus - 1) / num_gpus * NUM_BYTES / seconds


def _all_reduce(rank: int, world_size: int, port: int, result: str) -> None:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("nccl", rank=rank, world_size=world_size)
    numbers = torch.zeros(NUM_BYTES // 4, device=device)
    for count in (3, ROUNDS):  # first to connect
        torch.cuda.synchronize(device)
        begun = time.perf_counter()
        for _ in range(count):
            dist.all_reduce(numbers)
        torch.cuda.synchronize(device)
    if rank == 0:
        Path(result).write_text(str((time.perf_counter() - begun) / ROUNDS))
    dist.destroy_process_group()
