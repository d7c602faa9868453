"""The blocks of docs/scale.md: index, order, folds, verify, tables, a report and an evaluation of many images.

The index is made up, of images that are not there: names, patients, hashes and labels as a real set has them. What it
takes to open a set that is there, for each process of a node, is counted on a small one.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cxrdist.bench.timing import Row
from cxrdist.data.folds import assign_folds, write_split
from cxrdist.data.order import train_batches
from cxrdist.data.rows import Chosen, EpochOrder
from cxrdist.errors import UserError
from cxrdist.shards.columns import TEXT, sealed
from cxrdist.shards.index import (
    COLUMNS,
    LABEL,
    Counts,
    FileMeta,
    Resize,
    ShardIndex,
    ShardMeta,
    SplitMeta,
    arrow_bytes,
    index_rows,
    open_index,
    read_rows,
    set_hash,
    shard_name,
)
from cxrdist.task import TASKS, Columns

TASK = TASKS["b"]
PER_SHARD = 1000
SLOT = 100_000  # bytes of an image in its tar
NODE = 8  # processes
WORLDS = (1, 4, 8)
MODULE = "cxrdist.bench.scale"
MB = 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `cxrdist bench scale`."""
    add = parser.add_argument
    add("--images", type=int, default=10_000_000, metavar="N", help="rows of the index (default %(default)s)")
    add("--table-images", type=int, default=200_000, metavar="N", help="of tables, report, evaluation")


def run(args: argparse.Namespace) -> list[Row]:
    """Images per second of each block, with seconds and memory in the note."""
    with tempfile.TemporaryDirectory(prefix="cxrdist-bench-") as name:
        folder = Path(name)
        large, small = folder / "large", folder / "small"
        size = make_set(large, args.images)
        rows = [Row("index", "on disk", None, note=f"{size / 1e9:.2f} GB, {size / args.images:.0f} bytes a row")]
        for world in (1, NODE):
            rows += _of_node(large, world, args.images)
        for stage in ("verify", "folds"):
            rows += _alone(stage, large, args.images)
        make_set(small, args.table_images)
        for stage in ("report", "table", "evaluation"):
            rows += _alone(stage, small, args.table_images)
        rows += start_up(folder / "real")
        return rows


# The set


def make_set(folder: Path, num_images: int) -> int:
    """Write split `train` of that many images, whose tars are holes; the bytes of its index."""
    folder.mkdir()
    counts = [min(PER_SHARD, num_images - first) for first in range(0, num_images, PER_SHARD)]
    shards = []
    for number, count in enumerate(counts):
        shards.append(ShardMeta(name=shard_name("train", number), bytes=SLOT * PER_SHARD, sha256="", count=count))
        with (folder / shards[-1].name).open("wb") as file:
            file.truncate(SLOT * PER_SHARD)
    inputs = {str(number): hashlib.sha256(str(number).encode()).hexdigest() for number in range(len(shards))}
    batch = sealed(_made_up(num_images), set_hash("train", inputs))
    path = folder / "train.index.arrow"
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return _write_json(folder, num_images, shards, inputs)


def _write_json(folder: Path, num_images: int, shards: list[ShardMeta], inputs: dict[str, str]) -> int:
    """The JSON beside an index; the bytes of the index."""
    path = folder / "train.index.arrow"
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    meta = SplitMeta(
        task=TASK,
        split="train",
        counts=Counts(rows=num_images, images=num_images, left_out=0),
        size_px=600,
        resize=Resize(mode="exact", filter="", jpeg_quality=95),
        source={},
        rows_per_shard=shards[0].count,
        shards=tuple(shards),
        index=FileMeta(name=path.name, bytes=path.stat().st_size, sha256=sha256),
        left_out=(),
        inputs=inputs,
    )
    (folder / "train.json").write_text(meta.to_json())
    return meta.index.bytes


