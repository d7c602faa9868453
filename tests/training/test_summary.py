"""What a training prints: AUROC beside the loss once there is one, and figures by epoch and label at its end."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cxrdist import train
from cxrdist.errors import UserError
from cxrdist.shards.columns import Texts
from cxrdist.training import summary
from cxrdist.training.validate import Validation
from tests.training_runs import FLAGS, rows

TINY = ("--validate-fold", "1", "--folds", "3", "--set", "image_size=32", "--set", "model_kwargs=depth:1")
TINY += ("--set", "epochs=2", "--set", "member_epochs=2", "--set", "global_batch_size=8")


@pytest.fixture
def validation() -> Validation:
    """Six images of three patients: a label, one with an escape sequence, one that is masked."""
    nan = np.nan
    targets = np.array([[1, 0, nan], [0, 1, nan], [1, 1, nan], [0, 0, nan], [1, 0, nan], [0, 1, nan]], np.float32)
    logits = np.array([[2, 0, 0], [1, 1, 0], [3, 2, 0], [0, 3, 0], [0.5, 4, 0], [0.2, 5, 0]], np.float32)
    auroc = {"Nodule": 8 / 9, "b\x1b[2J": 4 / 9, "Masked": nan}
    losses = {"total": 0.5}
    places = {"rows": np.arange(2, 8), "targets": targets, "logits": logits, "roc": {}}
    return Validation(num_images=6, losses=losses, auroc_macro=6 / 9, num_labels=2, auroc=auroc, **places)


def loader_of(patients: list[str], check: Any = None) -> Any:
    """As much of a loader as the summary asks for."""
    return SimpleNamespace(index=SimpleNamespace(patients=Texts(patients, check)))


@pytest.mark.fast
def test_labels_have_intervals_and_the_best_epoch_is_marked(tmp_path: Path, validation: Validation) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"kind": "epoch", "epoch": 1, "epoch_loss": 0.75}\nxx\n'
        '{"kind": "validation", "epoch": 1, "validation/loss": 0.5, "validation/auroc_macro": 0.8}\n'
        '{"kind": "epoch", "epoch": 2, "epoch_loss": null}\n'
        '{"kind": "validation", "epoch": 2, "validation/loss": 0.25, "validation/auroc_macro": 0.8}\n'
        '{"kind": "epoch", "epoch": 3, "epoch_loss": 0.5}\n'
    )
    lines = summary.tables(tmp_path, validation, loader_of(["x", "y", "a", "a", "b", "b", "c", "c"])).splitlines()
    assert lines[0] == "last validation: 6 images of 3 patients; 95 % intervals over patients"
    assert re.fullmatch(r"Nodule +3  0\.8889  0\.\d{4} to 0\.\d{4}", lines[2])
    assert re.fullmatch(r"b\?\[2J +3  0\.4444  0\.\d{4} to 0\.\d{4}", lines[3])
    assert re.fullmatch(r"Masked +0 +none", lines[4])
    assert re.fullmatch(r"macro of 2 of 3 labels +0\.6667  0\.\d{4} to 0\.\d{4}", lines[5])
    assert [line.split() for line in lines[7:]] == [
        ["epoch", "train", "loss", "validation", "loss", "macro", "AUROC"],
        ["1", "0.7500", "0.5000", "0.8000", "best"],
        ["2", "none", "0.2500", "0.8000"],
        ["3", "0.5000", "none", "none"],
    ]
    assert summary.last_auroc(tmp_path) == 0.8


@pytest.mark.fast
def test_a_damaged_column_of_patients_does_not_end_what_is_trained(tmp_path: Path, validation: Validation) -> None:
    def damaged(column: object) -> None:
        raise UserError("index.arrow: patients are damaged")

    said = summary.tables(tmp_path, validation, loader_of(["a"] * 8, damaged))
    assert said == "no final table: index.arrow: patients are damaged"


def test_a_training_says_auroc_beside_the_loss_and_ends_with_a_table(
    uneven_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = [
        *FLAGS,
        "--shards",
        str(uneven_shards),
        "--out",
        str(run),
        "--model",
        "eva_x_tiny",
        *TINY,
        "--wandb",
        "off",
    ]
    train.main([*words, "--max-steps", "5"])  # an epoch has four
    first = capsys.readouterr().out
    assert "AUROC" not in re.split(r"^epoch 1/2: ", first, flags=re.M)[0]
    assert "last validation" not in first
    train.main([*words, "--resume"])  # the epoch before it is in the log alone
    second = capsys.readouterr().out
    aurocs = [row["validation/auroc_macro"] for row in rows(run, "validation")]
    steps = [line for line in second.splitlines() if re.match(r"epoch \d+ step", line)]
    assert len(steps) == 3
    for line in steps:
        shown = rf"loss [\d.]+, AUROC {aurocs[0]:.4f}, "
        assert re.fullmatch(rf"epoch .*: {shown}[\d.]+ images/s, waiting \d+%, \S+ left", line)
    table = second.split("last validation: ")[1]
    for epoch, auroc in enumerate(aurocs, 1):
        assert re.search(rf"^{epoch} .*{auroc:.4f}", table, re.M)
    assert table.count("best") == 1
    assert re.search(r"^macro of \d+ of 14 labels +0\.\d{4}  0\.\d{4} to 0\.\d{4}$", table, re.M)
