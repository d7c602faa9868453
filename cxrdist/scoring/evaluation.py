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
from cxrdist.scoring import calibration, metrics
from cxrdist.scoring.tables import ScoreTable, average_studies, study_ids
from cxrdist.tables import LabelTable

MIN_SUBGROUP = 20  # images; smaller groups say nothing
AGE_BINS = ((0, 40, "under 40"), (40, 60, "40-59"), (60, 80, "60-79"), (80, 200, "80 and over"))


@dataclass(frozen=True)
class TableScore:
    """One table's scores; lists have an entry per label in the task's order, nan where a label has none."""

    name: str
    macro_auroc: float
    macro_interval: tuple[float, float]  # 95 %
    num_labels: int  # that have an AUROC
    auroc: list[float]
    auroc_interval: list[tuple[float, float]]
    average_precision: list[float]
    calibration_error: float  # expected calibration error over all labels
    temperature: float  # of all labels together; above 1: overconfident
    calibration_error_after: float  # with the temperature fitted on the other half of the patients
    study_averaged_auroc: float  # macro, when all images of a study get their mean; nan where a study is not known


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


def match_labels(table: ScoreTable, truth: LabelTable, source: str) -> LabelTable:
    """The rows of `truth` in the table's order; UserError for an image without labels."""
    row_of = {name: row for row, name in enumerate(truth.about["image_name"])}
    unknown = [name for name in table.image_names if name not in row_of]
    if unknown:
        raise UserError(
            f"{source} has no labels for {len(unknown):,} of {len(table.image_names):,} scored images, e.g. "
            f"{unknown[0]!r}; give the label CSV of the images that were scored"
        )
    rows = [row_of[name] for name in table.image_names]
    return LabelTable(truth.about.iloc[rows], truth.targets[rows])


def evaluate(
    tables: Sequence[ScoreTable], truth: LabelTable, *, num_resamples: int = 1000, seed: int = 0
) -> Evaluation:
    """Score `tables` (over the same images in the same order) against the matching rows of `truth`."""
    targets = truth.targets.astype(np.float64)
    patients = truth.about["patient"].to_numpy(object)
    studies = study_ids(truth.about["patient"], truth.about["study"])
    probs = [table.probs for table in tables]
    samples = metrics.bootstrap_auroc(targets, probs, patients, num_resamples=num_resamples, seed=seed)
    scores = [_score(table, targets, patients, studies, samples[i]) for i, table in enumerate(tables)]
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
        labels=list(tables[0].labels),
        positives=[int(count) for count in targets.sum(axis=0)],
        scores=scores,
        comparisons=comparisons,
        subgroups=list(_subgroups(probs[0], targets, truth.about, num_resamples, seed)),
    )


def _score(
    table: ScoreTable,
    targets: metrics.Floats,
    patients: NDArray[Any],
    studies: Sequence[tuple[str, str] | None],
    samples: metrics.Floats,
) -> TableScore:
    auroc = metrics.auroc_per_label(targets, table.probs)
    value, num_labels = metrics.macro(auroc)
    by_study = math.nan
    if None not in studies:
        by_study = metrics.macro_auroc(targets, average_studies(table, studies).probs)[0]
    calibrated = calibration.calibrated_by_halves(table.probs, targets, patients)
    return TableScore(
        name=table.name,
        macro_auroc=value,
        macro_interval=metrics.interval(metrics.macro_samples(samples)),
        num_labels=num_labels,
        auroc=auroc.tolist(),
        auroc_interval=[metrics.interval(samples[:, label]) for label in range(len(table.labels))],
        average_precision=metrics.average_precision_per_label(targets, table.probs).tolist(),
        calibration_error=calibration.reliability(targets, table.probs).expected_error,
        temperature=calibration.temperature(targets, table.probs),
        calibration_error_after=calibration.reliability(targets, calibrated).expected_error,
        study_averaged_auroc=by_study,
    )


def _subgroups(
    probs: NDArray[np.float32], targets: metrics.Floats, about: pd.DataFrame, num_resamples: int, seed: int
) -> Iterator[Subgroup]:
    patients = about["patient"].to_numpy(object)
    for kind in ("view", "sex", "age"):
        values = about[kind].to_numpy(object)
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
