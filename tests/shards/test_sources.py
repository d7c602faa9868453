"""Anybody's images and tables through the command: names, columns, splits, sources, cells, sizes and DICOM headers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from cxrdist import preprocess
from cxrdist.cli import run_entry
from cxrdist.errors import UserError
from cxrdist.files import write_output
from cxrdist.shards import sources
from cxrdist.shards.index import ShardIndex, open_index, splits_in
from cxrdist.task import TASKS

NAN = float("nan")


def image(path: Path, seed: int = 0, size: tuple[int, int] = (40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 255, (6, 6), dtype=np.uint8)
    Image.fromarray(noise).resize(size).save(path)


def table(path: Path, *rows: str) -> Path:
    path.write_text("\n".join(rows) + "\n")
    return path


def run(out: Path, *flags: Any) -> None:
    preprocess.main([*map(str, flags), "--out", str(out), "--workers", "1"])


@pytest.fixture
def own(tmp_path: Path) -> tuple[Path, Path]:
    """Six images in two folders and a table of two labels: its patients are text, some cells are blank or -1."""
    for number in range(6):
        image(tmp_path / "images" / f"site{number % 2}" / f"x{number}.png", number)
    rows = ["who,file,TB,Nodule,part"]
    cells = ["1,0", "0,1", ",1", "-1,0", "1,-1", "0,"]
    rows += [f"P-{n // 2},site{n % 2}/x{n}.png,{cell},{'valid' if n > 3 else 'train'}" for n, cell in enumerate(cells)]
    return tmp_path / "images", table(tmp_path / "labels.csv", *rows)


def test_one_command_reads_own_data_and_finds_the_column_of_images(
    own: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--images", own[0], "--csv", own[1], "--labels", "Nodule,TB", "--patient-column", "who")
    run(tmp_path / "out", *flags, "--blank", "masked", "--uncertain", "0.5,TB=one")
    index = open_index(tmp_path / "out", "train")
    assert index.image_names.to_list() == [f"site{n % 2}/x{n}.png" for n in range(6)]
    assert index.patients.to_list() == ["P-0", "P-0", "P-1", "P-1", "P-2", "P-2"]
    expected = [[0, 1], [1, 0], [1, NAN], [0, 1], [0.5, 1], [NAN, 0]]
    assert np.array_equal(index.targets, np.array(expected, np.float32), equal_nan=True)
    assert index.masked
    assert index.targets.observed(np.arange(6)).tolist() == [2, 2, 1, 2, 2, 1]
    assert index.task.name == "csv"
    assert index.task.labels == ("Nodule", "TB")
    assert (index.widths.tolist(), index.heights.tolist()) == ([40] * 6, [30] * 6)
    out = capsys.readouterr().out
    assert "column 'file' names the images" in out
    assert "no patient is known" not in out


def test_without_a_patient_column_every_image_is_its_own_and_it_is_said(
    own: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(
        tmp_path / "out", "--images", own[0], "--csv", own[1], "--labels", "TB", "--blank", "zero", "--uncertain", "one"
    )
    index = open_index(tmp_path / "out", "train")
    assert index.patients.to_list() == index.image_names.to_list()
    assert capsys.readouterr().out.count("no patient is known") == 1


def test_a_split_column_makes_its_splits_and_one_of_them_alone(own: tuple[Path, Path], tmp_path: Path) -> None:
    flags = ("--images", own[0], "--csv", own[1], "--labels", "TB", "--blank", "zero", "--uncertain", "one")
    run(tmp_path / "both", *flags, "--split-column", "part")
    assert splits_in(tmp_path / "both") == ["train", "valid"]
    assert [len(open_index(tmp_path / "both", split)) for split in ("train", "valid")] == [4, 2]
    run(tmp_path / "one", *flags, "--split-column", "part", "--split", "valid")
    assert splits_in(tmp_path / "one") == ["valid"]
    with pytest.raises(UserError, match=r"none; its splits are train \(4\), valid \(2\)"):
        run(tmp_path / "none", *flags, "--split-column", "part", "--split", "test")


def test_images_without_a_table_become_a_split_of_a_shard_sets_task(own: tuple[Path, Path], tmp_path: Path) -> None:
    flags = ("--images", own[0], "--csv", own[1], "--labels", "TB", "--blank", "zero", "--uncertain", "one")
    run(tmp_path / "out", *flags, "--name", "mine")
    for number, more in enumerate(((), ("--task", tmp_path / "out"))):
        run(tmp_path / "out", "--images", own[0], "--split", f"new{number}", *more)
        index = open_index(tmp_path / "out", f"new{number}")
        assert index.targets is None
        assert index.task.name == "mine"
        assert index.image_names.to_list() == sorted(f"site{n % 2}/x{n}.png" for n in range(6))
    with pytest.raises(UserError, match=r"give --labels A,B,... .*or --task NAME"):
        run(tmp_path / "nothing", "--images", own[0], "--split", "new")
    with pytest.raises(UserError, match=r"columns of .*labels.csv: who, file, TB, Nodule, part"):
        run(tmp_path / "nothing", "--images", own[0], "--csv", own[1])


def test_names_mean_the_one_file_they_can_mean_and_come_back_as_given(tmp_path: Path) -> None:
    for number, name in enumerate(("a/1.png", "b/2.jpg", "b/c/3.jpg", "d/same.png", "e/same.png", "f/4.dot.png")):
        image(tmp_path / "images" / name, number)
    names = ["set/b/2.jpg", "1.png", "3", "same.png", "c/3x.jpg", "4.dot"]
    rows = [f"{name},{number % 2}" for number, name in enumerate(names)]
    csv_file = table(tmp_path / "labels.csv", "image,TB", *rows)
    run(tmp_path / "out", "--images", tmp_path / "images", "--csv", csv_file, "--labels", "TB")
    index = open_index(tmp_path / "out", "train")
    assert index.image_names.to_list() == ["set/b/2.jpg", "1.png", "3", "4.dot"]
    assert set(index.left_out) == {"same.png", "c/3x.jpg"}
    table(csv_file, "image,TB", "1.png,0", "a/1.png,1")
    with pytest.raises(UserError, match=r"'1.png' and 'a/1.png' are the same file"):
        run(tmp_path / "other", "--images", tmp_path / "images", "--csv", csv_file, "--labels", "TB")


def test_several_sources_become_one_set(tmp_path: Path) -> None:
    flags: list[Any] = ["--labels", "TB", "--images", tmp_path / "one", tmp_path / "two", "--csv"]
    for folder in ("one", "two"):
        image(tmp_path / folder / f"{folder}.png")
        flags.append(table(tmp_path / f"{folder}.csv", "image,TB", f"{folder}.png,1"))
    run(tmp_path / "out", *flags)
    index = open_index(tmp_path / "out", "train")
    assert index.image_names.to_list() == ["one.png", "two.png"]
    assert index.keys.tolist() == [0, 1]
    assert index.meta.source["csv"] == "one.csv, two.csv"
    image(tmp_path / "two" / "one.png")
    table(tmp_path / "two.csv", "image,TB", "one.png,1")
    with pytest.raises(UserError, match=r"image 'one.png' is in"):
        run(tmp_path / "again", *flags)


@pytest.mark.parametrize("fit", ["squash", "pad"])
def test_size_and_fit_are_stored_and_said(fit: str, tmp_path: Path) -> None:
    image(tmp_path / "images" / "wide.png", size=(900, 450))
    csv_file = table(tmp_path / "labels.csv", "image,TB", "wide.png,1")
    flags = ("--images", tmp_path / "images", "--csv", csv_file, "--labels", "TB", "--size", "384", "--fit", fit)
    run(tmp_path / "out", *flags)
    index = open_index(tmp_path / "out", "train")
    assert (index.size_px, index.meta.fit) == (384, fit)
    pixels = decoded(index)
    assert pixels.shape == (384, 384)
    assert bool((pixels[:90] < 3).all()) == (fit == "pad")
    with pytest.raises(UserError, match="384 to 2048"):
        run(tmp_path / "big", *flags, "--size", "4000")


def decoded(index: ShardIndex, row: int = 0) -> Any:
    start = int(index.offsets[row])
    content = (index.folder / index.shards[0]).read_bytes()[start : start + int(index.lengths[row])]
    return simplejpeg.decode_jpeg(content, "GRAY")[..., 0]


def test_a_set_without_one_image_ends_with_exit_2_and_leaves_nothing_that_looks_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"no image")
    csv_file = table(tmp_path / "labels.csv", "image,TB", "a.png,1")
    code = run_entry(
        lambda: run(tmp_path / "out", "--images", tmp_path / "images", "--csv", csv_file, "--labels", "TB")
    )
    assert code == 2
    assert "none of 1 images can be stored; the first is a.png: cannot identify" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_files_that_are_no_images_are_counted_and_named(
    own: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("notes.txt", "more.txt", "Thumbs.db", "LICENSE"):
        (own[0] / name).write_text("x")
    run(
        tmp_path / "out", "--images", own[0], "--csv", own[1], "--labels", "TB", "--blank", "zero", "--uncertain", "one"
    )
    assert (
        "files that are no images, not used: .txt (2), .db (1), no extension (1); first: LICENSE"
        in capsys.readouterr().out
    )


def test_maps_and_tables_that_cxrdist_wrote_into_the_folder_are_no_images_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "maps").mkdir()
    for name in ("a.png", "maps/of_a_ward.png", "maps/changed.png"):
        (tmp_path / name).write_bytes(b"an X-ray")
    for name in ("found.csv", "maps/a--TB.png", "maps/changed.png"):
        write_output(tmp_path / name, b"a map")
    (tmp_path / "maps" / "changed.png").write_bytes(b"an X-ray of the user's, by the name of a map")
    listed = sources.list_images(tmp_path)
    assert (set(listed.images), set(listed.others)) == ({"a.png", "maps/of_a_ward.png", "maps/changed.png"}, set())
    assert "files that cxrdist wrote, not used: 2 (first: found.csv)" in capsys.readouterr().out


def write_dicom(path: Path, **header: str) -> None:
    pydicom = pytest.importorskip("pydicom", reason="the dicom extra is not installed")
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    dataset = pydicom.Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset.Modality, dataset.PhotometricInterpretation, dataset.SamplesPerPixel = "CR", "MONOCHROME2", 1
    dataset.Rows, dataset.Columns, dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 48, 64, 16, 12, 11
    dataset.PixelRepresentation = 0
    dataset.PixelData = np.arange(48 * 64, dtype=np.uint16).tobytes()
    for name, value in header.items():
        setattr(dataset, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)


def test_a_dicoms_header_fills_what_the_table_lacks(tmp_path: Path) -> None:
    about = {"StudyInstanceUID": "1.2.3", "ViewPosition": "PA", "PatientSex": "F", "PatientAge": "061Y"}
    write_dicom(tmp_path / "images" / "one.dcm", PatientID="P-1", **about)
    write_dicom(tmp_path / "images" / "IM0002", PatientID="P-2", PatientName="Never^Stored")
    image(tmp_path / "images" / "three.jpg")
    csv_file = table(tmp_path / "labels.csv", "image,TB", "one,1", "IM0002,0", "three.jpg,1")
    flags = ("--images", tmp_path / "images", "--labels", "TB")
    run(tmp_path / "out", *flags, "--csv", csv_file)
    index = open_index(tmp_path / "out", "train")
    assert index.patients.to_list() == ["P-1", "P-2", "three.jpg"]
    assert index.studies.to_list() == ["1.2.3", "", ""]
    assert index.views.to_list()[0] == "PA"
    assert (index.sexes[0], index.ages[0]) == ("F", "61")
    assert index.widths.tolist() == [64, 64, 40]
    stored = b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir())
    assert b"Never" not in stored


def test_dicoms_without_the_extra_are_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dicom(tmp_path / "images" / "one.dcm", PatientID="P-1")
    csv_file = table(tmp_path / "labels.csv", "image,TB", "one.dcm,1")
    monkeypatch.setattr(sources.dicom, "dicom_available", lambda: "DICOM needs: pip install 'cxrdist[dicom]'")
    with pytest.raises(UserError, match=r"1 DICOM files \(first: one.dcm\); DICOM needs: pip install"):
        run(tmp_path / "out", "--images", tmp_path / "images", "--csv", csv_file, "--labels", "TB")
    assert not (tmp_path / "out").exists()


def test_labels_come_from_a_file_and_a_task_keeps_its_name_with_some_of_them(tmp_path: Path) -> None:
    task = preprocess.task_from(
        preprocess.parser().parse_args(["--images", "x", "--task", "b", "--labels", "Edema,Fracture"])
    )
    assert (task.name, task.labels) == ("b", ("Edema", "Fracture"))
    (tmp_path / "labels.txt").write_text("A, with comma\n\nB\n")
    flags = ["--images", "x", "--labels", f"@{tmp_path / 'labels.txt'}", "--name", "mine"]
    assert preprocess.task_from(preprocess.parser().parse_args(flags)).labels == ("A, with comma", "B")
    assert TASKS["b"].num_labels == 14
