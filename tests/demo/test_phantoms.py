"""The phantom division: names and labels as in the competition; pictures that depend on the seed alone."""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cxrdist.demo.phantoms import LUNG_OPACITY_PARENTS, Study, image_name, render, sample_studies, write_division
from cxrdist.task import COMPETITION_LABELS as LABELS

HEALTHY = Study(7, 1, "Male", 50, frozenset({"No Finding"}), ("PA", "Lateral"))


@pytest.mark.fast
def test_division_has_every_label_in_enough_patients_and_sensible_company() -> None:
    studies = sample_studies(250, 0)
    assert 550 < sum(len(study.views) for study in studies) < 650
    assert len({study.patient for study in studies}) == 250
    for label in LABELS:
        assert len({study.patient for study in studies if label in study.findings}) >= 20, label
    for study in studies:
        assert study.findings <= set(LABELS)
        assert study.findings
        if "No Finding" in study.findings:
            assert study.findings <= {"No Finding", "Support Devices"}
        if study.findings & set(LUNG_OPACITY_PARENTS):
            assert "Lung Opacity" in study.findings
    assert sample_studies(250, 1) != studies


@pytest.mark.parametrize("label", [label for label in LABELS if label != "No Finding"])
@pytest.mark.parametrize("image", [0, 1])
def test_each_finding_changes_the_picture_of_both_views(label: str, image: int) -> None:
    """At 112 px, the smallest size of the demo, the sign stands out from the same patient without it."""
    findings = {label, "Lung Opacity"} if label in LUNG_OPACITY_PARENTS else {label}
    sick = Study(7, 1, "Male", 50, frozenset(findings), HEALTHY.views)
    pictures = [Image.fromarray(render(study, image, 0)).resize((112, 112)) for study in (HEALTHY, sick)]
    difference = np.abs(np.subtract(*(np.asarray(picture, dtype=float) for picture in pictures)))
    assert np.sort(difference.ravel())[-40:].mean() > 20


def test_written_division_is_whole_and_does_not_depend_on_the_workers(tmp_path: Path) -> None:
    written = {}
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        num_images = write_division(folder / "images", folder / "train.csv", num_patients=4, seed=3, workers=workers)
        files = sorted((folder / "images").iterdir())
        assert len(files) == num_images
        written[workers] = [path.read_bytes() for path in files] + [(folder / "train.csv").read_bytes()]
    assert written[1] == written[2]
    with (tmp_path / "1" / "train.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = [image_name(study, i) for study in sample_studies(4, 3) for i in range(len(study.views))]
    assert [row["Image_name"] for row in rows] == names
    labels_of_study: dict[str, set[tuple[str, ...]]] = {}
    for row in rows:
        study = f"{row['Patient_ID']} {row['Study']}"
        labels_of_study.setdefault(study, set()).add(tuple(row[label] for label in LABELS))
    assert all(len(labels) == 1 for labels in labels_of_study.values())
    with Image.open(tmp_path / "1" / "images" / names[0]) as picture:
        assert picture.mode == "L"
        assert picture.size[0] > 500
