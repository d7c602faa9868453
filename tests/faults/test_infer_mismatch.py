"""FAULTS rows 23 (inference half) and 36: what does not belong together is named before anything is computed."""

import dataclasses
import io
import json
import shutil
import tarfile

import numpy as np
import pandas as pd
import pytest

from cxrdist import ensemble, evaluate
from cxrdist.errors import UserError
from cxrdist.files import folder_lock
from cxrdist.recipes import from_json, to_json
from cxrdist.runs.checkpoint import read_tensors, write_checkpoint
from cxrdist.runs.documents import EpochMeta, read_versioned
from cxrdist.scoring.tables import ScoreTable, TableMeta, read_table, write_table
from cxrdist.task import TASKS

pytestmark = pytest.mark.fault
LABELS = TASKS["b"].labels
SWAPPED = (LABELS[1], LABELS[0], *LABELS[2:])


def edit_task(path, **changes):
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"task": content["task"] | changes}))


@pytest.fixture
def shards(world, tmp_path):
    shutil.copytree(world.shards, tmp_path / "shards")
    return tmp_path / "shards"


def test_shards_of_another_task_or_other_label_order_are_named(world, shards, tmp_path):
    for changes, message in (
        ({"name": "a"}, r"holds split 'test' of another task \(task b and a\)"),
        ({"labels": SWAPPED}, f"label 1: {LABELS[0]!r} and {LABELS[1]!r}"),
    ):
        edit_task(shards / "test.json", **changes)
        with pytest.raises(UserError, match=message):
            world.run(tmp_path / "out", shards=shards)
        shutil.copy(world.shards / "test.json", shards / "test.json")
    assert not (tmp_path / "out").exists()


def test_reordered_members_of_a_tar_are_named_and_not_scored_as_other_images(world, shards, tmp_path):
    tar = shards / "test-000001.tar"
    with tarfile.open(tar) as file:
        names = file.getnames()
        samples = [[(file.getmember(name), file.extractfile(name).read()) for name in names[i : i + 2]] for i in (0, 2)]
        rest = [(file.getmember(name), file.extractfile(name).read()) for name in names[4:]]
    size = tar.stat().st_size
    with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as file:
        for member, content in [*samples[1], *samples[0], *rest]:
            file.addfile(member, io.BytesIO(content))
    content = tar.read_bytes().rstrip(b"\0")
    tar.write_bytes(content.ljust(size, b"\0"))
    with pytest.raises(UserError, match=r"test-000001\.tar: damaged: member .* instead of"):
        world.run(tmp_path / "out", shards=shards)
    assert not (tmp_path / "out").exists()


def test_a_second_inference_does_not_mix_its_files_into_a_folder_in_use(world, tmp_path):
    with folder_lock(tmp_path / "out"):
        with pytest.raises(UserError, match="in use by another run"):
            world.run(tmp_path / "out")
        assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


def test_a_run_of_another_task_or_with_swapped_outputs_is_named(world, infer_world, tmp_path):
    recipe = from_json((world.eva_x / "recipe.json").read_text())
    other = infer_world.make_run(tmp_path / "other", recipe, task=TASKS["a"])
    with pytest.raises(UserError, match=r"other@1 was trained for another task than the shards' \(task b and a\)"):
        world.run(tmp_path / "out", members=["--member", f"x={other}@1"])
    swapped = infer_world.make_run(tmp_path / "swapped", recipe, task=dataclasses.replace(TASKS["b"], labels=SWAPPED))
    with pytest.raises(UserError, match=f"swapped@1 was trained .*label 1: {LABELS[0]!r} and {LABELS[1]!r}"):
        world.run(tmp_path / "out", members=["--member", f"x={swapped}@1"])
    assert not (tmp_path / "out").exists()


