"""A shard set as one page to look at before training: counts, pictures and what is suspicious."""

import base64
import html
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cxrdist.data.inspection import ROWS_AT_ONCE, Example, Finding, Splits, label_counts
from cxrdist.errors import UserError
from cxrdist.report.page import PRIVACY, Section, html_table, write_report

THUMB_PX = 160  # shown at 118; 5 kB of the page
SHEET_IMAGES = 240  # in the sheet of all labels, at most MAX_PER_LABEL of one: 1.2 MB
MAX_PER_LABEL = 8
HEAT_LABELS, SMALL_HEAT_LABELS = 16, 48  # up to so many co-occur with numbers, without; beyond, pairs are listed
MAX_PAIRS, MAX_LINES = 40, 15  # of co-occurring labels; of a distribution or a list
COLUMNS = "grid-template-columns: repeat(auto-fill, minmax({}px, 1fr))"
STYLE = """
h3 { margin: 20px 0 6px; font-size: 16px; overflow-wrap: anywhere; }
section p, section li, section h2 { overflow-wrap: anywhere; }
.tall > .scroll { overflow: visible; background: none; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(300px, 100%), 1fr)); gap: 4px 28px; }
.columns > div { min-width: 0; }
table.pairs td:nth-child(2), table.pairs th:nth-child(2) { text-align: left; }
table.text td:last-child { font: inherit; word-break: normal; overflow-wrap: anywhere; }
table.heat { width: auto; font-size: 12.5px; }
table.heat td { padding: 4px 6px; text-align: center; min-width: 36px; }
table.heat td:first-child { text-align: left; white-space: nowrap; }
table.heat th { padding: 4px 2px; }
table.heat.small td { padding: 0 4px; min-width: 15px; height: 15px; }
table.heat td, table.heat th { position: static; }
table.heat th span { writing-mode: vertical-rl; transform: rotate(180deg); white-space: nowrap; }
.sheet { display: flex; flex-wrap: wrap; gap: 8px; margin: 6px 0 4px; }
.sheet figure { margin: 0; width: 118px; font-size: 11.5px; line-height: 1.3; color: var(--soft); }
.sheet figcaption { overflow-wrap: anywhere; }
.sheet img { margin: 0 0 3px; width: 118px; height: 118px; background: #000; border-radius: 4px; }
.finding { border-top: 1px solid var(--line); padding-top: 4px; margin-top: 16px; }
.finding p { margin: 4px 0; max-width: 86ch; }
.example { margin: 10px 0 2px; font-size: 13.5px; }
.examples { display: flex; flex-wrap: wrap; gap: 4px 28px; }
.examples > div { max-width: 100%; }
.labels { display: grid; align-items: end; gap: 0 14px; }
.labels h3 { font-size: 13.5px; line-height: 1.3; margin-top: 14px; }
.good { color: var(--good); }
@media (max-width: 640px) {
  .wrap { padding: 0 12px; }
  section { padding: 16px 14px; margin: 14px 0; }
  nav { position: static; }
  table { font-size: 13px; }
  th, td { padding: 5px 6px; }
  .sheet figure, .sheet img { width: 104px; }
  .sheet img { height: 104px; }
}
"""


def check_page(path: Path) -> None:
    """UserError where the name is not one of a page."""
    if path.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--report {path}: the page is HTML; name a file that ends with .html")


def write_dataset_report(path: Path, splits: Splits, findings: Sequence[Finding], seed: int = 0) -> None:
    task = splits.task
    sections = [
        _summary(splits, findings),
        _suspicious(splits, findings),
        _labels(splits),
        _co_occurrence(splits),
        _distributions(splits),
        _sheets(splits, np.random.default_rng(seed)),
        _left_out(splits),
    ]
    title = f"Shard set of task {task.name}"
    names = ", ".join(index.split for index in splits.indexes)
    subtitle = f"{splits.indexes[0].folder}: {len(splits):,} images in {names}. {PRIVACY}"
    write_report(path, title[:200], subtitle, sections, head=f"<style>{STYLE}</style>")  # behind the page's own style


