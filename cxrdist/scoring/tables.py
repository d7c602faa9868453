"""Score tables (one row of 14 probabilities per image) and how they are averaged into one.

A table is a CSV that any tool reads, with a JSON beside it that says where it came from. All averaging happens here, in
float32: views, epochs and folds of a member, then members. The published run took EVA-X's sigmoid and view mean in
float16, which moved the result by up to 2.4e-4 and made ties.
"""

import csv
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cxrdist.errors import UserError
from cxrdist.files import write_atomically
from cxrdist.labels import LABELS, patient_of, study_of
from cxrdist.scoring.metrics import macro_auroc

FORMAT_VERSION = 1
Average = Literal["prob", "logit", "rank"]
Probs = NDArray[np.float32]
_SMALLEST = np.float32(1e-7)  # probs are kept this far from 0 and 1 before a logit is taken


@dataclass(frozen=True, eq=False)
class ScoreTable:
    """Probabilities of one member, or of an average.

    image_names: (N,) object array of str, exact text, each once. probs: (N, 14) float32 in [0, 1], columns as LABELS.
    meta: what made it: member, div, split, shards (fingerprint), checkpoints, views, unreadable (name -> reason) and
        out_of_fold (True when no model behind a row was trained on its patient).
    """

    image_names: NDArray[np.object_]
    probs: Probs
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.probs.shape != (len(self.image_names), len(LABELS)) or self.probs.dtype != np.float32:
            raise ValueError(f"probs must be ({len(self.image_names)}, {len(LABELS)}) float32")

    @property
    def name(self) -> str:
        return str(self.meta.get("member", "table"))

    @property
    def unreadable(self) -> dict[str, str]:
        """Image name -> reason, for images that were asked for and could not be scored."""
        return dict(self.meta.get("unreadable", {}))


def write_table(path: Path, table: ScoreTable) -> None:
    """Write `path` (CSV; every float32 survives the round trip) and then the JSON beside it, each atomically."""
    buffer = io.StringIO()
    rows = csv.writer(buffer, lineterminator="\n")
    rows.writerow(("image_name", *LABELS))
    rows.writerows((name, *map(str, probs)) for name, probs in zip(table.image_names, table.probs, strict=True))
    content = buffer.getvalue().encode("utf-8")
    write_atomically(path, content)
    meta = {"format_version": FORMAT_VERSION} | table.meta | {"sha256": hashlib.sha256(content).hexdigest()}
    write_atomically(path.with_suffix(".json"), json.dumps(meta, indent=1) + "\n")


def read_table(path: Path) -> ScoreTable:
    """The table at `path`. Its JSON may be missing (a table made by other software); a submission CSV is a table too.

    Raises UserError, with file, line and column, for: label columns that are not the 14 in order, a value that is not a
    number in [0, 1], a repeated image, a CSV changed since its JSON was written, another format version.
    """
    try:
        content = path.read_bytes()
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a score table, e.g. OUT/scores/eva_x.csv") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a CSV file; give a score table, e.g. OUT/scores/eva_x.csv") from None
    rows = list(csv.reader(io.StringIO(text, newline="")))
    _check_header(path, rows[0] if rows else [])
    names: dict[str, int] = {}
    probs = np.zeros((len(rows) - 1, len(LABELS)), dtype=np.float32)
    for line, row in enumerate(rows[1:], start=2):
        if len(row) != len(LABELS) + 1:
            raise UserError(f"{path}, line {line}: {len(row)} cells instead of {len(LABELS) + 1}; make it again")
        if row[0] in names:
            raise UserError(f"{path}: image {row[0]!r} is in line {names[row[0]]} and again in line {line}; keep one")
        names[row[0]] = line
        try:
            probs[line - 2] = [float(cell) for cell in row[1:]]
        except ValueError as error:
            raise UserError(f"{path}, line {line}: {error}; a score table holds numbers in [0, 1]") from None
    _check_range(str(path), np.array(list(names), dtype=object), probs)
    return ScoreTable(np.array(list(names), dtype=object), probs, _read_meta(path, content))


