"""Average the weights of several checkpoints into one. Its flags: `cxrdist.flags.average`."""

import dataclasses
import os
import secrets
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from cxrdist import recipes
from cxrdist.cli import run_entry
from cxrdist.errors import UserError
from cxrdist.files import check_outputs, disk_errors_named, write_atomically
from cxrdist.flags.average import parser
from cxrdist.runs.checkpoint import epoch_folder, write_checkpoint
from cxrdist.runs.documents import EpochMeta, RunDocument
from cxrdist.runs.member import LoadedMember, load_member


def main(argv: list[str] | None = None) -> None:
    """Check that the checkpoints are of one kind, average them in float64 and write them as the last one's epoch."""
    args = parser().parse_args(argv)
    names = [name for text in args.sources for name in parse_source(text)]
    print(average(names, args.out, args.weights))


def parse_source(text: str) -> list[tuple[Path, int]]:
    """`RUN@5,6` as folder and epoch of each checkpoint; UserError when it is written in another way."""
    run, at, epochs = text.rpartition("@")
    if not at or not all(part.isdecimal() and int(part) > 0 for part in epochs.split(",")):
        raise UserError(f"--from {text}: write it as RUN@EPOCHS, e.g. runs/eva_x_b@5,6")
    return [(Path(run), int(part)) for part in epochs.split(",")]


def average(names: list[tuple[Path, int]], out: Path, weights: Literal["ema", "model"]) -> str:
    """Write the mean of the checkpoints' weights to `out` and return a line that says what was averaged.

    Raises UserError when a checkpoint is missing, damaged, or of another model, size, task or frozen backbone.
    """
    check_outputs([out / "recipe.json"], [run for run, _ in names], folder=out)
    with disk_errors_named(out):
        if out.exists() and any(out.iterdir()):
            raise UserError(f"{out} is not empty; give another --out")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"--from {twice[0]}@{twice[1]} is there twice; name each checkpoint once")
    if len(names) < 2:
        raise UserError("one checkpoint has no average; name at least two with --from RUN@5,6")
    total: dict[str, Tensor] = {}
    metas: list[EpochMeta] = []
    began: list[bool] = []
    first = load_member(*names[0], weights)
    for run, epoch in names:
        member = load_member(run, epoch, weights) if metas else first
        if found := _differences(first, member):
            raise UserError(f"{names[0][0]} and {run} cannot be averaged: {'; '.join(found)}")
        metas.append(member.meta)
        began.append(member.from_random)
        for name, tensor in member.architecture.trained_state_dict(member.model).items():
            total[name] = total.get(name, torch.zeros((), dtype=torch.float64)) + tensor.double()
    described = [f"{run.resolve()}@{epoch}" for run, epoch in names]
    frozen = first.meta.frozen
    if frozen is not None:  # named from `out`
        file = os.path.relpath((names[0][0] / frozen.file).resolve(), out.resolve())
        frozen = dataclasses.replace(frozen, file=file)
    meta = dataclasses.replace(
        first.meta,
        epoch=epoch,
        data=first.meta.data if all(meta.data == first.meta.data for meta in metas) else None,
        validation=None,
        frozen=frozen,
        averaged=tuple(described),
        weights=weights,
    )
    mean = {name: (tensor / len(names)).float() for name, tensor in total.items()}
    write_checkpoint(epoch_folder(out, epoch), {"ema": mean, "model": mean}, {"meta": meta})
    inference = dataclasses.replace(first.recipe.inference, member_epochs=(epoch,))
    recipe = dataclasses.replace(first.recipe, epochs=max(first.recipe.epochs, epoch), inference=inference)
    write_atomically(out / "task.json", first.task.to_json())
    if meta.data is not None:
        run_document = RunDocument(id=secrets.token_hex(8), data=meta.data, init="random" if any(began) else "")
        write_atomically(out / "run.json", run_document.to_json())
    write_atomically(out / "recipe.json", recipes.to_json(recipe))  # last: without it the folder is no run
    return f"{out}@{epoch}: the mean of {len(names)} checkpoints' {weights} weights ({', '.join(described)})"


def _differences(one: LoadedMember, other: LoadedMember) -> list[str]:
    """What the checkpoints are must be the same, not how they were trained."""
    same, found = ("model", "image_size", "model_kwargs"), recipes.differences(one.recipe, other.recipe)
    found = [text for text in found if text.split(":")[0] in same]
    found += one.task.differences(other.task)
    if (one.meta.frozen and one.meta.frozen.sha256) != (other.meta.frozen and other.meta.frozen.sha256):
        found.append("they were trained on different frozen backbones")
    return found


if __name__ == "__main__":
    raise SystemExit(run_entry(main))
