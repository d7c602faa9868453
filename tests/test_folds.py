"""`cxrdist folds`: whoever trained it, a row of the table is of the model that did not see the patient."""

import csv
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cxrdist import folds, infer, recipes, steps, train
from cxrdist.errors import UserError
from cxrdist.recipes import Inference, Recipe
from cxrdist.scoring.tables import read_table
from cxrdist.shards.index import open_index

MODULES = {"train": train, "infer": infer}


def tiny(task: str) -> Recipe:
    return dataclasses.replace(
        recipes.demo_eva_x(task),
        name="tiny",
        image_size=32,
        epochs=1,
        model_kwargs=(("depth", 2), ("embed_dim", 24), ("num_heads", 2)),
        inference=Inference(views=("plain", "hflip"), member_epochs=(1,)),
    )


class Office:
    """Runs the commands of steps in this process and keeps a list of them; `break_at` is interrupted in its epoch."""

    def __init__(self, shards: Path, folder: Path) -> None:
        self.shards, self.folder = shards, folder
        self.commands: list[list[str]] = []
        self.break_at = ""

    def run_command(self, name: str, words: list[str]) -> None:
        self.commands.append(words)
        command, flags = words[1], words[2:]
        if name == self.break_at:
            MODULES[command].main([*flags, "--max-steps", "1"])
            raise KeyboardInterrupt
        MODULES[command].main(flags)

    def folds(self, out: str, *more: str) -> list[str]:
        """The kinds of commands that a call runs, with their folds."""
        self.commands.clear()
        words = ["--model", "tiny", "--task", "b", "--shards", str(self.shards), "--init", "random", "--folds", "3"]
        speed = ["--precision", "fp32", "--threads", "1", "--wandb", "off"]
        folds.main([*words, *speed, "--out", str(self.folder / out), *more])
        return self.done()

    def done(self) -> list[str]:
        number = {"train": "--validate-fold", "infer": "--fold"}
        kinds = [words[1] for words in self.commands]
        return [f"{kind} {w[w.index(number[kind]) + 1]}" for kind, w in zip(kinds, self.commands, strict=True)]


