"""The demo: how patients are held out, what it refuses, and the folds from phantoms to a report."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cxrdist.demo import __main__ as demo
from cxrdist.demo.__main__ import FOLD_MEMBERS, Files, hold_out
from cxrdist.demo.phantoms import CSV_COLUMNS
from cxrdist.errors import UserError
from cxrdist.scoring.tables import read_table
from cxrdist.scoring.weights import Fit
from cxrdist.tables import read_label_csv, read_template
from cxrdist.task import TASKS

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.fast
def test_held_out_patients_are_disjoint_and_nothing_is_lost(tmp_path: Path) -> None:
    rows = [
        [f"{patient:08d}_001_{image:03d}.jpg", patient, 1, "", "", "Frontal", "PA"]
        + [int((patient + column) % 5 == 0) for column in range(TASKS["b"].num_labels)]
        for patient in range(40)
        for image in range(1 + patient % 3)
    ]
    source, task = tmp_path / "all.csv", TASKS["b"]
    files = Files.below(tmp_path / "demo", task)
    with source.open("w", newline="") as file:
        csv.writer(file).writerows([list(CSV_COLUMNS), *rows])
    hold_out(source, files, task, seed=0)
    train, test = (read_label_csv(path, task).about for path in (files.train_csv, files.truth))
    assert sorted([*train["image_name"], *test["image_name"]]) == sorted(row[0] for row in rows)
    assert not set(train["patient"]) & set(test["patient"])
    assert 0.1 < len(test) / len(rows) < 0.3
    names = list(read_template(files.template, task).image_names)
    assert sorted(names) == sorted(test["image_name"])
    assert names != sorted(names)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "nowhere", "--csv", "l.csv"], "nowhere: no such folder"),
        (["--images", "empty", "--csv", "l.csv"], "holds no .png, .jpg or .jpeg"),
        (["--images", "images", "--csv", "l.csv"], "Pneumothorax"),
        (["--images", "images"], "--csv FILE go together"),
        (["--patients", "3"], "too few"),
    ],
)
def test_mistake_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").touch()
    header = [name for name in CSV_COLUMNS if name != "Pneumothorax"]
    (tmp_path / "l.csv").write_text(",".join(header) + "\n" + ",".join(["1"] * len(header)) + "\n")
    with pytest.raises(UserError, match=message):
        demo.main(arguments)
    assert not (tmp_path / "demo").exists()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_folds_of_every_member_end_in_one_report_of_ensemble_and_members_and_are_reused(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cxrdist.demo", "--folds", "2", "--patients", "30", "--set", "epochs=1"]
    command += ["--out", str(tmp_path / "demo")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stdout + done.stderr
    files = Files.below(tmp_path / "demo", TASKS["b"], 2)
    fitted = Fit.read(files.weights)
    assert list(fitted.weights) == list(FOLD_MEMBERS)
    assert sum(fitted.weights.values()) == pytest.approx(1)
    assert read_table(files.ensemble).meta.members == fitted.weights
    metrics = json.loads((files.report / "metrics.json").read_text())
    assert [score["name"] for score in metrics["scores"]] == ["ensemble", *FOLD_MEMBERS]
    paired = [(pair["one"], pair["other"]) for pair in metrics["comparisons"]]
    assert [("ensemble", member) for member in FOLD_MEMBERS] == paired[: len(FOLD_MEMBERS)]
    for member, model in FOLD_MEMBERS.items():
        assert f"{member}: 2 folds, epochs=1 each" in done.stdout
        table = read_table(files.runs / f"{model}_b_folds" / f"{member}.csv")
        assert (len(table.image_names), table.meta.out_of_fold) == (fitted.num_images, True)
    again = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=os.environ)
    assert again.stdout.count("reused\n") == len(FOLD_MEMBERS) + 8, again.stdout