def _summary(splits: Splits, findings: Sequence[Finding]) -> Section:
    task = splits.task
    rows: list[list[str | tuple[str, str]]] = []
    for number, index in enumerate(splits.indexes):
        meta, patients, studies = index.meta, *_people(splits, number)
        labelled = "without labels" if index.targets is None else "with labels"
        left_out = (f"{meta.counts.left_out:,}", f"of {meta.counts.rows:,} rows")
        stored = (f"{meta.size_px} px, {meta.fit}", f"{meta.stored_as}, {meta.resize.mode}")
        rows.append([(index.split, labelled), f"{len(index):,}", left_out, patients, studies, stored])
    cards = [
        (f"{len(splits):,}", f"images in {len(splits.indexes)} split{'s' * (len(splits.indexes) > 1)}"),
        (f"{task.num_labels:,}", f"label{'s' * (task.num_labels > 1)} of task {task.name}"),
        (str(len(findings)), "kinds of suspicious things" if findings else "suspicious things found"),
    ]
    body = "".join(f'<div class="card"><b>{number}</b><span>{html.escape(text)}</span></div>' for number, text in cards)
    table = html_table(["split", "images", "left out", "patients", "studies", "stored"], rows)
    about = (
        "What training and inference read. squash: made square without regard to the aspect ratio; pad: black added."
    )
    return Section("Summary", about, f'<div class="cards">{body}</div>{table}')


def _people(splits: Splits, number: int) -> tuple[str, str]:
    """The numbers of patients and of studies of a split, or `unknown`."""
    chosen = slice(*splits.starts[number : number + 2].tolist())
    patients, names = splits.patients[chosen].codes()
    studies, study_names = splits.indexes[number].studies.codes()
    known = np.array([bool(name) for name in names])[patients]
    with_study = known & np.array([bool(name) for name in study_names])[studies]
    pairs = np.unique(patients[with_study].astype(np.int64) * len(study_names) + studies[with_study])
    num_patients = len(np.unique(patients[known]))
    return (f"{num_patients:,}" if num_patients else "unknown", f"{len(pairs):,}" if len(pairs) else "unknown")


def _labels(splits: Splits) -> Section:
    tables = []
    for index in splits.indexes:
        tables.append(f"<h3>{html.escape(index.split)}</h3>")
        if index.targets is None:
            tables.append("<p>This split has no labels.</p>")
            continue
        counts = label_counts(index.targets)
        rows = []
        for label, name in enumerate(splits.task.labels):
            observed, positive = int(counts.observed[label]), int(counts.positive[label])
            masked, soft = len(index) - observed, int(counts.soft[label])
            share = f"{counts.total[label] / observed:.2%}" if observed else "-"
            rows.append(
                [name, f"{positive:,}", share, f"{observed - positive:,}", f"{observed:,}", f"{masked:,}", f"{soft:,}"]
            )
        head = ["label", "positive", "prevalence", "negative", "observed", "masked", "soft"]
        tables.append(f'<div class="tall">{html_table(head, rows, kind="sortable")}</div>')
    about = (
        "Positive: 0.5 and more. Prevalence: the mean of the observed cells. Masked: not known, so that it counts "
        "neither way in loss and metrics. Soft: between 0 and 1."
    )
    return Section("Labels", about, "".join(tables))


def co_occurrence(splits: Splits) -> NDArray[np.int64]:
    """(K, K): the images positive in both labels, in all splits with labels."""
    both = np.zeros((splits.task.num_labels,) * 2, np.int64)
    for index in splits.indexes:
        for start in range(0, 0 if index.targets is None else len(index), ROWS_AT_ONCE):
            assert index.targets is not None
            positive = (index.targets[start : start + ROWS_AT_ONCE] >= 0.5).astype(np.float32)
            both += (positive.T @ positive).astype(np.int64)  # exact: float32 counts to 2^24
    return both


def _co_occurrence(splits: Splits) -> Section:
    labels, both = splits.task.labels, co_occurrence(splits)
    alone = both.diagonal()
    share = both / np.maximum(alone, 1)[:, None]
    title, about = (
        "Labels together",
        "Of the images positive for the label of the row, the share also positive for that of the column.",
    )
    if len(labels) == 1 or not alone.any():
        text = "The task has one label." if len(labels) == 1 else "No image is positive for any label."
        return Section(title, text, "")
    if len(labels) <= SMALL_HEAT_LABELS:
        return Section(title, about, _heat_table(labels, alone, share))
    rows, columns = np.nonzero(np.triu(both, 1))
    best = np.argsort(-both[rows, columns], kind="stable")[:MAX_PAIRS]
    pairs = [
        [labels[a], labels[b], f"{both[a, b]:,}", f"{share[a, b]:.0%}", f"{share[b, a]:.0%}"]
        for a, b in zip(rows[best].tolist(), columns[best].tolist(), strict=True)
    ]
    about = f"The {len(pairs)} most frequent of {len(rows):,} pairs of labels that are positive together."
    head = ["label", "and label", "images", "of the first", "of the second"]
    return Section(title, about, f'<div class="tall">{html_table(head, pairs, kind="pairs")}</div>')


