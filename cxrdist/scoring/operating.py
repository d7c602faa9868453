"""Calibration and operating points of a model: fitted on images that it has not seen, stored beside its weights.

A probability p of label k becomes sigmoid(slope * logit(p) + intercept); it is called positive from the label's
threshold on. Every interval is from resampled patients, with all their images.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cxrdist.documents import Document, read_bounded
from cxrdist.errors import UserError
from cxrdist.scoring.calibration import fitted_line
from cxrdist.scoring.metrics import Floats, interval
from cxrdist.scoring.tables import Average, Checkpoint, Probs, ScoreTable, logit, shares, was_seen
from cxrdist.task import MIN_CASES, Task

Method = Literal["platt", "temperature"]
Range = tuple[float, float]
FILE = "calibration.json"
NO_THRESHOLD = -1  # the decision on a label without one
RULE = re.compile(r"youden|f1|(sensitivity|specificity)=(0?\.\d+|1(\.0*)?)")


@dataclass(frozen=True, kw_only=True)
class Threshold(Document):
    """Of a label's calibrated probability, and what it reaches; all None where there are no positives or negatives.

    Intervals: 95 %.
    """

    threshold: float | None = None
    threshold_interval: Range | None = None
    sensitivity: float | None = None
    sensitivity_interval: Range | None = None
    specificity: float | None = None
    specificity_interval: Range | None = None


@dataclass(frozen=True, kw_only=True)
class LabelCalibration(Threshold):
    """One label's line and threshold. shared: the line is that of all labels together, this one has too few cases."""

    label: str
    positives: float  # a soft label t counts as t
    negatives: float
    shared: bool
    slope: float
    intercept: float
    slope_interval: Range | None
    intercept_interval: Range | None


NO_POINT = Threshold()


class Rate(NamedTuple):
    """A share in [0, 1], nan where nothing counts for it, and its 95 % interval."""

    value: float
    interval: Range | None


@dataclass(frozen=True)
class OperatingPoint:
    """What one label's threshold does on a set of images."""

    label: str
    threshold: float | None
    sensitivity: Rate
    specificity: Rate
    ppv: Rate
    npv: Rate


@dataclass(frozen=True, kw_only=True)
class Calibration(Document):
    """`calibration.json`. scores_of: the `identity` of the average that was calibrated. rule: how thresholds were
    chosen. out_of_fold, split, shards, images, patients: the scores that it was fitted on.
    """

    format_version: Literal[1] = 1
    task: Task
    scores_of: str
    method: Method
    rule: str
    out_of_fold: bool
    split: str
    shards: str
    images: int
    patients: int
    labels: tuple[LabelCalibration, ...]

    def __post_init__(self) -> None:
        if tuple(each.label for each in self.labels) != self.task.labels:
            raise UserError("a calibration has one entry for each label of its task, in order")
        if not all(each.slope > 0 for each in self.labels):
            raise UserError("a calibration's slopes are positive: it changes no order")

    def apply(self, probs: Probs) -> Probs:
        """(N, K) float32 calibrated probabilities; the order of the images by any label stays."""
        lines = np.array([(each.slope, each.intercept) for each in self.labels])
        scaled = lines[:, 0] * logit(np.asarray(probs, np.float64)) + lines[:, 1]
        return np.asarray(1 / (1 + np.exp(-np.clip(scaled, -700, 700))), dtype=np.float32)

    @property
    def thresholds(self) -> Floats:
        """(K,) of calibrated probabilities, nan where there is none."""
        return np.array([np.nan if each.threshold is None else each.threshold for each in self.labels])

    def decide(self, calibrated: Probs) -> NDArray[np.int8]:
        """(N, K) 1 from the threshold on, 0 below it, -1 where a label has none."""
        decided = (calibrated >= self.thresholds).astype(np.int8)
        decided[:, np.isnan(self.thresholds)] = NO_THRESHOLD
        return decided

    def require(self, scores_of: str, source: object) -> None:
        """UserError unless it was fitted on scores of that identity."""
        if self.scores_of != scores_of:
            raise UserError(
                f"{source} was fitted on scores of other members, epochs, views or weights than these; "
                "calibrate these (cxrdist calibrate), or give what it was fitted on"
            )


