"""A plan of rows -> uint8 batches on the device, decoded once, in threads of this process.

The JPEG decoder releases the GIL and writes straight into the batch: threads on all cores reach 0.86-1.0 of the bare
decoder's speed, worker processes, which copy every batch, 0.62-0.75 (`cxrdist bench data` prints the ratios).
"""

import collections
import contextlib
import itertools
import math
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray

from cxrdist.data.order import MicroBatch
from cxrdist.data.reader import ShardReader
from cxrdist.data.stream import Stream
from cxrdist.distributed.environment import MAX_DECODE_THREADS, usable_cores
from cxrdist.errors import UserError
from cxrdist.shards.index import ShardIndex


@dataclass(frozen=True, eq=False)
class Batch:
    """Images of one micro-batch, on the loader's device.

    images: (B, C, S, S) uint8, S the `size_px` of the split, C = 1 when all its images are grey, else 3 (RGB, channels
    last in memory). targets: (B, K) float32 in [0, 1], NaN where masked, or None for a split without labels.
    rows, keys: (B,) int64.
    weight, last, step, epoch: see MicroBatch; for a plan of bare row arrays weight 1, last True, step the batch number.
    With `on_bad="skip"` the undecodable rows are missing here; `weight` is reduced as if their loss were 0.

    The images' memory is used again only when the last tensor that shares it is gone.
    """

    images: torch.Tensor
    targets: torch.Tensor | None
    rows: NDArray[np.int64]
    keys: NDArray[np.int64]
    weight: float
    last: bool
    step: int
    epoch: int


@dataclass(frozen=True)
class SkippedImage:
    """An image that was left out of a batch, and why."""

    row: int
    key: int
    image_name: str
    reason: str


