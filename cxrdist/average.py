"""Average the weights of several checkpoints into one: `python -m cxrdist.average --from RUN@5,6 --out runs/NAME`.

The result is a run folder with one epoch, which inference takes like any other (`--member eva_x=runs/NAME@6`). The
published solution averaged probabilities, which needs a pass per checkpoint; averaged weights need one.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from cxrdist import models, recipes
from cxrdist.cli import Parser, add_flags
from cxrdist.errors import UserError, run_entry
from cxrdist.files import write_atomically
from cxrdist.recipes import Recipe
from cxrdist.runs import checkpoint

# what may differ between checkpoints that are averaged: how they were trained, not what they are
SAME = ("model", "div", "image_size", "model_kwargs")


def main(argv: list[str] | None = None) -> None:
    """Check that the checkpoints are of one kind, average them in float64 and write them as the last one's epoch."""
    parser = Parser(prog="cxrdist.average", description=__doc__)
    parser.add_argument(
        "--from",
        action="append",
        required=True,
        dest="sources",
        metavar="RUN@EPOCHS",
        help="run folder and epochs, e.g. runs/eva_x_b@5,6 (repeatable)",
    )
    parser.add_argument("--weights", choices=("ema", "model"), default="ema", help="which weights of each checkpoint")
    add_flags(parser, "--out", out={"required": True, "help": "run folder to write"})
    args = parser.parse_args(argv)
    print(average([parse_source(text) for text in args.sources], args.out, args.weights))


def parse_source(text: str) -> tuple[Path, list[int]]:
    """`RUN@5,6` as folder and epochs; UserError when it is written in another way."""
    run, at, epochs = text.rpartition("@")
    if not at or not all(part.isdecimal() and int(part) > 0 for part in epochs.split(",")):
        raise UserError(f"--from {text}: write it as RUN@EPOCHS, e.g. runs/eva_x_b@5,6")
    return Path(run), [int(part) for part in epochs.split(",")]


def average(sources: list[tuple[Path, list[int]]], out: Path, weights: Literal["ema", "model"]) -> str:
    """Write the mean of the checkpoints' weights to `out` and return a line that says what was averaged.

    Raises UserError when a checkpoint is missing, damaged, or of another model, size, division or frozen backbone.
    """
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; give another --out")
    names = [(run, epoch) for run, epochs in sources for epoch in epochs]
    if len(names) < 2:
        raise UserError("one checkpoint has no average; name at least two with --from RUN@5,6")
    total: dict[str, Tensor] = {}
    first: tuple[Recipe, dict[str, Any]] | None = None
    for run, epoch in names:
        recipe, model = checkpoint.load_member(run, epoch, weights)
        meta = checkpoint.read_document(run / "checkpoints" / f"epoch_{epoch:02d}", "meta")
        if first is None:
            first = recipe, _with_absolute_backbone(meta, run, out)
        _check_same(first, (recipe, meta), names[0][0], run)
        for name, tensor in models.trained_state_dict(model).items():
            total[name] = total.get(name, torch.zeros((), dtype=torch.float64)) + tensor.double()
    assert first is not None
    recipe, meta = first
    epoch = names[-1][1]
    mean = {name: (tensor / len(names)).float() for name, tensor in total.items()}
    described = [f"{run.resolve()}@{epoch}" for run, epoch in names]
    meta |= {"epoch": epoch, "averaged": described, "weights": weights, "validation": None}
    checkpoint.write_checkpoint(
        out / "checkpoints" / f"epoch_{epoch:02d}", {"ema": mean, "model": mean}, {"meta": meta}
    )
    kept = dataclasses.replace(recipe, epochs=max(recipe.epochs, epoch), member_epochs=(epoch,))
    write_atomically(out / "recipe.json", recipes.to_json(kept))
    return f"{out}@{epoch}: the mean of {len(names)} checkpoints' {weights} weights ({', '.join(described)})"


def _with_absolute_backbone(meta: dict[str, Any], run: Path, out: Path) -> dict[str, Any]:
    """`meta` with its frozen backbone named from `out`."""
    if meta["frozen"] is None:
        return meta
    file = os.path.relpath((run / meta["frozen"]["file"]).resolve(), out.resolve())
    return meta | {"frozen": meta["frozen"] | {"file": file}}


def _check_same(
    first: tuple[Recipe, dict[str, Any]], other: tuple[Recipe, dict[str, Any]], first_run: Path, run: Path
) -> None:
    changed = [text for text in recipes.differences(first[0], other[0]) if text.split(":")[0] in SAME]
    if changed:
        raise UserError(f"{first_run} and {run} cannot be averaged: {'; '.join(changed)}")
    hashes = {meta["frozen"] and meta["frozen"]["sha256"] for meta in (first[1], other[1])}
    if len(hashes) > 1:
        raise UserError(f"{first_run} and {run} cannot be averaged: they were trained on different frozen backbones")


if __name__ == "__main__":
    raise SystemExit(run_entry(main))