def read_calibration(path: Path) -> Calibration:
    """The calibration in the file `path`, or in that folder."""
    file = path / FILE if path.is_dir() else path
    try:
        return Calibration.from_json(read_bounded(file), file)
    except UserError as error:
        raise UserError(
            f"--calibration: {error}; give the {FILE} that `cxrdist calibrate` wrote, or its folder"
        ) from None


def identity(members: Sequence[tuple[float, Sequence[Checkpoint]]], average: Average) -> str:
    """What the scores of an average depend on beside the images: SHA-256 (hex) of weights, views and shares.

    members: weight and checkpoints of each; their order and names do not matter.
    """
    parts = [
        (round(share, 9), sorted([item.sha256, item.image_size, sorted(item.views.items())] for item in checkpoints))
        for share, (_, checkpoints) in zip(shares([weight for weight, _ in members]), members, strict=True)
    ]
    how = average if len(members) > 1 else "prob"
    return hashlib.sha256(json.dumps([how, sorted(parts)]).encode()).hexdigest()


def identity_of(tables: Sequence[ScoreTable], weights: Sequence[float], average: Average) -> str:
    """`identity` of members' score tables; UserError where one does not say its checkpoints."""
    if unsaid := [table.name for table in tables if not table.meta.checkpoints]:
        raise UserError(
            f"table {unsaid[0]!r} does not say whose scores it holds; give the members' tables with their JSON"
        )
    members = [(weight, table.meta.checkpoints) for table, weight in zip(tables, weights, strict=True)]
    return identity(members, average)


def check_unseen(tables: Sequence[ScoreTable], *, trusted: bool) -> list[str]:
    """UserError where a model may have been trained on the images of its table; notes on what is only not known.

    trusted: the user says that no model has seen them, which counts only where the tables do not know.
    """
    notes = []
    for table in tables:
        meta, seen = table.meta, was_seen(table.meta)
        if seen:
            source = next(item.source for item in meta.checkpoints if item.trained_on == meta.shards)
            raise UserError(
                f"{table.name!r}: {source} was trained on these very images (split {meta.split!r}), which says "
                "nothing of others; give out-of-fold scores (cxrdist folds, or infer --split train --fold K) or those "
                "of a split that it has not seen"
            )
        if seen is None and not trusted:
            raise UserError(
                f"{table.name!r} does not say what its models were trained on; where none of them has seen these "
                "images, say so with --unseen"
            )
        if seen is None:
            notes.append(f"{table.name}: that no model has seen these images is the user's word (--unseen)")
    return notes


def parse_rule(text: str) -> str:
    """A rule for thresholds: youden, f1, sensitivity=S or specificity=S; UserError for another."""
    if RULE.fullmatch(text) is None or text.endswith("=.0"):
        raise UserError(f"--threshold {text}: give youden, f1, sensitivity=0.9 or specificity=0.9 (any share)")
    return text


def fit(
    probs: Probs,
    targets: Floats,
    patients: NDArray[Any],
    *,
    task: Task,
    method: Method = "platt",
    rule: str = "youden",
    num_resamples: int = 200,
    seed: int = 0,
    scores_of: str = "",
    table: ScoreTable | None = None,
) -> Calibration:
    """Lines and thresholds for every label of `task`.

    Args: probs (N, K) in [0, 1]; targets (N, K) in [0, 1], nan where masked; patients (N,).
    table: whose split, shard set and kind of scores are written down.
    Raises UserError where no label has positives and negatives, or the scores are no better than chance.
    """
    logits = logit(np.asarray(probs, np.float64))
    seen = ~np.isnan(targets)
    cases = np.stack([np.nansum(targets, 0), np.nansum(1 - targets, 0)], 1)
    usable: NDArray[np.bool_] = np.asarray((cases > 0).all(1))
    if not usable.any():
        raise UserError("no label has both positives and negatives here, so nothing can be fitted")
    pooled = _fit_line(method, logits[:, usable][seen[:, usable]], targets[:, usable][seen[:, usable]])
    if pooled[0] <= 0:
        problem = "over all labels together these scores are no better than chance, so there is nothing to calibrate"
        raise UserError(f"{problem}; give more images, or another model")
    ids, draws = _resamples(patients, num_resamples, seed)
    labels = [
        _fit_label(
            label,
            logits[seen[:, place], place],
            targets[seen[:, place], place],
            draws,
            ids[seen[:, place]],
            method,
            rule,
            pooled,
        )
        for place, label in enumerate(task.labels)
    ]
    return Calibration(
        task=task,
        scores_of=scores_of,
        method=method,
        rule=rule,
        out_of_fold=table is not None and table.meta.out_of_fold,
        split="" if table is None else table.meta.split,
        shards="" if table is None else table.meta.shards,
        images=len(probs),
        patients=draws.shape[1],
        labels=tuple(labels),
    )


