"""FAULTS rows 46, 51, 56 and 62: what leaves the machine, who a patient is, where a backbone is, how names show."""

import dataclasses
import json
import re
import shutil
import time

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from cxrdist import cli, evaluate
from cxrdist.errors import UserError
from cxrdist.report.sheet import plain
from cxrdist.runs import member, start
from cxrdist.runs.documents import Facts, StepState
from cxrdist.scoring.tables import ScoreTable, TableMeta, write_table
from cxrdist.tables import read_label_csv
from cxrdist.task import TASKS, Columns, Task
from cxrdist.training import tracking
from cxrdist.training.tracking import Tracker

pytestmark = pytest.mark.fast
ODD = ("$x_{$", "<script>alert(1)</script>", "\"quotes\" and 'quotes'", "_hidden", r"\$", "50 % & more")


class Session:
    """A wandb run that keeps what it is given."""

    def __init__(self):
        self.summary, self.rows = {}, []

    def log(self, row):
        self.rows.append(row)

    def finish(self):
        pass


@pytest.mark.parametrize("asked", [False, True])
def test_images_and_their_names_leave_only_when_asked_and_what_is_sent_is_said(tmp_path, monkeypatch, capsys, asked):
    session = Session()
    monkeypatch.setattr(tracking._WandbThread, "_start", lambda *_: session)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "canary")
    with Tracker(tmp_path, wandb_mode="auto", images=asked) as tracker:
        tracker.metrics({"step": 1, "loss": 0.5})
        tracker.images(1, "augmented samples", np.zeros((1, 4, 4), np.uint8), ["00000211_001_001.jpg"])
    said = [line for line in capsys.readouterr().err.splitlines() if "online; sends" in line]
    assert len(said) == 1
    assert ("images with their names" in said[0]) == asked
    assert ("no images and no names of images" in said[0]) != asked
    assert "canary" not in said[0]
    assert any("augmented samples" in row for row in session.rows) == asked


def test_nothing_is_said_or_sent_when_it_is_off(tmp_path, capsys):
    with Tracker(tmp_path, wandb_mode="off") as tracker:
        assert tracker.dashboard is None
    assert capsys.readouterr().err == ""


def test_a_secret_in_a_message_of_the_dashboard_or_of_a_mistyped_flag_is_not_shown(tmp_path, monkeypatch, capsys):
    def fails(*_):
        raise OSError("https://user:secret@wandb.example/graphql: 403")

    monkeypatch.setattr(tracking._WandbThread, "_start", fails)
    with Tracker(tmp_path, wandb_mode="offline"):
        pass
    with pytest.raises(SystemExit):
        cli.Parser(prog="x").parse_args(["https://user:secret@host/shards"])
    shown = capsys.readouterr().err
    assert shown.count("https://***@") == 2
    assert "secret" not in shown


def label_table(folder, task, names, patients):
    frame = pd.DataFrame({task.columns.image: names, task.columns.patient: patients, "Study": "1"})
    for label in task.labels:
        frame[label] = [i % 2 for i in range(len(names))]
    frame.to_csv(folder / "labels.csv", index=False)
    return folder / "labels.csv"


OWN = Task(name="own", labels=("mass",), columns=Columns(image="file", patient="who"))


@pytest.mark.parametrize(
    ("patient", "says"),
    [
        ("\u0660\u0660", "digits other than 0 to 9"),
        ("\uff10\uff10", "digits other"),
        ("P\u200b1", "invisible character"),
    ],
)
def test_a_patient_that_looks_like_another_is_named_with_its_line(tmp_path, patient, says):
    path = label_table(tmp_path, OWN, ["a.png", "b.png"], ["00", patient])
    with pytest.raises(UserError, match=f"line 3: who .* {says}"):
        read_label_csv(path, OWN)


def test_one_patient_in_two_unicode_forms_is_one(tmp_path):
    path = label_table(tmp_path, OWN, ["a.png", "b.png"], ["M\u00fcller", "Mu\u0308ller"])
    assert set(read_label_csv(path, OWN).about["patient"]) == {"M\u00fcller"}


def test_patients_that_contradict_the_names_in_most_rows_are_refused_and_a_few_are_counted(tmp_path):
    task = TASKS["b"]
    names = [f"{i:08d}_001_001.jpg" for i in range(1, 7)]
    shifted = [str(i) for i in range(2, 8)]
    with pytest.raises(UserError, match=r"line 2: Patient_ID is '00000002', .* says '00000001'; so in 6 of 6 rows"):
        read_label_csv(label_table(tmp_path, task, names, shifted), task)
    few = ["1", "2", "3", "4", "5", "77"]
    (note,) = read_label_csv(label_table(tmp_path, task, names, few), task).notes
    assert "line 7: Patient_ID is '00000077'" in note
    assert "1 of 6 rows" in note
    right = [str(i) for i in range(1, 7)]
    assert read_label_csv(label_table(tmp_path, task, names, right), task).notes == ()
    free = dataclasses.replace(task, names="")
    assert read_label_csv(label_table(tmp_path, free, names, shifted), free).notes == ()