def average(probs: Sequence[Probs], weights: Sequence[float] | None = None, how: Average = "prob") -> Probs:
    """The weighted average (N, K) float32 of score arrays of equal shape, summed in the order given.

    prob: of probabilities (published). logit: of their logits, then the sigmoid (a geometric mean of odds).
    rank: of each label's ranks over these N images, scaled into (0, 1): only the order of a member counts.
    Weights are scaled to sum 1. Raises ValueError without a positive sum.
    """
    shares = np.asarray([1.0] * len(probs) if weights is None else weights, dtype=np.float64)
    if not (shares >= 0).all() or shares.sum() <= 0:
        raise ValueError("weights must be 0 or more, and one of them positive")
    shares = shares / shares.sum()
    total = np.zeros_like(probs[0])
    for share, table in zip(shares, probs, strict=True):
        total += np.float32(share) * _transformed(table, how)
    if how == "logit":
        total = sigmoid(total)
    return np.clip(total, 0.0, 1.0)


def sigmoid(logits: NDArray[np.float32]) -> Probs:
    """1 / (1 + exp(-x)) in float32, without overflow."""
    small = np.exp(-np.abs(logits.astype(np.float32, copy=False)))
    return np.asarray(np.where(logits >= 0, 1 / (1 + small), small / (1 + small)), dtype=np.float32)


def average_tables(
    tables: Sequence[ScoreTable], weights: Sequence[float] | None = None, how: Average = "prob"
) -> ScoreTable:
    """One table from several over the same images, in the first one's row order.

    Raises UserError when they hold different images, divisions, splits or shard sets; nothing is averaged then.
    """
    aligned = align(tables)
    shares = [1.0] * len(tables) if weights is None else list(weights)
    members = [{"member": table.name, "weight": share} for table, share in zip(tables, shares, strict=True)]
    meta = {key: value for key, value in tables[0].meta.items() if key in ("div", "split", "shards")}
    unreadable = {name: reason for table in tables for name, reason in table.unreadable.items()}
    meta |= {"member": "ensemble", "members": members, "average": how, "unreadable": unreadable}
    meta["out_of_fold"] = all(table.meta.get("out_of_fold") is True for table in tables)
    return ScoreTable(tables[0].image_names, average(aligned, shares, how), meta)


def align(tables: Sequence[ScoreTable]) -> list[Probs]:
    """Every table's probs in the first one's row order; UserError as in `average_tables`."""
    first = tables[0]
    position = {name: row for row, name in enumerate(first.image_names)}
    aligned = []
    for table in tables:
        for key in ("div", "split", "shards"):
            one, other = first.meta.get(key), table.meta.get(key)
            if None not in (one, other) and one != other:
                raise UserError(
                    f"tables {first.name!r} and {table.name!r} differ in {key}: {one} and {other}; "
                    "score both with the same shards"
                )
        missing = sorted(set(position) - set(table.image_names))
        extra = sorted(set(table.image_names) - set(position))
        if missing or extra:
            example = f"{missing[0]!r} is only in the first" if missing else f"{extra[0]!r} is only in the second"
            raise UserError(
                f"tables {first.name!r} and {table.name!r} hold different images: {len(missing):,} missing and "
                f"{len(extra):,} extra in the second ({example}); score both on the same images"
            )
        rows = np.empty(len(position), dtype=np.int64)
        rows[[position[name] for name in table.image_names]] = np.arange(len(position))
        aligned.append(table.probs[rows])
    return aligned


def join_parts(tables: Sequence[ScoreTable]) -> list[ScoreTable]:
    """Tables of the same member over disjoint images (its out-of-fold parts) become one; others stay as they are.

    Order: each member where it first appears. Raises UserError when parts of a member overlap.
    """
    by_member: dict[str, list[ScoreTable]] = {}
    for table in tables:
        by_member.setdefault(table.name, []).append(table)
    joined = []
    for name, parts in by_member.items():
        names = np.concatenate([part.image_names for part in parts])
        if len(set(names)) < len(names):
            repeated = next(image for image in names if (names == image).sum() > 1)
            raise UserError(
                f"two tables are named {name!r} and both hold image {repeated!r}: give them different member names "
                "(their JSON says the name), or parts over different images"
            )
        meta = dict(parts[0].meta)
        if len(parts) > 1:
            meta["out_of_fold"] = all(part.meta.get("out_of_fold") is True for part in parts)
            meta["unreadable"] = {image: reason for part in parts for image, reason in part.unreadable.items()}
        joined.append(ScoreTable(names, np.concatenate([part.probs for part in parts]), meta))
    return joined


def member_weights(tables: Sequence[ScoreTable], given: Sequence[float] | None) -> list[float]:
    """`--weights` as given, else the weights that the members were scored with (1 where a table names none)."""
    if given is not None and len(given) != len(tables):
        raise UserError(f"--weights has {len(given)} numbers for {len(tables)} members; give one per member")
    return [float(table.meta.get("weight", 1.0)) for table in tables] if given is None else list(given)


