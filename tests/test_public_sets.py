"""Public sets in small, each in its published form, through the command that the README gives for it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cxrdist import evaluate, preprocess
from cxrdist.shards.index import ShardIndex, open_index, splits_in
from cxrdist.task import TASKS

NUM_IMAGES = 24
NAN = float("nan")


class Set(NamedTuple):
    """Flags for `preprocess` beside --task, and what they must store: per split and image (patient, study, cells)."""

    flags: tuple[str | Path, ...]
    expected: dict[str, dict[str, tuple[str, str, dict[str, float]]]]


def draw(path: Path, number: int) -> None:
    """A bright oval, as large as `number` says, on noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[-1:1:44j, -1:1:40j]
    noise = np.random.default_rng(number).integers(0, 90, (44, 40))
    oval = 140 * (x**2 + y**2 < 0.2 + 0.03 * (number % 24))
    Image.fromarray((noise + oval).astype(np.uint8)).save(path)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


def chexpert(root: Path) -> Set:
    """Two tables, a folder each; -1 in every fifth cell of Edema, blanks beside."""
    tables: dict[str, list[dict[str, Any]]] = {"train": [], "valid": []}
    expected: Any = {"train": {}, "valid": {}}
    for n in range(NUM_IMAGES):
        split = "valid" if n % 4 == 3 else "train"
        name = f"CheXpert-v1.0-small/{split}/patient{n // 2:05d}{n % 2}/study{n % 3 + 1}/view1_frontal.jpg"
        draw(root / name, n)
        edema, fracture = ("-1.0" if n % 5 == 0 else "1.0"), ("" if n % 2 else "0.0")
        cells = dict.fromkeys(TASKS["chexpert"].labels, "1.0" if n % 3 else "") | {"Edema": edema, "Fracture": fracture}
        about = {"Path": name, "Sex": "Female", "Age": 60, "Frontal/Lateral": "Frontal", "AP/PA": "PA"}
        tables[split].append(about | cells)
        read = {"Edema": NAN if n % 5 == 0 else 1.0, "Fracture": 0.0, "Pneumonia": float(n % 3 > 0)}
        expected[split][name] = (f"patient{n // 2:05d}{n % 2}", f"study{n % 3 + 1}", read)
    folder = root / "CheXpert-v1.0-small"
    csvs = [write(folder / f"{split}.csv", rows) for split, rows in tables.items()]
    return Set(("--images", folder / "train", folder / "valid", "--csv", *csvs), expected)


