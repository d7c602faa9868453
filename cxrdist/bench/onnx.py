"""ONNX files of full-size models with random weights, against torch on this CPU, in batches of 5 and of 1."""

import argparse
import tempfile
import time
from pathlib import Path

import torch

from cxrdist.bench.timing import FAILED, Row
from cxrdist.cli import flag
from cxrdist.errors import UserError
from cxrdist.inference.members import checkpoint_of
from cxrdist.inference.onnx import MAX_DIFFERENCE, check_levels, export_onnx, onnx_available
from cxrdist.models import recipe_for
from cxrdist.runs.documents import StoredImages
from cxrdist.runs.member import build_model
from cxrdist.task import TASKS

STORED = StoredImages(size_px=600, fit="squash", mode="exact")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", **flag(str, "NAME", "recipes", nargs="+", default=["eva_x", "chexfound"]))
    parser.add_argument("--check", **flag(Path, "DIR", "X-rays to compare on (default: made-up images)"))


def run(args: argparse.Namespace) -> list[Row]:
    if missing := onnx_available():
        raise UserError(f"bench onnx: {missing}")
    task, rows = TASKS["b"], []
    levels = check_levels(args.check, STORED)
    for name in args.model:
        torch.manual_seed(0)
        recipe = recipe_for(name, task.name)
        model = build_model(recipe, task).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # no tensor so small that a mistake in it would pass
                parameter.add_(0.02 * torch.randn_like(parameter))
        head = checkpoint_of(name, recipe, model, recipe.inference.views)
        with tempfile.TemporaryDirectory() as folder:
            began = time.monotonic()
            found = export_onnx(Path(folder) / "model.onnx", head, model, task, levels)
            size = (Path(folder) / "model.onnx").stat().st_size
        seconds = time.monotonic() - began
        note = f"largest difference {found.difference:.1e} of logits up to {found.largest:.2f}; {size / 1e6:,.0f} MB; "
        note += f"written and compared in {seconds:.0f} s"
        stage = "full size" if found.difference <= MAX_DIFFERENCE else FAILED
        count = len(levels) + 1
        rows.append(Row(stage, f"{name}, torch", count / found.torch_s, 1.0))
        rows.append(Row(stage, f"{name}, onnxruntime", count / found.onnx_s, found.torch_s / found.onnx_s, None, note))
    return rows
