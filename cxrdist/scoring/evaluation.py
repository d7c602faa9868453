"""Score tables against labels: per label and macro, with intervals, paired comparisons, calibration and subgroups.

Every interval comes from resampling patients (see `metrics.bootstrap_auroc`), the same resamples for all tables.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cxrdist.errors import UserError
from cxrdist.labels import LABELS
from cxrdist.scoring import metrics
from cxrdist.scoring.tables import ScoreTable, average_studies, sigmoid

MIN_SUBGROUP = 20  # images; smaller groups say nothing
AGE_BINS = ((0, 40, "under 40"), (40, 60, "40-59"), (60, 80, "60-79"), (80, 200, "80 and over"))


@dataclass(frozen=True)
class TableScore:
    """One table's scores; lists have 14 entries in the order of LABELS, nan where a label has none."""

    name: str
    macro_auroc: float
    macro_interval: tuple[float, float]  # 95 %
    num_labels: int  # of 14 that have an AUROC
    auroc: list[float]
    auroc_interval: list[tuple[float, float]]
    average_precision: list[float]
    calibration_error: float  # expected calibration error over all labels
    temperature: float  # of all labels together; above 1: overconfident
    calibration_error_after: float  # with the temperature fitted on the other half of the patients
    study_averaged_auroc: float  # macro, when all images of a study get their mean; nan where names tell no study


@dataclass(frozen=True)
class Comparison:
    """Macro AUROC of `one` minus that of `other`, on the same resamples."""

    one: str
    other: str
    difference: float
    interval: tuple[float, float]
    share_above: float  # of resamples in which `one` is better


@dataclass(frozen=True)
class Subgroup:
    """The first table's macro AUROC within one group of images."""

    kind: str  # view, sex, age
    value: str
    num_images: int
    num_labels: int
    macro_auroc: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Evaluation:
    """All that `metrics.json` holds. `scores` begins with the table that counts (the ensemble where there is one)."""

    num_images: int
    num_patients: int
    num_resamples: int
    labels: list[str]
    positives: list[int]
    scores: list[TableScore]
    comparisons: list[Comparison]
    subgroups: list[Subgroup]

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers; nan becomes null."""
        return {key: _plain(value) for key, value in dataclasses.asdict(self).items()}


def match_labels(table: ScoreTable, truth: pd.DataFrame, source: str) -> pd.DataFrame:
    """The rows of `truth` (from `read_label_csv`) in the table's order; UserError for an image without labels."""
    rows = truth.set_index("image_name", drop=False)
    unknown = [name for name in table.image_names if name not in rows.index]
    if unknown:
        raise UserError(
            f"{source} has no labels for {len(unknown):,} of {len(table.image_names):,} scored images, e.g. "
            f"{unknown[0]!r}; give the label CSV of the images that were scored"
        )
    return rows.loc[list(table.image_names)]


def evaluate(
    tables: Sequence[ScoreTable], truth: pd.DataFrame, *, num_resamples: int = 1000, seed: int = 0
) -> Evaluation:
    """Score `tables` (over the same images in the same order) against the matching rows of `truth`."""
    targets = truth[list(LABELS)].to_numpy(np.float64)
    patients = truth["patient"].to_numpy(object)
    probs = [table.probs for table in tables]
    samples = metrics.bootstrap_auroc(targets, probs, patients, num_resamples=num_resamples, seed=seed)
    scores = [_score(table, targets, patients, samples[i]) for i, table in enumerate(tables)]
    macros = [metrics.macro_samples(samples[i]) for i in range(len(tables))]
    comparisons = []
    for one, other in itertools.combinations(range(len(tables)), 2):
        difference = macros[one] - macros[other]
        comparisons.append(
            Comparison(
                scores[one].name,
                scores[other].name,
                scores[one].macro_auroc - scores[other].macro_auroc,
                metrics.interval(difference),
                float(np.mean(difference[~np.isnan(difference)] > 0)),
            )
        )
    return Evaluation(
        num_images=len(truth),
        num_patients=len(set(patients)),
        num_resamples=num_resamples,
        labels=list(LABELS),
        positives=[int(count) for count in targets.sum(axis=0)],
        scores=scores,
        comparisons=comparisons,
        subgroups=list(_subgroups(probs[0], targets, truth, num_resamples, seed)),
    )


def _score(table: ScoreTable, targets: metrics.Floats, patients: NDArray[Any], samples: metrics.Floats) -> TableScore:
    auroc = metrics.auroc_per_label(targets, table.probs)
    value, num_labels = metrics.macro(auroc)
    try:
        by_study = metrics.macro_auroc(targets, average_studies(table).probs)[0]
    except UserError:
        by_study = math.nan
    return TableScore(
        name=table.name,
        macro_auroc=value,
        macro_interval=metrics.interval(metrics.macro_samples(samples)),
        num_labels=num_labels,
        auroc=auroc.tolist(),
        auroc_interval=[metrics.interval(samples[:, label]) for label in range(len(LABELS))],
        average_precision=metrics.average_precision_per_label(targets, table.probs).tolist(),
        calibration_error=metrics.reliability(targets, table.probs).expected_error,
        temperature=metrics.temperature(targets, table.probs),
        calibration_error_after=metrics.reliability(targets, _calibrated(table, targets, patients)).expected_error,
        study_averaged_auroc=by_study,
    )


def _calibrated(table: ScoreTable, targets: metrics.Floats, patients: NDArray[Any]) -> NDArray[np.float32]:
    """Probs divided by a temperature that was fitted on the other half of the patients."""
    _, ids = np.unique(patients.astype(str), return_inverse=True)
    inside = np.clip(table.probs, 1e-7, 1 - 1e-7)
    logits = np.log(inside) - np.log1p(-inside)
    out = table.probs.copy()
    for half in (0, 1):
        here, there = ids % 2 == half, ids % 2 != half
        if here.any() and there.any():
            out[here] = sigmoid(logits[here] / metrics.temperature(targets[there], table.probs[there]))
    return out


def _subgroups(
    probs: NDArray[np.float32], targets: metrics.Floats, truth: pd.DataFrame, num_resamples: int, seed: int
) -> Iterator[Subgroup]:
    patients = truth["patient"].to_numpy(object)
    for kind in ("view", "sex", "age"):
        values = truth[kind].to_numpy(object)
        if kind == "age":
            values = np.array([_age_bin(value) for value in values], dtype=object)
            order = [name for _, _, name in AGE_BINS]
        else:
            order = sorted(set(values))
        for value in order:
            rows = np.flatnonzero(values == value)
            if not value or len(rows) < MIN_SUBGROUP:
                continue
            auroc = metrics.auroc_per_label(targets[rows], probs[rows])
            macro, num_labels = metrics.macro(auroc)
            samples = metrics.bootstrap_auroc(
                targets[rows], [probs[rows]], patients[rows], num_resamples=num_resamples, seed=seed
            )
            low_high = metrics.interval(metrics.macro_samples(samples[0])) if num_labels else (math.nan, math.nan)
            yield Subgroup(kind, value, len(rows), num_labels, macro, low_high)


def _age_bin(text: str) -> str:
    try:
        age = float(text)
    except ValueError:
        return ""
    return next((name for low, high, name in AGE_BINS if low <= age < high), "")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
