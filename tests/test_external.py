"""External validation: one model's scores on sets of several tasks, against AUROCs counted pair by pair."""

import dataclasses
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cxrdist import evaluate, infer, preprocess
from cxrdist.cli import run_entry
from cxrdist.scoring.metrics import bootstrap_auroc, interval
from cxrdist.scoring.tables import Checkpoint, ScoreTable, TableMeta, read_table, write_table
from cxrdist.task import TASKS, Columns, Task

MODELS = Task(
    name="ours",
    labels=("Pleural Effusion", "Edema", "Lung Lesion", "Fracture"),
    columns=Columns(image="file", patient="who"),
)
THEIRS = Task(
    name="theirs",
    labels=("Nodule", "pleural_effusion", "EDEMA", "Hernia"),
    columns=Columns(image="file", patient="who"),
    blank={"*": "masked"},
)


def by_pairs(targets, probs):
    """AUROC as the share of (positive, negative) pairs in the right order, ties half."""
    pairs = [
        (p > n) + 0.5 * (p == n)
        for (p, one), (n, other) in itertools.product(zip(probs, targets, strict=True), repeat=2)
        if one == 1 and other == 0
    ]
    return sum(pairs) / len(pairs)


def drawn_at(page, label, place):
    """The AUROC at which the dot of that set is drawn in the label's row, by the texts of the axis."""
    ticks = re.findall(r'<text x="([\d.]+)%" y="12" text-anchor="middle">([\d.]+)</text>', page)
    at, values = np.array(ticks[:2], dtype=float).T
    row = next(row for row in page.split("<tr>") if row.startswith(f"<td>{label}</td>"))
    dot = float(re.search(rf'<circle class="dot c{place}" cx="([\d.]+)%"', row)[1])
    return values[0] + (dot - at[0]) / (at[1] - at[0]) * (values[1] - values[0])


def make_set(folder, name, task, count, seed, **columns):
    """Scores of the models' labels, and a label CSV of the set's own; `columns` replace labels by cells."""
    rng = np.random.default_rng(seed)
    names = np.array([f"{name}/{i}.png" for i in range(count)], dtype=object)
    probs = np.round(rng.random((count, 4)), 1).astype(np.float32)
    meta = TableMeta(member="eva_x", task=MODELS, split="test")
    write_table(folder / f"{name}.csv", ScoreTable(names, probs, meta))
    frame = pd.DataFrame({"file": names, "who": [f"P{i // 2}" for i in range(count)]})
    for label in task.labels:
        frame[label] = columns.get(label, (rng.random(count) < 0.4).astype(int))
    frame.sample(frac=1, random_state=seed).to_csv(folder / f"{name}_labels.csv", index=False)
    return probs, frame


@pytest.fixture
def sets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs.toml").write_text(THEIRS.to_toml())
    (tmp_path / "map.toml").write_text('[there]\n"Lung Lesion" = "nodule"\n[far]\n"edema" = ""\n')
    edema = [0, 1, ""] * 20  # masked in a third
    return {
        "home": make_set(tmp_path, "home", MODELS, 50, 1, Fracture=[0] * 50),
        "there": make_set(tmp_path, "there", THEIRS, 60, 2, EDEMA=edema),
        "far": make_set(tmp_path, "far", THEIRS, 40, 3),
    }


HOME = ("--external", "home=home.csv@home_labels.csv")
THERE = ("--external", "there=there.csv@there_labels.csv#theirs.toml")
FAR = ("--external", "far=far.csv@far_labels.csv#theirs.toml")
BASE = ("--out", "report", "--resamples", "50")