def _heat_table(labels: Sequence[str], alone: NDArray[np.int64], share: NDArray[np.float64]) -> str:
    small = len(labels) > HEAT_LABELS
    head = "".join(f"<th><span>{html.escape(label)}</span></th>" for label in labels)
    rows = []
    for a, label in enumerate(labels):
        cells = []
        for b in range(len(labels)):
            text = f"{100 * share[a, b]:.0f}" if alone[a] else "-"
            text = f' title="{text} %">' if small else f">{text}"
            cells.append(
                f'<td style="background:rgba(var(--heat),{(1 - 0.5 * (not small)) * share[a, b]:.2f})"{text}</td>'
            )
        rows.append(f"<tr><td>{html.escape(label)} <small>{alone[a]:,}</small></td>{''.join(cells)}</tr>")
    kind = "heat small" if small else "heat"
    table = f'<table class="{kind}"><thead><tr><th>%</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    return f'<div class="scroll">{table}</div>'


def _distributions(splits: Splits) -> Section:
    names = [index.split for index in splits.indexes]
    sizes, codes = np.unique(
        splits.column("widths").astype(np.int64) << 32 | splits.column("heights"), return_inverse=True
    )
    # Padded, so that equally frequent sizes stand in the order of their numbers; a page shows no such spaces.
    size_texts = [f"{size >> 32:9,} x {size % 2**32:9,} px" if size else "" for size in sizes.tolist()]
    ages, age_texts = splits.texts("ages").codes()
    blocks = [
        _distribution(splits, "Source size (width x height)", codes, size_texts, by_count=True),
        *(
            _distribution(splits, title, *splits.texts(field).codes(), by_count=True)
            for title, field in (("View", "views"), ("Sex", "sexes"))
        ),
        _distribution(splits, "Age", ages, [_decade(text) for text in age_texts], by_count=False),
    ]
    about = f"Images of {' and of '.join(names)}, and their share."
    if splits.sizes_known:
        short = np.minimum(splits.column("widths"), splits.column("heights"))
        short = short[short > 0]
        middle = f"{np.median(short):,.0f} px in the median"
        about += f" The shorter side of the sources has {short.min():,} to {short.max():,} px, {middle}."
    return Section("Sizes, views, sex, age", about, f'<div class="columns">{"".join(blocks)}</div>')


def _distribution(
    splits: Splits, title: str, codes: NDArray[np.integer[Any]], values: Iterable[str], *, by_count: bool
) -> str:
    """A table of the most frequent values (else all, in order), unknown last. codes: (N,) into `values`."""
    texts, places = np.unique(np.array(list(values)), return_inverse=True)
    table = np.zeros((len(texts), len(splits.indexes)), np.int64)
    np.add.at(table, (places[codes], splits.split_ids), 1)
    if not texts.any():
        return f"<div><h3>{title}</h3><p>Not known.</p></div>"
    totals = np.maximum(table.sum(axis=0), 1).tolist()
    lines = np.argsort(-table.sum(axis=1), kind="stable")[:MAX_LINES] if by_count else np.arange(len(texts))
    rows = []
    for line in sorted(lines.tolist(), key=lambda line: not texts[line]):
        cells = zip(table[line].tolist(), totals, strict=True)
        rows.append([str(texts[line]) or "unknown", *(f"{count:,} ({count / total:.1%})" for count, total in cells)])
    rest = np.setdiff1d(np.arange(len(texts)), lines)
    if len(rest):
        rows.append([f"{len(rest):,} others", *(f"{count:,}" for count in table[rest].sum(axis=0).tolist())])
    head = [title.split(" (")[0].lower(), *(index.split for index in splits.indexes)]
    return f"<div><h3>{title}</h3>{html_table(head, rows)}</div>"


def _decade(text: str) -> str:
    """`60 to 69` of an age in years such as 64, 64.0 or 064Y; '' where it is none."""
    match = re.fullmatch(r"0*(\d{1,3})(\.\d*)?\s*[Yy]?", text.strip())
    if match is None:
        return ""
    decade = int(match[1]) // 10 * 10
    return f"{decade:3d} to {decade + 9}" if decade < 120 else "120 and more"


