"""`python -m cxrdist.ensemble`: from tables to a submission, without images or models."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest

from cxrdist import ensemble, evaluate
from cxrdist.errors import UserError
from cxrdist.scoring.metrics import macro_auroc
from cxrdist.scoring.tables import ScoreTable, TableMeta, average, read_table, write_table
from cxrdist.scoring.weights import Fit
from cxrdist.shards.index import open_index
from cxrdist.tables import read_label_csv
from cxrdist.task import TASKS

pytestmark = pytest.mark.fast
TASK = TASKS["b"]
LABELS = TASK.labels


@pytest.fixture
def tables(tmp_path):
    """Two members over 40 images of the test split, and their out-of-fold tables in two parts over 80 others."""
    rng = np.random.default_rng(0)
    truth = (rng.random((80, 14)) < 0.4).astype(int)
    files = {}
    for member, skill in (("good", 0.4), ("poor", 0.0)):
        names = np.array([f"{i:08d}_001_001.jpg" for i in range(40)], dtype=object)
        table = ScoreTable(names, rng.random((40, 14), dtype=np.float32), TableMeta(member=member, task=TASK))
        write_table(tmp_path / f"{member}.csv", table)
        for part in (0, 1):
            names = np.array([f"{1000 + i:08d}_001_001.jpg" for i in range(part * 40, part * 40 + 40)], dtype=object)
            probs = (skill * truth[part * 40 : part * 40 + 40] + 0.5 * rng.random((40, 14))).astype(np.float32)
            fold = ScoreTable(
                names, probs, TableMeta(member=member, task=TASK, out_of_fold=True, split="train", shards="s")
            )
            write_table(tmp_path / f"{member}_fold{part}.csv", fold)
        files[member] = table
    names = [f"{1000 + i:08d}_001_001.jpg" for i in range(80)]
    frame = pd.DataFrame({"Image_name": names, "Patient_ID": [name[:8] for name in names], "Study": 1})
    for label, column in zip(LABELS, truth.T, strict=True):
        frame[label] = column
    frame.to_csv(tmp_path / "labels.csv", index=False)
    order = files["good"].image_names[::-1]
    pd.DataFrame({"Image_name": order} | dict.fromkeys(LABELS, 0)).to_csv(tmp_path / "template.csv", index=False)
    return files


def arguments(folder, *more):
    return ["--scores", str(folder / "good.csv"), str(folder / "poor.csv"), *more]


def test_weighted_average_lands_in_the_templates_order(tables, tmp_path):
    out = tmp_path / "submission.csv"
    template = str(tmp_path / "template.csv")
    ensemble.main(arguments(tmp_path, "--weights", "3", "1", "--template", template, "--out", str(out)))
    values = pd.read_csv(out)[list(LABELS)].to_numpy().astype(np.float32)[::-1]
    np.testing.assert_array_equal(values, average([tables["good"].probs, tables["poor"].probs], [3, 1]))
    again = read_table(out)
    assert again.image_names[0] == tables["good"].image_names[-1]


def test_members_keep_the_weights_they_were_scored_with(tables, tmp_path):
    out = tmp_path / "final.csv"
    write_table(
        tmp_path / "good.csv",
        dataclasses.replace(tables["good"], meta=dataclasses.replace(tables["good"].meta, weight=3.0)),
    )
    ensemble.main(arguments(tmp_path, "--out", str(out)))
    np.testing.assert_array_equal(read_table(out).probs, average([tables["good"].probs, tables["poor"].probs], [3, 1]))


def fold_tables(folder):
    return [str(folder / f"{member}_fold{part}.csv") for member in ("good", "poor") for part in (0, 1)]


def test_weights_are_fitted_on_joined_out_of_fold_tables_only_and_applied_by_name(tables, tmp_path, capsys):
    folds = fold_tables(tmp_path)
    out = ("--csv", str(tmp_path / "labels.csv"), "--out", str(tmp_path / "final.csv"))
    ensemble.main(arguments(tmp_path, "--fit", *reversed(folds), *out))
    printed = capsys.readouterr().out
    assert "weights fitted on 80 out-of-fold images of 80 patients" in printed
    assert "over equal weights: +" in printed
    weights = {line.split()[0]: float(line.split()[-1]) for line in printed.splitlines() if " weight " in line}
    assert list(weights) == ["good", "poor"]
    assert weights["good"] > 0.8
    found = read_table(tmp_path / "final.csv")
    assert len(found.image_names) == 40
    np.testing.assert_array_equal(
        found.probs, average([tables["good"].probs, tables["poor"].probs], list(found.meta.members.values()))
    )
    with pytest.raises(UserError, match="same members only"):
        ensemble.main(["--scores", str(tmp_path / "good.csv"), "--fit", *folds, *out])
    table = read_table(tmp_path / "poor_fold1.csv")
    write_table(
        tmp_path / "poor_fold1.csv", dataclasses.replace(table, meta=dataclasses.replace(table.meta, out_of_fold=False))
    )
    with pytest.raises(UserError, match="'poor' is not out-of-fold"):
        ensemble.main(arguments(tmp_path, "--fit", *folds, *out))


def test_a_fit_alone_writes_the_out_of_fold_table_of_the_ensemble_and_its_weights(tables, tmp_path):
    out, doc = tmp_path / "oof.csv", tmp_path / "fit.json"
    truth = ("--csv", str(tmp_path / "labels.csv"))
    ensemble.main(["--fit", *fold_tables(tmp_path), *truth, "--out", str(out), "--json", str(doc)])
    table, fitted = read_table(out), Fit.read(doc)
    assert (len(table.image_names), table.meta.out_of_fold, table.meta.members) == (80, True, fitted.weights)
    report = tmp_path / "report"
    parts = fold_tables(tmp_path)
    evaluate.main(["--scores", *parts, str(out), *truth, "--out", str(report), "--resamples", "20"])
    numbers = json.loads((report / "metrics.json").read_text())
    assert [score["name"] for score in numbers["scores"]] == ["ensemble", "good", "poor"]  # not averaged once more
    wanted = macro_auroc(read_label_csv(tmp_path / "labels.csv", TASK).targets, table.probs)[0]
    assert numbers["scores"][0]["macro_auroc"] == pytest.approx(wanted)


def test_wrong_counts_and_combinations_are_named_and_nothing_is_written(tables, tmp_path):
    out = tmp_path / "final.csv"
    for more, message in (
        (("--weights", "1"), "1 numbers for 2 members"),
        (("--fit", *fold_tables(tmp_path)), "give --csv FILE with the labels"),
        (("--csv", "y.csv"), "go with --fit"),
        (("--fit", "x.csv", "--weights", "1", "1", "--csv", "y.csv"), "exclude each other"),
    ):
        with pytest.raises(UserError, match=message):
            ensemble.main(arguments(tmp_path, *more, "--out", str(out)))
    with pytest.raises(UserError, match="give --scores FILES to average, or --fit"):
        ensemble.main(["--out", str(out)])
    with pytest.raises(UserError, match="--template goes with --scores"):
        ensemble.main(["--fit", "x.csv", "--template", str(tmp_path / "template.csv"), "--out", str(out)])
    assert not out.exists()


def test_studies_are_known_by_name_or_from_the_shard_set_and_else_the_remedy_is_named(world, tmp_path):
    index = open_index(world.shards, "test")
    names = np.array(index.image_names.to_list(), dtype=object)
    probs = np.random.default_rng(0).random((len(names), 14), dtype=np.float32)
    for member, task in (("named", TASK), ("unnamed", dataclasses.replace(TASK, names=""))):
        write_table(tmp_path / f"{member}.csv", ScoreTable(names, probs, TableMeta(member=member, task=task)))
    flags = ("--average-studies", "--out", str(tmp_path / "final.csv"))
    results = []
    for more in ((), ("--shards", str(world.shards))):
        ensemble.main(["--scores", str(tmp_path / "named.csv"), *flags, *more])
        results.append((tmp_path / "final.csv").read_bytes())
    assert results[0] == results[1]
    with pytest.raises(UserError, match=r"study of image .* is not known; shard sets and label CSVs"):
        ensemble.main(["--scores", str(tmp_path / "unnamed.csv"), *flags])
    table = read_table(tmp_path / "final.csv")
    assert table.meta.study_averaged
    assert len(np.unique(table.probs[:, 0])) == len(set(zip(index.patients, index.studies, strict=True)))
