"""A small division in shards and small trained-looking runs, made once per session and only read."""

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from cxrdist import preprocess
from cxrdist.labels import LABELS
from cxrdist.models import build_model, frozen_names, trained_state_dict
from cxrdist.models.weights import file_sha256, write_safetensors
from cxrdist.recipes import Recipe, recipe_for, to_json
from cxrdist.training.checkpoint import write_checkpoint

NUM_TEST = 23
EVA_X = {"embed_dim": 48, "depth": 2, "num_heads": 3}
CHEXFOUND = {"embed_dim": 32, "depth": 4, "num_heads": 2, "decoder_dim": 32, "init_values": 1.0}


def write_images(folder: Path, names: list[str], seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        coarse = Image.fromarray(rng.integers(0, 256, (12, 12), dtype=np.uint8), "L")
        coarse.resize((160, 140), Image.Resampling.BICUBIC).save(folder / name, "JPEG", quality=90)


def make_run(folder: Path, recipe: Recipe, epochs: tuple[int, ...] = (1, 2), seed: int = 0) -> Path:
    """A run folder as training writes it, with random weights that differ by epoch over one frozen backbone."""
    torch.manual_seed(seed)
    model = build_model(recipe.model, recipe.image_size, **dict(recipe.model_kwargs))
    frozen = None
    folder.mkdir(parents=True)
    (folder / "recipe.json").write_text(to_json(recipe))
    if names := frozen_names(model):
        path = folder / "backbone.safetensors"
        write_safetensors(path, {name: model.state_dict()[name] for name in names})
        frozen = {"file": path.name, "sha256": file_sha256(path)}
    for epoch in epochs:
        tensors = {name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in trained_state_dict(model).items()}
        write_checkpoint(
            folder / "checkpoints" / f"epoch_{epoch:02d}",
            {"ema": tensors},
            {"meta": {"epoch": epoch, "frozen": frozen}},
        )
    return folder


@dataclasses.dataclass(frozen=True)
class World:
    """Paths of the small division: shards with 23 test images (one left out), its template, truth and two runs."""

    shards: Path
    template: Path
    truth: Path
    eva_x: Path
    chexfound: Path

    def members(self) -> list[str]:
        return ["--member", f"eva_x={self.eva_x}@1,2:tta", "--member", f"chexfound={self.chexfound}@1,2"]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    names = [f"{i // 3:08d}_{1 + i % 3 // 2:03d}_{i % 3:03d}.jpg" for i in range(NUM_TEST)]
    write_images(folder / "images", names)
    bad = "00000099_001_001.jpg"
    (folder / "images" / bad).write_bytes(b"not an image")
    order = [str(name) for name in np.random.default_rng(1).permutation([*names, bad])]
    template = folder / "template.csv"
    pd.DataFrame({"Image_name": order} | dict.fromkeys(LABELS, 0)).to_csv(template, index=False)
    rng = np.random.default_rng(2)
    truth = pd.DataFrame({"Image_name": names, "Patient_ID": [name[:8] for name in names]})
    truth["Study"] = [name.split("_")[1] for name in names]
    truth["Sex"], truth["Age"] = "Female", [str(20 + 3 * i) for i in range(NUM_TEST)]
    for label in LABELS:
        truth[label] = (rng.random(NUM_TEST) < 0.4).astype(int)
    truth.to_csv(folder / "truth.csv", index=False)
    shards = folder / "shards"
    base = ["--div", "b", "--images", str(folder / "images"), "--out", str(shards), "--workers", "1"]
    preprocess.main([*base, "--csv", str(template), "--split", "test"])
    preprocess.main([*base, "--csv", str(folder / "truth.csv"), "--split", "train"])
    eva_x = dataclasses.replace(
        recipe_for("eva_x_tiny", "b"), image_size=64, model_kwargs=tuple(sorted(EVA_X.items())), member_epochs=(1, 2)
    )
    chexfound = dataclasses.replace(
        recipe_for("chexfound", "b"), image_size=80, model_kwargs=tuple(sorted(CHEXFOUND.items())), member_epochs=(1, 2)
    )
    return World(
        shards,
        template,
        folder / "truth.csv",
        make_run(folder / "runs" / "eva_x_b", eva_x),
        make_run(folder / "runs" / "chexfound_b", chexfound, seed=1),
    )


@pytest.fixture
def run_infer(world: World) -> Callable[..., None]:
    """Run inference in this process (one process, CPU, float32) on the small division."""
    from cxrdist import infer

    def run(out: Path, *arguments: str, members: list[str] | None = None) -> None:
        chosen = world.members() if members is None else members
        base = [
            "--div",
            "b",
            "--shards",
            str(world.shards),
            "--out",
            str(out),
            "--device-batch-size",
            "4",
            "--precision",
            "fp32",
        ]
        infer.main([*base, *chosen, *arguments])

    return run


@pytest.fixture
def launch_infer(world: World) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run inference on two gloo processes of one thread each; the whole process group ends with the call."""

    def launch(out: Path, *arguments: str, members: list[str] | None = None) -> subprocess.CompletedProcess[str]:
        base = [
            "--div",
            "b",
            "--shards",
            str(world.shards),
            "--out",
            str(out),
            "--device-batch-size",
            "4",
            "--precision",
            "fp32",
        ]
        process = start_infer(2, [*base, *(world.members() if members is None else members), *arguments])
        try:
            stdout, stderr = process.communicate(timeout=100)
        finally:
            end(process)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    return launch


def start_infer(num_processes: int, arguments: list[str]) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    return subprocess.Popen(
        [*command, "-m", "cxrdist.infer", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def end(process: "subprocess.Popen[str]") -> None:
    """Kill whatever is left of the process group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()
