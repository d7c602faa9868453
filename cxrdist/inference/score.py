"""Batches of images -> float32 logits of every pass -> parts on the disk -> a score table per member."""

import contextlib
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cxrdist.augment.views import make_views
from cxrdist.data.loader import Loader
from cxrdist.distributed.precision import DTYPES, autocast
from cxrdist.errors import UserError
from cxrdist.files import check_outputs, refuse_links, with_json
from cxrdist.inference.parts import Logits, Part, Rows
from cxrdist.inference.passes import Column, Member, Pass
from cxrdist.models import architecture_of
from cxrdist.scoring.tables import ScoreTable, TableMeta, average, read_meta, sigmoid
from cxrdist.shards.index import ShardIndex

HELD_BATCHES = 32  # decoded batches kept while models that do not fit together take turns on the device
RESIDENT_SHARE = 0.5  # of the free device memory that weights may fill; the rest is for activations
Scored = tuple[int, Rows, Tensor]
Call = Callable[[Any], Any]


def _as_it_is(model: Any) -> Any:
    return model


def score(
    loader: Loader,
    batches: Iterable[Rows],
    passes: Sequence[Pass],
    models: dict[str, nn.Module],
    precision: str,
    *,
    compiled: bool = False,
) -> Iterator[Scored]:
    """(place in `batches`, rows (n,), logits (P, n, K) float32 on the device) of every batch, in order.

    Undecodable rows are missing, a batch of nothing else too. Models stay on the device when all fit; else they take
    turns on `HELD_BATCHES` decoded batches at a time, so that each image is still decoded once. Frozen backbones are
    then held in `precision` (see `Architecture.hold_frozen`). compiled: by torch.compile, each model once.
    """
    call: Call = functools.cache(torch.compile) if compiled else _as_it_is
    for head in (head for item in passes for head in item.heads):
        architecture_of(head.model).hold_frozen(models[head.sha256], DTYPES[precision])
    resident = fits(models.values(), loader.device)
    stages = [list(group) for _, group in itertools.groupby(passes, lambda item: None if resident else item.heads)]
    decoded = loader.batches(batches)
    while group := list(itertools.islice(decoded, 1 if resident else HELD_BATCHES)):
        logits: list[list[Tensor]] = [[] for _ in group]
        for stage in stages:
            used = {head.sha256: models[head.sha256] for item in stage for head in item.heads}
            for model in used.values():
                model.to(loader.device)
            for batch, columns in zip(group, logits, strict=True):
                columns += run_passes(batch.images, stage, used, precision, call)
            for model in () if resident else used.values():
                model.to("cpu")
        for batch, columns in zip(group, logits, strict=True):
            yield batch.step, batch.rows, torch.stack(columns)


@torch.no_grad()
def run_passes(
    images: Tensor, passes: Sequence[Pass], models: dict[str, nn.Module], precision: str, call: Call = _as_it_is
) -> list[Tensor]:
    """(B, K) float32 logits for every column of `columns_of(passes)`, of uint8 images (B, C, S, S).

    A view is made once for all models of its size and normalisation; a shared frozen backbone gives its features once
    to all heads.
    call: what is done to a model, or half of one, before it is called.
    """
    columns: list[list[Tensor]] = [[] for _ in passes]
    architectures = [architecture_of(item.heads[0].model) for item in passes]
    kinds = [(item.image_size, each.stats) for item, each in zip(passes, architectures, strict=True)]
    for size, stats in dict.fromkeys(kinds):
        of_kind = [place for place, kind in enumerate(kinds) if kind == (size, stats)]
        views = list(dict.fromkeys(passes[place].view for place in of_kind))
        for view, inputs in make_views(images, views, size, stats):
            for place in of_kind:
                item, architecture = passes[place], architectures[place]
                if item.view != view:
                    continue
                heads = [models[head.sha256] for head in item.heads]
                with autocast(precision, images.device):
                    if architecture.features is not None and architecture.head_logits is not None:
                        features = call(architecture.features)(heads[0], inputs)
                        logits = [call(architecture.head_logits)(head, features) for head in heads]
                    else:
                        logits = [call(head)(inputs) for head in heads]
                columns[place] = [value.float() for value in logits]
    return [column for group in columns for column in group]


def fits(models: Iterable[nn.Module], device: torch.device) -> bool:
    """Whether all weights may stay on the device at once (always on a CPU: they are in its memory already)."""
    if device.type != "cuda":
        return True
    weights = {tensor.data_ptr(): tensor.nbytes for model in models for tensor in model.state_dict().values()}
    return bool(sum(weights.values()) < RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0])


