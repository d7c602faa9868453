"""Score tables against labels: per label and macro, with intervals, paired comparisons, calibration and subgroups.

Every interval comes from resampling patients (see `metrics.bootstrap_auroc`), the same resamples for all tables.
"""

import functools
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import TypeAdapter

from cxrdist.errors import UserError
from cxrdist.scoring import calibration, metrics
from cxrdist.scoring.tables import ScoreTable, average_studies, study_ids
from cxrdist.tables import LabelTable
from cxrdist.task import MIN_CASES

FEW_CASES = f"* fewer than {MIN_CASES} positives or negatives: its intervals may be too narrow"
MIN_SUBGROUP = 20  # images; smaller groups say nothing
AGES, AGE_NAMES = (0, 40, 60, 80, 200), ("under 40", "40-59", "60-79", "80 and over")


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
    study_averaged: "StudyAverage | None"  # None where a study is not known, or all have one image


@dataclass(frozen=True)
class StudyAverage:
    """What it changes when all images of a study get their mean; intervals of the gain on the same resamples.

    by image: each image is scored with its study's mean. by study: each study is scored once, with the mean of its
    images' labels where they differ. Lists have an entry per label, nan where a label has none.
    """

    num_studies: int
    macro_auroc: float
    macro_gain: float
    macro_gain_interval: tuple[float, float]
    gain: list[float]
    gain_interval: list[tuple[float, float]]
    by_study_macro_auroc: float
    by_study_auroc: list[float]
    by_study_interval: list[tuple[float, float]]


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
    observed: list[int]  # images whose label is not masked
    positives: list[int | float]  # a soft label t counts as t
    scores: list[TableScore]
    comparisons: list[Comparison]
    subgroups: list[Subgroup]

    def few_cases(self) -> list[bool]:
        """By label: has it so few positives or negatives that its intervals may be too narrow?"""
        return [min(n, seen - n) < MIN_CASES for n, seen in zip(self.positives, self.observed, strict=True)]

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers; nan becomes null."""
        return json.loads(TypeAdapter(Evaluation).dump_json(self))  # type: ignore[no-any-return]


def match_labels(table: ScoreTable, truth: LabelTable, source: Path) -> LabelTable:
    """The rows of `truth`, read from `source`, in the table's order; UserError for an image without labels."""
    rows = pd.Index(truth.about["image_name"]).get_indexer(pd.Index(table.image_names))
    if len(unknown := table.image_names[rows < 0]):
        count = f"{len(unknown):,} of {len(rows):,} scored images, e.g. {unknown[0]!r}"
        raise UserError(f"{source} has no labels for {count}; give the label CSV of the images that were scored")
    return LabelTable(truth.about.iloc[rows], truth.targets[rows])


def evaluate(tables: Sequence[ScoreTable], truth: LabelTable, *, num_resamples: int = 1000) -> Evaluation:
    """Score `tables` (over the same images in the same order) against the matching rows of `truth`."""
    targets = truth.targets.astype(np.float64)
    patients = truth.about["patient"].to_numpy(object)
    resample = functools.partial(metrics.bootstrap_auroc, num_resamples=num_resamples)
    samples = resample(targets, [table.probs for table in tables], patients)
    averages = _study_averages(tables, targets, truth.about, samples, resample)
    scores = [
        _score(table, targets, truth.about, values, average)
        for table, values, average in zip(tables, samples, averages, strict=True)
    ]
    comparisons, macros = [], metrics.macro_samples(samples)
    for (one, first), (other, second) in itertools.combinations(zip(scores, macros, strict=True), 2):
        gain, difference = one.macro_auroc - other.macro_auroc, first - second
        above = float(np.mean(difference[~np.isnan(difference)] > 0))
        comparisons.append(Comparison(one.name, other.name, gain, metrics.interval(difference), above))
    observed = (~np.isnan(targets)).sum(axis=0).tolist()
    positives = [int(n) if n.is_integer() else n for n in np.nansum(targets, axis=0).tolist()]
    subgroups = list(_subgroups(tables[0].probs, targets, truth.about, resample))
    counts = len(truth), len(set(patients)), num_resamples
    return Evaluation(*counts, list(tables[0].labels), observed, positives, scores, comparisons, subgroups)