def _sheets(splits: Splits, rng: np.random.Generator) -> Section:
    task = splits.task
    per_label = max(1, min(MAX_PER_LABEL, SHEET_IMAGES // task.num_labels))
    places = np.arange(task.num_labels)
    if task.num_labels > SHEET_IMAGES:
        places = np.sort(rng.choice(places, SHEET_IMAGES, replace=False))
    labelled = [(number, index.targets) for number, index in enumerate(splits.indexes) if index.targets is not None]
    sheets = []
    for place in places.tolist():
        positives = [
            splits.starts[number] + np.flatnonzero(targets.label(place) >= 0.5) for number, targets in labelled
        ]
        images = np.concatenate([*positives, np.empty(0, np.int64)])
        chosen = np.sort(rng.choice(images, min(per_label, len(images)), replace=False)).tolist()
        sheet = _sheet(splits, chosen) if chosen else "<p>No positive image.</p>"
        sheets.append(f"<div><h3>{html.escape(task.labels[place])}</h3>{sheet}</div>")
    about = f"{f'Up to {per_label}' if per_label > 1 else 'One'} of each label's positives, drawn at random from all "
    about += "splits, as stored (squares)."
    if len(places) < task.num_labels:
        about += f" {len(places)} random ones of {task.num_labels:,} labels."
    if not labelled:
        chosen = np.sort(rng.choice(len(splits), min(4 * MAX_PER_LABEL, len(splits)), replace=False)).tolist()
        about, sheets = "As stored (squares); no split has labels.", [_sheet(splits, chosen)]
    body = "".join(sheets)
    if per_label <= 2:  # many labels: side by side
        body = f'<div class="labels" style="{COLUMNS.format(126 * per_label)}">{body}</div>'
    return Section("Random images", about, body)


def _sheet(splits: Splits, images: Sequence[int]) -> str:
    figures = []
    for image in images:
        name = html.escape(splits.names[image])
        data = base64.b64encode(splits.thumbnail(image, THUMB_PX)).decode()
        picture = f'<img alt="{name}" src="data:image/jpeg;base64,{data}">'
        figures.append(
            f"<figure>{picture}<figcaption>{name}, {html.escape(splits.split_name(image))}</figcaption></figure>"
        )
    return f'<div class="sheet">{"".join(figures)}</div>'


def _suspicious(splits: Splits, findings: Sequence[Finding]) -> Section:
    unknown = (
        ""
        if splits.sizes_known
        else "This set is of an older version: its sources' sizes and rotations are not known. "
    )
    if not findings:
        nothing = "Nothing: no repeated, blank, tiny or turned image, no contradictory id, no label with few cases."
        body = f'<p class="good">{nothing}</p>'
        return Section("Suspicious", f"{unknown}What was looked for and not found.", body)
    rows = [[finding.title, finding.amount] for finding in findings]
    blocks = [html_table(["what", "how many"], rows, kind="text")]
    for finding in findings:
        title = f"{finding.title}: {finding.amount}"
        texts = f"<p>{html.escape(finding.why)}</p><p><b>What to do:</b> {html.escape(finding.remedy)}</p>"
        examples = "".join(_example(splits, example) for example in finding.examples)
        blocks.append(
            f'<div class="finding"><h3>{html.escape(title)}</h3>{texts}<div class="examples">{examples}</div></div>'
        )
    about = f"{unknown}Advice, worst first; nothing was changed. Each kind with its first examples."
    return Section("Suspicious", about, "".join(blocks))


def _example(splits: Splits, example: Example) -> str:
    images = _sheet(splits, example.images) if example.images else ""
    return f'<div><p class="example">{html.escape(example.note)}</p>{images}</div>'


def _left_out(splits: Splits) -> Section:
    blocks = []
    for index in splits.indexes:
        left_out = index.meta.left_out
        if not left_out:
            continue
        blocks.append(f"<h3>{html.escape(index.split)}: {len(left_out):,} left out</h3>")
        reasons = Counter(entry.reason for entry in left_out).most_common(MAX_LINES)
        shown = [[f"{count:,}", reason] for reason, count in reasons]
        blocks.append(html_table(["images", "reason"], shown, kind="text"))
        names = [[entry.image_name, entry.reason] for entry in left_out[:MAX_LINES]]
        blocks.append(f"<h3>The first {len(names)}</h3>" + html_table(["image", "reason"], names, kind="text"))
    about = (
        "Rows of the source tables that are not in the shards."
        if blocks
        else "Nothing: each row of the source has its image."
    )
    return Section("Left out", about, "".join(blocks))