def _resamples(patients: NDArray[Any], number: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.uint16]]:
    """The place of each image's patient (N,), and how often each patient is in each of the resamples (B, P)."""
    distinct, ids = np.unique(np.asarray(patients).astype(str), return_inverse=True)
    rng, share = np.random.default_rng(seed), np.full(len(distinct), 1 / len(distinct))
    draws = np.empty((number, len(distinct)), np.uint16)
    for row in draws:
        row[:] = rng.multinomial(len(distinct), share)
    return ids, draws


def _fit_label(
    label: str,
    logits: Floats,
    targets: Floats,
    draws: NDArray[np.uint16],
    ids: NDArray[np.int64],
    method: Method,
    rule: str,
    pooled: Range,
) -> LabelCalibration:
    """One label's line and threshold; ids: the patient of each image. pooled: all labels' line."""
    positives, negatives = float(targets.sum()), float((1 - targets).sum())
    line, lines = pooled, None
    shared = min(positives, negatives) < MIN_CASES
    if not shared:
        line = _fit_line(method, logits, targets)
        shared = line[0] <= 0  # the scores are no better than chance: nothing to be told from them alone
        line = pooled if shared else line
    if not shared:
        resampled = [_fit_line(method, logits, targets, draw[ids].astype(np.float64), start=line) for draw in draws]
        lines = np.array(resampled).reshape(-1, 2)
    point = _threshold(rule, line, logits, targets, draws, ids) if min(positives, negatives) > 0 else NO_POINT
    return LabelCalibration(
        label=label,
        positives=positives,
        negatives=negatives,
        shared=shared,
        slope=line[0],
        intercept=line[1],
        slope_interval=None if lines is None else _range(*interval(lines[:, 0])),
        intercept_interval=None if lines is None else _range(*interval(lines[:, 1])),
        **dataclasses.asdict(point),
    )


def _fit_line(
    method: Method, logits: Floats, targets: Floats, weights: Floats | None = None, start: Range = (1.0, 0.0)
) -> Range:
    if weights is not None and not ((weights * targets).sum() > 0 and (weights * (1 - targets)).sum() > 0):
        return float("nan"), float("nan")
    return fitted_line(logits, targets, weights, with_intercept=method == "platt", start=start)


def _threshold(
    rule: str, line: Range, logits: Floats, targets: Floats, draws: NDArray[np.uint16], ids: NDArray[np.int64]
) -> Threshold:
    """The operating point of one label by `rule`, with its intervals over the resamples."""
    order = np.argsort(-logits, kind="stable")
    ordered, truth = logits[order], targets[order]
    ends = np.append(np.flatnonzero(ordered[1:] != ordered[:-1]), len(ordered) - 1)  # last row of each distinct score
    below = np.append(ordered[ends[1:]], ordered[-1])
    cuts = (ordered[ends] + below) / 2  # between a score and the next one, so that rounding moves nobody across
    cuts[-1] = ordered[-1]

    def rates(weights: Floats) -> tuple[Floats, Floats]:
        positive, negative = np.cumsum(weights * truth)[ends], np.cumsum(weights * (1 - truth))[ends]
        if positive[-1] <= 0 or negative[-1] <= 0:
            return np.full(len(ends), np.nan), np.full(len(ends), np.nan)
        return positive / positive[-1], 1 - negative / negative[-1]

    share = float(np.mean(truth))
    plain = np.ones(len(truth))
    sensitivity, specificity = rates(plain)
    chosen = _choose(rule, sensitivity, specificity, share)
    samples = []
    for draw in draws:
        weights = draw[ids[order]].astype(np.float64)
        sens, spec = rates(weights)
        if not np.isnan(sens[0]):
            cut = cuts[_choose(rule, sens, spec, float(np.average(truth, weights=weights)))]
            samples.append((cut, sens[chosen], spec[chosen]))
    columns = np.array(samples or [(np.nan,) * 3]).T
    low, high = interval(line[0] * columns[0] + line[1])
    return Threshold(
        threshold=_sigmoid(line[0] * float(cuts[chosen]) + line[1]),
        threshold_interval=_range(_sigmoid(low), _sigmoid(high)),
        sensitivity=float(sensitivity[chosen]),
        sensitivity_interval=_range(*interval(columns[1])),
        specificity=float(specificity[chosen]),
        specificity_interval=_range(*interval(columns[2])),
    )