def test_a_recipe_that_does_not_fit_the_weights_is_named(world, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(world.chexfound, run)
    recipe = from_json((run / "recipe.json").read_text())
    sizes = dict(recipe.model_kwargs) | {"decoder_dim": 64}
    (run / "recipe.json").write_text(to_json(dataclasses.replace(recipe, model_kwargs=tuple(sorted(sizes.items())))))
    with pytest.raises(UserError, match="does not fit the model"):
        world.run(tmp_path / "out", members=["--member", f"x={run}@1"])
    assert not (tmp_path / "out").exists()


def test_a_template_of_other_images_and_an_epoch_that_is_not_there_are_named(world, tmp_path):
    template = tmp_path / "template.csv"
    template.write_text(world.template.read_text().replace("00000003_", "00700003_"))
    with pytest.raises(UserError, match=r"asks for 3 of 24 images that the shards do not hold, e\.g\. '00700003_"):
        world.run(tmp_path / "out", "--template", str(template))
    with pytest.raises(UserError, match="has epochs: 1, 2"):
        world.run(tmp_path / "out", members=["--member", f"x={world.eva_x}@1,3"])
    assert not (tmp_path / "out").exists()


def test_weights_that_produce_non_finite_scores_are_named_and_no_table_is_written(world, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(world.eva_x, run)
    folder = run / "checkpoints" / "epoch_02"
    weights = read_tensors(folder, "ema")
    weights["head.bias"][3] = float("nan")
    write_checkpoint(folder, {"ema": weights}, {"meta": read_versioned(EpochMeta, folder / "meta.json")})
    with pytest.raises(UserError, match=r"run@2 produces non-finite scores for 23 images, e\.g\. .*view plain, fp32"):
        world.run(tmp_path / "out", members=["--member", f"x={run}@1,2"])
    assert not (tmp_path / "out" / "scores").exists()
    assert not (tmp_path / "out" / "submission.csv").exists()


def test_one_process_where_two_were_asked_for_is_named_at_once(world, tmp_path):
    with pytest.raises(UserError, match="1 processes were started, 2 expected"):
        world.run(tmp_path / "out", "--expect-processes", "2")
    assert not (tmp_path / "out").exists()


def test_two_ranks_name_a_mismatch_once(world, tmp_path):
    result = world.launch(tmp_path / "out", "--div", "a")
    assert result.returncode != 0
    named = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert len(named) == 1, result.stderr
    assert "holds split 'test' of another task (task a and b)" in named[0]
    assert "infer.py" not in result.stderr, "no traceback of ours"
    assert not (tmp_path / "out").exists()


@pytest.fixture
def tables(tmp_path):
    """Two tables over the same five images, and a template of them."""
    names = np.array([f"{i:08d}_001_001.jpg" for i in range(5)], dtype=object)
    rng = np.random.default_rng(0)
    for member in ("one", "two"):
        write_table(
            tmp_path / f"{member}.csv",
            ScoreTable(names, rng.random((5, 14), dtype=np.float32), TableMeta(member=member, task=TASKS["b"])),
        )
    pd.DataFrame({"Image_name": names} | dict.fromkeys(LABELS, 0)).to_csv(tmp_path / "template.csv", index=False)
    return tmp_path


def average(folder):
    scores = [str(folder / "one.csv"), str(folder / "two.csv")]
    ensemble.main(["--scores", *scores, "--template", str(folder / "template.csv"), "--out", str(folder / "final.csv")])


def test_members_with_another_label_order_are_named_and_not_averaged(tables):
    frame = pd.read_csv(tables / "two.csv", dtype=str)
    frame[["image_name", *SWAPPED]].to_csv(tables / "two.csv", index=False)
    with pytest.raises(UserError, match=r"two\.csv: column 2 is 'Cardiomegaly' where 'Atelectasis' belongs"):
        average(tables)
    frame.columns = ["image_name", *SWAPPED]
    frame.to_csv(tables / "two.csv", index=False)
    with pytest.raises(UserError, match=r"two\.csv: column 2 is 'Cardiomegaly'"):
        average(tables)
    assert not (tables / "final.csv").exists()


def test_members_with_other_images_are_named_and_not_averaged(tables):
    two = read_table(tables / "two.csv")
    two.image_names[3] = "00000077_001_001.jpg"
    write_table(tables / "two.csv", two)
    with pytest.raises(
        UserError, match=r"'one' and 'two' hold different images: 1 missing and 1 extra.*00000003_001_001"
    ):
        average(tables)
    with pytest.raises(UserError, match="hold different images"):
        evaluate.main(
            ["--scores", str(tables / "one.csv"), str(tables / "two.csv"), "--csv", "x", "--out", str(tables)]
        )
    assert not (tables / "final.csv").exists()


def test_a_table_whose_cells_were_changed_by_hand_is_named(tables):
    lines = (tables / "two.csv").read_text().splitlines()
    first, second = lines[1].split(",", 1), lines[2].split(",", 1)
    lines[1], lines[2] = f"{first[0]},{second[1]}", f"{second[0]},{first[1]}"
    (tables / "two.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match="was changed after it was written"):
        average(tables)
