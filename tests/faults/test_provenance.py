"""FAULTS rows 43, 44, 45: weights that are no numbers; tables that do not belong together or lack rows; raw weights."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from cxrdist import ensemble, evaluate
from cxrdist.cli import run_entry
from cxrdist.errors import UserError
from cxrdist.inference.members import load_ensemble, parse_member
from cxrdist.inference.passes import describe_plan, plan_passes
from cxrdist.recipes import recipe_for
from cxrdist.runs.member import build_model
from cxrdist.scoring.tables import Checkpoint, ScoreTable, TableMeta, join_parts, read_table, shares, write_table
from cxrdist.task import TASKS

pytestmark = pytest.mark.fast
TASK = TASKS["b"]
NAMES = [f"{i // 2:08d}_001_{i % 2:03d}.jpg" for i in range(12)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two members over 12 images, and their labels; the commands run there."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate("mn"):
        write(tmp_path / f"{name}.csv", NAMES, seed=number)
    rng = np.random.default_rng(9)
    frame = pd.DataFrame({"Image_name": NAMES, "Patient_ID": [name[:8] for name in NAMES], "Study": 1})
    for label in TASK.labels:
        frame[label] = (rng.random(12) < 0.5).astype(int)
    frame.to_csv(tmp_path / "labels.csv", index=False)
    return tmp_path


def write(path, names, seed=0, **changes):
    probs = np.random.default_rng(seed).random((len(names), 14), dtype=np.float32)
    about = {"member": path.stem, "task": TASK, "split": "test", "shards": "s" * 64} | changes
    write_table(path, ScoreTable(np.array(names, dtype=object), probs, TableMeta(**about)))
    return path


def without_json(path, rows):
    """A table of the first rows of another, without a JSON."""
    lines = path.read_text().splitlines(keepends=True)[: rows + 1]
    new = path.with_name("bare.csv")
    new.write_text("".join(lines))
    return new


def ended(entry, *words):
    return run_entry(lambda: entry.main([str(word) for word in words]))


@pytest.mark.parametrize(
    "weights", [("inf", "1"), ("-1", "1"), ("nan", "1"), ("0", "0"), ("1e308", "1e308"), ("x", "1")]
)
@pytest.mark.parametrize("entry", [ensemble, evaluate])
def test_weights_that_are_no_numbers_are_named_and_nothing_is_written(folder, capsys, entry, weights):
    words = ["--scores", "m.csv", "n.csv", "--weights", *weights, "--out", "out"]
    words += ["--csv", "labels.csv"] if entry is evaluate else []
    try:
        code = ended(entry, *words)
    except SystemExit as end:  # of the parser
        code = end.code
    assert code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "weight" in error
    assert not (folder / "out").exists()


@pytest.mark.parametrize("weight", ["Infinity", "-1.0", "NaN", "1e999", '"1"', "null"])
def test_a_weight_in_a_tables_json_that_is_no_number_is_named(folder, capsys, weight):
    path = folder / "m.json"
    path.write_text(path.read_text().replace('"weight": 1.0', f'"weight": {weight}'))
    assert ended(ensemble, "--scores", "m.csv", "n.csv", "--out", "out.csv") == 2
    assert "weight" in capsys.readouterr().err
    assert not (folder / "out.csv").exists()


def test_weights_are_scaled_to_sum_one():
    assert shares([3, 1]).tolist() == [0.75, 0.25]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"task": TASKS["a"]}, "task b and a"),
        ({"split": "train"}, "split: test and train"),
        ({"shards": "t" * 64}, "shards: s"),
    ],
)
def test_tables_of_two_tasks_splits_or_shard_sets_are_not_joined_under_one_name(folder, capsys, changes, says):
    for name in ("A", "B", "C"):
        (folder / name).mkdir()
    write(folder / "A" / "m.csv", NAMES[:4])
    write(folder / "B" / "m.csv", NAMES[4:8], **({"shards": "", "split": ""} if "task" not in changes else {}))
    write(folder / "C" / "m.csv", NAMES[8:], **changes)
    for more in ((), ("--allow-missing",)):
        assert ended(ensemble, "--scores", "A/m.csv", "B/m.csv", "C/m.csv", "--out", "out.csv", *more) == 2
        error = capsys.readouterr().err
        assert says in error or (not more and "not all say" in error)
    assert not (folder / "out.csv").exists()


def test_parts_of_one_name_that_do_not_say_their_origin_are_joined_only_when_asked(folder, capsys):
    (folder / "B").mkdir()
    write(folder / "m.csv", NAMES[:6])
    write(folder / "B" / "m.csv", NAMES[6:])
    (folder / "B" / "m.json").unlink()
    words = ["--scores", "m.csv", "B/m.csv", "--out", "out.csv"]
    assert ended(ensemble, *words) == 2
    assert "2 tables are named 'm' and not all say their split and shards" in capsys.readouterr().err
    assert ended(ensemble, *words, "--allow-missing") == 0
    assert "does not say its split, shards" in capsys.readouterr().out
    table = read_table(folder / "out.csv")
    assert (len(table.image_names), table.meta.split, table.meta.shards) == (12, "", "")


def test_raw_and_averaged_weights_are_not_parts_of_one_member():
    tables = [
        ScoreTable(
            np.array([name], dtype=object),
            np.zeros((1, 14), np.float32),
            TableMeta(
                member="m",
                task=TASK,
                split="test",
                shards="s",
                checkpoints=(
                    Checkpoint(source="", sha256="", backbone_sha256=None, image_size=1, views={}, weights=kind),
                ),
            ),
        )
        for name, kind in (("a", "ema"), ("b", "raw"))
    ]
    with pytest.raises(UserError, match="EMA and raw"):
        join_parts(tables)


def test_tables_over_different_rows_are_counted_and_averaged_only_when_asked(folder, capsys):
    write(folder / "n.csv", NAMES[3:], seed=1)
    words = ["--scores", "m.csv", "n.csv", "--out", "out.csv"]
    assert ended(ensemble, *words) == 2
    assert f"3 missing and 0 extra in the second, e.g. {NAMES[0]!r}" in capsys.readouterr().err
    assert not (folder / "out.csv").exists()
    assert ended(ensemble, *words, "--allow-missing") == 0
    assert "3 missing" in capsys.readouterr().out
    table, one, two = (read_table(folder / f"{name}.csv") for name in ("out", "m", "n"))
    assert table.image_names.tolist() == NAMES[3:]
    np.testing.assert_allclose(table.probs, (one.probs[3:] + two.probs) / 2, rtol=1e-6)
    report = ("--csv", "labels.csv", "--out", "report", "--resamples", "5")
    assert ended(evaluate, "--scores", "out.csv", *report) == 2
    assert "3 of 12 images of 'ensemble' have no score" in capsys.readouterr().err


def test_a_table_that_lacks_rows_is_evaluated_only_when_asked_and_the_report_says_so(folder, capsys):
    bare = without_json(folder / "m.csv", 5)
    words = ["--scores", bare, "--csv", "labels.csv", "--out", "report", "--resamples", "5"]
    assert ended(evaluate, *words) == 2
    said = capsys.readouterr()
    assert f"7 of 12 images of 'bare' have no score, e.g. {NAMES[5]!r}" in said.err
    assert "no JSON beside it" in said.out
    assert not (folder / "report").exists()
    assert ended(evaluate, *words, "--allow-missing") == 0
    page = (folder / "report" / "report.html").read_text()
    assert "7 of 12 images of" in page
    assert "does not say its task, split, shards, models" in page


def test_a_fold_that_has_all_its_rows_is_evaluated_and_said(folder, capsys):
    write(folder / "m.csv", NAMES[:4], split="train", out_of_fold=True, asked=4)
    words = ["--scores", "m.csv", "--csv", "labels.csv", "--out", "report", "--resamples", "5"]
    assert ended(evaluate, *words) == 0
    said = "he scores are of 4 of the 12 labelled images in labels.csv, of patients whom training held out"
    assert f"t{said}" in capsys.readouterr().out
    assert f"T{said}." in (folder / "report" / "report.html").read_text()
    write(folder / "m.csv", NAMES[:4], asked=6, unreadable={NAMES[4]: "cut"})
    assert ended(evaluate, *words) == 2
    assert "1 of 6 images of 'm'" in capsys.readouterr().err


def test_labels_from_another_shard_set_than_the_one_that_was_scored_are_refused(world, tmp_path, capsys):
    table = write(
        tmp_path / "m.csv", [f"{i // 3:08d}_{1 + i % 3 // 2:03d}_{i % 3:03d}.jpg" for i in range(23)], split="train"
    )
    words = ["--scores", table, "--shards", world.shards, "--out", tmp_path / "report", "--resamples", "5"]
    assert ended(evaluate, *words) == 2
    assert "is not the shard set that 'm' was scored on" in capsys.readouterr().err


def test_the_plan_and_the_table_say_which_weights_are_used_and_raw_ones_beside_an_ema_are_a_warning(tmp_path):
    model = build_model(recipe_for("eva_x_tiny", "b"), TASK)
    state = {f"backbone.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"epoch": 5, "model_state_dict": state}, tmp_path / "best_model_f5.pth")
    torch.save({"epoch": 5, "ema_state_dict": state}, tmp_path / "ema_model_f5.pth")
    raw, ema = (f"eva_x={tmp_path}/{name}_model_f5.pth:plain" for name in ("best", "ema"))
    both = f"eva_x={tmp_path}/best_model_f5.pth,{tmp_path}/ema_model_f5.pth:plain"
    for text, kind, warned in ((raw, "raw", True), (ema, "ema", False), (both, "ema", False)):
        found = load_ensemble([parse_member(text)], TASK)
        (item,) = found.members[0].checkpoints
        assert (item.weights, item.task) == (kind, "")
        plan = describe_plan(found.members, plan_passes(found.members), 5)
        assert f"{'raw' if kind == 'raw' else 'EMA'} weights (the file does not say their task)" in plan
        assert bool(found.notes) == warned
        assert all("warning: eva_x: " in note and "ema_model_f5.pth beside it" in note for note in found.notes)


def test_inference_writes_the_kind_of_weights_and_the_number_of_rows_into_the_tables_json(world, tmp_path, capsys):
    world.run(tmp_path / "out", members=["--member", f"eva_x={world.eva_x}@1:plain"])
    assert "EMA weights, 64 px" in capsys.readouterr().out
    meta = json.loads((tmp_path / "out" / "scores" / "eva_x.json").read_text())
    assert [(item["weights"], item["task"]) for item in meta["checkpoints"]] == [("ema", "b")]
    assert meta["asked"] == 24
    assert len(meta["unreadable"]) == 1
    table = read_table(tmp_path / "out" / "scores" / "eva_x.csv")
    assert table.unsaid == []