def _choose(rule: str, sensitivity: Floats, specificity: Floats, share: float) -> int:
    """The place of the cut, from the highest score down, that the rule asks for. share: of positives."""
    name, _, wanted = rule.partition("=")
    if name == "sensitivity":  # the fewest false alarms that still find so many
        return int(np.argmax(sensitivity >= float(wanted) - 1e-12))
    if name == "specificity":
        enough = np.flatnonzero(specificity >= float(wanted) - 1e-12)
        return int(enough[-1]) if len(enough) else 0
    if name == "f1":
        found, alarms = share * sensitivity, (1 - share) * (1 - specificity)
        return int(np.argmax(2 * found / (found + alarms + share)))
    return int(np.argmax(sensitivity + specificity))


def _sigmoid(value: float) -> float:
    return float(1 / (1 + np.exp(-np.clip(value, -700, 700))))


def _range(low: float, high: float) -> Range | None:
    return None if np.isnan(low) else (float(low), float(high))


def cross_fitted(probs: Probs, targets: Floats, patients: NDArray[Any], task: Task, method: Method) -> Probs:
    """(N, K) float32 calibrated probabilities, each by lines that were fitted on the other half of the patients.

    Raises UserError where a half cannot be fitted, as `fit` does.
    """
    _, ids = np.unique(np.asarray(patients).astype(str), return_inverse=True)
    out = np.empty_like(probs)
    for half in (0, 1):
        here, there = ids % 2 == half, ids % 2 != half
        fitted = fit(probs[there], targets[there], ids[there], task=task, method=method, num_resamples=0)
        out[here] = fitted.apply(probs[here])
    return out


def performance(
    calibration: Calibration, probs: Probs, targets: Floats, patients: NDArray[Any], num_resamples: int = 200
) -> list[OperatingPoint]:
    """What each label's threshold does on these images; a rate is nan, its interval None, where nothing counts for it.

    Args: probs (N, K) not yet calibrated; targets (N, K) in [0, 1], nan where masked; patients (N,).
    """
    decided = calibration.decide(calibration.apply(probs))
    ids, draws = _resamples(patients, num_resamples, seed=0)
    points = []
    for place, each in enumerate(calibration.labels):
        rows = ~np.isnan(targets[:, place]) & (decided[:, place] >= 0)
        truth, called = targets[rows, place], decided[rows, place] == 1
        kinds = (truth * called, truth * ~called, (1 - truth) * called, (1 - truth) * ~called)
        of_patient = [np.bincount(ids[rows], kind, minlength=draws.shape[1]) for kind in kinds]
        found, missed, alarms, cleared = (np.append(each.sum(), draws @ each) for each in of_patient)
        with np.errstate(invalid="ignore", divide="ignore"):
            shares_of = (
                *(found / (found + missed), cleared / (cleared + alarms)),
                *(found / (found + alarms), cleared / (cleared + missed)),
            )
        rates = (Rate(float(values[0]), _range(*interval(values[1:]))) for values in shares_of)
        points.append(OperatingPoint(each.label, each.threshold, *rates))
    return points