def _made_up(num_images: int) -> pa.RecordBatch:
    """Three images a patient; labels at random, one in ten positive. No Python object per row."""
    rng, row = np.random.default_rng(0), np.arange(num_images)
    patient, sex = _digits(row // 3, 8), rng.integers(0, 3, num_images // 3 + 1)[row // 3]
    constant = {"channels": 1, "width": 2500, "height": 2048, "orientation": 1}
    columns: dict[str, Any] = {name: np.full(num_images, value) for name, value in constant.items()}
    columns |= {
        "key": row,
        "image_name": _texts(patient, _same("_001_", num_images), _digits(row % 3, 3), _same(".jpg", num_images)),
        "patient": _texts(patient),
        "study": _texts(_same("001", num_images)),
        "shard": row // PER_SHARD,
        "offset": 512 + SLOT * (row % PER_SHARD),
        "length": rng.integers(50_000, SLOT - 1024, num_images),
        "sha256": pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(32), num_images, [None, pa.py_buffer(rng.bytes(32 * num_images))]
        ),
        "xxh3_64": rng.integers(0, 2**63, num_images),
        "view": pa.array(["PA", "AP", "LATERAL"], TEXT).take(pa.array(rng.integers(0, 3, num_images))),
        "sex": pa.array(["Female", "Male", ""], TEXT).take(pa.array(sex)),
        "age": pa.array(list(map(str, range(18, 95))), TEXT).take(pa.array(rng.integers(0, 77, num_images))),
    }
    kinds = COLUMNS | {LABEL + label: pa.uint8() for label in TASK.labels}
    columns |= {name: rng.random(num_images, np.float32) < 0.1 for name in kinds.keys() - COLUMNS.keys()}
    fields = [pa.field(name, kind, nullable=False) for name, kind in kinds.items()]
    arrays = [
        cells if isinstance(cells := columns[f.name], pa.Array) else pa.array(cells.astype(f.type.to_pandas_dtype()))
        for f in fields
    ]
    return pa.record_batch(arrays, pa.schema(fields))


def _digits(numbers: NDArray[np.int64], width: int) -> NDArray[np.uint8]:
    return (numbers[:, None] // 10 ** np.arange(width)[::-1] % 10 + ord("0")).astype(np.uint8)


def _same(text: str, num: int) -> NDArray[np.uint8]:
    return np.broadcast_to(np.frombuffer(text.encode(), np.uint8), (num, len(text)))


def _texts(*parts: NDArray[np.uint8]) -> pa.Array:
    """Texts of one length from the bytes (N, n) of their parts."""
    content = np.hstack(parts)
    ends = np.arange(len(content) + 1, dtype=np.int64) * content.shape[1]
    return pa.LargeStringArray.from_buffers(len(content), pa.py_buffer(ends), pa.py_buffer(content))


# Parts, each in a process of its own, whose memory is then its own, too


def memory(path: Path) -> dict[str, float]:
    """MB of this process: private, and its share of what is mapped of the file."""
    found = {"anon": 0.0, "peak": 0.0, "shared": 0.0}
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            found["anon"] = int(line.split()[1]) / 1024
    mapped = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if not line[0].isupper():
            mapped = line.endswith(str(path))
        elif mapped and line.startswith("Pss:"):
            found["shared"] += int(line.split()[1]) / 1024
    return found


def reset_peak() -> None:
    """Let the kernel count the peak of memory from here on."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> float:
    """MB resident at most since `reset_peak`, files included."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def _processes(commands: list[list[str]]) -> list[dict[str, Any]]:
    """The JSON that each of some processes of this module, started together, prints."""
    started = [
        subprocess.Popen([sys.executable, "-m", MODULE, *command], stdout=subprocess.PIPE, text=True)
        for command in commands
    ]
    outputs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise UserError(f"bench scale: {commands[0][0]} failed")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def _of_node(folder: Path, world: int, num_images: int) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="cxrdist-bench-") as meeting:
        found = _processes([["node", str(folder), str(rank), str(world), meeting] for rank in range(world)])
    stage, all_of = f"{world} of a node", f"all {world}" if world > 1 else "it"
    private = max(one["private"] for one in found)
    shared = sum(one["shared"] for one in found)
    opened = found[0]["open"]
    rows = [
        Row(stage, "open, checked by the first", num_images / opened, note=f"{opened:.2f} s of CPU"),
        Row(stage, "memory after an epoch", None, note=f"{private:.0f} MB private each, {shared:.0f} MB for {all_of}"),
    ]
    if world > 1:
        later = max(one["open"] for one in found[1:])
        rows.insert(1, Row(stage, "open, checked before", num_images / later, note=f"{later:.2f} s of CPU"))
    for name in ("first batch", "first batch, resumed", "order of an epoch"):
        slowest = max(one[name] for one in found)
        rows.append(Row(stage, name, num_images / slowest, note=f"{slowest:.2f} s of CPU"))
    return rows


