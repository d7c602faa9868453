"""What every test shares: GPU tests skip with a reason where there is no GPU, and one thread per process."""

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "disabled")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def uneven_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A grey training split of task b: 48 images in shards of 24, 8 and 16, keys with a gap, 6 patients."""
    import numpy as np
    from PIL import Image

    from cxrdist.shards.convert import Pixels
    from cxrdist.shards.writer import Source, SplitJob, write_split
    from cxrdist.task import TASKS

    folder = tmp_path_factory.mktemp("uneven")
    rng = np.random.default_rng(0)
    sources = []
    for number, key in enumerate([*range(32), *range(48, 64)]):
        path = folder / "images" / f"{number % 6:08d}_001_{number:03d}.png"
        path.parent.mkdir(exist_ok=True)
        noise = Image.fromarray(rng.integers(0, 255, (30, 30), dtype=np.uint8))
        noise.resize((600, 600), Image.Resampling.BILINEAR).save(path, compress_level=1)
        targets = tuple(float(value) for value in rng.random(TASKS["b"].num_labels) < 0.3)
        size = path.stat().st_size
        sources.append(Source(key, path.name, str(path), size, "", f"{number % 6:08d}", "001", targets=targets))
    write_split(SplitJob(folder / "div_b", TASKS["b"], "train", sources, Pixels(), 24, {}))
    return folder / "div_b"


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A small division and two small runs to infer with (see infer_world.py)."""
    return load_infer_world().make_infer_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def infer_world() -> Any:
    """The module of that name: builders for tests that need a run or a launch of their own."""
    return load_infer_world()


def load_infer_world() -> Any:
    """The module beside this file, which the importlib mode of pytest does not put on the path."""
    if "infer_world" not in sys.modules:
        spec = importlib.util.spec_from_file_location("infer_world", Path(__file__).with_name("infer_world.py"))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["infer_world"] = module
        spec.loader.exec_module(module)
    return sys.modules["infer_world"]


@pytest.fixture
def make_division(tmp_path: Path) -> Any:
    """`make_division(names, **columns)`: a folder of small grey images and their label CSV, as (images, csv) paths."""
    import csv
    import re

    import numpy as np
    from PIL import Image

    from cxrdist.task import COMPETITION_LABELS as LABELS

    def make(names: list[str], size: tuple[int, int] = (64, 48), **columns: list[Any]) -> tuple[Path, Path]:
        images, table = tmp_path / "images", tmp_path / "train.csv"
        images.mkdir()
        rng = np.random.default_rng(0)
        header = ["Image_name", "Patient_ID", "Study", "Sex", "Age", "ViewCategory", "ViewPosition", *LABELS]
        with table.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, header)
            writer.writeheader()
            for row, name in enumerate(names):
                noise = Image.fromarray(rng.integers(0, 255, (8, 8), dtype=np.uint8))
                (images / name).parent.mkdir(parents=True, exist_ok=True)
                with (images / name).open("wb") as image:
                    noise.resize(size).save(image, "PNG" if name.endswith("png") else "JPEG")
                said = re.fullmatch(r"([0-9]{1,8})_[0-9]+_[0-9]+\..*", name)
                values = {
                    "Image_name": name,
                    "Patient_ID": said[1] if said else row // 2 + 1,
                    "Study": 1,
                    "Sex": "Female",
                    "Age": 60,
                }
                values |= {"ViewCategory": "Frontal", "ViewPosition": "PA"}
                values |= {label: (row + place) % 2 for place, label in enumerate(LABELS)}
                values |= {column: cells[row] for column, cells in columns.items()}
                writer.writerow(values)
        return images, table

    return make


@pytest.fixture
def store_undecodable() -> Any:
    """`store_undecodable(folder, split, rows)`: images become zeros in tar and index alike, as if they were stored so.

    Returns their names. The bytes equal the index, so this is no damage.
    """
    import dataclasses
    import hashlib

    import numpy as np
    import pyarrow as pa
    import xxhash

    from cxrdist.shards.index import COLUMNS, arrow_bytes, open_index, read_rows

    def store(folder: Path, split: str, rows: list[int]) -> list[str]:
        index = open_index(folder, split)
        batch = read_rows(folder, index.meta)
        digests, checksums = batch.column("sha256").to_pylist(), batch.column("xxh3_64").to_pylist()
        for row in rows:
            data = bytes(int(index.lengths[row]))
            digests[row], checksums[row] = hashlib.sha256(data).digest(), xxhash.xxh3_64_intdigest(data)
            with (folder / index.shards[index.shard_ids[row]]).open("r+b") as tar:
                tar.seek(int(index.offsets[row]))
                tar.write(data)
        columns = dict(zip(batch.schema.names, batch.columns, strict=True))
        columns["sha256"] = pa.array(digests, COLUMNS["sha256"])
        columns["xxh3_64"] = pa.array(np.array(checksums, np.uint64))
        content = arrow_bytes(pa.record_batch(list(columns.values()), schema=batch.schema))
        (folder / index.meta.index.name).write_bytes(content)
        entry = dataclasses.replace(index.meta.index, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        (folder / f"{split}.json").write_text(dataclasses.replace(index.meta, index=entry).to_json())
        return [index.image_names[row] for row in rows]

    return store
