"""From scores that no model has seen to decisions on a new image, through the commands."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import cxrdist
from cxrdist import calibrate, evaluate, export
from cxrdist.cli import run_entry
from cxrdist.errors import UserError
from cxrdist.files import write_output
from cxrdist.runs.checkpoint import epoch_folder, read_tensors, write_checkpoint
from cxrdist.runs.documents import EpochMeta, Facts, StoredImages
from cxrdist.scoring.operating import Calibration
from cxrdist.scoring.tables import average_tables, read_table
from cxrdist.shards.index import open_index


@pytest.fixture(scope="module")
def scores(world, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("scored")
    world.run(out)
    return out / "scores"


@pytest.fixture(scope="module")
def truth(world, scores, tmp_path_factory) -> Path:
    """Labels that these random models have something to say of: above the middle score, and three cells not."""
    table = average_tables([read_table(Path(path)) for path in both(scores)])
    labels = (table.probs > np.median(table.probs, axis=0)).astype(int)
    labels[[1, 5, 9]] = 1 - labels[[1, 5, 9]]
    given = pd.read_csv(world.truth, dtype=str).set_index("Image_name").loc[table.image_names]
    given[list(table.labels)] = labels
    path = tmp_path_factory.mktemp("truth") / "truth.csv"
    given.reset_index().to_csv(path, index=False)
    return path


def both(scores: Path) -> list[str]:
    return [str(scores / "eva_x.csv"), str(scores / "chexfound.csv")]


def members(world) -> list[str]:
    return [f"eva_x={world.eva_x}@1,2:tta", f"chexfound={world.chexfound}@1,2"]


@pytest.fixture(scope="module")
def calibrated(world, scores, truth, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("calibrated")
    calibrate.main(["--scores", *both(scores), "--labels", str(truth), "--out", str(out), "--unseen"])
    return out


def test_what_is_fitted_travels_to_the_prediction(world, scores, truth, calibrated, tmp_path) -> None:
    fitted = Calibration.read(calibrated / "calibration.json")
    assert (calibrated / "calibration.html").read_text().count("<table") == 2
    export.main([*members(world), "--out", str(tmp_path / "bundle"), "--calibration", str(calibrated)])
    image = world.shards.parent / "images" / "00000000_001_000.jpg"
    shutil.rmtree(tmp_path / "moved", ignore_errors=True)
    (tmp_path / "bundle").rename(tmp_path / "moved")
    found = cxrdist.load(tmp_path / "moved", precision="fp32").predict(image)
    lines = np.array([(each.slope, each.intercept) for each in fitted.labels])
    odds = np.log(found.probabilities / (1 - found.probabilities)) * lines[:, 0] + lines[:, 1]
    np.testing.assert_allclose(found.calibrated, 1 / (1 + np.exp(-odds)), atol=1e-5)
    np.testing.assert_array_equal(found.decisions == 1, found.calibrated >= fitted.thresholds)
    card = (tmp_path / "moved" / "README.md").read_text()
    assert "thresholds by youden" in card
    same = cxrdist.load(members(world), calibration=calibrated, precision="fp32").predict(image)
    assert same.calibrated.tobytes() == found.calibrated.tobytes()


def test_an_export_over_an_earlier_one_leaves_nothing_of_it(world, scores, truth, calibrated, tmp_path) -> None:
    out = tmp_path / "bundle"
    export.main([*members(world), "--out", str(out), "--calibration", str(calibrated)])
    write_output(out / "checkpoint0.onnx", b"of an earlier export")
    (out / "mine.onnx").write_bytes(b"not of an export")
    export.main([*members(world), "--out", str(out)])
    assert cxrdist.load(out).calibration is None
    assert sorted(path.name for path in out.glob("*.onnx")) == ["mine.onnx"]
    assert not (out / "calibration.json").exists()


def test_a_report_shows_what_the_thresholds_do(world, scores, truth, calibrated, tmp_path) -> None:
    given = ["--scores", *both(scores), "--csv", str(truth), "--resamples", "20"]
    evaluate.main([*given, "--calibration", str(calibrated), "--out", str(tmp_path / "report")])
    page = (tmp_path / "report" / "report.html").read_text()
    assert "Operating points" in page
    with pytest.raises(UserError, match="was fitted on scores of other members"):
        evaluate.main(
            [*given, "--weights", "2", "1", "--calibration", str(calibrated), "--out", str(tmp_path / "other")]
        )
    assert not (tmp_path / "other").exists()


def test_a_calibration_of_other_weights_or_views_is_refused(world, calibrated, tmp_path) -> None:
    for other in (
        [f"eva_x={world.eva_x}@1,2:plain", members(world)[1]],
        [f"eva_x={world.eva_x}@2:tta", members(world)[1]],
        [members(world)[0]],
        [f"{members(world)[0]}*3", members(world)[1]],
    ):
        with pytest.raises(UserError, match="was fitted on scores of other members"):
            cxrdist.load(other, calibration=calibrated)
        with pytest.raises(UserError, match="was fitted on scores of other members"):
            export.main([*other, "--calibration", str(calibrated), "--out", str(tmp_path / "bundle")])
    assert not (tmp_path / "bundle").exists()


def test_scores_of_one_run_are_calibrated_in_its_folder_and_found_there(world, scores, truth, tmp_path) -> None:
    run = tmp_path / "eva_x_b"
    shutil.copytree(world.eva_x, run)
    own = tmp_path / "scores" / "eva_x.csv"
    world.run(tmp_path, members=["--member", f"eva_x={run}@1,2:tta"])
    calibrate.main(["--scores", str(own), "--csv", str(truth), "--unseen", "--threshold", "sensitivity=0.8"])
    image = np.full((40, 50), 100, np.uint8)
    assert cxrdist.load(run).calibration is not None  # the views and epochs of its recipe
    assert cxrdist.load([f"eva_x={run}@1,2:tta"]).predict(image).decisions is not None
    assert cxrdist.load([f"eva_x={run}@1:tta"]).calibration is None
    for flags, kept in (([], True), (["--calibration", "none"], False)):
        export.main([str(run), "--out", str(tmp_path / "bundle"), *flags])
        assert (cxrdist.load(tmp_path / "bundle").calibration is not None) is kept


def trained_run(world, folder: Path, shards: str) -> Path:
    """The small run as one that says on which shards, prepared how, it was trained."""
    shutil.copytree(world.eva_x, folder)
    facts = Facts(
        task="b",
        split="train",
        shards=shards,
        images=23,
        positives={},
        folds=None,
        validate_fold=None,
        stored=StoredImages(size_px=600, fit="squash", mode="exact"),
    )
    for epoch in (1, 2):
        place = epoch_folder(folder, epoch)
        meta, ema = EpochMeta.read(place / "meta.json"), read_tensors(place, "ema")
        write_checkpoint(place, {"ema": ema}, {"meta": dataclasses.replace(meta, data=facts)})
    return folder


def test_scores_of_images_that_were_trained_on_are_refused_whatever_the_user_says(
    world, truth, tmp_path, capsys
) -> None:
    shards = open_index(world.shards, "train").fingerprint
    run = trained_run(world, tmp_path / "run", shards)
    world.run(tmp_path, "--split", "train", members=["--member", f"eva_x={run}@1,2"])
    table = tmp_path / "scores" / "eva_x.csv"
    assert read_table(table).meta.checkpoints[0].trained_on == shards
    command = ["--scores", str(table), "--csv", str(truth), "--unseen"]
    assert run_entry(lambda: calibrate.main(command)) == 2
    assert "was trained on these very images" in capsys.readouterr().err
    assert not (run / "calibration.json").exists()


def test_scores_of_another_split_need_no_word_of_the_user(world, truth, tmp_path) -> None:
    run = trained_run(world, tmp_path / "run", open_index(world.shards, "train").fingerprint)
    world.run(tmp_path, members=["--member", f"eva_x={run}@1,2"])
    calibrate.main(["--scores", str(tmp_path / "scores" / "eva_x.csv"), "--csv", str(truth)])
    assert json.loads((run / "calibration.json").read_text())["split"] == "test"
    assert "prepared as published" not in " ".join(cxrdist.load(run).notes)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--scores", "{eva}", "--unseen"], "give --csv FILE"),
        (["--scores", "{eva}", "--csv", "nowhere.csv", "--unseen", "--out", "{tmp}"], "nowhere.csv"),
        (["--scores", "{eva}", "--csv", "{truth}", "--threshold", "best"], "give youden, f1"),
        (["--scores", "{eva}", "--csv", "{truth}"], "--unseen"),
        (["--scores", "{eva}", "{chexfound}", "--csv", "{truth}", "--unseen"], "give --out DIR"),
        (["--scores", "nowhere.csv", "--csv", "{truth}"], "nowhere.csv"),
        (["--scores", "{bare}", "--csv", "{truth}", "--unseen"], "does not say whose scores it holds"),
    ],
)
def test_a_mistake_is_one_line(arguments, told, world, scores, truth, tmp_path, capsys) -> None:
    shutil.copy(scores / "eva_x.csv", tmp_path / "bare.csv")
    eva, chexfound = both(scores)
    places = {"eva": eva, "chexfound": chexfound, "truth": truth, "tmp": tmp_path, "bare": tmp_path / "bare.csv"}
    texts = [text.format(**places) for text in arguments]
    assert run_entry(lambda: calibrate.main(texts)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert told in lines[0], lines[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare.csv"]