def node(folder: Path, rank: int, world: int, meeting: Path) -> dict[str, float]:
    """What one of `world` processes of a node does to train: the first opens and checks, then the others open."""

    def meet(name: str) -> None:
        (meeting / f"{name}-{rank}").touch()
        while sum(path.name.startswith(name) for path in meeting.iterdir()) < world:
            time.sleep(0.05)

    found: dict[str, float] = {}
    before = memory(folder / "train.index.arrow")
    if rank:
        meet("checked")
    with timed(found, "open"):
        index = open_index(folder, "train", checked=rank > 0)
        assert (index.num_channels, index.masked) == (1, False)
    if not rank:
        meet("checked")
    rows = Chosen(np.arange(len(index)) % 5 > 0)  # without a fold
    plan: dict[str, Any] = dict(seed=0, epoch=1, global_batch_size=1024, device_batch_size=32)
    plan |= {"rank": rank, "world_size": NODE}
    with timed(found, "first batch"):
        next(train_batches(rows, **plan))
    with timed(found, "first batch, resumed"):
        next(train_batches(rows, **plan, start_step=len(rows) // 2048))
    with timed(found, "order of an epoch"):
        order = EpochOrder(rows, 0, 1)
        for start in range(0, len(order), 2**16):
            order[start : start + 2**16]
    assert index.targets is not None
    for batch in train_batches(rows, **plan):  # what training looks at of each image
        index.targets[batch.rows], index.keys[batch.rows]
        index.offsets[batch.rows], index.lengths[batch.rows], index.checksums[batch.rows]  # type: ignore[index]
    meet("done")
    after = memory(folder / "train.index.arrow")
    meet("measured")
    return found | {"private": after["anon"] - before["anon"], "shared": after["shared"]}


def _alone(stage: str, folder: Path, num_images: int) -> list[Row]:
    (found,) = _processes([[stage, str(folder)]])
    return [
        Row(stage, name, num_images / seconds, note=f"{seconds:.1f} s, {mb:,.0f} MB more at most")
        for name, (seconds, mb) in found.items()
    ]


@contextlib.contextmanager
def timed(found: dict[str, Any], name: str, *, with_peak: bool = False) -> Iterator[None]:
    """Seconds of CPU that the block takes, which on a free core is the time; or with `with_peak` seconds by the clock,
    and the MB that it takes at most beyond what there was.
    """
    reset_peak()
    there, begun, spent = peak(), time.perf_counter(), time.process_time()
    yield
    seconds = time.perf_counter() - begun
    found[name] = (seconds, peak() - there) if with_peak else time.process_time() - spent


def measure(stage: str, folder: Path) -> dict[str, Any]:
    """The parts of a stage, by name: seconds, and the MB that each took at most."""
    found: dict[str, Any] = {}
    index = open_index(folder, "train")
    for name, part in STAGES[stage](folder, index):
        with timed(found, name, with_peak=True):
            part()
    return found


Parts = Iterator[tuple[str, Callable[[], Any]]]


def _verify(folder: Path, index: ShardIndex) -> Parts:
    yield "every byte of the index", lambda: read_rows(folder, index.meta)
    yield "no name twice", index.check_names


def _folds(folder: Path, index: ShardIndex) -> Parts:
    assert index.targets is not None
    yield "5 by patient", lambda: assign_folds(index.patients, index.targets, 5, 0)  # type: ignore[arg-type]
    folds = (np.arange(len(index)) // 3 % 5).astype(np.int16)
    yield "split.csv", lambda: write_split(folder / "split.csv", index.patients, folds)


def _report(folder: Path, index: ShardIndex) -> Parts:
    from cxrdist.data.inspection import Pixels, Splits, findings

    splits, rng, num = Splits([index]), np.random.default_rng(0), len(index)
    fine = rng.integers(0, 2**63, (num, 16)).astype(np.uint64)
    pixels = Pixels(fine[:, 0].copy(), fine, np.full(num, 10, np.uint8), np.full(num, 200, np.uint8))
    yield "what is suspicious, once all images are read", lambda: findings(splits, pixels)


def _table(folder: Path, index: ShardIndex) -> Parts:
    from cxrdist.shards.sources import rows_of_table
    from cxrdist.shards.verify import write_table

    path = folder / "labels.csv"

    def write() -> None:
        with path.open("w", encoding="utf-8", newline="") as file:
            write_table(index, file)

    yield "verify --table", write
    columns = Columns(image="image_name", patient="patient", study="study", view=("view",), sex="sex", age="age")
    task = dataclasses.replace(TASK, name="made_up", columns=columns)
    yield "read as preprocess does", lambda: rows_of_table(task, "train", path)


def _evaluation(folder: Path, index: ShardIndex) -> Parts:
    from cxrdist.scoring.evaluation import evaluate, match_labels
    from cxrdist.scoring.tables import ScoreTable, TableMeta, read_table, write_table
    from cxrdist.truth import read_truth

    assert index.targets is not None
    rng, path = np.random.default_rng(0), folder / "scores.csv"
    probs = np.clip(index.targets[:] * 0.2 + rng.random(index.targets.shape, np.float32) * 0.8, 0, 1)
    names = np.array(index.image_names.to_list(), object)
    meta = TableMeta(member="made_up", task=TASK, split="train", shards=index.fingerprint, asked=len(index))
    yield "score table, written", lambda: write_table(path, ScoreTable(names, probs, meta))
    kept: list[Any] = []
    yield "score table, read", lambda: kept.append(read_table(path))
    yield "labels of the set", lambda: kept.append(match_labels(kept[0], *read_truth(None, folder, TASK, kept[:1])))
    yield "evaluation with 2 resamples", lambda: evaluate(kept[:1], kept[1], num_resamples=2)


STAGES = {"verify": _verify, "folds": _folds, "report": _report, "table": _table, "evaluation": _evaluation}


# Start-up


def start_up(folder: Path, num_shards: int = 16, per_shard: int = 500) -> list[Row]:
    """What each process reads until the set is open and checked, on one node."""
    real_set(folder, num_shards, per_shard)
    size, rows = sum(path.stat().st_size for path in folder.iterdir()), []
    for world in WORLDS:
        found = reads_of(folder, world)
        most, all_of = max(found, key=lambda one: one["reads"]), sum(one["bytes"] for one in found)
        headers = num_shards * per_shard / max(one["headers"] for one in found)
        note = (
            f"first process {_told(found[0])}; most of any {_told(most)}; all {all_of / MB:.1f} of {size / MB:.0f} MB"
        )
        rows.append(Row("start-up", f"{world} processes", headers, note=note))
    return rows


def reads_of(folder: Path, world: int) -> list[dict[str, float]]:
    """Of each rank of torchrun: calls of read and their bytes, files opened, and seconds of the headers' check."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}", "-m", MODULE]
    with tempfile.TemporaryDirectory(prefix="cxrdist-bench-") as out:
        environ = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, *launcher, "start", str(folder), out], env=environ, check=True)
        return [json.loads((Path(out) / str(rank)).read_text()) for rank in range(world)]


def _told(found: dict[str, float]) -> str:
    return f"{found['reads']:,.0f} reads, {found['bytes'] / MB:.1f} MB, {found['opens']:.0f} files"


def start(folder: Path, out: Path) -> None:
    """Open the set as training does, in a process of torchrun; the counts go to a file of this rank."""
    from cxrdist.distributed.group import process_group
    from cxrdist.shards.verify import check_headers, open_together

    opened: list[str] = []
    sys.addaudithook(lambda event, given: opened.append(str(given[0])) if event == "open" else None)
    with process_group(60.0, then="") as ranks:
        opened.clear()
        before = _read_so_far()
        index = open_together(ranks, folder, "train")
        reads, size = (after - there for after, there in zip(_read_so_far(), before, strict=True))
        opens = sum(path.startswith(str(folder)) for path in opened)
        begun = time.perf_counter()
        check_headers(index, ranks.rank, ranks.world_size)
        found = {"reads": reads, "bytes": size, "opens": opens, "headers": time.perf_counter() - begun}
        (out / str(ranks.rank)).write_text(json.dumps(found))


def _read_so_far() -> tuple[int, int]:
    """Calls of read, and the bytes they gave, of this process."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["syscr"]), int(fields["rchar"])


def real_set(folder: Path, num_shards: int, per_shard: int) -> None:
    """Split `train` with tars that are there, of images of 4,096 random bytes."""
    folder.mkdir()
    rng, num = np.random.default_rng(0), num_shards * per_shard
    shards, offsets = [], []
    for number in range(num_shards):
        path = folder / shard_name("train", number)
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for row in range(number * per_shard, (number + 1) * per_shard):
                offsets.append(tar.offset + tarfile.BLOCKSIZE)
                for kind, content in (("jpg", rng.bytes(4096)), ("json", b"{}")):
                    member = tarfile.TarInfo(f"{row:08d}.{kind}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        shards.append(ShardMeta(name=path.name, bytes=path.stat().st_size, sha256="", count=per_shard))
    key = np.arange(num)
    numbers = {"key": key, "shard": key // per_shard, "offset": offsets, "length": np.full(num, 4096), "xxh3_64": key}
    ones = {name: np.ones(num) for name in ("channels", "width", "height", "orientation")}
    texts = {name: [""] * num for name in ("patient", "study", "view", "sex", "age")}
    columns = numbers | ones | texts | {"image_name": [f"{row}.jpg" for row in key], "sha256": [bytes(32)] * num}
    batch = index_rows(columns, TASK.labels, np.zeros((num, TASK.num_labels), np.float32))
    (folder / "train.index.arrow").write_bytes(arrow_bytes(batch, set_hash("train", {})))
    _write_json(folder, num, shards, {})


def main(stage: str, folder: str, *more: str) -> None:
    """A part of this benchmark, in a process of its own; it prints what it found as JSON."""
    if stage == "start":
        start(Path(folder), Path(more[0]))
    elif stage == "node":
        print(json.dumps(node(Path(folder), int(more[0]), int(more[1]), Path(more[2]))))
    else:
        print(json.dumps(measure(stage, Path(folder))))


if __name__ == "__main__":
    main(*sys.argv[1:])
