"""External validation: scores of one set of labels against the labels of several sets, matched by name or by a map.

A label of the scores that a set does not have is a blank there, with its reason; nothing is guessed.
"""

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter, ValidationError

from cxrdist.documents import Document, problem
from cxrdist.errors import UserError
from cxrdist.files import read_bytes
from cxrdist.scoring import metrics
from cxrdist.scoring.tables import ScoreTable
from cxrdist.tables import LabelTable
from cxrdist.task import Task, folded, nearest

LabelMap = dict[str, dict[str, str]]  # set -> label of its scores -> what the set's own labels call it, '' for nothing
MAX_MAP_BYTES = 2**20
NOT_THERE, LEFT_OUT, NO_SCORE = "no such label", "left out by the map", "not a label of the scores"


@dataclass(frozen=True, eq=False)
class ScoredSet:
    """A set's scores (an ensemble's where there are several tables) and labels, row by row of the same images.

    task: of the labels in `truth`, read from `source`. scores: the files. models: the weights behind them, by content;
    empty where a table does not say it. notes: what a reader must know of the tables and their rows.
    """

    name: str
    table: ScoreTable
    truth: LabelTable
    task: Task
    source: Path
    scores: tuple[Path, ...]
    models: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LabelScore(Document):
    """One label on one set. `auroc` is None exactly where `blank` says why.

    own: what the set's labels call it, '' where they do not have it. num_images: whose label is not masked.
    positives: a soft label t counts as t. interval: 95 %, from resampled patients.
    """

    label: str
    own: str = ""
    num_images: int = 0
    positives: float = 0.0
    prevalence: float | None = None
    auroc: float | None = None
    interval: tuple[float, float] | None = None
    blank: str = ""


@dataclass(frozen=True, kw_only=True)
class SetResult(Document):
    """One set. cells: one per label of the validation. not_scored: its labels that no label of the scores matches.

    macro_auroc: over the `shared` labels of the validation, so that sets can be compared; None where there is none.
    """

    name: str
    task: str
    labels: str
    scores: tuple[str, ...]
    models: tuple[str, ...]
    num_images: int
    num_patients: int
    macro_auroc: float | None
    macro_interval: tuple[float, float] | None
    cells: tuple[LabelScore, ...]
    not_scored: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Validation(Document):
    """What `evaluate --external` writes as metrics.json.

    labels: of the scores, that at least one set has; the others are `nowhere`. shared: with an AUROC on every set.
    """

    format_version: int = 1
    num_resamples: int
    labels: tuple[str, ...]
    shared: tuple[str, ...]
    nowhere: tuple[str, ...]
    sets: tuple[SetResult, ...]


def read_map(path: Path, sets: Sequence[ScoredSet]) -> LabelMap:
    """A TOML file with a table for each set that needs one: `[SET]`, then `"label of the scores" = "label of the set"`.

    "" leaves a label out that has the same name but not the same meaning. Names are compared as `folded`, and come back
    as the set and the scores spell them. UserError, with the entry and what there is, for an unknown or repeated name.
    """
    try:
        tables = tomllib.loads(read_bytes(path, MAX_MAP_BYTES).decode("utf-8"))
        given = TypeAdapter(LabelMap).validate_python(tables, strict=True)
    except ValidationError as error:
        raise UserError(f'--map {path}: {problem(error)}; write [SET] and then "label" = "label of the set"') from None
    except (ValueError, RecursionError) as error:
        raise error if isinstance(error, UserError) else UserError(f"--map {path}: not TOML ({error})") from None
    known = {each.name: each for each in sets}
    found: LabelMap = {}
    for name, entries in given.items():
        if name not in known:
            raise UserError(f"--map {path}: [{name}] is no set of --external{_there_are(name, known)}")
        table, task = known[name].table, known[name].task
        scored, own = by_folded(table.labels, f"scores of {name}"), by_folded(task.labels, f"labels of {name}")
        for label, other in entries.items():
            where = f'--map {path}: [{name}] "{label}" = "{other}"'
            if folded(label) not in scored:
                raise UserError(f"{where}: the scores have no label {label!r}{_there_are(label, table.labels)}")
            if other and folded(other) not in own:
                raise UserError(f"{where}: {known[name].source} has no label {other!r}{_there_are(other, task.labels)}")
            mapped = found.setdefault(name, {})
            if scored[folded(label)] in mapped:
                raise UserError(f"{where}: {label!r} is there twice; keep one")
            mapped[scored[folded(label)]] = other and own[folded(other)]
    return found


def by_folded(labels: Sequence[str], whose: str) -> dict[str, str]:
    """Labels by their `folded` names; UserError where two of them are alike then."""
    found: dict[str, str] = {}
    for label in labels:
        if (first := found.setdefault(folded(label), label)) != label:
            raise UserError(f"{whose}: {first!r} and {label!r} differ in case, spaces, '_' or '-' only; rename one")
    return found