def mimic(root: Path) -> Set:
    """Three tables; two images a study; the first study's Edema is -1."""
    labels, about, splits = [], [], []
    expected: Any = {}
    for n in range(NUM_IMAGES):
        subject, study, dicom = str(10000000 + n // 4), str(50000000 + n // 2), f"{n:08x}-0"
        split = ("train", "validate", "test")[n // 4 % 3]
        name = f"files/p{subject[:2]}/p{subject}/s{study}/{dicom}.jpg"
        draw(root / name, n)
        about.append({"dicom_id": dicom, "subject_id": subject, "study_id": study, "ViewPosition": "AP"})
        splits.append({"dicom_id": dicom, "study_id": study, "subject_id": subject, "split": split})
        if n % 2 == 0:
            cells = dict.fromkeys(TASKS["mimic"].labels, "") | {"Edema": "-1.0" if n == 0 else "1.0"}
            labels.append({"subject_id": subject, "study_id": study} | cells)
        expected.setdefault(split.replace("validate", "valid"), {})[name] = (
            *(subject, study),
            {"Edema": NAN if n < 2 else 1.0, "Fracture": 0.0},
        )
    for kind, rows in (("metadata", about), ("split", splits), ("chexpert", labels)):
        csv = write(root / f"mimic-cxr-2.0.0-{kind}.csv.gz", rows)
    return Set(("--images", root, "--csv", csv), expected)


def nih(root: Path) -> Set:
    """images_001/images/ and images_002/images/, and the two official lists."""
    rows, expected = [], {"train": {}, "test": {}}  # type: ignore[var-annotated]
    for n in range(NUM_IMAGES):
        name, split = f"{n // 2:08d}_{n % 2:03d}.png", "test" if n // 2 % 3 == 2 else "train"
        draw(root / f"images_{n // 12 + 1:03d}" / "images" / name, n)
        rows.append({"Image Index": name, "Finding Labels": "Effusion|Mass" if n % 2 else "No Finding",
                     "Follow-up #": n % 2, "Patient ID": n // 2, "Patient Age": "058Y", "Patient Gender": "F",
                     "View Position": "PA"})  # fmt: skip
        expected[split][name] = (str(n // 2), str(n % 2), {"Mass": float(n % 2), "Edema": 0.0})
    for split, file in (("train", "train_val_list.txt"), ("test", "test_list.txt")):
        (root / file).write_text("\n".join(expected[split]))
    return Set(("--images", root, "--csv", write(root / "Data_Entry_2017_v2020.csv", rows)), expected)


def padchest(root: Path) -> Set:
    """Images in numbered folders that the table names apart; every sixth row without a list of labels."""
    rows, expected = [], {}
    for n in range(NUM_IMAGES):
        name = f"{n}_{n:08d}.png"
        draw(root / str(n % 3) / name, n)
        labels = "" if n % 6 == 0 else "['normal']" if n % 2 else "[' pneumonia', 'cardiomegaly']"
        rows.append({"ImageID": name, "ImageDir": n % 3, "StudyDate_DICOM": 20140915, "StudyID": f"S{n // 2}",
                     "PatientID": f"P{n // 2}", "PatientBirth": "1950.0", "PatientSex_DICOM": "M", "Projection": "PA",
                     "Labels": labels})  # fmt: skip
        cells = dict.fromkeys(("pneumonia", "cardiomegaly"), NAN if n % 6 == 0 else float(n % 2 == 0))
        expected[name] = (f"P{n // 2}", f"S{n // 2}", cells)
    csv = write(root / "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv.gz", rows)
    return Set(("--images", root, "--csv", csv), {"train": expected})


def vindr(root: Path) -> Set:
    """PhysioNet's form: three readers in training, of whom one or two say ILD; the consensus in the test set."""
    train, test = [], []
    expected: Any = {"train": {}, "test": {}}
    for n in range(NUM_IMAGES):
        name, split = f"{n:032x}", "test" if n % 4 == 3 else "train"
        draw(root / split / f"{name}.png", n)
        rows = test if split == "test" else train
        for reader in range(1 if split == "test" else 3):
            cells = dict.fromkeys(TASKS["vindr"].labels, 0) | {"ILD": int(reader <= n % 2)}
            rows.append({"image_id": name} | ({"rad_id": f"R{reader}"} if split == "train" else {}) | cells)
        ild = 1.0 if split == "test" else float(n % 2)  # 1 or 2 of 3
        expected[split][name] = (name, "", {"ILD": ild, "Atelectasis": 0.0})
    csvs = [write(root / f"image_labels_{split}.csv", rows) for split, rows in {"train": train, "test": test}.items()]
    return Set(("--images", root / "train", root / "test", "--csv", *csvs), expected)


def stored(index: ShardIndex) -> dict[str, tuple[str, str, dict[str, float]]]:
    assert index.targets is not None
    cells = [dict(zip(index.task.labels, row, strict=True)) for row in index.targets[:].tolist()]
    return dict(zip(index.image_names, zip(index.patients, index.studies, cells, strict=True), strict=True))


def make(form: str, read: Callable[[Path], Set], folder: Path) -> tuple[Path, Set]:
    given = read(folder / "source")
    out = folder / "shards" / form
    preprocess.main(["--task", form, *map(str, given.flags), "--out", str(out), "--workers", "1"])
    return out, given


@pytest.mark.parametrize(
    ("form", "read"), [(function.__name__, function) for function in (chexpert, mimic, nih, padchest, vindr)]
)
def test_a_public_set_becomes_shards_in_one_command(
    form: str, read: Callable[[Path], Set], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, given = make(form, read, tmp_path)
    assert set(splits_in(out)) == set(given.expected)
    printed = capsys.readouterr().out
    for split, images in given.expected.items():
        index = open_index(out, split)
        assert index.task.name == form
        found = stored(index)
        assert list(found) == list(images)
        for name, (patient, study, cells) in images.items():
            assert found[name][:2] == (patient, study)
            assert {label: found[name][2][label] for label in cells} == pytest.approx(cells, nan_ok=True)
        assert f"{len(images)} rows = {len(images)} images stored + 0 left out" in printed
    assert ("no patient is known" in printed) == (form == "vindr")  # which is published without patients
    assert "--patient-column" not in printed  # a flag that these tasks refuse


def launch(module: str, *flags: str | Path) -> str:
    """An entry on two gloo processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", module]
    done = subprocess.run(
        [*command, *map(str, flags)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


SMALL = [f"--set={field}" for field in ("image_size=32", "model_kwargs=depth=2", "global_batch_size=8", "epochs=2")]


@pytest.mark.slow
def test_chexpert_with_masked_cells_trains_scores_and_evaluates_without_another_table(tmp_path: Path) -> None:
    shards, _ = make("chexpert", chexpert, tmp_path)
    run, out = tmp_path / "run", tmp_path / "out"
    common = ("--shards", shards, "--precision", "fp32")
    start = ("--model", "demo_eva_x", "--init", "random", "--wandb", "off", "--threads", "1")
    said = launch("cxrdist.train", *common, *start, *SMALL, "--out", run)
    assert "validation: 6 images of split valid" in said
    assert "epoch 2/2: train loss" in said
    launch("cxrdist.infer", *common, "--split", "valid", "--member", f"eva={run}:plain", "--out", out)
    table = out / "scores" / "eva.csv"
    evaluate.main(["--scores", str(table), "--shards", str(shards), "--resamples", "20", "--out", str(tmp_path / "r")])
    scores = json.loads((tmp_path / "r" / "metrics.json").read_text())
    assert (scores["num_images"], scores["num_patients"]) == (6, 6)
    observed = dict(zip(scores["labels"], scores["observed"], strict=True))
    assert (observed["Edema"], observed["Pneumonia"]) == (5, 6)  # image 15 of n % 4 == 3 is uncertain of Edema
    assert "positives of observed" in (tmp_path / "r" / "report.html").read_text()
