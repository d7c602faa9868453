"""The 14 findings in submission order, the divisions' file names, and the reading and checking of label CSVs.

Every table of the project orders its label columns as `LABELS`; a CSV may hold them in any order and is read by name.
Source: the competition's data description (Grand X-Ray Slam).
"""

from dataclasses import dataclass

LABELS = (
    "Atelectasis",
    "Cardiomegaly",
    "Consolidation",
    "Edema",
    "Enlarged Cardiomediastinum",
    "Fracture",
    "Lung Lesion",
    "Lung Opacity",
    "No Finding",
    "Pleural Effusion",
    "Pleural Other",
    "Pneumonia",
    "Pneumothorax",
    "Support Devices",
)
DIVISIONS = ("a", "b")
SPLITS = ("train", "test")


@dataclass(frozen=True)
class DivisionFiles:
    """Names inside the competition's folder, and the images known to be unreadable there."""

    train_csv: str
    train_images: str
    test_images: str
    template_csv: str
    unreadable: tuple[str, ...] = ()


DIVISION_FILES = {
    "a": DivisionFiles("train1.csv", "train1", "test1", "sample_submission_1.csv"),
    "b": DivisionFiles(
        "train2.csv",
        "train2",
        "test2",
        "sample_submission_2.csv",
        ("00043046_001_001.jpg", "00052495_001_001.jpg", "00056890_001_001.jpg"),
    ),
}