def pair_labels(one: ScoredSet, given: Mapping[str, str]) -> dict[str, LabelScore]:
    """For every label of the set's scores, by its folded name, what the set's labels call it, or why nothing.

    given: the set's part of the map, which comes before equal names. UserError where not one label is paired.
    """
    own, cells = by_folded(one.task.labels, f"labels of {one.name}"), {}
    for name, label in by_folded(one.table.labels, f"scores of {one.name}").items():
        other = given[label] if label in given else own.get(name, "")
        why = "" if other else LEFT_OUT if label in given else NOT_THERE
        cells[name] = LabelScore(label=label, own=other, blank=why)
    if not any(cell.own for cell in cells.values()):
        both = f"the scores have {_some(one.table.labels)}; {one.source} has {_some(one.task.labels)}"
        raise UserError(f"--external {one.name}: no label in common: {both}; say in --map FILE what is the same")
    return cells


def validate(sets: Sequence[ScoredSet], given: LabelMap, num_resamples: int = 1000) -> Validation:
    """AUROC of every label on every set; intervals from resampling each set's patients. Raises as `pair_labels`."""
    pairs = [pair_labels(each, given.get(each.name, {})) for each in sets]
    spelt: dict[str, str] = {}
    for cells in pairs:
        for name, cell in cells.items():
            spelt.setdefault(name, cell.label)
    there = [name for name in spelt if any(name in cells and cells[name].own for cells in pairs)]
    scored, samples = [], []
    for each, cells in zip(sets, pairs, strict=True):
        some, resampled = _score(each, cells, num_resamples)
        scored.append([some.get(name, LabelScore(label=spelt[name], blank=NO_SCORE)) for name in there])
        samples.append(resampled)
    shared = [place for place, row in enumerate(zip(*scored, strict=True)) if all(c.auroc is not None for c in row)]
    results = []
    for each, row, resampled in zip(sets, scored, samples, strict=True):
        macro, interval = None, None
        if shared:
            macro = metrics.macro(np.array([row[place].auroc for place in shared], dtype=np.float64))[0]
            columns = np.stack([resampled[there[place]] for place in shared], axis=-1)
            interval = _known(metrics.interval(metrics.macro_samples(columns)))
        used = {cell.own for cell in row}
        results.append(
            SetResult(
                name=each.name,
                task=each.task.name,
                labels=str(each.source),
                scores=tuple(map(str, each.scores)),
                models=each.models,
                num_images=len(each.truth),
                num_patients=int(each.truth.about["patient"].nunique()),
                macro_auroc=macro,
                macro_interval=interval,
                cells=tuple(row),
                not_scored=tuple(label for label in each.task.labels if label not in used),
            )
        )
    return Validation(
        num_resamples=num_resamples,
        labels=tuple(spelt[name] for name in there),
        shared=tuple(spelt[there[place]] for place in shared),
        nowhere=tuple(label for name, label in spelt.items() if name not in there),
        sets=tuple(results),
    )


def _score(
    one: ScoredSet, cells: Mapping[str, LabelScore], num_resamples: int
) -> tuple[dict[str, LabelScore], dict[str, metrics.Floats]]:
    """The cells with their numbers, and (B,) resampled AUROCs of those that are paired, by folded name."""
    paired = [name for name, cell in cells.items() if cell.own]
    columns = [one.table.labels.index(cells[name].label) for name in paired]
    own = [one.task.labels.index(cells[name].own) for name in paired]
    targets, probs = one.truth.targets[:, own].astype(np.float64), one.table.probs[:, columns]
    patients = one.truth.about["patient"].to_numpy(object)
    aurocs = metrics.auroc_per_label(targets, probs)
    samples = metrics.bootstrap_auroc(targets, [probs], patients, num_resamples=num_resamples)[0]
    found = dict(cells)
    for place, name in enumerate(paired):
        observed = int((~np.isnan(targets[:, place])).sum())
        positives, defined = float(np.nansum(targets[:, place])), not math.isnan(aurocs[place])
        why = "no negatives" if positives else "no positives"
        found[name] = LabelScore(
            label=cells[name].label,
            own=cells[name].own,
            num_images=observed,
            positives=positives,
            prevalence=positives / observed if observed else None,
            auroc=float(aurocs[place]) if defined else None,
            interval=_known(metrics.interval(samples[:, place])) if defined else None,
            blank="" if defined else why if observed else "masked in every image",
        )
    return found, {name: samples[:, place] for place, name in enumerate(paired)}


def _known(interval: tuple[float, float]) -> tuple[float, float] | None:
    return None if math.isnan(interval[0]) else interval


def _there_are(name: str, names: Sequence[str] | Mapping[str, object]) -> str:
    return f"{nearest(name, names)}; there are: {_some(list(names))}"


def _some(names: Sequence[str], count: int = 20) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