class Loader:
    """Decodes batches of one split ahead of their use. A context manager; `close` may be called at any time."""

    def __init__(
        self,
        index: ShardIndex,
        device: torch.device | str = "cpu",
        *,
        num_threads: int | None = None,
        prefetch: int = 2,
        on_bad: Literal["error", "skip"] = "error",
        max_bad: int = 100,
        stream: Stream | None = None,
    ) -> None:
        """
        Args:
            num_threads: to decode; None takes this process's cores, at most 8, and 0 the caller's thread.
            prefetch: batches decoded ahead, at least 1; with those that the caller keeps, the memory in use.
            on_bad: of an image that was stored as no JPEG of the split's size: raise a UserError that names shard and
                key, or skip it, count it in `skipped`, and raise after `max_bad` of them. Damage is never skipped.
            stream: brings the shards, which then need not be in the index's folder; it is closed by its owner. Batches
                are to be read in the order of its passes; see `next_pass`.
        """
        if prefetch < 1:
            raise ValueError(f"prefetch {prefetch}: at least 1 batch must be in work")
        self.index = index
        self.device = torch.device(device)
        on_gpu = self.device.type == "cuda"
        if on_gpu and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.num_threads = min(MAX_DECODE_THREADS, usable_cores()) if num_threads is None else num_threads
        self.wait_s = 0.0
        self.skipped: list[SkippedImage] = []
        self._prefetch, self._on_bad, self._max_bad = prefetch, on_bad, max_bad
        self._reader = ShardReader(index, stream)
        self._buffers = _Buffers(self.device, (index.size_px, index.size_px, index.num_channels))
        # A thread starts on GPU 0, and to leave the stream would open a context there (0.5 GB) in every process.
        start = (torch.cuda.set_device, (self.device,)) if on_gpu else (None, ())
        self._threads = ThreadPoolExecutor(self.num_threads, "decode", *start) if self.num_threads else None
        self._jobs: set[_Job] = set()
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the threads, each after the image it is at, and close the files. Using the loader afterwards raises."""
        self._closed = True
        self._reader.stop()
        self._cancel(list(self._jobs))
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
        self._reader.close()

    @property
    def shards_wait_s(self) -> float:
        """Of `wait_s`, about: the time in which threads waited for shards to come."""
        return 0.0 if self._reader.stream is None else self._reader.stream.wait_s

    def next_pass(self) -> None:
        """All batches of an epoch, or of another pass over the rows, were read: a stream goes on with the next."""
        self._reader.next_pass()

    def batches(self, plan: Iterable[MicroBatch | NDArray[np.int64]]) -> Iterator[Batch]:
        """The batches of `plan` (`order.train_batches` or `eval_batches`), in its order; waiting is added to `wait_s`.

        Raises UserError, naming shard file and key, for an image that is damaged, or cannot be decoded (see `on_bad`).
        """
        jobs: collections.deque[_Job] = collections.deque()
        numbered = enumerate(plan)

        def fill() -> None:
            for number, micro in itertools.islice(numbered, self._prefetch - len(jobs)):
                jobs.append(self._start(number, micro))

        try:
            fill()
            while jobs:
                batch = self._finish(jobs.popleft())
                fill()
                if batch is not None:
                    yield batch
                del batch  # while the next one is awaited, only the caller keeps this one's memory
        finally:
            self._cancel(jobs)

    def _start(self, number: int, micro: MicroBatch | NDArray[np.int64]) -> "_Job":
        if self._closed:
            raise RuntimeError("the loader is closed")
        planned = isinstance(micro, MicroBatch)
        if not isinstance(micro, MicroBatch):
            micro = MicroBatch(np.asarray(micro, np.int64), weight=1.0, last=True, step=number, epoch=0)
        job = _Job(self._reader, self._buffers, micro, keep_empty=planned)
        self._jobs.add(job)
        if self._threads is not None:
            for _ in range(min(self.num_threads, len(micro.rows))):
                self._threads.submit(job.work)
        return job

    def _finish(self, job: "_Job") -> Batch | None:
        """Wait for the job; its batch, or None when all rows of a bare array were skipped."""
        start = time.perf_counter()
        if self._threads is None:
            job.work()
        job.ready.wait()
        self.wait_s += time.perf_counter() - start
        self._jobs.discard(job)
        if job.cancelled:
            raise RuntimeError("the loader was closed while it was in use")
        for position in sorted(job.errors):
            error = job.errors[position]
            if not isinstance(error, _Undecodable):
                raise error
            if self._on_bad == "error":
                raise UserError(f"{error}; preprocess again, or train without it by --on-bad skip") from error
            self._skip(int(job.micro.rows[max(position, 0)]), error)
        if job.micro.last:
            self._reader.passed(job.micro.rows)
        if job.batch is not None and job.copied is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(job.copied)
            for tensor in (job.batch.images, job.batch.targets):
                if tensor is not None:
                    tensor.record_stream(current)
        return job.batch

    def _skip(self, row: int, error: Exception) -> None:
        if all(item.row != row for item in self.skipped):  # else in an earlier epoch
            about = int(self.index.keys[row]), self.index.image_names[row]
            self.skipped.append(SkippedImage(row, *about, str(error)))
            if len(self.skipped) > self._max_bad:
                most = f"more than {self._max_bad} images cannot be decoded (--max-unreadable)"
                raise UserError(f"{most}; preprocess again; the last one: {error}") from error

    def _cancel(self, jobs: Iterable["_Job"]) -> None:
        for job in jobs:
            job.cancelled = True
            job.ready.set()
            self._jobs.discard(job)


class _Undecodable(UserError):
    """An image whose bytes are those that were preprocessed, and no JPEG of the split's size."""