@pytest.fixture
def office(uneven_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Office:
    torch.set_num_threads(1)
    for name in ("SLURM_ARRAY_TASK_ID", "CXRDIST_ACCEL_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CXRDIST_PROCESSES", "1")
    monkeypatch.setitem(recipes.RECIPES, "tiny", tiny)
    monkeypatch.setattr(folds, "stop_as_interrupted", lambda: None)
    found = Office(uneven_shards, tmp_path)
    monkeypatch.setattr(steps, "run_command", found.run_command)
    return found


ALL = [f"{kind} {fold}" for fold in range(3) for kind in ("train", "infer")]


def test_every_image_has_the_score_of_the_model_that_did_not_see_its_patient(office: Office, tmp_path: Path) -> None:
    assert office.folds("out") == ALL
    trainings = [words for words in office.commands if words[1] == "train"]
    assert [words[words.index("--group") + 1] for words in trainings] == ["out"] * 3, "together on a dashboard"
    table, index = read_table(tmp_path / "out" / "tiny.csv"), open_index(office.shards, "train")
    assert table.image_names.tolist() == index.image_names.to_list()
    assert table.meta.out_of_fold
    assert [item.source.rpartition("/")[2] for item in table.meta.checkpoints] == [
        f"tiny_b_fold{k}@1" for k in range(3)
    ]
    held_out = set()
    for fold in range(3):
        run = tmp_path / "out" / f"tiny_b_fold{fold}"
        with (run / "split.csv").open() as file:
            patients = {row["patient"] for row in csv.DictReader(file) if row["fold"] == str(fold)}
        single = [
            "--shards",
            str(office.shards),
            "--split",
            "train",
            "--precision",
            "fp32",
            "--out",
            str(tmp_path / "x"),
        ]
        infer.main([*single, "--member", f"tiny={run}@1"])
        rows = np.array([name in patients for name in index.patients.to_list()])
        np.testing.assert_allclose(
            table.probs[rows], read_table(tmp_path / "x" / "scores" / "tiny.csv").probs[rows], rtol=0, atol=1e-6
        )
        assert not held_out & patients
        held_out |= patients
    assert len(held_out) == 6
    assert office.folds("out") == []
    assert office.folds("out", "--threads", "2", "--log-every", "1") == []  # change nothing that is learned


def test_tasks_of_an_array_make_the_table_that_one_call_makes_and_the_last_one_joins(
    office: Office, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    office.folds("one")
    wanted = (tmp_path / "one" / "tiny.csv").read_bytes()
    for fold in (2, 0, 1):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(fold))
        assert office.folds("array") == [f"train {fold}", f"infer {fold}"]
        assert (tmp_path / "array" / "tiny.csv").exists() == (fold == 1)
    assert "joined by the command that does the last of: train fold 1, score fold 1" in capsys.readouterr().out
    assert (tmp_path / "array" / "tiny.csv").read_bytes() == wanted
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    with pytest.raises(UserError, match=r"fold 3 is not possible.*0 to 2"):
        office.folds("array")
    (tmp_path / "array" / "tiny.csv").unlink()
    monkeypatch.setenv("CXRDIST_PROCESSES", "7")  # as on another machine: only joined
    assert office.folds("array", "--only", "all") == []
    assert (tmp_path / "array" / "tiny.csv").read_bytes() == wanted


def test_an_interrupted_fold_resumes_and_a_change_repeats_only_what_depends_on_it(
    office: Office, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    office.break_at = "train fold 1"
    with pytest.raises(KeyboardInterrupt):
        office.folds("out")
    office.break_at = ""
    assert office.folds("out") == ALL[2:]
    assert "--resume" in office.commands[0]
    assert "--resume" not in office.commands[2]
    first = (tmp_path / "out" / "tiny.csv").read_bytes()
    assert office.folds("out", "--set", "views=plain") == ["infer 0", "infer 1", "infer 2"]
    assert (tmp_path / "out" / "tiny.csv").read_bytes() != first
    assert office.folds("out", "--set", "ema_decay=0.5", "--only", "0") == ALL[:2]
    (earlier,) = (tmp_path / "out").glob("tiny_b_fold0_until_*")
    assert f"the earlier one is {earlier}" in capsys.readouterr().out
    assert (earlier / "recipe.json").exists()


@pytest.mark.fast
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--validate-fold", "1"], "--validate-fold is of one training.*--only K"),
        (["--resume"], "--resume is of one training.*resumed without it"),
        (["--only", "5"], "fold 5 is not possible.*0 to 2"),
        (["--member", "a b"], "a name has letters"),
        (["--set", "epoch=1"], "no such recipe field"),
        (["--init", "nowhere.safetensors"], "there is no such file"),
        (["--model", "nothing"], "'nothing' is unknown"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(
    office: Office, tmp_path: Path, more: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        office.folds("out", *more)
    assert not (tmp_path / "out").exists()


@pytest.mark.fast
def test_a_mistyped_flag_is_named_by_trainings_own_parser(office: Office, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        office.folds("out", "--presision", "fp32")
    assert "did you mean --precision?" in capsys.readouterr().err


@pytest.mark.fast
def test_a_fold_that_another_command_works_on_is_left_alone(office: Office, tmp_path: Path, monkeypatch: Any) -> None:
    def meet(name: str, words: list[str]) -> None:
        monkeypatch.setattr(steps, "run_command", office.run_command)
        with pytest.raises(UserError, match=r"fold 1 in .* is worked on by another command"):
            office.folds("out", "--only", "1")
        raise KeyboardInterrupt

    monkeypatch.setattr(steps, "run_command", meet)
    with pytest.raises(KeyboardInterrupt):
        office.folds("out", "--only", "1")
    assert office.commands == []


def test_scoring_streams_where_training_does_and_else_reads_the_copy():
    streaming = ("--shards-url", "s3://bucket/x", "--cache", "c", "--cache-gb", "5")
    assert folds.words_for_infer((*streaming, "--seed", "1")) == [*streaming]
    assert folds.words_for_infer(streaming[:2]) == []