def test_the_table_of_three_sets_of_two_tasks_equals_aurocs_counted_by_hand_and_blanks_say_why(sets, capsys):
    evaluate.main([*HOME, *THERE, *FAR, "--map", "map.toml", *BASE])
    result = json.loads(Path("report/metrics.json").read_text())
    assert result["labels"] == list(MODELS.labels)
    called = {
        "home": ("Pleural Effusion", "Edema", "Lung Lesion", "Fracture"),
        "there": ("pleural_effusion", "EDEMA", "Nodule", ""),
        "far": ("pleural_effusion", "", "", ""),
    }
    blanks = {
        ("home", "Fracture"): "no positives",
        ("there", "Fracture"): "no such label",
        ("far", "Edema"): "left out by the map",
        ("far", "Lung Lesion"): "no such label",
        ("far", "Fracture"): "no such label",
    }
    printed, page = capsys.readouterr().out, Path("report/report.html").read_text()
    counted = {}
    for place, found in enumerate(result["sets"]):
        name = found["name"]
        probs, frame = sets[name]
        assert tuple(cell["own"] for cell in found["cells"]) == called[name]
        assert (found["num_images"], found["num_patients"]) == (len(frame), len(frame) // 2)
        for column, (label, cell) in enumerate(zip(MODELS.labels, found["cells"], strict=True)):
            assert cell["blank"] == blanks.get((name, label), "")
            if cell["own"]:
                known = pd.to_numeric(frame[cell["own"]], errors="coerce")
                rows = known.notna().to_numpy()
                assert (cell["num_images"], cell["positives"]) == (rows.sum(), known.sum())
                assert cell["prevalence"] == pytest.approx(known.mean())
            if cell["blank"]:
                assert cell["auroc"] is None
                assert cell["interval"] is None
                line = next(line for line in printed.splitlines() if re.match(rf"{label} +{name} ", line))
                assert line.endswith(cell["blank"])
                assert f"{label} ({cell['blank']})" in printed
                assert f"{cell['blank']}</small>" in page
            else:
                wanted = counted[name, label] = by_pairs(known[rows], probs[rows, column])
                assert cell["auroc"] == pytest.approx(wanted, abs=1e-12)
                drawn = bootstrap_auroc(
                    known[rows].to_numpy()[:, None], [probs[rows][:, [column]]], frame["who"][rows], num_resamples=50
                )
                if rows.all():  # else other patients are drawn: those of whom the label is known
                    assert cell["interval"] == pytest.approx(interval(drawn))
                assert cell["interval"][0] < wanted < cell["interval"][1]
                assert re.search(rf"{label} +{name} +{wanted:.3f} \(", printed)
                assert f"<td>{wanted:.3f}<br><small>{cell['interval'][0]:.3f} to " in page
                assert wanted == pytest.approx(drawn_at(page, label, place), abs=1e-3)
    assert result["shared"] == ["Pleural Effusion"]
    for found in result["sets"]:
        assert found["macro_auroc"] == pytest.approx(counted[found["name"], "Pleural Effusion"])
    assert (
        "there: 3 labels compared: Pleural Effusion = pleural_effusion, Edema = EDEMA, Lung Lesion = Nodule" in printed
    )
    assert "Lung Lesion = Nodule (map)" in printed
    assert "its labels that no score is of: Hernia" in printed
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", page)


def test_a_label_that_no_set_has_is_named_and_takes_no_row(sets, capsys):
    evaluate.main([*THERE, *FAR, *BASE])
    result = json.loads(Path("report/metrics.json").read_text())
    assert result["labels"] == ["Pleural Effusion", "Edema"]
    assert result["nowhere"] == ["Lung Lesion", "Fracture"]
    assert "labels of the scores that no set has: Lung Lesion, Fracture" in capsys.readouterr().out
    assert "labels of the scores that no set has: Lung Lesion, Fracture" in Path("report/report.html").read_text()


def test_sets_without_a_shared_label_have_no_macro_and_any_label_can_be_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = np.array(list("abcdef"), dtype=object)
    labels = ("<b>$x$", "_y", *(f"label {i}" for i in range(120)))
    task = Task(name="many", labels=labels, columns=Columns(image="file"), blank={"*": "masked"})
    (tmp_path / "many.toml").write_text(task.to_toml())
    probs = np.linspace(0, 1, 6 * len(labels), dtype=np.float32).reshape(6, -1)
    write_table(tmp_path / "t.csv", ScoreTable(names, probs, TableMeta(task=task)))
    for name, known in (("one", labels[0]), ("two", labels[1])):
        frame = pd.DataFrame({"file": names} | dict.fromkeys(labels, "")).assign(**{known: [0, 1, 0, 1, 1, 1]})
        frame.to_csv(f"{name}.csv", index=False)
    sets = [f"--external={name}=t.csv@{name}.csv#many.toml" for name in ("one", "two")]
    evaluate.main([*sets, *BASE])
    result = json.loads(Path("report/metrics.json").read_text())
    assert result["shared"] == []
    assert [found["macro_auroc"] for found in result["sets"]] == [None, None]
    assert [found["cells"][0]["blank"] for found in result["sets"]] == ["", "masked in every image"]
    page = Path("report/report.html").read_text()
    assert "&lt;b&gt;$x$" in page
    assert page.count('<svg class="row" height="30"') == len(labels) + 1, "a line for each set, in every row"
    assert "macro over the 0 of 122 labels" in capsys.readouterr().out


MISTAKES = {
    "label of the map that the scores lack": (
        [*THERE, "--map", "x.toml"],
        '[there]\n"Lung Leson" = "Nodule"',
        r"x\.toml: \[there\] .*the scores have no label 'Lung Leson'; the nearest is 'Lung Lesion'; there are: Pleural",
    ),
    "label of the map that the set lacks": (
        [*THERE, "--map", "x.toml"],
        '[there]\n"Lung Lesion" = "Mass"',
        r"x\.toml: \[there\] \"Lung Lesion\" = \"Mass\": there_labels\.csv has no label 'Mass'; there are: Nodule, ",
    ),
    "set of the map that is not given": (
        [*THERE, "--map", "x.toml"],
        '[thre]\n"Lung Lesion" = "Nodule"',
        r"x\.toml: \[thre\] is no set of --external; the nearest is 'there'; there are: there",
    ),
    "map of another form": (
        [*THERE, "--map", "x.toml"],
        "there = 3",
        r"x\.toml: there: Input should be a valid dict",
    ),
    "map that is not TOML": ([*THERE, "--map", "x.toml"], "[there", r"x\.toml: not TOML"),
    "label that is there twice in the map": (
        [*THERE, "--map", "x.toml"],
        '[there]\n"Edema" = "Nodule"\n"EDEMA" = "Hernia"',
        r"'EDEMA' is there twice",
    ),
    "no label in common": (
        ["--external", "x=there.csv@there_labels.csv#x.toml"],
        Task(name="x", labels=("Hernia",), columns=Columns(image="file")).to_toml(),
        r"x: no label in common: the scores have Pleural Effusion, .*; there_labels\.csv has Hernia; say in --map FILE",
    ),
    "table of other images": (
        ["--external", "there=far.csv@there_labels.csv#theirs.toml"],
        "",
        r"there_labels\.csv has no labels for 40 of 40 scored images, e\.g\. 'far/0\.png'",
    ),
    "labels of another task": (
        ["--external", "there=there.csv@there_labels.csv"],
        "",
        r"--external there: .*column 'Pleural Effusion' is missing.*; or name its own task: there_labels\.csv#TASK",
    ),
    "set that is given twice": ([*HOME, *HOME], "", r"--external home is there twice"),
    "set without labels": (["--external", "home=home.csv"], "", r"--external home=home\.csv: write NAME=SCORES"),
    "unknown task": (["--external", "h=home.csv@home_labels.csv#nhi"], "", r"nhi: no such task; one of a, b"),
    "scores and labels of no known task": (
        ["--external", "h=bare.csv@home_labels.csv"],
        "",
        r"of no task that is known: name theirs with home_labels\.csv#TASK",
    ),
    "both kinds of evaluation": ([*HOME, "--csv", "home_labels.csv"], "", r"leave out --csv"),
    "a map without sets": (["--scores", "home.csv", "--map", "x.toml"], "", r"--map says what the sets of --external"),
    "neither": ([], "", r"give --scores FILES, or --external"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_written(sets, tmp_path, capsys, mistake):
    arguments, text, message = MISTAKES[mistake]
    (tmp_path / "x.toml").write_text(text)
    (tmp_path / "bare.csv").write_bytes((tmp_path / "home.csv").read_bytes())  # without its JSON
    try:
        code = run_entry(lambda: evaluate.main([*arguments, *BASE]))
    except SystemExit as end:  # argparse's own
        code = end.code
    error = capsys.readouterr().err
    assert code == 2
    assert re.search(message, error), error
    assert error.count("\n") == 1
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("split", "trained_on", "seen"),
    [("train", "", True), ("train", "mine", True), ("train", "other", False), ("test", "", False)],
)
def test_images_that_may_have_been_trained_on_are_said(sets, capsys, split, trained_on, seen):
    table = read_table(Path("home.csv"))
    weights = Checkpoint(
        source="runs/x@1", sha256="0", backbone_sha256=None, trained_on=trained_on, image_size=64, views={"plain": 1.0}
    )
    meta = dataclasses.replace(table.meta, split=split, shards="mine", checkpoints=(weights,), sha256="")
    write_table(Path("home.csv"), ScoreTable(table.image_names, table.probs, meta))
    evaluate.main([*HOME, *BASE])
    assert ("home: these images may have been trained on" in capsys.readouterr().out) is seen


def test_labels_that_differ_in_case_only_are_not_guessed_between(sets, tmp_path, capsys):
    twice = Task(name="twice", labels=("Edema", "edema"), columns=Columns(image="file", patient="who"))
    (tmp_path / "twice.toml").write_text(twice.to_toml())
    frame = sets["home"][1].assign(edema=0)
    frame.to_csv("twice.csv", index=False)
    assert run_entry(lambda: evaluate.main(["--external", "h=home.csv@twice.csv#twice.toml", *BASE])) == 2
    assert "'Edema' and 'edema' differ in case, spaces, '_' or '-' only" in capsys.readouterr().err


def test_models_of_one_task_score_the_shards_of_another_and_are_validated_on_both(world, tmp_path, capsys):
    """Through the real commands: preprocess, infer --external, evaluate --external."""
    frame = pd.read_csv(world.truth, dtype=str).rename(columns={"Image_name": "file", "Patient_ID": "who"})
    rng = np.random.default_rng(7)
    frame["pleural-effusion"], frame["Hernia"] = rng.integers(0, 2, (2, len(frame)))
    frame[["file", "who", "pleural-effusion", "Hernia"]].to_csv(tmp_path / "site.csv", index=False)
    task = Task(name="site", labels=("Hernia", "pleural-effusion"), columns=Columns(image="file", patient="who"))
    (tmp_path / "site.toml").write_text(task.to_toml())
    source = ["--csv", str(tmp_path / "site.csv"), "--images", str(world.truth.parent / "images")]
    site = tmp_path / "site"
    preprocess.main(["--task", str(tmp_path / "site.toml"), *source, "--out", str(site), "--split", "test"])
    members = ["--member", f"eva_x={world.eva_x}@1:plain"]
    world.run(tmp_path / "home", "--split", "train", members=members)

    def infer_site(*more):
        sizes = ["--device-batch-size", "4", "--precision", "fp32", "--out", str(tmp_path / "out")]
        return run_entry(lambda: infer.main(["--shards", str(site), *members, *sizes, *more]))

    assert infer_site() == 2
    assert "was trained for another task than the shards' (task site and b" in (error := capsys.readouterr().err)
    assert "--external" in error
    assert infer_site("--external", "a") == 2
    assert "the task of --external and" in capsys.readouterr().err
    assert infer_site("--external", "--split", "train", "--fold", "0") == 2
    assert (
        "--fold chooses patients of the runs' training split: add --split train, without --external"
        in capsys.readouterr().err
    )
    (tmp_path / "template.csv").write_text("file,Hernia\n00000000_001_000.jpg,0\n")
    assert infer_site("--external", "--template", str(tmp_path / "template.csv")) == 2
    assert "column 'Hernia' is not a label of task b" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert infer_site("--external") == 0
    assert not (tmp_path / "out" / "submission.csv").exists()

    one, other = (tmp_path / name / "scores" / "eva_x.csv" for name in ("home", "out"))
    home, away = read_table(one), read_table(other)
    assert away.meta.task == TASKS["b"]
    assert away.meta.shards == json.loads((site / "test.json").read_text())["index"]["sha256"]
    rows = pd.Index(home.image_names).get_indexer(away.image_names)
    np.testing.assert_allclose(away.probs, home.probs[rows], rtol=0, atol=1e-6)

    sets = ["--external", f"home={one}@{world.shards}", "--external", f"site={other}@{site}"]
    evaluate.main([*sets, "--out", str(tmp_path / "report"), "--resamples", "20"])
    result = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert result["shared"] == ["Pleural Effusion"]
    assert result["sets"][0]["models"] == result["sets"][1]["models"] != []
    place = result["labels"].index("Pleural Effusion")
    truth = frame.set_index("file").loc[list(away.image_names), "pleural-effusion"]
    wanted = by_pairs(truth, away.probs[:, away.labels.index("Pleural Effusion")])
    assert result["sets"][1]["cells"][place]["auroc"] == pytest.approx(wanted, abs=1e-12)
    assert result["sets"][1]["not_scored"] == ["Hernia"]
    assert "home: these images may have been trained on" in capsys.readouterr().out

    alone = ["--scores", str(other), "--shards", str(site), "--out", str(tmp_path / "alone")]
    assert run_entry(lambda: evaluate.main(alone)) == 2
    assert "of another task than the scores (task b and site" in (error := capsys.readouterr().err)
    assert "evaluate --external" in error
    unlabelled = ["--external", f"x={tmp_path / 'test' / 'scores' / 'eva_x.csv'}@{world.shards}"]
    world.run(tmp_path / "test", members=members)
    assert run_entry(lambda: evaluate.main([*unlabelled, "--out", str(tmp_path / "alone")])) == 2
    assert "has no labels; give a label CSV: --external x=SCORES@LABELS.csv#TASK" in capsys.readouterr().err
