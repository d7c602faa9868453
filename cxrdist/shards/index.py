"""The index of a shard set: what every image is called, where its bytes lie and what is known about it.

Tars say nothing about how many samples they should hold, so everything that reads a shard set starts here.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cxrdist.errors import UserError
from cxrdist.labels import LABELS

FORMAT_VERSION = 1
TEXT_COLUMNS = ("image_name", "patient", "study", "shard", "sha256", "view", "sex", "age")
COLUMNS = (
    "key",
    "image_name",
    "patient",
    "study",
    "shard",
    "offset",
    "length",
    "sha256",
    "channels",
    "view",
    "sex",
    "age",
    *LABELS,
)


@dataclass(frozen=True)
class ShardIndex:
    """One split of a shard set; arrays have one entry per image (N of them), in key order.

    keys: (N,) int64, the row of the image in the source CSV, counted from 0; gaps where an image was left out.
    image_names, patients, studies, views, sexes, ages: (N,) object arrays of str; '' where unknown.
    shard_ids: (N,) int32 into `shards`; offsets, lengths: (N,) int64 bytes of the JPEG in its tar; sha256: their hash.
    channels: (N,) uint8, 1 or 3. targets: (N, 14) float32 in {0, 1} in the order of LABELS, or None for a test split.
    meta: the split's JSON.
    """

    folder: Path
    div: str
    split: str
    shards: tuple[str, ...]
    keys: np.ndarray
    image_names: np.ndarray
    patients: np.ndarray
    studies: np.ndarray
    views: np.ndarray
    sexes: np.ndarray
    ages: np.ndarray
    shard_ids: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray
    sha256: np.ndarray
    channels: np.ndarray
    targets: np.ndarray | None
    meta: dict[str, Any]

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def num_channels(self) -> int:
        """Channels of a batch: 1 when every image of the split has one, else 3."""
        return 1 if bool((self.channels == 1).all()) else 3

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the index file, which holds every image's hash: identifies the shard set."""
        return str(self.meta["index"]["sha256"])

    @cached_property
    def left_out(self) -> dict[str, str]:
        """Image name -> reason, for every image of the source that is not in the shards."""
        return {entry["image_name"]: entry["reason"] for entry in self.meta["left_out"]}


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:06d}.tar"


def read_meta(folder: Path, split: str, div: str) -> dict[str, Any]:
    """The split's JSON. Raises UserError when it is missing, damaged, of another format version, division or split."""
    path = folder / f"{split}.json"
    if not path.is_file():
        there = sorted(file.name for file in folder.glob("*.json")) if folder.is_dir() else None
        if there is None:
            raise UserError(f"{folder}: no such folder; make it with `python -m cxrdist.preprocess --div {div} ...`")
        found = f"it holds {', '.join(there)}" if there else "it holds no finished split"
        raise UserError(
            f"{path} is missing ({found}); run or finish `python -m cxrdist.preprocess --div {div} --split {split} ...`"
        )
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        version, found_div, found_split = meta["format_version"], meta["div"], meta["split"]
        complete = {"counts", "shards", "index", "left_out", "labels", "size_px"} <= set(meta)
    except (ValueError, KeyError, TypeError):
        complete = False
        version, found_div, found_split = FORMAT_VERSION, div, split
    if version != FORMAT_VERSION:
        raise UserError(f"{path}: format version {version}, this cxrdist reads {FORMAT_VERSION}; preprocess again")
    if not complete:
        raise UserError(f"{path} is damaged; delete it and run cxrdist.preprocess again")
    if (found_div, found_split) != (div, split):
        raise UserError(
            f"{folder} holds split {found_split!r} of division {found_div!r}, not {split!r} of {div!r}; "
            "give the shards of the division you name with --div"
        )
    if tuple(meta["labels"]) != LABELS:
        raise UserError(f"{path}: its labels are not the competition's 14 in order; preprocess again")
    return dict(meta)


