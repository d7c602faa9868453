"""Random numbers of the training augmentation, as a pure function of (seed, epoch, key, step).

A counter-based hash gives every image of every epoch its own numbers, one stream for each step, so they depend neither
on the batch an image is in nor on ranks, threads, other steps, or what was drawn before. Drawn on the host in numpy for
a whole batch at once.
"""

import contextlib
import zlib
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from cxrdist.splitmix import GAMMA, mix

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@contextlib.contextmanager
def seeded_on_host(value: float) -> Iterator[None]:
    """torch's generator of the CPU seeded by a uniform number, inside; no other generator is touched.

    `torch.manual_seed` would also seed those of all GPUs, and with them the dropout of the step in work.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(value * 2.0**53))
        yield


def uniforms(seed: int, epoch: int, keys: Ints, num: int, *, start: int = 1, stream: str = "") -> Floats:
    """(B, num) independent values in [0, 1), the row of a key depending on nothing but (seed, epoch, key, stream).

    start: the place of the first of them in the stream.
    Source: the SplitMix64 generator (Steele, Lea, Flood 2014), its state hashed from the numbers and the name.
    """
    state = np.zeros(len(keys), np.uint64)
    parts = [np.int64(seed), np.int64(epoch), np.asarray(keys, np.int64)]
    if stream:
        parts.append(np.int64(zlib.crc32(stream.encode())))
    for part in parts:
        state = mix((state ^ np.asarray(part).astype(np.uint64)) + GAMMA)
    counters = np.arange(start, start + num, dtype=np.uint64) * GAMMA
    return (mix(state[:, None] + counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53