def average_studies(table: ScoreTable) -> ScoreTable:
    """Give every image of a study the mean probability of the study's images (same patient and study in the name).

    All images of a study carry the same labels. Raises UserError for a name that is not patient_study_image.
    """
    studies = [f"{patient_of(name)}_{study_of(name)}" for name in table.image_names]
    _, ids = np.unique(np.array(studies, dtype=str), return_inverse=True)
    sums = np.zeros((int(ids.max(initial=-1)) + 1, len(LABELS)), dtype=np.float64)
    np.add.at(sums, ids, table.probs)
    means = (sums / np.bincount(ids)[:, None]).astype(np.float32)
    return ScoreTable(table.image_names, means[ids], table.meta | {"study_averaged": True})


def search_weights(tables: Sequence[ScoreTable], targets: NDArray[Any], *, rounds: int = 50) -> list[float]:
    """Weights (sum 1) that raise the macro AUROC of the probability average, chosen on out-of-fold tables.

    Greedy selection with replacement: from nothing, `rounds` times add the member that helps most; a member's weight is
    its share of the picks. Coarse on purpose: a fine search fits the sample. Ties go to the earlier member.
    Args: targets (N, 14) in the first table's row order.
    Raises UserError for a table that is not out-of-fold: on images that a model has seen, overfitting would win.
    Source: Caruana et al. 2004 (ensemble selection).
    """
    for table in tables:
        if table.meta.get("out_of_fold") is not True:
            raise UserError(
                f"table {table.name!r} is not out-of-fold: weights may only be searched on patients that its models "
                "did not see; make it with `cxrdist.infer --split train --fold K` from runs with --validate-fold K"
            )
    aligned = align(tables)
    picks = np.zeros(len(tables))
    total = np.zeros_like(aligned[0], dtype=np.float64)
    for _ in range(rounds):
        scores = [macro_auroc(targets, total + table)[0] for table in aligned]
        best = int(np.argmax(scores))
        picks[best] += 1
        total += aligned[best]
    return [float(share) for share in picks / picks.sum()]


def _transformed(probs: Probs, how: Average) -> Probs:
    if how == "prob":
        return probs
    if how == "logit":
        inside = np.clip(probs, _SMALLEST, 1 - _SMALLEST)
        return np.log(inside) - np.log1p(-inside)
    ranks = np.empty(probs.shape, dtype=np.float32)
    for label in range(probs.shape[1]):
        _, ids, counts = np.unique(probs[:, label], return_inverse=True, return_counts=True)
        middle = np.cumsum(counts) - counts + (counts - 1) / 2  # equal probs share the middle of their places
        ranks[:, label] = (middle[ids] + 0.5) / len(probs)
    return ranks


def _check_header(path: Path, header: list[str]) -> None:
    wanted = ("image_name", *LABELS)
    if len(header) != len(wanted) or header[0].lower() != wanted[0]:
        raise UserError(
            f"{path} is not a score table: its header has {len(header)} columns instead of image_name and the 14 labels"
        )
    for place, (found, label) in enumerate(zip(header[1:], LABELS, strict=True), start=2):
        if found != label:
            raise UserError(
                f"{path}: column {place} is {found!r} where {label!r} belongs; a table's labels must be in submission "
                "order, so nothing was averaged: put the columns in order, or score again"
            )


def _check_range(source: str, names: NDArray[np.object_], probs: Probs) -> None:
    bad = ~((probs >= 0) & (probs <= 1))
    if bad.any():
        row, label = (int(place) for place in np.argwhere(bad)[0])
        raise UserError(
            f"{source}: {names[row]!r}, {LABELS[label]}: {probs[row, label]} is not a probability in [0, 1]"
        )


def _read_meta(path: Path, content: bytes) -> dict[str, Any]:
    """The JSON beside a table, after checking that it describes this very content; a bare name without one."""
    side = path.with_suffix(".json")
    if not side.is_file():
        return {"member": path.stem}
    try:
        meta = json.loads(side.read_text(encoding="utf-8"))
        version, sha256 = meta["format_version"], meta["sha256"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{side} is damaged; score again, or delete it to use the table without its origin") from None
    if version != FORMAT_VERSION:
        raise UserError(f"{side}: format version {version}, this cxrdist reads {FORMAT_VERSION}; score again")
    if sha256 != hashlib.sha256(content).hexdigest():
        raise UserError(
            f"{path} was changed after it was written (its hash is not the one in {side.name}); score again, or delete "
            f"{side.name} to use it without its origin"
        )
    return dict(meta)
