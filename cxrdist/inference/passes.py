"""Which forward passes the members of an ensemble need, each planned once.

The published inference decoded an image for each pass, ran one of six views twice and a frozen backbone once per head:
12 + 2 passes where 10 + 1 give the same numbers. Equal views are one here, with their summed weight, and checkpoints
whose frozen backbones are equal byte for byte share its pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from cxrdist.scoring.tables import Checkpoint

Column = tuple[str, int, str]  # checkpoint sha256, image size, view


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


def plan_passes(members: Sequence[Member]) -> list[Pass]:
    """Every distinct (backbone, view) once, grouped by image size and backbone in the order they are first needed."""
    wanted: dict[tuple[int, str, str], dict[str, dict[str, Checkpoint]]] = {}
    for member in members:
        for checkpoint in member.checkpoints:
            backbone = checkpoint.image_size, checkpoint.model, checkpoint.backbone_sha256 or checkpoint.sha256
            for view in checkpoint.views:
                wanted.setdefault(backbone, {}).setdefault(view, {}).setdefault(checkpoint.sha256, checkpoint)
    sizes = [size for size, _, _ in wanted]
    ordered = sorted(wanted.items(), key=lambda item: sizes.index(item[0][0]))
    return [Pass(size, view, tuple(heads.values())) for (size, _, _), views in ordered for view, heads in views.items()]


def columns_of(passes: Sequence[Pass]) -> list[Column]:
    """What each logit column of a run is, in the order the passes make them."""
    return [(head.sha256, item.image_size, item.view) for item in passes for head in item.heads]


def num_naive_passes(members: Sequence[Member]) -> int:
    """Passes (and decodes) of the published way: every view of every checkpoint of every member by itself."""
    return sum(checkpoint.num_views for member in members for checkpoint in member.checkpoints)


def describe_plan(members: Sequence[Member], passes: Sequence[Pass], num_images: int) -> str:
    """The plan for people: each member's checkpoints and views, and the passes against the naive count."""
    lines = [f"plan: {num_images:,} images"]
    for member in members:
        for checkpoint in member.checkpoints:
            least = min(checkpoint.views.values())
            counts = {view: round(share / least) for view, share in checkpoint.views.items()}
            views = ", ".join(view if n == 1 else f"{view} (counts {n}x)" for view, n in counts.items())
            kind = {"ema": "EMA weights", "raw": "raw weights", "": "weights as stored"}[checkpoint.weights]
            told = f"{kind}{'' if checkpoint.task else ' (the file does not say their task)'}"
            lines.append(f"  {member.name}: {checkpoint.source}, {told}, {checkpoint.image_size} px, views: {views}")
    naive, shared = num_naive_passes(members), sum(len(item.heads) - 1 for item in passes)
    equal, several = naive - len(passes) - shared, "" if shared == 1 else "s"
    once = [f"{equal} equal view{'' if equal == 1 else 's'} or weights"] * (equal > 0)
    once += [f"{shared} shared frozen backbone{several}"] * (shared > 0)
    told = f"{len(passes)} backbone pass{'' if len(passes) == 1 else 'es'}"
    told += f" instead of {naive}: {' and '.join(once)} run once" if once else ""
    told += f"; each image decoded once instead of {naive} times" if naive > 1 else ""
    return "\n".join([*lines, f"  {told}"])
