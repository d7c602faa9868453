"""`predict`, `cxrdist.load` and bundles: what inference on a shard set says, for images from anywhere."""

import io
import json
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cxrdist
from cxrdist import export, infer, predict, preprocess
from cxrdist.cli import run_entry
from cxrdist.errors import UserError
from cxrdist.inference import predictor
from cxrdist.report.saliency import FROM_RANDOM
from cxrdist.scoring.tables import average_tables, read_table
from cxrdist.task import Task

MEMBERS = "eva_x={0.eva_x}@1,2:tta", "chexfound={0.chexfound}@1,2"


@pytest.fixture(scope="module")
def members(world) -> list[str]:
    return [text.format(world) for text in MEMBERS]


@pytest.fixture(scope="module")
def bundle(members, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "model"
    export.main([*members, "--out", str(out)])
    return out


@pytest.fixture(scope="module")
def scored(world, tmp_path_factory):
    """The score tables of inference, and the images that they are of."""
    out = tmp_path_factory.mktemp("scored")
    world.run(out)
    return [read_table(out / "scores" / f"{name}.csv") for name in ("eva_x", "chexfound")]


def files_of(world, table) -> list[Path]:
    return [world.shards.parent / "images" / name for name in table.image_names]


def test_predict_says_what_inference_says(world, members, scored) -> None:
    model = cxrdist.load(members, precision="fp32")
    found = model.predict(files_of(world, scored[0]), batch_size=7)
    for table in scored:
        np.testing.assert_allclose(found.members[table.name], table.probs, atol=1e-6)
    np.testing.assert_allclose(found.probabilities, average_tables(scored).probs, atol=1e-6)
    assert found.labels == labels_in(scored)


def labels_in(scored):
    return scored[0].labels


@pytest.mark.parametrize("kind", ["png", "png16", "rgb", "bytes", "array", "dicom"])
def test_any_kind_of_file_is_prepared_as_preprocessing_does(kind, world, tmp_path) -> None:
    """The same grey levels through preprocess and infer, and through predict."""
    rng = np.random.default_rng(3)
    levels = np.asarray(Image.fromarray(rng.integers(0, 256, (12, 12), dtype=np.uint8)).resize((150, 190)))
    source = levels.astype(np.uint16) * 200 + 7 if kind == "png16" else levels
    folder = tmp_path / "images"
    folder.mkdir()
    if kind == "dicom":
        write_dicom(folder / "x.dcm", levels)
    else:
        picture = Image.fromarray(np.stack([levels, levels // 2, levels], -1) if kind == "rgb" else source)
        picture.save(folder / "x.png")
    (file,) = folder.iterdir()
    shards = tmp_path / "shards"
    preprocess.main(["--task", "b", "--images", str(folder), "--split", "test", "--out", str(shards), "--workers", "1"])
    member = ["--member", f"eva_x={world.eva_x}@2:tta"]
    more = ["--shards", str(shards), "--precision", "fp32", "--out", str(tmp_path / "out")]
    infer.main([*member, *more, "--max-unreadable", "0"])
    table = read_table(tmp_path / "out" / "scores" / "eva_x.csv")
    given = {"bytes": file.read_bytes(), "array": source}.get(kind, file)
    found = cxrdist.load(f"eva_x={world.eva_x}@2:tta", precision="fp32").predict(given)
    np.testing.assert_allclose(found.probabilities, table.probs, atol=1e-6)


def write_dicom(path: Path, levels: np.ndarray) -> None:
    pydicom = pytest.importorskip("pydicom")
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = generate_uid()
    dataset.Modality, dataset.PhotometricInterpretation = "CR", "MONOCHROME1"
    dataset.Rows, dataset.Columns = levels.shape
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit, dataset.PixelRepresentation, dataset.SamplesPerPixel = 7, 0, 1
    dataset.PixelData = levels.tobytes()
    dataset.save_as(path, enforce_file_format=True)


def test_a_bundle_says_the_same_bits_without_its_run(world, members, bundle, scored, tmp_path) -> None:
    moved = tmp_path / "elsewhere" / "given"
    shutil.copytree(bundle, moved)
    files = files_of(world, scored[0])
    before = cxrdist.load(members, precision="fp32").predict(files)
    after = cxrdist.load(moved, precision="fp32").predict(files)
    assert before.probabilities.tobytes() == after.probabilities.tobytes()
    for path in moved.iterdir():
        assert str(world.shards.parent) not in path.read_bytes().decode("latin-1"), path


def test_a_bundle_without_its_backbone_needs_exactly_that_one(world, tmp_path) -> None:
    out, run = tmp_path / "bundle", world.chexfound
    export.main([f"chexfound={run}", "--out", str(out), "--without-backbone"])
    image = np.zeros((50, 40), np.uint8)
    with pytest.raises(UserError, match="leaves out the frozen backbone of chexfound"):
        cxrdist.load(out)
    own = cxrdist.load(out, backbone=run / "backbone.safetensors").predict(image)
    assert own.probabilities.tobytes() == cxrdist.load(run).predict(image).probabilities.tobytes()
    from safetensors.torch import load_file, save_file

    other = {name: tensor + 1 for name, tensor in load_file(run / "backbone.safetensors").items()}
    save_file(other, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="is not the frozen backbone of"):
        cxrdist.load(out, backbone=tmp_path / "other.safetensors")


@pytest.mark.parametrize("name", ["config.json", "task.json", "model.safetensors", "manifest.json"])
def test_a_tampered_bundle_is_refused(name, bundle, tmp_path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(bundle, folder)
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(UserError):
        cxrdist.load(folder)


@pytest.mark.parametrize("name", ["config.json", "task.json", "model.safetensors"])
def test_a_file_that_the_manifest_does_not_list_does_not_count(name, bundle, tmp_path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(bundle, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"][name]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="does not list"):
        cxrdist.load(folder)


def test_the_model_card_may_be_edited(bundle, tmp_path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(bundle, folder)
    (folder / "README.md").write_text("mine")
    assert cxrdist.load(folder).labels


def test_the_model_card_names_the_official_weights_only_of_what_started_from_them(world, bundle, tmp_path) -> None:
    export.main([f"chexfound={world.chexfound}", "--out", str(tmp_path / "random")])  # its backbone is random
    both, random = ((folder / "README.md").read_text() for folder in (bundle, tmp_path / "random"))
    both, random = (text.partition("## Licences of the weights")[2] for text in (both, random))
    assert re.findall(r"^- (\S+): ", both, re.MULTILINE) == ["eva\\_x\\_tiny"]
    assert not re.findall(r"^- (\S+): ", random, re.MULTILINE)
    assert "random weights" in random


def test_a_model_and_what_it_says_can_be_pickled(bundle) -> None:
    model, image = cxrdist.load(bundle), np.full((30, 20), 90, np.uint8)
    there = pickle.loads(pickle.dumps(model))
    found = pickle.loads(pickle.dumps(model.predict([image, image])))
    assert found.probabilities.tobytes() == there.predict([image, image]).probabilities.tobytes()
    assert found.sources == ("image 1", "image 2")


def test_a_map_is_of_its_label(bundle) -> None:
    model = cxrdist.load(bundle, precision="fp32")
    levels = np.random.default_rng(0).integers(0, 256, (60, 80), dtype=np.uint8)
    for member in ("eva_x", "chexfound"):
        maps, shown = model.maps(levels, model.labels[:3], member=member)
        assert shown.shape == (600, 600, 1)
        assert maps.shape[0] == 3
        assert (maps >= 0).all()
        assert not np.array_equal(maps[0], maps[1])
    with pytest.raises(UserError, match="no label of this model"):
        model.maps(levels, ["Gout"])


def test_maps_of_a_model_that_started_from_random_weights_say_so(world, scored, tmp_path, capsys) -> None:
    image, sizes = files_of(world, scored[0])[0], {}
    for name, run in (("eva_x", world.eva_x), ("chexfound", world.chexfound)):  # the backbone of the second is random
        member = ["--member", f"{name}={run}@1:plain", "--precision", "fp32"]
        predict.main([str(image), *member, "--maps", str(tmp_path / name)])
        assert (FROM_RANDOM in capsys.readouterr().out) is (name == "chexfound")
        with Image.open(next((tmp_path / name).glob("*.png"))) as picture:
            sizes[name] = picture.size
    assert sizes["chexfound"][1] == sizes["eva_x"][1] + 24


def test_the_command_writes_all_that_was_asked_for(world, bundle, scored, tmp_path, capsys) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for file in files_of(world, scored[0])[:2]:
        shutil.copy(file, folder)
    out = ["--csv", str(tmp_path / "o.csv"), "--json", str(tmp_path / "found.json"), "--maps", str(tmp_path / "maps")]
    predict.main([str(folder), "--bundle", str(bundle), "--precision", "fp32", *out])
    said = capsys.readouterr().out
    table = read_table(tmp_path / "o.csv", scored[0].meta.task)
    where = {name: row for row, name in enumerate(scored[0].image_names)}
    expected = average_tables(scored).probs[[where[name] for name in table.image_names]]
    np.testing.assert_allclose(table.probs, expected, atol=1e-6)
    found = json.loads((tmp_path / "found.json").read_text())
    likely = sum(each["probability"] >= 0.5 for image in found["images"] for each in image["findings"].values())
    maps = list((tmp_path / "maps").glob("*.png"))
    assert len(maps) == likely > 0
    with Image.open(maps[0]) as picture:
        assert picture.size == (1200, 644)
    assert "2 images in" in said
    assert "not a medical device" in said


def test_an_interrupted_folder_is_resumed_with_the_same_bits(world, bundle, scored, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for file in files_of(world, scored[0])[:6]:
        shutil.copy(file, folder)
    (folder / "bad.png").write_bytes(b"no image")
    words = [str(folder), "--bundle", str(bundle), "--precision", "fp32", "--device-batch-size", "2", "--csv"]
    assert run_entry(lambda: predict.main([*words, str(tmp_path / "whole.csv")])) == 2  # one is unreadable
    calls, real = [], predictor.Predictor._logits

    def interrupted(self, levels):
        calls.append(len(levels))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, levels)

    monkeypatch.setattr(predictor.Predictor, "_logits", interrupted)
    assert run_entry(lambda: predict.main([*words, str(tmp_path / "o.csv")])) == 130
    assert not (tmp_path / "o.csv").exists()
    assert run_entry(lambda: predict.main([*words, str(tmp_path / "o.csv")])) == 2
    assert len(calls) == 3 + 1  # two of three batches were kept; the fourth has no image that can be read
    assert (tmp_path / "o.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert not list(tmp_path.glob("*.parts"))


def test_an_unreadable_image_is_named_and_the_others_are_scored(world, bundle, tmp_path, capsys) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    good = world.shards.parent / "images" / "00000000_001_000.jpg"
    arguments = [str(good), str(tmp_path / "bad.png"), "--bundle", str(bundle), "--csv", str(tmp_path / "o.csv")]
    assert run_entry(lambda: predict.main(arguments)) == 2
    said = capsys.readouterr()
    assert "1 of 2 images could not be read" in said.err
    assert "bad.png" in said.err
    assert len((tmp_path / "o.csv").read_text().splitlines()) == 2


def test_where_no_image_can_be_read_only_that_is_said(bundle, tmp_path, capsys) -> None:
    (tmp_path / "findings.csv").write_text("image,label")
    arguments = [str(tmp_path / "findings.csv"), "--bundle", str(bundle), "--maps", str(tmp_path / "maps")]
    assert run_entry(lambda: predict.main(arguments)) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "1 of 1 images could not be read" in said.err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["{image}"], "give the model: --bundle DIR, or --member"),
        (["{image}", "--bundle", "{tmp}"], "no config.json there"),
        (["nowhere.png", "--bundle", "{bundle}"], "nowhere.png: no such image or folder"),
        (["{tmp}", "--bundle", "{bundle}"], "no .png, .jpg"),
        (["{image}", "--bundle", "{bundle}", "--csv", "{image}"], "is an input of this command"),
        (["{image}", "--bundle", "{bundle}", "--json", "{bundle}/o.json"], "lies in an input folder"),
        (["{image}", "--bundle", "{bundle}", "--csv", "a.csv", "--json", "a.json"], "give another"),
        (["{image}", "--bundle", "{bundle}", "--average", "logit"], "a bundle says its task and how it averages"),
        (["{image}", "--bundle", "{bundle}", "--task", "a"], "a bundle says its task and how it averages"),
        (["{image}", "--bundle", "{bundle}", "--device", "tpu"], "give cpu, cuda or cuda:N"),
        (["{image}", "--bundle", "{bundle}", "--calibration", "nowhere"], "nowhere: no such file"),
        (["{image}", "--member", "eva_x=nowhere"], "neither a run folder nor a weight file"),
        (["{image}", "--bundle", "{bundle}", "--precision", "fp16"], "a CPU cannot"),
    ],
)
def test_a_mistake_is_one_line(arguments, told, world, bundle, tmp_path, capsys) -> None:
    image = tmp_path / "one" / "x.jpg"
    image.parent.mkdir()
    shutil.copy(world.shards.parent / "images" / "00000000_001_000.jpg", image)
    (tmp_path / "empty").mkdir()
    places = {"image": image, "bundle": bundle, "tmp": tmp_path / "empty"}
    texts = [text.format(**places) for text in arguments]
    before = image.read_bytes()
    assert run_entry(lambda: predict.main(texts)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert told in lines[0], lines[0]
    assert image.read_bytes() == before


def test_what_preprocessing_did_is_read_from_the_run(tmp_path) -> None:
    """A model of padded 500-px images sees new ones padded to 500 px."""
    from cxrdist.data.images import levels_of
    from cxrdist.shards.convert import Pixels

    wide = np.full((40, 80), 200, np.uint8)
    levels = levels_of(wide, Pixels(size_px=500, fit="pad"))
    assert levels.shape == (500, 500, 1)
    assert levels[:120].max() < 20
    assert levels[250].min() > 180


@pytest.mark.parametrize("array", [np.zeros((4, 4, 2), np.uint8), np.zeros((4, 4)), np.zeros((0, 4), np.uint8)])
def test_an_array_of_another_form_is_refused(array, bundle) -> None:
    with pytest.raises(UserError, match=r"is no image; give \(H, W\)"):
        cxrdist.load(bundle).predict(array)


def test_importing_the_package_imports_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, cxrdist; assert 'torch' not in sys.modules; cxrdist.load; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


def test_onnx_says_what_torch_says(members, tmp_path, capsys) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    out = tmp_path / "bundle"
    one_each = [text.replace("@1,2", "@2") for text in members]
    export.main([*one_each, "--out", str(out), "--onnx"])
    said = capsys.readouterr().out
    assert said.count("largest difference from torch") == 2
    model = cxrdist.load(out, precision="fp32")
    rng = np.random.default_rng(1)
    for number, size in ((0, 64), (1, 80)):
        session = onnxruntime.InferenceSession(out / f"checkpoint{number}.onnx")
        levels = rng.integers(0, 256, (3, 1, size, size)).astype(np.float32).repeat(3, axis=1)
        (ours,) = session.run(["logits"], {"levels": levels})
        item = [head for member in model.members for head in member.checkpoints][number]
        from cxrdist.augment.views import normalise
        from cxrdist.models import architecture_of

        with torch.no_grad():
            inputs = normalise(torch.from_numpy(levels), stats=architecture_of(item.model).stats)
            theirs = model._models[item.sha256](inputs).numpy()
        assert np.abs(ours - theirs).max() <= 1e-4
    assert io.BytesIO((out / "README.md").read_bytes()).read().count(b"ONNX") > 0


@pytest.mark.parametrize("name", ["eva_x_tiny", "demo_chexfound", "timm:swin_tiny_patch4_window7_224", "timm:resnet18"])
def test_a_model_that_is_built_to_be_loaded_lacks_nothing_but_its_parameters(name) -> None:
    from cxrdist.models import recipe_for
    from cxrdist.runs.member import build_model

    task, recipe = Task(name="t", labels=("A", "B")), recipe_for(name, "t")
    usual, built = build_model(recipe, task), build_model(recipe, task, to_load=True)
    buffers = dict(usual.named_buffers())
    for key, tensor in built.named_buffers():
        assert torch.equal(tensor, buffers[key]), key
    assert [key for key, _ in built.named_parameters()] == [key for key, _ in usual.named_parameters()]
    assert [p.requires_grad for p in built.parameters()] == [p.requires_grad for p in usual.parameters()]
    built.load_state_dict(usual.state_dict())
    images = torch.rand(2, 3, recipe.image_size, recipe.image_size)
    with torch.no_grad():
        assert torch.equal(built.eval()(images), usual.eval()(images))
