"""Which forward passes the members of an ensemble need, each planned once.

The published inference decoded every image once per pass, ran one of six views twice and a frozen backbone once per
head: 12 + 2 passes where 10 + 1 give the same numbers. Views are canonical here (equal ones are one, with their summed
weight), and checkpoints whose frozen backbones are equal byte for byte share its pass.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cxrdist.errors import UserError
from cxrdist.recipes import PUBLISHED_VIEWS

VIEW_SETS = {"tta": PUBLISHED_VIEWS, "plain": ("plain",)}


@dataclass(frozen=True)
class MemberSpec:
    """What `--member` asks for: epochs and views are None where the run's recipe decides."""

    name: str
    source: Path  # run folder, or a weight file
    epochs: tuple[int, ...] | None
    views: tuple[str, ...] | None
    weight: float | None


@dataclass(frozen=True)
class Checkpoint:
    """One set of weights to score with. Equal `sha256` means equal weights."""

    label: str  # for people: runs/eva_x_b@5
    sha256: str  # of all its tensors
    backbone_sha256: str | None  # of the frozen backbone's tensors; None when there is none to share
    image_size: int
    views: tuple[tuple[str, float], ...]  # distinct canonical views with their weights (sum 1)
    num_views: int  # views asked for, equal ones included


@dataclass(frozen=True)
class Member:
    """Checkpoints (epochs, folds) averaged evenly into one score table."""

    name: str
    checkpoints: tuple[Checkpoint, ...]
    weight: float = 1.0


@dataclass(frozen=True)
class Pass:
    """One forward pass over all images: one view through one backbone, then the heads that share it."""

    image_size: int
    view: str
    heads: tuple[Checkpoint, ...]


def parse_member(text: str) -> MemberSpec:
    """`NAME=SOURCE[@EPOCHS][:VIEWS][*WEIGHT]`, e.g. `eva_x=runs/eva_x_b@5,6:tta*0.5`.

    SOURCE is a run folder, or a weight file. VIEWS is tta, plain or view names with commas.
    Raises UserError for a text of another form.
    """
    form = f"--member {text}: write NAME=RUN@5,6[:tta|:plain][*WEIGHT], or NAME=FILE for a weight file"
    name, equals, rest = text.partition("=")
    if not equals or not rest or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UserError(f"{form}; a name has letters, digits, '.', '_', '-'")
    weight, views, epochs = None, None, None
    match = re.fullmatch(r"(.+)\*([0-9.eE+-]+)", rest)
    if match:
        rest = match[1]
        try:
            weight = float(match[2])
        except ValueError:
            raise UserError(f"{form}; {match[2]!r} is not a number") from None
        if not 0 <= weight < float("inf"):
            raise UserError(f"{form}; a weight is 0 or more")
    source, colon, tail = rest.rpartition(":")
    if colon and "/" not in tail and "\\" not in tail:
        rest = source
        views = VIEW_SETS.get(tail) or tuple(tail.split(","))
        unknown = [view for view in views if view not in PUBLISHED_VIEWS]
        if unknown:
            raise UserError(f"{form}; view {unknown[0]!r} is unknown: tta, plain or of {', '.join(PUBLISHED_VIEWS)}")
    match = re.fullmatch(r"(.+)@(\d+(?:,\d+)*)", rest)
    if match:
        rest = match[1]
        epochs = tuple(int(epoch) for epoch in match[2].split(","))
        if len(set(epochs)) < len(epochs):
            raise UserError(f"{form}; an epoch is named twice")
    return MemberSpec(name, Path(rest), epochs, views, weight)


def plan_passes(members: Sequence[Member]) -> list[Pass]:
    """Every distinct (backbone, view) once, grouped by image size and backbone in the order they are first needed."""
    wanted: dict[tuple[int, str], dict[str, dict[str, Checkpoint]]] = {}
    for member in members:
        for checkpoint in member.checkpoints:
            backbone = (checkpoint.image_size, checkpoint.backbone_sha256 or checkpoint.sha256)
            for view, _ in checkpoint.views:
                wanted.setdefault(backbone, {}).setdefault(view, {}).setdefault(checkpoint.sha256, checkpoint)
    sizes = sorted({size for size, _ in wanted}, key=[size for size, _ in wanted].index)
    ordered = [(backbone, views) for size in sizes for backbone, views in wanted.items() if backbone[0] == size]
    return [Pass(size, view, tuple(heads.values())) for (size, _), views in ordered for view, heads in views.items()]


def columns_of(passes: Sequence[Pass]) -> list[tuple[str, int, str]]:
    """What each logit column of a run is: (checkpoint sha256, image size, view), in the order the passes make them."""
    return [(head.sha256, item.image_size, item.view) for item in passes for head in item.heads]


def num_naive_passes(members: Sequence[Member]) -> int:
    """Passes (and decodes) of the published way: every view of every checkpoint of every member by itself."""
    return sum(checkpoint.num_views for member in members for checkpoint in member.checkpoints)


def describe_plan(members: Sequence[Member], passes: Sequence[Pass], num_images: int) -> str:
    """The plan for people: each member's checkpoints and views, and the passes against the naive count."""
    lines = [f"plan: {num_images:,} images"]
    for member in members:
        for checkpoint in member.checkpoints:
            least = min(share for _, share in checkpoint.views)
            views = ", ".join(
                view if share < 1.5 * least else f"{view} (counts {share / least:.0f}x)"
                for view, share in checkpoint.views
            )
            lines.append(f"  {member.name}: {checkpoint.label}, {checkpoint.image_size} px, views: {views}")
    naive = num_naive_passes(members)
    shared = sum(len(item.heads) - 1 for item in passes)
    lines.append(
        f"  {len(passes)} backbone passes instead of {naive}: {naive - len(passes) - shared} equal views or weights "
        f"and {shared} shared frozen backbones run once; each image decoded once instead of {naive} times"
    )
    return "\n".join(lines)