@pytest.mark.parametrize("way", ["backbone", "init", "init folder", "beside"])
def test_a_run_copied_to_another_machine_finds_its_backbone_by_content(world, tmp_path, monkeypatch, way):
    run = shutil.copytree(world.chexfound, tmp_path / "copy" / "run")
    (tmp_path / "new").mkdir()
    moved = tmp_path / "new" / "another_name.pth"
    shutil.move(run / member.BACKBONE_FILE, moved)
    recorded = member.load_member(world.chexfound, 1).meta.frozen
    frozen = dataclasses.replace(recorded, file="/of/the/old/machine/backbone.pth")
    monkeypatch.chdir(tmp_path)
    recipe, task = member.read_recipe(run), member.read_task(run)
    facts = Facts(task="b", split="train", shards="", images=1, positives={}, folds=None, validate_fold=None)
    hardware = {"world_size": 1, "device_batch_size": 1, "precision": "fp32"}
    begin = start.Start(run, StepState(data=facts, frozen=frozen, **hardware))
    with pytest.raises(UserError, match=r"backbone .* is not there"):
        start.build(recipe, task, None, run, begin, None)
    init = {"init": f"gone.pth,{moved}", "init folder": str(moved.parent)}.get(way)
    if way == "beside":
        shutil.copy(moved, run / "backbone.pth")
    model, _, _ = start.build(recipe, task, init, run, begin, moved if way == "backbone" else None)
    wanted = member.load_member(world.chexfound, 1).model.state_dict()
    names = member.architecture_of(recipe.model).frozen_names(model)
    assert names
    assert all((model.state_dict()[name] == wanted[name]).all() for name in names)


def test_inference_takes_the_moved_backbone(world, tmp_path):
    run = shutil.copytree(world.chexfound, tmp_path / "run")
    moved = tmp_path / "moved.safetensors"
    shutil.move(run / member.BACKBONE_FILE, moved)
    members = ["--member", f"chexfound={run}@1:plain"]
    with pytest.raises(UserError, match="--backbone FILE"):
        world.run(tmp_path / "out", members=members)
    world.run(tmp_path / "out", "--backbone", str(moved), members=members)
    world.run(tmp_path / "same", members=["--member", f"chexfound={world.chexfound}@1:plain"])
    one, two = ((tmp_path / name / "scores" / "chexfound.csv").read_bytes() for name in ("out", "same"))
    assert one == two


@pytest.mark.parametrize("name", ODD)
def test_matplotlib_draws_a_name_as_it_is(name):
    figure = Figure()
    axis = figure.subplots()
    axis.set_title(plain(name))
    figure.canvas.draw()
    shown, formula = axis.title._preprocess_math(axis.title.get_text())
    assert not formula
    assert shown == name


def test_odd_names_of_members_runs_labels_and_images_are_shown_in_a_report(tmp_path):
    task = dataclasses.replace(OWN, labels=ODD)
    names = [f"{name.replace('/', '').replace(chr(92), '')}{i}.png" for i, name in enumerate(ODD * 4)]
    rng = np.random.default_rng(0)
    files = []
    for number, odd in enumerate(ODD[:4]):
        probs = rng.random((len(names), len(ODD)), dtype=np.float32)
        meta = TableMeta(member=odd, task=task, split="test", shards="s")
        files.append(str(tmp_path / f"{number}.csv"))
        write_table(tmp_path / f"{number}.csv", ScoreTable(np.array(names, dtype=object), probs, meta))
    path = label_table(tmp_path, task, names, [f"P{i // 2}" for i in range(len(names))])
    runs = []
    for number, odd in enumerate(ODD[:4]):
        run = tmp_path / odd.replace("/", "")
        run.mkdir()
        rows = [{"kind": "train", "step": i + 1, "epoch": 1, "loss": 1.0 + number} for i in range(5)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        runs += ["--run", str(run)]
    out = ("--out", str(tmp_path / "report"), "--resamples", "5")
    evaluate.main(["--scores", *files, "--csv", str(path), *runs, *out])
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("<script") == 1, "the page's own"
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert re.search(r"macro AUROC, \$x_\{\$<br>", page)


@pytest.mark.fault
@pytest.mark.timeout(120)
def test_wandb_records_odd_labels_as_they_are_and_neither_images_command_line_nor_user(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")
    row = {"step": 1} | {f"validation/auroc/{label}": 0.5 for label in ODD}
    with Tracker(tmp_path, wandb_mode="offline", config={"recipe": {}}) as tracker:
        tracker.metrics(row)
        tracker.curves(1, "validation/roc", {label: ([0.0, 1.0], [0.0, 1.0]) for label in ODD}, "false positives")
        tracker.images(1, "augmented samples", np.zeros((1, 4, 4), np.uint8), ["00000211_001_001.jpg"])
    assert "stopped" not in capsys.readouterr().err
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    end = time.monotonic() + 60  # wandb writes from a process of its own, which a busy machine lets wait
    while (content := path.read_bytes()) and b"auroc" not in content and time.monotonic() < end:
        time.sleep(0.2)
    time.sleep(1.0)
    content = path.read_bytes()
    for key in row:
        assert key.encode() in content or json.dumps(key)[1:-1].encode() in content, key
    for private in (b"00000211", b"augmented samples", b"pytest"):  # the last one: of the command line
        assert private not in content, private
    assert not list(tmp_path.glob("wandb/offline-run-*/files/media/images"))
