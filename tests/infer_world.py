"""A small division in shards and small runs with random weights, for the tests of inference and evaluation.

`tests/conftest.py` makes it a session fixture. Nothing in it is changed by a test; outputs go elsewhere.
"""

import contextlib
import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import torch
from PIL import Image

from cxrdist import infer, preprocess
from cxrdist.models import architecture_of
from cxrdist.recipes import PUBLISHED_VIEWS, Inference, Recipe, recipe_for, to_json
from cxrdist.runs.checkpoint import epoch_folder, write_checkpoint
from cxrdist.runs.documents import EpochMeta
from cxrdist.runs.member import build_model, write_frozen
from cxrdist.task import TASKS, Task

TASK = TASKS["b"]
LABELS = TASK.labels
NUM_IMAGES = 23
BAD_IMAGE = "00000099_001_001.jpg"  # in the template; preprocessing leaves it out
EVA_X = {"depth": 2, "embed_dim": 48, "num_heads": 3}
CHEXFOUND = {"decoder_dim": 32, "depth": 4, "embed_dim": 32, "init_values": 1.0, "num_heads": 2}


@dataclasses.dataclass(frozen=True)
class InferWorld:
    """shards: 23 images in three test tars of 8, and a training split; runs: two epochs each."""

    shards: Path
    template: Path
    truth: Path
    eva_x: Path
    chexfound: Path

    def members(self) -> list[str]:
        return ["--member", f"eva_x={self.eva_x}@1,2:tta", "--member", f"chexfound={self.chexfound}@1,2"]

    def arguments(
        self, out: Path, *more: str, members: list[str] | None = None, shards: Path | None = None
    ) -> list[str]:
        sizes = ["--device-batch-size", "4", "--precision", "fp32"]
        base = ["--div", "b", "--shards", str(shards or self.shards), "--out", str(out)]
        return [*base, *sizes, *(self.members() if members is None else members), *more]

    def run(self, out: Path, *more: str, members: list[str] | None = None, shards: Path | None = None) -> None:
        """Infer in this process, on one thread as the launched processes do."""
        torch.set_num_threads(1)
        infer.main(self.arguments(out, *more, members=members, shards=shards))

    def launch(
        self, out: Path, *more: str, members: list[str] | None = None, shards: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Infer on two gloo processes."""
        with launched(self.arguments(out, *more, members=members, shards=shards)) as process:
            stdout, stderr = process.communicate(timeout=100)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


@contextlib.contextmanager
def launched(arguments: list[str], num_processes: int = 2) -> "Iterator[subprocess.Popen[str]]":
    """`cxrdist.infer` on gloo processes; none of them, nor of their children, outlives the block."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    process = subprocess.Popen(
        [*command, "-m", "cxrdist.infer", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        left = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        for victim in [*left, process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
        process.wait()


def make_infer_world(folder: Path) -> InferWorld:
    names = [f"{i // 3:08d}_{1 + i % 3 // 2:03d}_{i % 3:03d}.jpg" for i in range(NUM_IMAGES)]
    write_images(folder / "images", names)
    (folder / "images" / BAD_IMAGE).write_bytes(b"not an image")
    order = [str(name) for name in np.random.default_rng(1).permutation([*names, BAD_IMAGE])]
    template = folder / "template.csv"
    pd.DataFrame({"Image_name": order} | dict.fromkeys(LABELS, 0)).to_csv(template, index=False)
    rng = np.random.default_rng(2)
    truth = pd.DataFrame({"Image_name": names, "Patient_ID": [name[:8] for name in names]})
    truth["Study"] = [name.split("_")[1] for name in names]
    truth["Sex"], truth["Age"] = "Female", [str(20 + 3 * i) for i in range(NUM_IMAGES)]
    for label in LABELS:
        truth[label] = (rng.random(NUM_IMAGES) < 0.4).astype(int)
    truth.to_csv(folder / "truth.csv", index=False)
    shards = folder / "shards"
    base = ["--div", "b", "--images", str(folder / "images"), "--out", str(shards), "--workers", "1"]
    preprocess.main([*base, "--csv", str(template), "--split", "test", "--rows-per-shard", "8"])
    preprocess.main([*base, "--csv", str(folder / "truth.csv"), "--split", "train"])
    eva_x = dataclasses.replace(
        recipe_for("eva_x_tiny", "b"),
        image_size=64,
        model_kwargs=tuple(EVA_X.items()),
        inference=Inference(views=PUBLISHED_VIEWS, member_epochs=(1, 2)),
    )
    chexfound = dataclasses.replace(
        recipe_for("chexfound", "b"),
        image_size=80,
        model_kwargs=tuple(CHEXFOUND.items()),
        inference=Inference(member_epochs=(1, 2)),
    )
    runs = make_run(folder / "runs" / "eva_x_b", eva_x), make_run(folder / "runs" / "chexfound_b", chexfound, seed=1)
    return InferWorld(shards, template, folder / "truth.csv", *runs)


def write_images(folder: Path, names: list[str]) -> None:
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        coarse = Image.fromarray(rng.integers(0, 256, (12, 12), dtype=np.uint8), "L")
        coarse.resize((160, 140), Image.Resampling.BICUBIC).save(folder / name, "JPEG", quality=90)


def make_run(folder: Path, recipe: Recipe, seed: int = 0, task: Task = TASK) -> Path:
    """A run folder as training writes it: two epochs of different random weights over one frozen backbone."""
    torch.manual_seed(seed)
    architecture, model = architecture_of(recipe.model), build_model(recipe, task)
    folder.mkdir(parents=True)
    (folder / "recipe.json").write_text(to_json(recipe))
    (folder / "task.json").write_text(task.to_json())
    frozen = write_frozen(architecture, model, folder) if architecture.frozen_names(model) else None
    for epoch in (1, 2):
        trained = architecture.trained_state_dict(model)
        weights = {name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in trained.items()}
        meta = EpochMeta(epoch=epoch, recipe=recipe.name, model=recipe.model, task=task, frozen=frozen)
        write_checkpoint(epoch_folder(folder, epoch), {"ema": weights}, {"meta": meta})
    return folder