def _study_averages(
    tables: Sequence[ScoreTable],
    targets: metrics.Floats,
    about: pd.DataFrame,
    samples: metrics.Floats,
    resample: Callable[..., metrics.Floats],
) -> list[StudyAverage | None]:
    """By table; `samples`: (T, B, K) of the tables as they are."""
    ids = study_ids(about["patient"], about["study"])
    if None in ids or len(set(ids)) == len(ids):
        return [None] * len(tables)
    codes, distinct = pd.factorize(pd.Series(ids, dtype=object))
    means = [average_studies(table, ids).probs for table in tables]
    first = np.unique(codes, return_index=True)[1]
    seen = np.zeros((len(distinct), targets.shape[1]))
    labels = np.zeros_like(seen)
    np.add.at(seen, codes, ~np.isnan(targets))
    np.add.at(labels, codes, np.nan_to_num(targets))
    study_targets = np.divide(labels, seen, out=np.full(seen.shape, np.nan), where=seen > 0)
    patients = about["patient"].to_numpy(object)
    averaged = resample(targets, means, patients)
    by_study = resample(study_targets, [mean[first] for mean in means], patients[first])
    found: list[StudyAverage | None] = []
    for table, mean, before, after, studies in zip(tables, means, samples, averaged, by_study, strict=True):
        auroc, plain = metrics.auroc_per_label(targets, mean), metrics.auroc_per_label(targets, table.probs)
        study_auroc = metrics.auroc_per_label(study_targets, mean[first])
        macro_gain = metrics.macro_samples(after) - metrics.macro_samples(before)
        found.append(
            StudyAverage(
                num_studies=len(distinct),
                macro_auroc=metrics.macro(auroc)[0],
                macro_gain=metrics.macro(auroc)[0] - metrics.macro(plain)[0],
                macro_gain_interval=metrics.interval(macro_gain),
                gain=(auroc - plain).tolist(),
                gain_interval=[metrics.interval(values) for values in (after - before).T],
                by_study_macro_auroc=metrics.macro(study_auroc)[0],
                by_study_auroc=study_auroc.tolist(),
                by_study_interval=[metrics.interval(values) for values in studies.T],
            )
        )
    return found


def _score(
    table: ScoreTable,
    targets: metrics.Floats,
    about: pd.DataFrame,
    samples: metrics.Floats,
    study_average: StudyAverage | None,
) -> TableScore:
    auroc = metrics.auroc_per_label(targets, table.probs)
    value, num_labels = metrics.macro(auroc)
    calibrated = calibration.calibrated_by_halves(table.probs, targets, about["patient"].to_numpy(object))
    return TableScore(
        name=table.name,
        macro_auroc=value,
        macro_interval=metrics.interval(metrics.macro_samples(samples)),
        num_labels=num_labels,
        auroc=auroc.tolist(),
        auroc_interval=[metrics.interval(values) for values in samples.T],
        average_precision=metrics.average_precision_per_label(targets, table.probs).tolist(),
        calibration_error=calibration.reliability(targets, table.probs).expected_error,
        temperature=calibration.temperature(targets, table.probs),
        calibration_error_after=calibration.reliability(targets, calibrated).expected_error,
        study_averaged=study_average,
    )


def _subgroups(
    probs: NDArray[np.float32], targets: metrics.Floats, about: pd.DataFrame, resample: Callable[..., metrics.Floats]
) -> Iterator[Subgroup]:
    ages = pd.to_numeric(about["age"], errors="coerce")  # nan, which is no group, where it is unknown
    about = about.assign(age=pd.cut(ages, AGES, right=False, labels=AGE_NAMES)).reset_index()
    for kind in ("view", "sex", "age"):
        for value, group in about.groupby(kind, observed=True):
            rows = group.index.to_numpy()
            if value and len(rows) >= MIN_SUBGROUP:
                macro, num_labels = metrics.macro_auroc(targets[rows], probs[rows])
                samples = resample(targets[rows], [probs[rows]], group["patient"].to_numpy(object))
                interval = metrics.interval(metrics.macro_samples(samples[0]))
                yield Subgroup(kind, str(value), len(rows), num_labels, macro, interval)