def in_parts(
    scored: Iterable[Scored], loader: Loader, batches: Mapping[int, Rows], none: Tensor, save_every_s: float, show: Any
) -> Iterator[Part]:
    """Collect scores into parts of about `save_every_s`. The host waits for the device only where a part ends.

    batches: by number, in the order of the scores. none: logits (P, 0, K). show: a progress bar that counts images.
    """
    first, saved, numbers = 0, time.monotonic(), list(batches)
    rows, logits = [np.empty(0, np.int64)], [none]

    def close(end: int) -> Part:
        wanted = {row for number in numbers[first:end] for row in batches[number].tolist()}
        unreadable = {item.row: item.reason for item in loader.skipped if item.row in wanted}
        on_host = torch.cat(logits, dim=1).cpu().numpy()
        return Part(np.array(numbers[first:end]), np.concatenate(rows), on_host, unreadable)

    for place, batch_rows, batch_logits in scored:
        rows.append(batch_rows)
        logits.append(batch_logits)
        show.update(len(batches[numbers[place]]))
        if time.monotonic() - saved >= save_every_s:
            yield close(place + 1)
            first, rows, logits, saved = place + 1, rows[:1], [none], time.monotonic()
    if first < len(batches):
        yield close(len(batches))


def check_folder(out: Path, names: Sequence[str], inputs: Iterable[Path | None]) -> None:
    """UserError, before a model is read, where the tables of these members and a submission must not be written."""
    tables = with_json(out / "scores" / f"{name}.csv" for name in dict.fromkeys(names))
    there = [path for path in inputs if path is not None]
    check_outputs([*tables, out / "submission.csv"], there, folder=out)
    refuse_links(out / "parts")
    check_no_other_tables(out / "scores", names)


def check_no_other_tables(folder: Path, names: Sequence[str]) -> None:
    """UserError where an earlier inference left score tables of other members than `names` in `folder`.

    They would be averaged in by `ensemble --scores FOLDER/*.csv`. A table without a JSON is not an inference's.
    """
    tables = [path for path in sorted(folder.glob("*.csv")) if path.with_suffix(".json").exists()]
    if others := [str(path) for path in tables if path.stem not in names]:
        about = f"{', '.join(others)}: from an earlier inference with other members, and ensembles would average it in"
        raise UserError(
            f"{about}; give its members with --member, too, move it away, or choose another folder by --out"
        )


def check_same_images(folder: Path, names: Sequence[str], index: ShardIndex) -> None:
    """UserError where a score table in `folder` that would be replaced says that it is of another split or shard set.

    A JSON that cannot be read says nothing.
    """
    paths = (folder / f"{name}.csv" for name in dict.fromkeys(names))
    for path in filter(Path.exists, paths):
        meta = TableMeta()
        with contextlib.suppress(UserError):
            meta = read_meta(path.with_suffix(".json"))
        if meta.split not in ("", index.split):
            about = f"scores of split {meta.split!r}, which those of {index.split!r} would replace"
        elif meta.shards not in ("", index.fingerprint):
            about = "scores of another shard set, which those of this one would replace"
        else:
            continue
        raise UserError(f"{path}: holds {about}; choose another folder by --out, or move it away")


def check_finite(logits: Logits, passes: Sequence[Pass], image_names: NDArray[np.object_], precision: str) -> None:
    """UserError that names checkpoint, view and image of the first non-finite score of logits (P, n, K)."""
    if len(bad := np.argwhere(~np.isfinite(logits).all(axis=2))):
        head, view = [(head, item.view) for item in passes for head in item.heads][bad[0, 0]]
        remedy = "use --precision bf16 or fp32" if precision == "fp16" else "train again or use another epoch"
        images = f"{len(set(bad[:, 1])):,} images, e.g. {image_names[bad[0, 1]]!r} (view {view}, {precision})"
        raise UserError(f"{head.source} produces non-finite scores for {images}; {remedy}")


def member_table(
    member: Member, logits: Logits, columns: Sequence[Column], image_names: NDArray[np.object_], meta: TableMeta
) -> ScoreTable:
    """A member's probabilities: the mean of each checkpoint's views, then of the checkpoints, as `meta` averages.

    Args: logits: (P, n, K) with the P `columns` (see `passes.columns_of`); meta: what all members have in common.
    """
    per_column, per_checkpoint = dict(zip(columns, logits, strict=True)), []
    for item in member.checkpoints:
        views = [sigmoid(per_column[item.sha256, item.image_size, view]) for view in item.views]
        per_checkpoint.append(average(views, list(item.views.values()), meta.average))
    meta = dataclasses.replace(meta, member=member.name, weight=member.weight, checkpoints=member.checkpoints)
    return ScoreTable(image_names, average(per_checkpoint, None, meta.average), meta)