class _Buffers:
    """Host memory for decoded batches, used again: with fresh pages for each the speed is 0.5-0.97x.

    image_shape: (S, S, C) of every image. stream: on which batches are copied to a GPU, else None.
    """

    def __init__(self, device: torch.device, image_shape: tuple[int, int, int]) -> None:
        self.device, self.image_shape = device, image_shape
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._free: collections.deque[tuple[NDArray[np.uint8], torch.cuda.Event | None]] = collections.deque()

    def take(self, num_bytes: int) -> NDArray[np.uint8]:
        """At least `num_bytes`; a buffer that is too small is dropped."""
        while self._free:
            buffer, copied = self._free.popleft()
            if len(buffer) >= num_bytes:
                if copied is not None:
                    copied.synchronize()  # the host waits here only when it is a full batch ahead of the copy
                return buffer
        if self.stream is not None:
            return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True).numpy()
        return np.empty(num_bytes, np.uint8)

    def give_back(self, buffer: NDArray[np.uint8], copied: torch.cuda.Event | None = None) -> None:
        self._free.append((buffer, copied))


class _Job:
    """One batch in work. Threads call `work` and share its rows; the one that decodes the last image completes it."""

    def __init__(self, reader: ShardReader, buffers: _Buffers, micro: MicroBatch, keep_empty: bool) -> None:
        self.micro = micro
        self.errors: dict[int, Exception] = {}  # by position in the batch, -1 for the batch itself
        self.ready = threading.Event()
        self.cancelled = False
        self.batch: Batch | None = None
        self.copied: torch.cuda.Event | None = None  # to the device
        self._reader, self._buffers, self._keep_empty = reader, buffers, keep_empty
        # Shared by the threads without a lock: `next` on these is one step under the GIL.
        self._todo = enumerate(micro.rows.tolist())
        self._num_done = itertools.count(1)
        shape = (len(micro.rows), *buffers.image_shape)
        self._buffer = buffers.take(math.prod(shape))
        self._pixels = self._buffer[: math.prod(shape)].reshape(shape)
        if buffers.stream is None:
            # A tensor made of _pixels keeps that very array alive, hence it dies with the last tensor of the batch.
            weakref.finalize(self._pixels, buffers.give_back, self._buffer).atexit = False

    def work(self) -> None:
        """Decode rows until none is left."""
        for position, row in self._todo:
            if self.cancelled:
                return
            try:
                self._decode(row, self._pixels[position])
            except Exception as error:  # raised again by Loader._finish, in the caller's thread
                self.errors[position] = error
            if next(self._num_done) == len(self._pixels):
                try:
                    self.batch = self._assemble()
                except Exception as error:
                    self.errors[-1] = error
                self.ready.set()

    def _decode(self, row: int, target: NDArray[np.uint8]) -> None:
        data = self._reader.read(row)
        try:
            self._reader.decode(data, target)
        except ValueError as error:
            what = f"cannot be decoded ({error}) though its bytes are those that were preprocessed"
            raise _Undecodable(f"{self._reader.where(row)}: {what}") from error

    def _assemble(self) -> Batch | None:
        """The batch on the device, without bad rows."""
        micro, index, stream = self.micro, self._reader.index, self._buffers.stream
        good = [position for position in range(len(micro.rows)) if position not in self.errors]
        if not good and not self._keep_empty:
            return None
        weight = micro.weight
        if self.errors:
            counts = np.ones(len(micro.rows), np.int64) if index.targets is None else index.targets.observed(micro.rows)
            weight = float(weight * counts[good].sum() / max(1, counts.sum()))
        images = torch.from_numpy(self._pixels)
        if len(good) < len(micro.rows):
            self._pixels[sorted(self.errors)] = 0
            images = images[good or [0]]
        rows = micro.rows[good or [0]]
        targets = None if index.targets is None else torch.from_numpy(index.targets[rows])
        with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
            images = images.to(self._buffers.device, non_blocking=True).permute(0, 3, 1, 2)
            if targets is not None:
                pinned = targets if stream is None else targets.pin_memory()  # else this thread would wait for the copy
                targets = pinned.to(self._buffers.device, non_blocking=True)
            if stream is not None:
                self.copied = stream.record_event()
                self._buffers.give_back(self._buffer, self.copied)
        return Batch(images, targets, rows, index.keys[rows], weight, micro.last, micro.step, micro.epoch)
