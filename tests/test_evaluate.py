"""From score tables and labels to numbers and one self-contained page."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cxrdist import evaluate
from cxrdist.errors import UserError
from cxrdist.scoring.metrics import macro_auroc
from cxrdist.scoring.tables import ScoreTable, TableMeta, read_table, write_table
from cxrdist.tables import read_label_csv
from cxrdist.task import TASKS, Columns, Task

VERSION_1 = Path(__file__).parent / "golden" / "version1"


def test_report_is_one_page_without_any_outside_address_and_its_numbers_are_those_of_the_metrics(
    world, tmp_path, capsys
):
    world.run(tmp_path / "out")
    tables = [tmp_path / "out" / "scores" / f"{name}.csv" for name in ("eva_x", "chexfound")]
    for run in (world.eva_x, world.chexfound):
        rows = [{"kind": "train", "step": i, "epoch": 1 + i // 5, "loss": 1 / (1 + i)} for i in range(10)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "timings.json").write_text('{"train eva_x": 125.0}')
    evaluate.main(
        [
            *("--scores", *map(str, tables), "--csv", str(world.truth), "--out", str(tmp_path / "report")),
            *("--run", str(world.eva_x), "--run", str(world.chexfound), "--shards", str(world.shards)),
            *("--timings", str(tmp_path / "timings.json"), "--resamples", "50"),
        ]
    )
    numbers = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert [score["name"] for score in numbers["scores"]] == ["ensemble", "eva_x", "chexfound"]
    table = read_table(tables[0])
    labels = read_label_csv(world.truth, TASKS["b"])
    row_of = {name: row for row, name in enumerate(labels.about["image_name"])}
    truth = labels.targets[[row_of[name] for name in table.image_names]]
    assert numbers["scores"][1]["macro_auroc"] == pytest.approx(macro_auroc(truth, table.probs)[0])
    said = capsys.readouterr().out
    assert re.search(r"^label, by ensemble +positive +AUROC +95 % interval +average precision$", said, re.M)
    first = numbers["scores"][0]
    for place, label in enumerate(numbers["labels"]):
        low, high = first["auroc_interval"][place]
        auroc = (
            rf"{first['auroc'][place]:.4f}  {low:.4f} to {high:.4f}" if first["auroc"][place] is not None else "none"
        )
        assert re.search(rf"^{label} \* +{numbers['positives'][place]} +{auroc}", said, re.M), label
    few = "* fewer than 20 positives or negatives"
    assert f"\n{few}" in said
    for score in numbers["scores"]:
        assert re.search(rf"^{score['name']} +macro AUROC {score['macro_auroc']:.4f} \(95 % ", said, re.M)
    page = (tmp_path / "report" / "report.html").read_text()
    assert "not for clinical use" in page
    assert f">{few}" in page
    assert "holds images of patients" in page
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", page)
    assert page.count("data:image/jpeg") >= 14 * 6
    for title in (
        "Curves and images of each label",
        "Grad-CAM of eva_x_b@2",
        "GLoRI attention of chexfound_b@2",
        "Files and times",
    ):
        assert title in page
    assert "chexfound_b: This model started from random weights" in page
    assert "eva_x_b: This model started from random weights" not in page
    assert np.isfinite(numbers["scores"][0]["macro_interval"]).all()


def test_labels_of_other_images_and_wrong_weights_are_named(world, tmp_path):
    world.run(tmp_path / "out")
    table = str(tmp_path / "out" / "scores" / "eva_x.csv")
    other = tmp_path / "other.csv"
    other.write_text("\n".join(world.truth.read_text().splitlines()[:5]) + "\n")
    with pytest.raises(UserError, match="has no labels for 19 of 23 scored images"):
        evaluate.main(["--scores", table, "--csv", str(other), "--out", str(tmp_path / "report")])
    with pytest.raises(UserError, match="2 numbers for 1 members"):
        evaluate.main(["--scores", table, "--csv", str(world.truth), "--weights", "1", "2"])
    assert not (tmp_path / "report").exists()


def test_version_1_tables_and_runs_are_reported(tmp_path, monkeypatch):
    shutil.copytree(VERSION_1, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    runs = ("--run", "run_full_eva_x", "--run", "run_full_chexfound", "--shards", "shards")
    scores = ("--scores", "oof/eva_x.csv", "oof/chexfound.csv", "--csv", "labels.csv")
    evaluate.main([*scores, *runs, "--out", str(tmp_path / "report"), "--resamples", "20"])
    page = (tmp_path / "report" / "report.html").read_text()
    assert "task b, split train; 4 images" in page
    assert "GLoRI attention of run_full_chexfound@2" in page


@pytest.mark.parametrize("num_labels", [1, 3, pytest.param(40, marks=pytest.mark.slow)])
def test_a_report_holds_any_number_of_labels_however_they_are_called(tmp_path, num_labels):
    task = Task(
        name="own",
        labels=("<b>$x$ & $y</b>", *(f"finding, {i}" for i in range(1, num_labels))),
        columns=Columns(image="file", patient="who"),
    )
    rng = np.random.default_rng(0)
    names = np.array([f"folder/{i}.png" for i in range(40)], dtype=object)
    table = ScoreTable(names, rng.random((40, num_labels), dtype=np.float32), TableMeta(member="m", task=task))
    write_table(tmp_path / "m.csv", table)
    frame = pd.DataFrame({"file": names, "who": [f"P-{i // 2}" for i in range(40)]})
    for label in task.labels:
        frame[label] = (rng.random(40) < 0.5).astype(int)
    frame.to_csv(tmp_path / "labels.csv", index=False)
    evaluate.main(
        [
            *("--scores", str(tmp_path / "m.csv"), "--csv", str(tmp_path / "labels.csv")),
            *("--out", str(tmp_path / "report"), "--resamples", "20"),
        ]
    )
    numbers = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert numbers["labels"] == list(task.labels)
    assert numbers["num_patients"] == 20
    page = (tmp_path / "report" / "report.html").read_text()
    assert f"of {num_labels} labels" in page
    assert "&lt;b&gt;$x$ &amp; $y&lt;/b&gt;" in page
    assert "<b>$x$" not in page


def test_blank_and_uncertain_cells_are_read_as_the_flags_say(world, tmp_path):
    world.run(tmp_path / "out")
    table = str(tmp_path / "out" / "scores" / "eva_x.csv")
    text = world.truth.read_text().splitlines()
    text[1] = re.sub(r",[01],[01]$", ",,-1", text[1])
    (tmp_path / "labels.csv").write_text("\n".join(text) + "\n")
    base = ["--scores", table, "--csv", str(tmp_path / "labels.csv"), "--out", str(tmp_path / "r"), "--resamples", "5"]
    with pytest.raises(UserError, match="is blank"):
        evaluate.main(base)
    counts = []
    for reading in ("zero", "one"):
        evaluate.main([*base, "--blank", "zero", "--uncertain", reading])
        counts.append(json.loads((tmp_path / "r" / "metrics.json").read_text())["positives"])
    assert [one - zero for zero, one in zip(*counts, strict=True)] == [0] * 13 + [1]


def test_images_are_in_a_report_only_where_a_run_is_shown(world, tmp_path):
    world.run(tmp_path / "out", "--split", "train")
    table = str(tmp_path / "out" / "scores" / "eva_x.csv")
    base = ["--scores", table, "--shards", str(world.shards), "--out", str(tmp_path / "r"), "--resamples", "5"]
    evaluate.main(base)
    page = (tmp_path / "r" / "report.html").read_text()
    assert "holds images of patients" not in page
    assert "<img" not in page
    evaluate.main([*base, "--run", str(run_with_a_log(world.eva_x, tmp_path))])
    page = (tmp_path / "r" / "report.html").read_text()
    assert "holds images of patients" in page
    assert "<img" in page


def run_with_a_log(run, folder):
    copy = shutil.copytree(run, folder / run.name)
    (copy / "metrics.jsonl").write_text(json.dumps({"kind": "train", "step": 1, "epoch": 1, "loss": 0.5}) + "\n")
    return copy
