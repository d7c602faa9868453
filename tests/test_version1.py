"""Format version 1: shards, an unfinished and a finished run, score tables and averages of commit c512b50 still read.

The files are in golden/version1. Numbers are equal bit for bit on a machine like the one that wrote them; on another
CPU rounding differs, and they are compared to float tolerance.
"""

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from cxrdist import average, ensemble, evaluate, infer, train
from cxrdist.data.reader import NO_XXH3
from cxrdist.models.weights.safetensors import file_sha256
from cxrdist.runs import checkpoint

SOURCE = Path(__file__).parent / "golden" / "version1"
EXPECTED: dict[str, Any] = json.loads((SOURCE / "expected.json").read_text())


def same_machine() -> bool:
    recorded = EXPECTED["environment"]
    packages = all(version(name) == recorded[name] for name in ("torch", "numpy", "timm", "kornia"))
    return packages and torch.backends.cpu.get_cpu_capability() == recorded["torch_cpu_capability"]


def assert_equal(found: Any, wanted: Any, name: str, *, bits: bool = True) -> None:
    """Bit for bit on a machine like that of the files, else, or without `bits`, to float tolerance."""
    if bits and same_machine():
        np.testing.assert_array_equal(found, wanted, err_msg=name)
    else:
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the files, which is the working folder, too; one thread, as the commands were given."""
    shutil.copytree(SOURCE, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path / "old"
    torch.set_num_threads(threads)


def flags_of(name: str) -> list[str]:
    """A recorded command's words after the module."""
    words = EXPECTED["commands"][name]
    return words[next(place for place, word in enumerate(words) if word.startswith("--")) :]


@pytest.mark.parametrize("model", ["eva_x", "chexfound"])
def test_an_unfinished_run_is_resumed_to_the_same_numbers(old: Path, model: str) -> None:
    half, full = old / f"run_half_{model}", old / f"run_full_{model}"
    bits = model != "chexfound"  # version 1 summed GLoRI's outputs by an einsum, whose gradients round in another order
    train.main([*flags_of(f"train_{model}"), "--out", half.name, "--resume"])
    rows, wanted = ([json.loads(line) for line in (run / "metrics.jsonl").open()] for run in (half, full))
    assert [row.keys() for row in rows] == [row.keys() for row in wanted]
    for row, other in zip(rows, wanted, strict=True):
        for name, value in other.items():
            if isinstance(value, float):
                assert_equal(row[name], value, name, bits=bits)
            else:
                assert row[name] == value, name
    for epoch in (1, 2):
        for kind in ("ema", "model"):
            ours, theirs = (
                load_file(checkpoint.epoch_folder(run, epoch) / f"{kind}.safetensors") for run in (half, full)
            )
            assert ours.keys() == theirs.keys()
            for name, tensor in theirs.items():
                assert_equal(ours[name].numpy(), tensor.numpy(), f"epoch {epoch}, {kind}, {name}", bits=bits)


@pytest.mark.parametrize("model", ["eva_x", "chexfound"])
def test_a_finished_run_is_known_as_finished(old: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    train.main([*flags_of(f"train_{model}"), "--out", f"run_full_{model}", "--resume"])
    assert "is finished: all 2 epochs are trained" in capsys.readouterr().out


def test_inference_gives_the_same_tables_and_submission(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    infer.main([*flags_of("out"), "--out", "again"])
    assert capsys.readouterr().out.count(NO_XXH3) == 1
    for name in ("scores/eva_x.csv", "scores/chexfound.csv", "submission.csv"):
        ours, theirs = (pd.read_csv(old / folder / name, index_col=0) for folder in ("again", "out"))
        assert list(ours.index) == list(theirs.index)
        assert_equal(ours.to_numpy(np.float32), theirs.to_numpy(np.float32), name)
        assert not same_machine() or file_sha256(old / "again" / name) == file_sha256(old / "out" / name)


def test_tables_are_averaged_and_evaluated(old: Path) -> None:
    tables = [str(path) for path in sorted((old / "out" / "scores").glob("*.csv"), reverse=True)]
    ensemble.main(["--scores", *tables, "--template", "template.csv", "--out", "submission.csv"])
    assert (old / "submission.csv").read_bytes() == (old / "out" / "submission.csv").read_bytes()
    folds = [str(path) for path in sorted((old / "oof").glob("*.csv"))]
    evaluate.main(["--scores", *folds, "--csv", "labels.csv", "--out", "report", "--resamples", "20"])
    scores = json.loads((old / "report" / "metrics.json").read_text())["scores"]
    assert {score["name"] for score in scores} == {"ensemble", "eva_x", "chexfound"}
    assert "trained on" not in (old / "report" / "report.html").read_text()  # out of fold, as their JSON says


def test_checkpoints_are_averaged_and_the_average_of_version_1_is_a_member(old: Path) -> None:
    average.main(["--from", "run_full_chexfound@1,2", "--out", "new_average"])
    ours, theirs = (
        load_file(old / run / "checkpoints" / "epoch_02" / "ema.safetensors") for run in ("new_average", "average")
    )
    for name, tensor in theirs.items():
        assert ours[name].equal(tensor), name
    members = ["--member", "old=average@2:plain", "--member", "new=new_average@2:plain"]
    infer.main(["--shards", "shards", "--out", "averaged", "--precision", "fp32", "--device-batch-size", "4", *members])
    assert (old / "averaged/scores/old.csv").read_bytes() == (old / "averaged/scores/new.csv").read_bytes()
