"""Outputs know inputs: what a command would write over is an input, a foreign file or behind a link -> nothing is."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cxrdist import average, ensemble, evaluate, files, preprocess, verify
from cxrdist.bench import __main__ as bench
from cxrdist.errors import UserError
from cxrdist.inference.score import check_folder
from cxrdist.models import convert
from cxrdist.models.weights.safetensors import write_safetensors
from cxrdist.scoring.tables import ScoreTable, TableMeta, write_table
from cxrdist.shards.index import open_index
from cxrdist.steps import Step, run_steps
from cxrdist.task import TASKS

pytestmark = pytest.mark.fast

TASK = TASKS["b"]
NAMES = [f"{number:08d}_001_001.jpg" for number in range(8)]


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    """Two score tables, their labels and a template, in one folder."""
    folder, rng = tmp_path / "tables", np.random.default_rng(0)
    for member in ("a", "b"):
        probs = rng.random((len(NAMES), TASK.num_labels), dtype=np.float32)
        meta = TableMeta(member=member, task=TASK, split="test", shards="x")
        write_table(folder / f"{member}.csv", ScoreTable(np.array(NAMES, dtype=object), probs, meta))
    targets = [[str((row + k) % 2) for k in range(TASK.num_labels)] for row in range(len(NAMES))]
    for name, about in (("truth", ("Patient_ID", "Study")), ("template", ())):
        rows = [[image, *image.split("_")[: len(about)], *cells] for image, cells in zip(NAMES, targets, strict=True)]
        lines = [",".join(cells) for cells in (["Image_name", *about, *TASK.labels], *rows)]
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")
    return folder


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".cxrdist"}


def flags_of(tables: Path, *more: str) -> list[str]:
    return ["--scores", str(tables / "a.csv"), str(tables / "b.csv"), *more]


@pytest.mark.parametrize("out", ["a.csv", "a.json", "b.csv", "template.csv", "x.json", "other/../b.csv", "hard.csv"])
@pytest.mark.parametrize("template", [False, True])
def test_an_ensemble_is_not_written_over_its_inputs(tables: Path, out: str, template: bool) -> None:
    (tables / "other").mkdir()
    os.link(tables / "b.csv", tables / "hard.csv")
    before = everything(tables)
    more = ["--template", str(tables / "template.csv")] if template else []
    with pytest.raises(UserError, match=r"--out .*(is an input|name it \.csv|is there, and is not)"):
        ensemble.main(flags_of(tables, *more, "--out", str(tables / out)))
    assert everything(tables) == before


def test_the_labels_of_a_fit_are_an_input(tables: Path) -> None:
    fitted = ["--fit", str(tables / "a.csv"), str(tables / "b.csv"), "--csv", str(tables / "truth.csv")]
    with pytest.raises(UserError, match=r"truth\.csv: is an input"):
        ensemble.main(flags_of(tables, *fitted, "--out", str(tables / "truth.csv")))


def test_what_cxrdist_wrote_is_replaced_and_what_was_changed_since_is_not(tables: Path) -> None:
    out = tables / "submission.csv"
    flags = flags_of(tables, "--template", str(tables / "template.csv"), "--out", str(out))
    ensemble.main(flags)
    first = out.read_bytes()
    ensemble.main([*flags, "--weights", "3", "1"])
    assert out.read_bytes() != first
    out.write_bytes(first)  # as cxrdist wrote it, earlier
    ensemble.main(flags)
    out.write_text("mine")
    with pytest.raises(UserError, match=r"is there, and is not as cxrdist wrote it.*move it away"):
        ensemble.main(flags)
    assert out.read_text() == "mine"


def test_an_evaluation_does_not_replace_a_foreign_page_or_follow_a_link(tables: Path, tmp_path: Path) -> None:
    flags = flags_of(tables, "--csv", str(tables / "truth.csv"), "--resamples", "2", "--out")
    out = tmp_path / "report"
    out.mkdir()
    (out / "report.html").write_text("mine")
    with pytest.raises(UserError, match=r"report\.html: is there"):
        evaluate.main([*flags, str(out)])
    (out / "report.html").unlink()
    (tmp_path / "victim").write_text("mine")
    (out / "metrics.json").symlink_to(tmp_path / "victim")
    with pytest.raises(UserError, match=r"metrics\.json: is a symbolic link"):
        evaluate.main([*flags, str(out)])
    (out / "metrics.json").unlink()
    evaluate.main([*flags, str(out)])
    evaluate.main([*flags, str(out)])  # over its own
    assert (tmp_path / "victim").read_text() == "mine"


def test_the_outputs_of_inference_are_no_inputs_links_or_foreign_files(tmp_path: Path) -> None:
    out, victim = tmp_path / "out", tmp_path / "victim"
    victim.mkdir()
    with pytest.raises(UserError, match=r"submission\.csv: is an input"):
        check_folder(out, ["m"], [out / "submission.csv", None])
    with pytest.raises(UserError, match="lies in an input folder"):
        check_folder(victim / "scores", ["m"], [victim])
    out.mkdir()
    for name in ("scores", "parts"):
        (out / name).symlink_to(victim)
        with pytest.raises(UserError, match=f"{name}: is a symbolic link"):
            check_folder(out, ["m"], [])
        (out / name).unlink()
    (out / "scores").mkdir()
    (out / "scores" / "m.csv").write_text("mine")
    with pytest.raises(UserError, match=r"m\.csv: is there"):
        check_folder(out, ["m"], [])


@pytest.mark.parametrize("kind", ["foreign", "link", "pipe", "folder", "among the shards"])
def test_a_page_a_benchmark_and_converted_weights_are_written_to_new_or_own_files_only(
    kind: str, uneven_shards: Path, tmp_path: Path
) -> None:
    victim, source = tmp_path / "victim", tmp_path / "in.safetensors"
    victim.write_text("mine")
    write_safetensors(source, {"x": torch.zeros(1)})
    folder = uneven_shards if kind == "among the shards" else tmp_path
    page, table, weights = folder / "look.html", tmp_path / "rows.json", tmp_path / "w.safetensors"
    for path in (page, table, weights):
        match kind:
            case "foreign":
                path.write_text("mine")
            case "link":
                path.symlink_to(victim)
            case "pipe":
                os.mkfifo(path)
            case "folder":
                path.mkdir()
    with pytest.raises(UserError, match=r"--report .*look\.html"):
        verify.main(["--shards", str(uneven_shards), "--report", str(page)])
    if kind != "among the shards":
        with pytest.raises(UserError, match=r"--json .*rows\.json"):
            bench.main(["views", "--json", str(table)])
        with pytest.raises(UserError, match=r"--out .*w\.safetensors"):
            convert.main([str(source), "--out", str(weights)])
    with pytest.raises(UserError, match="is an input"):
        convert.main([str(source), "--out", str(source)])
    assert victim.read_text() == "mine"


def test_average_names_an_out_that_is_a_file_or_holds_something(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for out, told in ((tmp_path / "file", "not a folder"), (tmp_path, "not empty")):
        with pytest.raises(UserError, match=told):
            average.main(["--from", f"{tmp_path / 'run'}@1,2", "--out", str(out)])


def test_the_demo_removes_and_replaces_only_what_its_stamps_say(tmp_path: Path) -> None:
    def draw() -> None:
        (tmp_path / "runs").mkdir()
        (tmp_path / "runs" / "done").touch()

    def step(text: str) -> list[Step]:
        return [
            Step(
                name="s",
                words=(),
                call=draw,
                inputs=(text,),
                results=(tmp_path / "runs/done",),
                folder=tmp_path / "runs",
            )
        ]

    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").touch()
    with pytest.raises(UserError, match=r"no .* says that this command made it"):
        run_steps(step("one"), tmp_path)
    (tmp_path / "runs").rename(tmp_path / "kept")
    run_steps(step("one"), tmp_path)
    run_steps(step("two"), tmp_path)  # another input: made again
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["done"]


def run(images: Path, table: Path, out: Path, *more: str) -> None:
    preprocess.main(
        ["--images", str(images), "--csv", str(table), "--task", "b", "--out", str(out), "--workers", "1", *more]
    )


def test_preprocessing_leaves_foreign_files_alone_or_refuses(make_division: Any, tmp_path: Path) -> None:
    images, table = make_division([f"{number}.jpg" for number in range(4)])
    out = tmp_path / "out"
    out.mkdir()
    others = ["train-backup.tar", "train-01.tar", "train.csv", ".train.notes.tmp", "test-000000.tar", "mine.json"]
    for name in others:
        (out / name).write_text("mine")
    for name in ("train-000000.tar", "train-000099.tar", "train.index.arrow", "train.index.csv", "train.json"):
        (out / name).write_text("mine")
        with pytest.raises(UserError, match=f"{name}: is named as a file of split 'train', but no record"):
            run(images, table, out, "--overwrite")
        (out / name).unlink()
    for name in ("train.json", ".train.work"):
        (out / name).symlink_to(images)
        with pytest.raises(UserError, match="is a symbolic link"):
            run(images, table, out)
        (out / name).unlink()
    run(images, table, out, "--rows-per-shard", "1")
    run(images, table, out, "--rows-per-shard", "3", "--overwrite")
    assert {name: (out / name).read_text() for name in others} == dict.fromkeys(others, "mine")
    assert sorted(path.name for path in out.glob("train-0*.tar")) == [
        "train-000000.tar",
        "train-000001.tar",
        "train-01.tar",
    ]
    assert len(open_index(out, "train", TASK)) == 4
    (out / "train-000007.tar").write_text("mine")  # as a copy that a user made
    with pytest.raises(UserError, match=r"train-000007\.tar: is named"):
        run(images, table, out, "--rows-per-shard", "1", "--overwrite")


def test_an_overwrite_that_was_interrupted_still_knows_what_is_its_own(
    make_division: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, table = make_division([f"{number}.jpg" for number in range(4)])
    out = tmp_path / "out"
    run(images, table, out, "--rows-per-shard", "1")
    index = json.loads((out / "train.json").read_text())["index"]["name"]
    (out / index).write_bytes(b"damaged")  # so that the JSON alone says what there is
    real = files.replace

    def killed(temporary: Path, path: Path) -> None:
        real(temporary, path)
        if path.name == "train-000000.tar":
            raise KeyboardInterrupt

    monkeypatch.setattr(files, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        run(images, table, out, "--rows-per-shard", "2", "--overwrite")
    monkeypatch.setattr(files, "replace", real)
    run(images, table, out, "--rows-per-shard", "2")
    assert sorted(path.name for path in out.iterdir()) == [
        *("train-000000.tar", "train-000001.tar", "train.index.arrow", "train.json")
    ]


def test_a_file_is_known_as_cxrdists_own_wherever_its_writer_is_killed(tmp_path: Path, monkeypatch: Any) -> None:
    out = tmp_path / "x.csv"
    files.write_output(out, "one")
    with monkeypatch.context() as patched:
        patched.setattr(files, "write_atomically", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            files.write_output(out, "two")
    files.check_outputs([out])
    files.write_output(out, "two")
    with (tmp_path / files.RECORD_FILE).open("ab") as record:
        record.write(b"half of a li")
    files.write_output(out, "three")
    files.check_outputs([out])
    out.rename(tmp_path / "y.csv")
    with pytest.raises(UserError, match="is not as cxrdist wrote it"):
        files.check_outputs([tmp_path / "y.csv"])
    (tmp_path / files.RECORD_FILE).unlink()
    (tmp_path / files.RECORD_FILE).symlink_to(tmp_path / "y.csv")
    with pytest.raises(UserError, match=r"\.cxrdist: is a symbolic link"):
        files.write_output(out, "four")
    assert (tmp_path / "y.csv").read_text() == "three"
