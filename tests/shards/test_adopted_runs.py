"""Adopted tars, written in open_clip's way and by webdataset's own writer, train, resume on other ranks, and infer."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image
from safetensors.torch import load_file

from cxrdist import infer, preprocess
from cxrdist.shards.index import open_index
from cxrdist.task import COMPETITION_LABELS as LABELS
from tests import training_runs

pytestmark = pytest.mark.slow
FLAGS = ["--validate-fold", "0", "--folds", "4", "--checkpoint-minutes", "0", "--device-batch-size", "3"]
FLAGS += ["--set", "epochs=2", "--set", "member_epochs=2"]
FLAGS += ["--set", "drop_rate=0", "--set", "clip_grad_norm=none"]  # dropout masks change with the number of ranks
NUM_IMAGES, EACH = 24, 7


def sample(number: int) -> tuple[str, str, bytes, dict[str, Any]]:
    """(key, suffix, image, what its json says); images of several sizes and kinds."""
    rng = np.random.default_rng(number)
    suffix = ("jpg", "png", "jpeg")[number % 3]
    noise = Image.fromarray(rng.integers(0, 255, (20, 20), dtype=np.uint8)).resize((100 + number, 120))
    buffer = io.BytesIO()
    noise.save(buffer, "PNG" if suffix == "png" else "JPEG")
    labels = {label: int(rng.random() < 0.3) for label in LABELS}
    about = {"Patient_ID": f"{number // 2:08d}", "Study": "001", "caption": "a chest"}
    return f"{number:09d}", suffix, buffer.getvalue(), about | labels


def write_as_open_clip(folder: Path) -> None:
    for start in range(0, NUM_IMAGES, EACH):
        with tarfile.open(folder / f"{start // EACH:05d}.tar", "w") as tar:
            for number in range(start, min(start + EACH, NUM_IMAGES)):
                key, suffix, image, about = sample(number)
                members = ((suffix, image), ("txt", b"a chest"), ("json", json.dumps(about).encode()))
                for extension, data in members:
                    member = tarfile.TarInfo(f"{key}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def write_by_webdataset(folder: Path) -> None:
    with wds.ShardWriter(str(folder / "cxr-%06d.tar"), maxcount=EACH, verbose=0) as writer:
        for key, suffix, image, about in map(sample, range(NUM_IMAGES)):
            writer.write({"__key__": key, suffix: image, "json": about})


@pytest.mark.parametrize(("write", "resumed_on"), [(write_as_open_clip, 2), (write_by_webdataset, 1)])
def test_an_adopted_set_trains_resumes_and_infers(
    tmp_path: Path, write: Callable[[Path], None], resumed_on: int
) -> None:
    """On as many ranks as before bit for bit; on another number to float tolerance."""
    tars, whole, run = tmp_path / "tars", tmp_path / "whole", tmp_path / "run"
    tars.mkdir()
    write(tars)
    preprocess.main(["--adopt", str(tars / "*.tar"), "--task", "b", "--workers", "1"])
    ended = training_runs.train(tars, whole, *FLAGS)
    assert ended.code == 0, ended.output
    ended = training_runs.train(tars, run, *FLAGS, fault={"kill": {"rank": 1, "at": "step", "count": 3}})
    assert ended.code != 0, ended.output
    ended = training_runs.train(tars, run, *FLAGS, "--resume", processes=resumed_on)
    assert ended.code == 0, ended.output
    assert "resuming from" in ended.output
    if resumed_on == 2:
        training_runs.assert_same_result(run, whole)
    weights = "checkpoints/epoch_02/ema.safetensors"
    ours, theirs = load_file(run / weights), load_file(whole / weights)
    for name, tensor in theirs.items():  # as of FAULT 17
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=5e-3 if "bias" in name else 1e-3)
    flags = ["--precision", "fp32", "--device-batch-size", "5", "--split", "train", "--out", str(tmp_path / "out")]
    infer.main(["--shards", str(tars), *flags, "--member", f"own={run}@2:plain"])
    rows = (tmp_path / "out" / "scores" / "own.csv").read_text().splitlines()[1:]
    assert [row.split(",")[0] for row in rows] == open_index(tars, "train").image_names.to_list()
