"""`evaluate --external`: each set's scores and labels, read and matched, then numbers, a page and a table of text."""

import argparse
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from cxrdist import __version__
from cxrdist.cli import with_readings
from cxrdist.errors import UserError
from cxrdist.files import check_outputs, with_json, write_output
from cxrdist.flags.evaluate import FORM
from cxrdist.report.external import auroc_text, external_sections, macro_text, share_text, shared_text
from cxrdist.report.figures import files_section
from cxrdist.report.page import write_report
from cxrdist.scoring.evaluation import match_labels
from cxrdist.scoring.external import LabelMap, ScoredSet, Validation, read_map, validate
from cxrdist.scoring.tables import ScoreTable, TableMeta, read_members, task_of, was_seen, with_ensemble
from cxrdist.shards.index import task_of as task_of_shards
from cxrdist.tables import LabelTable
from cxrdist.task import Task, load_task
from cxrdist.truth import check_rows, read_truth

SET = re.compile(
    r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)=(?P<scores>.+)@(?P<labels>[^@#]+)(#(?P<task>[^@#]+))?", re.DOTALL
)


@dataclass(frozen=True)
class SetSpec:
    """What `--external` asks for. labels: a shard set's folder or a label CSV. task: of a CSV, where it is named."""

    name: str
    scores: tuple[Path, ...]
    labels: Path
    task: Task | None


def parse_set(text: str) -> SetSpec:
    """`NAME=SCORES.csv[,SCORES.csv]@SHARDS` or `@LABELS.csv[#TASK]`; UserError for another form or an unknown task."""
    if (found := SET.fullmatch(text)) is None:
        raise UserError(f"--external {text}: write {FORM}; a name has letters, digits, '.', '_', '-'")
    try:
        task = None if found["task"] is None else load_task(found["task"])
    except UserError as error:
        raise UserError(f"--external {text}: {str(error).removeprefix('--task ')}") from None
    return SetSpec(found["name"], tuple(map(Path, found["scores"].split(","))), Path(found["labels"]), task)


def evaluate_external(args: argparse.Namespace) -> None:
    """Read every set, score it, and write OUT/metrics.json and OUT/report.html. Raises UserError, writing nothing."""
    specs = [parse_set(text) for text in args.external]
    names = [spec.name for spec in specs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"--external {twice[0]} is there twice; tables of one set are given with commas between")
    outputs = [args.out / name for name in ("metrics.json", "report.html")]
    inputs = list(chain.from_iterable([*with_json(spec.scores), spec.labels] for spec in specs))
    check_outputs(outputs, inputs + ([] if args.map is None else [args.map]), folder=args.out)
    sets = [read_set(spec, args) for spec in specs]
    given = {} if args.map is None else read_map(args.map, sets)
    result = validate(sets, given, args.resamples)
    told = list(matched(result, given))
    notes = [f"{one.name}: {note}" for one in sets for note in one.notes]
    if len({one.models for one in sets if one.models}) > 1:
        notes.append("The sets were not all scored with the same weights: what differs is not the data alone.")
    print("\n".join([*told, *(f"note: {note}" for note in notes)]), flush=True)
    paths = {f"{kind} of {one.name}": text for one in result.sets
             for kind, text in (("scores", ", ".join(one.scores)), ("labels", one.labels))}  # fmt: skip
    paths |= {"map": str(args.map)} if args.map is not None else {}
    sections = [*external_sections(result, notes), files_section(paths | {"this report": str(args.out)}, {})]
    about = f"external validation on {', '.join(one.name for one in sets)}; cxrdist {__version__}"
    write_output(outputs[0], result.to_json())
    write_report(outputs[1], args.title, about, sections)
    print("\n".join(lines_of(result)))
    print(f"report: {outputs[1]}; numbers: {outputs[0]}")


def read_set(spec: SetSpec, args: argparse.Namespace) -> ScoredSet:
    """One set's scores and the labels of the same images. Raises UserError as all that reads them does."""
    more = {"allow_missing": args.allow_missing}
    tables, weights = read_members(list(spec.scores), None, args.weights, **more)
    models, members = [item.sha256 for table in tables for item in table.meta.checkpoints], tables
    if len(tables) > 1:
        tables = with_ensemble(tables, weights, args.average, take_made=args.weights is None, **more)
    table = tables[0]
    labelled, task = read_labelled(spec, tables, args)
    truth = match_labels(table, labelled, spec.labels)
    notes = check_rows(table, labelled, spec.labels, allow_missing=args.allow_missing)
    notes += [f"{', '.join(table.meta.members)} are averaged"] if len(tables) > 1 else []
    notes += [f"the table does not say its {', '.join(table.unsaid)}"] if table.unsaid else []
    if any(may_be_seen(member.meta, task) for member in members):
        notes.append("these images may have been trained on: the scores say how well the models remember them")
    return ScoredSet(spec.name, table, truth, task, spec.labels, spec.scores, tuple(sorted(models)), tuple(notes))


def may_be_seen(meta: TableMeta, task: Task) -> bool:
    """Whether the models behind a table were trained on its shards or, where it does not say that, may have been."""
    own = meta.task is not None and not task.differences(meta.task)
    seen = was_seen(meta)
    return own and meta.split == "train" if seen is None else seen


def read_labelled(spec: SetSpec, tables: Sequence[ScoreTable], args: argparse.Namespace) -> tuple[LabelTable, Task]:
    """All labels of a set, and the task that says what they are: a shard set's own, `#TASK`, or the tables'."""
    if not spec.labels.exists():
        raise UserError(f"--external {spec.name}: {spec.labels}: no such shard set or label CSV; check the path")
    if spec.labels.is_dir():
        if spec.task is not None:
            raise UserError(f"--external {spec.name}: {spec.labels} is a shard set and says its task: leave out #TASK")
        task, remedy = task_of_shards(spec.labels), f"give a label CSV: --external {spec.name}=SCORES@LABELS.csv#TASK"
        return read_truth(None, spec.labels, task, tables, remedy=remedy)[0], task
    behind = f"{spec.labels}#TASK, e.g. #nih or #FILE.toml"
    task = spec.task or task_of(tables[0], None, behind)
    try:
        task = with_readings(task, args)
        return read_truth(spec.labels, None, task, tables)[0], task
    except UserError as error:
        raise UserError(
            f"--external {spec.name}: {error}{'' if spec.task else f'; or name its own task: {behind}'}"
        ) from None


def matched(result: Validation, given: LabelMap) -> Iterator[str]:
    """A line for each set: what was taken for what, what is a blank and why, and what was compared with nothing."""
    for one in result.sets:
        mapped, pairs, blanks = given.get(one.name, {}), [], []
        for score in one.cells:
            if score.own:
                same = f"{score.label} = {score.own}{' (map)' if score.label in mapped else ''}"
                pairs.append(score.label if score.own == score.label else same)
            if score.blank:
                blanks.append(f"{score.label} ({score.blank})")
        left = ", ".join(one.not_scored)
        told = f"{one.name}: {len(pairs)} labels compared: {', '.join(pairs)}"
        told += f"; blank: {', '.join(blanks)}" if blanks else ""
        yield told + (f"; its labels that no score is of: {left}" if left else "")
    if result.nowhere:
        yield f"labels of the scores that no set has: {', '.join(result.nowhere)}"


def lines_of(result: Validation) -> Iterator[str]:
    """The table as text: label, set, AUROC with interval, positives, images and prevalence, or why it is a blank."""
    labels, sets = [label[:40] for label in result.labels], [one.name for one in result.sets]
    wide, narrow = max(map(len, [*labels, "macro"])), max(map(len, [*sets, "set"]))
    yield f"{'label':<{wide}}  {'set':<{narrow}}  {'AUROC (95 %)':<22}  positives of images"
    for place, label in enumerate(labels):
        for one in result.sets:
            score = one.cells[place]
            about = "; ".join(filter(None, (share_text(score), score.blank)))
            yield f"{label:<{wide}}  {one.name:<{narrow}}  {auroc_text(score):<22}  {about}"
    for one in result.sets:
        yield f"{'macro':<{wide}}  {one.name:<{narrow}}  {macro_text(one)}"
    yield shared_text(result)
