"""A checkpoint as one ONNX file, compared with torch as soon as it is written.

Input `levels`: (batch, 3, S, S) float32 in [0, 255], an image resized to S (a grey one three times); the mean and the
deviation are in the graph. Output `logits`: (batch, K) float32. Only the plain view; the batch is free.
"""

import importlib.util
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cxrdist.augment.views import normalise, resize
from cxrdist.data.images import Levels, Pixels, levels_of
from cxrdist.errors import UserError
from cxrdist.files import write_output
from cxrdist.models import architecture_of
from cxrdist.runs.documents import StoredImages
from cxrdist.scoring.tables import Checkpoint
from cxrdist.task import Task

MAX_DIFFERENCE = 1e-4  # of logits, from torch
NUM_CHECKED = 5  # images, another batch than the one that is traced
TRACED = 2  # torch.export takes a batch of 1 for a constant
OPSET = 18
MOST_BYTES = 2**31  # of one protobuf message
NEEDED = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class Compared:
    """An ONNX file against torch on the same images, both on the CPU: logits and seconds."""

    path: Path
    difference: float
    largest: float  # logit
    onnx_s: float
    torch_s: float

    def __str__(self) -> str:
        size = self.path.stat().st_size / 1e6
        ratio = self.torch_s / self.onnx_s
        return (
            f"{self.path}: {size:,.1f} MB; {NUM_CHECKED} and 1 images, largest difference from torch "
            f"{self.difference:.1e} (logits up to {self.largest:.2f}); {ratio:.2f} times torch's speed on this CPU"
        )


class _FromLevels(nn.Module):
    """Levels in [0, 255] -> logits: the normalisation is part of the graph."""

    shift: Tensor
    scale: Tensor

    def __init__(self, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("shift", -torch.tensor(mean).view(3, 1, 1) / torch.tensor(std).view(3, 1, 1))
        self.register_buffer("scale", 1 / (255 * torch.tensor(std).view(3, 1, 1)))

    def forward(self, levels: Tensor) -> Tensor:
        logits: Tensor = self.model(levels * self.scale + self.shift)
        return logits


def onnx_available() -> str:
    """What is missing, or ''."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    return f"needs {', '.join(missing)}: pip install 'cxrdist[onnx]'" if missing else ""


def file_of(number: int) -> str:
    """The name of a checkpoint's ONNX file."""
    return f"checkpoint{number}.onnx"


def check_levels(source: Path | None, stored: StoredImages) -> list[Levels]:
    """`NUM_CHECKED` stored images (S, S, C): the first that can be read of a file or folder, else made-up ones."""
    if source is None:
        rng = np.random.default_rng(0)
        side = stored.size_px // 8
        coarse = rng.integers(0, 256, (NUM_CHECKED, side, side), dtype=np.uint8)
        return list(np.kron(coarse, np.ones((1, 8, 8), np.uint8))[..., None])
    files = sorted(path for path in source.rglob("*") if path.is_file()) if source.is_dir() else [source]
    pixels, found = Pixels(stored.mode, stored.size_px, stored.fit), list[Levels]()
    for file in files:
        if not isinstance(levels := levels_of(file, pixels, as_jpeg=stored.jpeg), str):
            found.append(levels)
        if len(found) == NUM_CHECKED:
            break
    if not found:
        raise UserError(f"--check {source}: no image there can be read; give X-rays")
    return [found[place % len(found)] for place in range(NUM_CHECKED)]


@torch.no_grad()
def export_onnx(path: Path, head: Checkpoint, model: nn.Module, task: Task, stored: list[Levels]) -> Compared:
    """Write one checkpoint's ONNX file and compare it with the model on images (S, S, C) of 600 px or so."""
    import onnxruntime

    architecture = architecture_of(head.model)
    whole = _FromLevels(model.cpu(), *architecture.stats).eval()
    images = [torch.from_numpy(np.ascontiguousarray(each)).permute(2, 0, 1)[None] for each in stored]
    sizes = [resize(image, head.image_size) for image in images]
    levels = torch.cat([each.expand(1, 3, -1, -1) for each in sizes])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            whole,
            (levels[:TRACED],),
            input_names=["levels"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    about = {"labels": "\n".join(task.labels), "image_size": str(head.image_size), "model": head.model}
    for key, value in about.items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, value
    if (size := proto.ByteSize()) >= MOST_BYTES:
        raise UserError(f"{path}: {size:,} bytes, an ONNX file holds less than {MOST_BYTES:,}; leave --onnx out")
    write_output(path, proto.SerializeToString())
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    differences, seconds = [], {"onnx": 0.0, "torch": 0.0}
    largest = 0.0
    for batch in (levels, levels[:1]):
        began = time.perf_counter()
        (ours,) = session.run(["logits"], {"levels": batch.numpy()})
        between = time.perf_counter()
        theirs: NDArray[np.float32] = model(normalise(batch, stats=architecture.stats)).numpy()
        seconds["torch"] += time.perf_counter() - between
        seconds["onnx"] += between - began
        differences.append(float(np.abs(ours - theirs).max()))
        largest = max(largest, float(np.abs(theirs).max()))
    return Compared(path, max(differences), largest, seconds["onnx"], seconds["torch"])
