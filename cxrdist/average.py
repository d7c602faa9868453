"""Average the weights of several checkpoints into one: `python -m cxrdist.average --from RUN@5,6 --out runs/NAME`.

The result is a run folder with one epoch, which inference takes like any other (`--member eva_x=runs/NAME@6`). The
published solution averaged probabilities, which needs a pass per checkpoint; averaged weights need one.
"""

import dataclasses
import os
import secrets
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from cxrdist import recipes
from cxrdist.cli import Parser, add_flags, flag, run_entry
from cxrdist.errors import UserError
from cxrdist.files import write_atomically
from cxrdist.runs.checkpoint import epoch_folder, write_checkpoint
from cxrdist.runs.documents import EpochMeta, Frozen, RunDocument
from cxrdist.runs.member import LoadedMember, load_member

# what may not differ between checkpoints that are averaged: what they are, not how they were trained
SAME = ("model", "image_size", "model_kwargs")


def main(argv: list[str] | None = None) -> None:
    """Check that the checkpoints are of one kind, average them in float64 and write them as the last one's epoch."""
    parser = Parser(prog="cxrdist.average", description=__doc__)
    about = "run folder and epochs, e.g. runs/eva_x_b@5,6 (repeatable)"
    sources = flag(str, "RUN@EPOCHS", about, action="append", required=True, dest="sources")
    parser.add_argument("--from", **sources)
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

    Raises UserError when a checkpoint is missing, damaged, or of another model, size, task or frozen backbone.
    """
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; give another --out")
    names = [(run, epoch) for run, epochs in sources for epoch in epochs]
    if len(names) < 2:
        raise UserError("one checkpoint has no average; name at least two with --from RUN@5,6")
    total: dict[str, Tensor] = {}
    metas: list[EpochMeta] = []
    first: LoadedMember | None = None
    for run, epoch in names:
        member = load_member(run, epoch, weights)
        first = first or member
        if found := _differences(first, member):
            raise UserError(f"{names[0][0]} and {run} cannot be averaged: {'; '.join(found)}")
        metas.append(member.meta)
        for name, tensor in member.architecture.trained_state_dict(member.model).items():
            total[name] = total.get(name, torch.zeros((), dtype=torch.float64)) + tensor.double()
    assert first is not None
    described = [f"{run.resolve()}@{epoch}" for run, epoch in names]
    meta = dataclasses.replace(
        first.meta,
        epoch=epoch,
        data=first.meta.data if all(meta.data == first.meta.data for meta in metas) else None,
        validation=None,
        frozen=_frozen_from(first.meta, names[0][0], out),
        averaged=tuple(described),
        weights=weights,
    )
    mean = {name: (tensor / len(names)).float() for name, tensor in total.items()}
    write_checkpoint(epoch_folder(out, epoch), {"ema": mean, "model": mean}, {"meta": meta})
    inference = dataclasses.replace(first.recipe.inference, member_epochs=(epoch,))
    recipe = dataclasses.replace(first.recipe, epochs=max(first.recipe.epochs, epoch), inference=inference)
    write_atomically(out / "task.json", first.task.to_json())
    if meta.data is not None:
        write_atomically(out / "run.json", RunDocument(id=secrets.token_hex(8), data=meta.data).to_json())
    write_atomically(out / "recipe.json", recipes.to_json(recipe))  # last: without it the folder is no run
    return f"{out}@{epoch}: the mean of {len(names)} checkpoints' {weights} weights ({', '.join(described)})"


def _frozen_from(meta: EpochMeta, run: Path, out: Path) -> Frozen | None:
    """The frozen backbone of a checkpoint of `run`, named from `out`."""
    if meta.frozen is None:
        return None
    return dataclasses.replace(meta.frozen, file=os.path.relpath((run / meta.frozen.file).resolve(), out.resolve()))


def _differences(one: LoadedMember, other: LoadedMember) -> list[str]:
    found = [text for text in recipes.differences(one.recipe, other.recipe) if text.split(":")[0] in SAME]
    found += one.task.differences(other.task)
    if (one.meta.frozen and one.meta.frozen.sha256) != (other.meta.frozen and other.meta.frozen.sha256):
        found.append("they were trained on different frozen backbones")
    return found


if __name__ == "__main__":
    raise SystemExit(run_entry(main))