def open_index(folder: Path, split: str, div: str) -> ShardIndex:
    """Open one split after checking that its tars are the ones the index was written for, by name and size.

    Reads the JSON and the index (hashed) and stats each tar; no image is read. Raises UserError, naming the file, what
    was expected and the remedy, when anything is missing, extra, damaged, unfinished or of another division.
    """
    folder = Path(folder)
    meta = read_meta(folder, split, div)
    path = folder / f"{split}.index.csv"
    again = "run cxrdist.preprocess again, or copy the shard set anew"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {again}") from None
    if hashlib.sha256(content).hexdigest() != meta["index"]["sha256"]:
        raise UserError(
            f"{path} is damaged: {len(content):,} bytes whose SHA-256 is not the one in {split}.json; {again}"
        )
    shards = tuple(str(shard["name"]) for shard in meta["shards"])
    check_tars(folder, split, meta)
    table = _read_table(path, has_labels=split != "test")
    count = int(meta["counts"]["images"])
    ids = {name: number for number, name in enumerate(shards)}
    shard_ids = table["shard"].map(ids)
    if len(table) != count or bool(shard_ids.isna().any()):
        raise UserError(f"{path}: its {len(table):,} rows do not fit the {count:,} images of {split}.json; {again}")
    if count == 0:
        raise UserError(f"{folder}: split {split!r} holds no image; see left_out in {split}.json")
    text = {name: table[name].to_numpy(dtype=object) for name in TEXT_COLUMNS}
    return ShardIndex(
        folder=folder,
        div=div,
        split=split,
        shards=shards,
        keys=table["key"].to_numpy(np.int64),
        image_names=text["image_name"],
        patients=text["patient"],
        studies=text["study"],
        views=text["view"],
        sexes=text["sex"],
        ages=text["age"],
        shard_ids=shard_ids.to_numpy(np.int32),
        offsets=table["offset"].to_numpy(np.int64),
        lengths=table["length"].to_numpy(np.int64),
        sha256=text["sha256"],
        channels=table["channels"].to_numpy(np.uint8),
        targets=None if split == "test" else table[list(LABELS)].to_numpy(np.float32),
        meta=meta,
    )


def check_tars(folder: Path, split: str, meta: dict[str, Any]) -> None:
    """Compare the tars in the folder with those in `meta` by name and size; UserError names the first that differs."""
    again = "run cxrdist.preprocess again, or copy this shard anew"
    for shard in meta["shards"]:
        name, size = str(shard["name"]), int(shard["bytes"])
        if not re.fullmatch(rf"{re.escape(split)}-\d{{6}}\.tar", name):
            raise UserError(f"{folder}/{split}.json: {name!r} is not a shard's file name; {again}")
        try:
            found = (folder / name).stat().st_size
        except OSError as error:
            expected = f"{shard['count']:,} images in {size:,} bytes"
            raise UserError(f"{folder / name}: {error.strerror}; it should hold {expected}; {again}") from None
        if found != size:
            raise UserError(
                f"{folder / name}: {found:,} bytes instead of {size:,} ({shard['count']:,} images); {again}"
            )
    listed = {str(shard["name"]) for shard in meta["shards"]}
    extra = sorted(path.name for path in folder.glob(f"{split}-*.tar") if path.name not in listed)
    if extra:
        raise UserError(
            f"{folder / extra[0]} does not belong to this set of {len(listed)} shards ({len(extra)} extra); remove it"
        )


def _read_table(path: Path, has_labels: bool) -> pd.DataFrame:
    kinds: dict[str, Any] = dict.fromkeys(TEXT_COLUMNS, object)
    kinds |= {"key": np.int64, "offset": np.int64, "length": np.int64, "channels": np.uint8}
    if has_labels:
        kinds |= dict.fromkeys(LABELS, np.int8)
    try:
        return pd.read_csv(path, usecols=list(kinds), dtype=kinds, na_filter=False, encoding="utf-8")
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); run cxrdist.preprocess again") from None
