"""What is fuzzed: undamaged files of every kind, how they are damaged, and how the entries read them."""

import contextlib
import dataclasses
import gzip
import hashlib
import io
import itertools
import json
import os
import random
import shutil
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.fuzz.mutations import (
    Mutator,
    damaged,
    json_damaged,
    json_lines_damaged,
    table_damaged,
    text_damaged,
)

GOLDEN = Path(__file__).parents[1] / "golden"


@dataclass(frozen=True)
class Kind:
    """make: (world, folder) -> the undamaged files in the new folder. damage: changes some of them. read: their result.

    vouched: a hash that is not damaged vouches for the bytes, so that another result would be silently wrong.
    weight: its share of all inputs.
    """

    name: str
    make: Callable[[Path, Path], None]
    damage: Callable[[random.Random, Path], None]
    read: Callable[[Path], object]
    vouched: bool = False
    weight: float = 1.0


def files_of(changes: dict[str, Mutator]) -> Callable[[random.Random, Path], None]:
    """Damage one of these files; now and then put another's content in its place."""

    def damage(rng: random.Random, folder: Path) -> None:
        name = rng.choice(sorted(changes))
        path = folder / name
        if rng.random() < 0.02:
            others = sorted(other for other in folder.rglob("*") if other.is_file() and other != path)
            if others:
                shutil.copyfile(rng.choice(others), path)
                return
        path.write_bytes(changes[name](rng, path.read_bytes()))

    return damage


def digest(*parts: Any) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(np.ascontiguousarray(part).tobytes() if isinstance(part, np.ndarray) else repr(part).encode())
    return found.hexdigest()


def copied(name: str) -> Callable[[Path, Path], None]:
    def make(world: Path, folder: Path) -> None:
        shutil.copytree(world / name, folder)

    return make


def written(files: dict[str, bytes]) -> Callable[[Path, Path], None]:
    def make(world: Path, folder: Path) -> None:
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)

    return make


# The world: a shard set and run folders, made once.


def make_world(root: Path) -> None:
    import torch

    from cxrdist.inference.parts import Part
    from cxrdist.recipes import eva_x_tiny
    from cxrdist.runs import checkpoint, start
    from cxrdist.runs.documents import Facts, RunDocument, StepState
    from cxrdist.runs.member import build_model, read_recipe
    from cxrdist.scoring.tables import ScoreTable, TableMeta, write_table
    from cxrdist.shards.convert import Pixels
    from cxrdist.shards.index import open_index
    from cxrdist.shards.writer import Source, SplitJob, write_split
    from cxrdist.task import TASKS
    from tests.conftest import load_infer_world

    torch.set_num_threads(1)
    task, rng = TASKS["b"], np.random.default_rng(0)
    names = [f"{i // 2:08d}_001_{i % 2:03d}.jpg" for i in range(8)]
    load_infer_world().write_images(root / "images", names)
    sources = []
    for key, name in enumerate(names):
        targets = tuple(float(value) for value in rng.random(task.num_labels) < 0.4)
        path = root / "images" / name
        sources.append(Source(key, name, str(path), path.stat().st_size, "", name[:8], "001", targets=targets))
    write_split(SplitJob(root / "shards", task, "train", sources, Pixels(size_px=384), 4, {}))
    index = open_index(root / "shards", "train")
    eva_x = dataclasses.replace(
        eva_x_tiny("b"),
        image_size=32,
        model_kwargs=(("depth", 2), ("embed_dim", 48), ("num_heads", 3)),
    )
    run = load_infer_world().make_run(root / "run", dataclasses.replace(eva_x, epochs=6))
    facts = Facts(
        task="b", split="train", shards=index.fingerprint, images=8, positives={}, folds=None, validate_fold=None
    )
    session = start.describe_session(torch.device("cpu"), 1, 4, "fp32")
    (run / "run.json").write_text(RunDocument(id="0123456789abcdef", data=facts).to_json())
    start.write_start(run, read_recipe(run), task, session)
    state = StepState(world_size=1, device_batch_size=4, precision="fp32", data=facts, frozen=None)
    weights = build_model(read_recipe(run), task).state_dict()
    for step in (10, 20):
        changed = dataclasses.replace(state, global_step=step)
        checkpoint.write_checkpoint(checkpoint.step_folder(run, step), {"model": weights}, {"state": changed})
    rows = [{"kind": "train", "step": step, "epoch": 1, "loss": 0.5, "lr/all": 1e-4} for step in range(1, 6)]
    lines = "".join(json.dumps(row) + "\n" for row in [*rows, {"kind": "validation", "step": 5, "epoch": 1}])
    (run / "metrics.jsonl").write_text(lines)
    (run / "timings.jsonl").write_text(
        "".join(json.dumps({"step": step, "images_per_s": 3.0}) + "\n" for step in range(6))
    )
    probs = rng.random((8, task.num_labels), dtype=np.float32)
    tables = root / "tables"
    write_table(tables / "one.csv", ScoreTable(np.array(names, object), probs, TableMeta(member="one", task=task)))
    write_table(tables / "two.csv", ScoreTable(np.array(names, object), probs, TableMeta(member="two", task=task)))
    part = Part(np.array([0, 1]), np.arange(8), rng.random((2, 8, 14), dtype=np.float32), {9: "bad"})
    (root / "parts").mkdir()
    (root / "parts" / "00000000-0.npz").write_bytes(part.to_bytes())
    save_weights(root / "weights", weights)
    save_bundle(root / "bundle", run)


def save_bundle(folder: Path, run: Path) -> None:
    from cxrdist.inference import bundle
    from cxrdist.inference.members import load_ensemble, parse_member
    from cxrdist.inference.predictor import AS_PUBLISHED, scores_of
    from cxrdist.scoring.operating import fit
    from cxrdist.task import TASKS

    task, rng = TASKS["b"], np.random.default_rng(1)
    ensemble = load_ensemble([parse_member(f"eva={run}@1,2:tta")], task)
    probs = rng.random((60, task.num_labels), dtype=np.float32)
    targets = (rng.random(probs.shape) < probs).astype(np.float64)
    whose = {"scores_of": scores_of(ensemble, "prob"), "num_resamples": 5}
    fitted = fit(probs, targets, np.arange(60), task=task, **whose)
    more = {"version": "0", "card": "a card", "calibration": fitted}
    bundle.write_manifest(folder, bundle.write_bundle(folder, task, ensemble, AS_PUBLISHED, "prob", **more))


def save_weights(folder: Path, weights: dict[str, Any]) -> None:
    import torch

    from cxrdist.models.weights.safetensors import write_safetensors

    write_safetensors(folder / "weights.safetensors", weights, {"layout": "cxrdist"})
    torch.save({"model": weights, "epoch": 3}, folder / "zip.pth")
    torch.save({"model": weights, "epoch": 3}, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    backbone = {f"backbone.{name}": tensor for name, tensor in weights.items()}
    epoch = {"epoch": 5, "model_state_dict": backbone, "ema_state_dict": backbone}
    torch.save(epoch, folder / "published.pth")


# Tables.


def csv_bytes(*rows: list[Any]) -> bytes:
    return "".join(",".join(map(str, row)) + "\n" for row in rows).encode()


def label_tables() -> dict[str, dict[str, bytes]]:
    """Task -> its table (the first file) and those beside it."""
    from cxrdist.task import TASKS

    b, chexpert, mimic = TASKS["b"], TASKS["chexpert"], TASKS["mimic"]
    own_header = ["Image_name", "Patient_ID", "Study", "Sex", "Age", "ViewCategory", "ViewPosition", *b.labels]
    own = [[f"{i:08d}_001_001.jpg", i, 1, "Female", 60, "Frontal", "PA", *(i % 2 for _ in b.labels)] for i in range(6)]
    path = "CheXpert-v1.0-small/train/patient0000{}/study1/view1_frontal.jpg"
    chex = [
        [path.format(i), "Male", 68, "Frontal", "AP", *("1.0", "", "-1.0", "0.0")[i:], *[""] * (10 + i)]
        for i in range(4)
    ]
    meta = [[f"d{i}-a", 10000030 + i, 50414260 + i, "PA"] for i in range(4)]
    studies = [[10000030 + i, 50414260 + i, *("1.0", "", "-1.0", "0.0")[i:], *[""] * (10 + i)] for i in range(4)]
    nih_header = [
        "Image Index",
        "Finding Labels",
        "Follow-up #",
        "Patient ID",
        "Patient Age",
        "Patient Gender",
        "View Position",
    ]
    nih = [
        [f"0000000{i}_000.png", "Cardiomegaly|Emphysema" if i else "No Finding", 0, i, "058Y", "M", "PA"]
        for i in range(4)
    ]
    pad_header = [
        "ImageID",
        "ImageDir",
        "StudyID",
        "PatientID",
        "PatientBirth",
        "PatientSex_DICOM",
        "ViewPosition_DICOM",
    ]
    pad_header += ["Projection", "StudyDate_DICOM", "Labels"]
    pad = [[f"p-{i}.png", 0, f"s{i}", f"p{i}", 1930.0, "F", "PA", "PA", 20140101, "['normal']"] for i in range(4)]
    boxes = [
        [f"a{i}", name, 1, reader, "", "", "", ""]
        for i in range(2)
        for reader, name in (("R1", "ILD"), ("R2", "No finding"))
    ]
    return {
        "b": {"train.csv": csv_bytes(own_header, *own)},
        "chexpert": {
            "train.csv": csv_bytes(["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *chexpert.labels], *chex)
        },
        "mimic": {
            "mimic-cxr-2.0.0-chexpert.csv": csv_bytes(["subject_id", "study_id", *mimic.labels], *studies),
            "mimic-cxr-2.0.0-metadata.csv": csv_bytes(["dicom_id", "subject_id", "study_id", "ViewPosition"], *meta),
            "mimic-cxr-2.0.0-split.csv": csv_bytes(
                ["dicom_id", "study_id", "subject_id", "split"], *([m[0], m[2], m[1], "train"] for m in meta)
            ),
        },
        "nih": {
            "Data_Entry_2017.csv": csv_bytes(nih_header, *nih),
            "train_val_list.txt": b"00000000_000.png\n00000001_000.png\n",
            "test_list.txt": b"00000002_000.png\n00000003_000.png",
        },
        "padchest": {"PADCHEST.csv": csv_bytes(pad_header, *pad)},
        "vindr": {
            "train.csv": csv_bytes(
                ["image_id", "class_name", "class_id", "rad_id", "x_min", "y_min", "x_max", "y_max"], *boxes
            )
        },
    }


def read_label_table(name: str, file: str) -> Callable[[Path], object]:
    def read(folder: Path) -> object:
        from cxrdist.published import read_labels
        from cxrdist.task import TASKS

        table = read_labels(folder / file, TASKS[name])
        return digest(table.targets, table.about.to_numpy().tolist())

    return read


def read_template_file(folder: Path) -> object:
    from cxrdist.tables import read_template
    from cxrdist.task import TASKS

    return digest(read_template(folder / "template.csv", TASKS["b"]))


def gzipped(rng: random.Random, data: bytes) -> bytes:
    return damaged(rng, data) if rng.random() < 0.5 else gzip.compress(table_damaged(rng, gzip.decompress(data)))


def make_template(world: Path, folder: Path) -> None:
    from cxrdist.task import TASKS

    labels = TASKS["b"].labels
    written(
        {"template.csv": csv_bytes(["Image_name", *labels], *([f"{i:08d}_001_001.jpg", *[0] * 14] for i in range(5)))}
    )(world, folder)


def make_task(world: Path, folder: Path) -> None:
    from cxrdist.task import TASKS

    toml = TASKS["chexpert"].to_toml().encode()
    written({"task.toml": toml, "task.json": TASKS["nih"].to_json().encode()})(world, folder)


def read_task_files(folder: Path) -> object:
    from cxrdist.task import load_task

    return digest(load_task(str(folder / "task.toml")), load_task(str(folder / "task.json")))


# Source images.


def make_images(world: Path, folder: Path) -> None:
    from PIL import Image

    rng = np.random.default_rng(3)
    grey = Image.fromarray(rng.integers(0, 255, (40, 56), dtype=np.uint8))
    deep = Image.fromarray(rng.integers(0, 65535, (40, 56), dtype=np.uint16))
    colour = Image.fromarray(rng.integers(0, 255, (40, 56, 3), dtype=np.uint8))
    folder.mkdir(parents=True)
    for image, names in (
        (grey, "a.png a.jpg a.tif a.bmp a.gif"),
        (deep, "d.png d.tif"),
        (colour, "c.png c.jpg c.webp c.bmp"),
    ):
        for name in names.split():
            image.save(folder / name)
    colour.convert("CMYK").save(folder / "cmyk.jpg")
    colour.convert("P").save(folder / "p.png")


def read_images(folder: Path) -> object:
    from cxrdist.shards.convert import Converted, convert

    results = [convert(str(path)) for path in sorted(folder.iterdir())]
    reasons = [result for result in results if not isinstance(result, Converted)]
    assert not any("\n" in reason for reason in reasons)
    return digest([getattr(result, "sha256", result) for result in results])


def damage_any(rng: random.Random, folder: Path) -> None:
    """Only the damaged file stays: the others say nothing new."""
    paths = sorted(folder.iterdir())
    chosen = rng.choice(paths)
    content = damaged(rng, chosen.read_bytes())
    for path in paths:
        path.unlink()
    chosen.write_bytes(content)


def make_dicoms(world: Path, folder: Path) -> None:
    import warnings

    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    folder.mkdir(parents=True)
    for name, syntax in (("explicit", ExplicitVRLittleEndian), ("implicit", ImplicitVRLittleEndian)):
        made = Dataset()
        made.file_meta = FileMetaDataset()
        made.file_meta.TransferSyntaxUID = syntax
        made.file_meta.MediaStorageSOPClassUID = made.SOPClassUID = ComputedRadiographyImageStorage
        made.file_meta.MediaStorageSOPInstanceUID = made.SOPInstanceUID = "1.2.3"
        made.Modality, made.BodyPartExamined, made.PatientID, made.PatientAge = "CR", "CHEST", "p1", "050Y"
        made.SamplesPerPixel, made.PhotometricInterpretation = 1, "MONOCHROME1"
        made.WindowCenter, made.WindowWidth = 2000, 3000
        made.Rows, made.Columns, made.BitsAllocated, made.BitsStored, made.HighBit = 40, 52, 16, 12, 11
        made.PixelRepresentation = 0
        made.PixelData = np.linspace(0, 4095, 40 * 52).astype("<u2").tobytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made.save_as(folder / f"{name}.dcm", enforce_file_format=True)


# Shards.


def read_shards(folder: Path) -> object:
    """What `verify` and an epoch of the loader see: index, tar headers and every image's pixels."""
    from cxrdist.data.loader import Loader
    from cxrdist.shards.verify import verify

    index = verify(folder, "train")
    with Loader(index, num_threads=0) as loader:
        images = [batch.images.numpy() for batch in loader.batches([np.arange(len(index))])]
    return digest(*images, index.about().to_numpy().tolist(), index.targets[:])


def read_index(folder: Path) -> object:
    from cxrdist.shards.index import open_index, task_of

    index = open_index(folder, "train", task_of(folder))
    names = index.image_names.to_list()
    assert index.rows_of(names).tolist() == list(range(len(index)))
    columns = [getattr(index, name) for name in ("keys", "shard_ids", "offsets", "lengths", "channels")]
    columns += [] if index.targets is None else [index.targets[:]]  # the SHA-256s are checked by verify, before use
    about = [index.left_out, index.num_channels, index.size_px, index.masked, index.patients.codes()[0].tolist()]
    return digest(*columns, index.about().to_numpy().tolist(), *about)


def index_rehashed(rng: random.Random, folder: Path) -> None:
    """An index with damaged bytes or another value in a cell, and the JSON made to expect it."""
    import pyarrow as pa

    path = folder / "train.index.arrow"
    if rng.random() < 0.5:
        content = damaged(rng, path.read_bytes())
    else:
        from cxrdist.shards.index import arrow_bytes

        batch = pa.ipc.open_file(path).get_batch(0)
        column, row = rng.randrange(batch.num_columns), rng.randrange(batch.num_rows)
        field, values = batch.schema.field(column), batch.column(column).to_pylist()
        if pa.types.is_integer(field.type):
            bits = field.type.bit_width
            values[row] = rng.choice((0, 1, 2, 3, 128, 254, 255, 2 ** (bits - 1) - 1, values[(row + 1) % len(values)]))
            if pa.types.is_signed_integer(field.type) and rng.random() < 0.4:
                values[row] = -rng.choice((1, 128, 2 ** (bits - 1)))
        elif pa.types.is_floating(field.type):
            values[row] = rng.choice((-1.0, 2.0, float("inf"), float("nan")))
        elif pa.types.is_large_string(field.type):
            values[row] = rng.choice(("", "x" * 9999, "../x", "a\nb", "\0", values[(row + 1) % len(values)]))
        changed = batch.set_column(column, field, pa.array(values, field.type))
        content = arrow_bytes(changed)
    path.write_bytes(content)
    document = json.loads((folder / "train.json").read_bytes())
    document["index"] |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "train.json").write_text(json.dumps(document))


# Run folders.


def read_run(folder: Path) -> object:
    """What resuming and inference read of a run folder."""
    import torch

    from cxrdist.recipes import to_json
    from cxrdist.runs import checkpoint, start
    from cxrdist.runs.documents import EpochMeta, Facts, Sessions, StepState, read_versioned
    from cxrdist.runs.member import load_member, read_recipe

    loaded = load_member(folder, 2)
    recipe, facts = read_recipe(folder), start.read_facts(folder)
    begun = start.find_start(folder, recipe, facts, resume=True, say=lambda text: None)
    session = start.describe_session(torch.device("cpu"), 1, 4, "fp32")
    start.write_start(folder, recipe, loaded.task, session)
    assert read_versioned(Sessions, folder / "environment.json").sessions
    state = [tensor.numpy() for tensor in loaded.model.state_dict().values()]
    assert isinstance(loaded.meta, EpochMeta)
    assert begun.state is None or isinstance(begun.state, StepState)
    assert isinstance(facts, Facts)
    assert checkpoint.run_id(folder)
    return digest(*state, to_json(recipe), loaded.task, loaded.meta)


def read_checkpoints(folder: Path) -> object:
    """The weights of an epoch and the newest step, for whose files the manifest vouches."""
    from cxrdist.runs import checkpoint
    from cxrdist.runs.documents import StepState, read_versioned
    from cxrdist.runs.member import load_member

    loaded = load_member(folder, 2)
    step, warnings = checkpoint.newest_step(folder)
    if warnings:
        assert step == checkpoint.step_folder(folder, 10), "no fallback"
        step = checkpoint.step_folder(folder, 20)
    assert step is not None
    state = read_versioned(StepState, step / "state.json") if not warnings else None
    tensors = checkpoint.read_tensors(step, "model") if not warnings else {}
    found = [tensor.numpy() for tensor in (*loaded.model.state_dict().values(), *tensors.values())]
    if warnings:
        from cxrdist.errors import UserError

        raise UserError(warnings[0])
    return digest(*found, loaded.meta, state)


def manifest_rehashed(rng: random.Random, folder: Path) -> None:
    """meta.json or state.json of another content, and a manifest that vouches for it."""
    checkpoint, name = rng.choice((("epoch_02", "meta.json"), ("step_20", "state.json")))
    path = folder / "checkpoints" / checkpoint / name
    content = json_damaged(rng, path.read_bytes())
    path.write_bytes(content)
    manifest = path.with_name("manifest.json")
    document = json.loads(manifest.read_bytes())
    document["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest.write_text(json.dumps(document))


BUNDLE_JSON = dict.fromkeys(("config.json", "task.json", "calibration.json"), json_damaged)


def bundle_rehashed(rng: random.Random, folder: Path) -> None:
    """A document of a bundle with another content, and a manifest that vouches for it."""
    files_of(BUNDLE_JSON)(rng, folder)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    for name in manifest["files"]:
        content = (folder / name).read_bytes()
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def read_bundle(folder: Path) -> object:
    """The model and what it says of an image."""
    from cxrdist.inference.predictor import load

    model = load(folder, device="cpu", precision="fp32")
    found = model.predict(np.arange(2000, dtype=np.uint8).reshape(40, 50) // 9)
    return digest(model.labels, model.calibration, found.probabilities, found.decisions)


def read_log(folder: Path) -> object:
    from cxrdist.evaluate import read_metrics
    from cxrdist.report.figures import training_section
    from cxrdist.training.tracking import _history

    history, rows = _history(folder), read_metrics(folder)
    if rows:
        training_section({"run": rows}, {"run": 0})
    return len(history)


def read_folds(folder: Path) -> object:
    from cxrdist.data.folds import read_split
    from cxrdist.task import TASKS

    return digest(read_split(folder / "split.csv", TASKS["b"]))


# Scores.


def read_tables(folder: Path) -> object:
    from cxrdist.scoring.tables import average_tables, read_members

    tables, weights = read_members([folder / "one.csv", folder / "two.csv"], None)
    average = average_tables(tables, weights)
    return digest(average.probs, average.image_names.tolist(), weights)


def read_label_map(folder: Path) -> object:
    from cxrdist.scoring.external import ScoredSet, read_map
    from cxrdist.scoring.tables import ScoreTable, TableMeta
    from cxrdist.tables import LabelTable
    from cxrdist.task import TASKS

    none = np.zeros((0, TASKS["b"].num_labels), np.float32)
    table = ScoreTable(np.zeros(0, object), none, TableMeta(task=TASKS["b"]))
    sets = [ScoredSet(n, table, LabelTable(None, none), TASKS["nih"], folder, ()) for n in ("nih", "site")]
    return digest(read_map(folder / "map.toml", sets))


def read_parts(folder: Path) -> object:
    from cxrdist.errors import UserError
    from cxrdist.inference.parts import Basis, PartStore, merge

    basis = Basis(shards="", rows="", columns=(), device_batch_size=4, precision="fp32", device="cpu")
    store = PartStore(folder, basis)
    store.folder = folder
    parts = store.read_all()
    if not parts:
        raise UserError("scored again")
    return digest(*merge(list(parts.values()), 10, np.arange(8))[:2])


# Weights.


def read_weight_file(name: str) -> Callable[[Path], object]:
    def read(folder: Path) -> object:
        from cxrdist.models import architecture_of
        from cxrdist.models.weights.fit import load_init
        from cxrdist.models.weights.layouts import architecture_of_file, read_weights

        found = read_weights(folder / name)
        kind = architecture_of_file(found)
        architecture = architecture_of("eva_x_tiny")
        model = architecture.build(32, 14, depth=2, embed_dim=48, num_heads=3)
        load_init(architecture, model, folder / name)
        return digest(kind, *(tensor.numpy() for tensor in model.state_dict().values()))

    return read


BACKBONES = {"vit.safetensors": "timm:test_vit", "frozen.safetensors": "glori:test_vit"}


def make_backbones(world: Path, folder: Path) -> None:
    from safetensors.torch import save_file

    from cxrdist.models import architecture_of

    made = world / "backbones"
    if not made.exists():  # several processes share the world
        own = Path(tempfile.mkdtemp(dir=world))
        for name, model in BACKBONES.items():
            save_file(architecture_of(model).build(64, 14).state_dict(), own / name)
        with contextlib.suppress(OSError):
            own.rename(made)
    shutil.copytree(made, folder, dirs_exist_ok=True)


def read_backbones(folder: Path) -> object:
    from cxrdist.models import architecture_of
    from cxrdist.models.weights.fit import load_init

    for name, kind in BACKBONES.items():
        architecture = architecture_of(kind)
        load_init(architecture, architecture.build(32, 14), folder / name)
    return None


def safetensors_damaged(rng: random.Random, data: bytes) -> bytes:
    if rng.random() < 0.5:
        return damaged(rng, data)
    size = int.from_bytes(data[:8], "little")
    header, rest = json_damaged(rng, data[8 : 8 + size]), data[8 + size :]
    if rng.random() < 0.3:
        document = json.loads(data[8 : 8 + size])
        entry = document[rng.choice([name for name in document if name != "__metadata__"])]
        entry["dtype"] = rng.choice(("F64", "BF16", "F8_E4M3", "BOOL", "I64", "C64", "F4", "U8"))
        header = json.dumps(document).encode()
    return len(header).to_bytes(8, "little") + header + rest


def pickle_damaged(rng: random.Random, data: bytes) -> bytes:
    """A pickle of torch with other numbers, names and opcodes near its begin, or one that asks for much."""
    if rng.random() < 0.1:
        return rng.choice(HOSTILE)
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 3))):
        place = rng.randrange(min(len(changed), 6000))
        kind = rng.randrange(4)
        if kind == 0:
            changed[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[place : place + 5] = b"J" + rng.choice((b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\0\x5e\xd0\xb2"))
        elif kind == 2:
            changed[place : place + 1] = rng.choice(
                (b"X\xff\xff\xff\x7f", b"Q", b"R", b"b", b"(", b"t", b"}", b".", b"0", b"\x8b")
            )
        else:
            del changed[place : place + rng.choice((1, 2, 9))]
    return bytes(changed)


def legacy_damaged(rng: random.Random, data: bytes) -> bytes:
    return damaged(rng, data) if rng.random() < 0.3 else pickle_damaged(rng, data)


def zip_damaged(rng: random.Random, data: bytes) -> bytes:
    if rng.random() < 0.4:
        return damaged(rng, data)
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(target, "w") as new:
        for member in old.infolist():
            content = old.read(member)
            kind = rng.random()
            if member.filename.endswith("data.pkl"):
                content = pickle_damaged(rng, content)
                if kind < 0.02:
                    content = content[:-1] + b"N0" * 10**8 + b"."
            elif kind < 0.05:
                content = damaged(rng, content)
            compress = zipfile.ZIP_DEFLATED if kind < 0.02 else zipfile.ZIP_STORED
            new.writestr(member.filename, content, compress)
    return target.getvalue()


def _hostile() -> tuple[bytes, ...]:
    """Legacy files whose object asks for 3 GB in the ways torch's reader knows, or for code."""
    import pickle

    magic = [pickle.dumps(value, protocol=2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    three = b"J" + (800_000_000).to_bytes(4, "little")
    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu" + three + b"NtQ"
    objects = (
        b"cbuiltins\nbytearray\n" + three + b"\x85R",
        b"ctorch\nTensor\n" + three + b"\x85R",
        b"ctorch\nFloatTensor\n" + three + b"\x85R",
        storage,
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + b"K\0"
        + three
        + b"\x85K\1\x85\x89ccollections\nOrderedDict\n)RtR",
        b"X" + (2**31 - 1).to_bytes(4, "little") + b"x",
        b"cposix\nsystem\nX\x02\0\0\0ls\x85R",
        b"(" * 200_000,
        b"]" + b"2" * 10 + b"a" * 5,
    )
    return tuple(
        b"".join(magic) + b"\x80\x02}X\x01\0\0\0a" + item + b"s." + pickle.dumps([], protocol=2) for item in objects
    )


HOSTILE = _hostile()


# Flags.


def flag_kind(name: str, examples: tuple[str, ...], read: Callable[[str], object], weight: float) -> Kind:
    def damage(rng: random.Random, folder: Path) -> None:
        (folder / "flag").write_bytes(text_damaged(rng, rng.choice(examples).encode()))

    def read_flag(folder: Path) -> object:
        return read((folder / "flag").read_bytes().decode("utf-8", "surrogatepass"))

    return Kind(name, written({"flag": examples[0].encode()}), damage, read_flag, weight=weight)


def read_set(text: str) -> object:
    import torch

    from cxrdist.models import architecture_of
    from cxrdist.recipes import demo_eva_x, with_overrides

    recipe = with_overrides(demo_eva_x("b"), [text])
    with torch.device("meta"):
        architecture = architecture_of(recipe.model)
        architecture.trained_names(architecture.build_for(recipe, 14), recipe.train)
    return None


def read_member_flag(text: str) -> object:
    from cxrdist.inference.members import parse_member

    spec = parse_member(text)
    os.path.lexists(spec.source)
    return None


def read_external_flag(text: str) -> object:
    from cxrdist.external import parse_set

    return parse_set(text) and None


def read_blank(text: str) -> object:
    from cxrdist.task import TASKS, parse_readings

    return TASKS["b"].with_readings(parse_readings(text, TASKS["b"].labels), None) and None


SETS = (
    *(
        "ema_decay=0.9995",
        "image_size=224",
        "num_heads=0",
        "model_kwargs=num_heads=0",
        "model_kwargs=depth:2,embed_dim:96",
    ),
    *(
        "betas=0.9,0.99",
        "views=plain,hflip",
        "member_epochs=1,2",
        "clip_grad_norm=none",
        "seed=3",
        "global_batch_size=32",
    ),
    *(
        "epochs=3",
        "augment=none",
        "model=eva_x",
        "loss=focal_bce",
        "warmup_steps=5",
        "lr_schedule=cosine",
        "drop_rate=0.2",
    ),
    *("model=timm:test_vit", "train=last:2", "layer_decay=0.5", "drop_path=0.1", "loss=asl", "label_smoothing=0.1"),
)
MEMBERS = (
    "eva_x=runs/eva_x_b@5,6:tta*0.5",
    "a=weights/x.pth#eva_x_224:plain",
    "b=run",
    "c=run:plain,hflip*2",
    "d=f,g#eva_x",
    "e=w.safetensors#timm:test_vit.r160_in1k:tta",
)

RUN_JSON = {
    **dict.fromkeys(("recipe.json", "task.json", "run.json", "environment.json"), json_damaged),
    **dict.fromkeys(
        (
            "checkpoints/epoch_02/manifest.json",
            "checkpoints/step_20/manifest.json",
            "checkpoints/step_10/manifest.json",
        ),
        json_damaged,
    ),
}
CHECKPOINT_FILES = {
    "checkpoints/epoch_02/ema.safetensors": safetensors_damaged,
    "checkpoints/epoch_02/meta.json": json_damaged,
    "checkpoints/step_20/model.safetensors": safetensors_damaged,
    "checkpoints/step_20/state.json": json_damaged,
    "checkpoints/step_20/manifest.json": json_damaged,
}


def _kinds() -> list[Kind]:
    found = [
        Kind(
            f"table {name}",
            written(files),
            files_of({file: damaged if file.endswith(".txt") else table_damaged for file in files}),
            read_label_table(name, next(iter(files))),
            weight=3 if name == "b" else 1.5,
        )
        for name, files in label_tables().items()
    ]
    packed = {"train.csv.gz": gzip.compress(label_tables()["b"]["train.csv"], mtime=0)}
    found += [
        Kind("table gzip", written(packed), files_of({"train.csv.gz": gzipped}), read_label_table("b", "train.csv.gz")),
        Kind("template", make_template, files_of({"template.csv": table_damaged}), read_template_file, weight=2),
        Kind(
            "task file",
            make_task,
            files_of({"task.toml": damaged, "task.json": json_damaged}),
            read_task_files,
            weight=2,
        ),
        Kind("source image", make_images, damage_any, read_images, weight=3),
        Kind("source DICOM", make_dicoms, damage_any, read_images, weight=3),
        Kind("tar", copied("shards"), files_of(dict.fromkeys(TARS, damaged)), read_shards, True, weight=1.5),
        Kind("index", copied("shards"), files_of({"train.index.arrow": damaged}), read_index, True, weight=2),
        Kind("index, hash recomputed", copied("shards"), index_rehashed, read_shards, weight=2),
        Kind("split JSON", copied("shards"), files_of({"train.json": json_damaged}), read_shards, weight=2),
        Kind("run JSON", copied("run"), files_of(RUN_JSON), read_run, weight=2),
        Kind("checkpoint", copied("run"), files_of(CHECKPOINT_FILES), read_checkpoints, True, weight=2),
        Kind("meta and state, hash recomputed", copied("run"), manifest_rehashed, read_run, weight=1.5),
        Kind(
            "metrics.jsonl",
            copied("run"),
            files_of(dict.fromkeys(("metrics.jsonl", "timings.jsonl"), json_lines_damaged)),
            read_log,
            weight=2,
        ),
        Kind("split.csv", written({"split.csv": SPLIT}), files_of({"split.csv": table_damaged}), read_folds),
        Kind("score table", copied("tables"), files_of({"one.csv": table_damaged}), read_tables, True, weight=2),
        Kind("score table JSON", copied("tables"), files_of({"two.json": json_damaged}), read_tables, weight=2),
        Kind("label map", written({"map.toml": LABEL_MAP}), files_of({"map.toml": damaged}), read_label_map),
        Kind("part", copied("parts"), files_of({"00000000-0.npz": damaged}), read_parts, True, weight=2),
        *(
            Kind(f"weights {file}", copied("weights"), files_of({file: change}), read_weight_file(file), weight=weight)
            for file, change, weight in (
                ("weights.safetensors", safetensors_damaged, 1.5),
                ("zip.pth", zip_damaged, 1.5),
                ("published.pth", zip_damaged, 0.75),
                ("legacy.pth", legacy_damaged, 1.5),
            )
        ),
        Kind("bundle", copied("bundle"), files_of(BUNDLE_FILES), read_bundle, True),
        Kind("bundle, manifest recomputed", copied("bundle"), bundle_rehashed, read_bundle),
        Kind(
            "weights timm",
            make_backbones,
            files_of(dict.fromkeys(BACKBONES, safetensors_damaged)),
            read_backbones,
            weight=1.5,
        ),
        flag_kind("flag set", SETS, read_set, 2),
        flag_kind("flag member", MEMBERS, read_member_flag, 2),
        flag_kind("flag external", ("nih=a.csv,b.csv@shards/nih", "s=a.csv@l.csv#nih"), read_external_flag, 1),
        flag_kind("flag blank", ("zero", "masked,Edema=one", "0.5,Lung Lesion=zero"), read_blank, 1),
    ]
    return found


BUNDLE_FILES = BUNDLE_JSON | {"model.safetensors": safetensors_damaged, "manifest.json": json_damaged}
TARS = ("train-000000.tar", "train-000001.tar")
LABEL_MAP = b'[nih]\n"Pleural Effusion" = "Effusion"\n"Lung Lesion" = "Mass"\n[site]\nFracture = ""\n'
SPLIT = b"patient,fold\n" + b"".join(b"%08d,%d\n" % (number, number % 5) for number in range(20))
KINDS = {kind.name: kind for kind in _kinds()}


# Kinds that fail on purpose: a fuzz that finds nothing in them finds nothing.


def _fails(name: str, fail: Callable[[], object]) -> Kind:
    def read(folder: Path) -> object:
        return fail() if (folder / "file").read_bytes() != b"undamaged" else 0

    return Kind(name, written({"file": b"undamaged"}), files_of({"file": lambda rng, data: data + b"x"}), read, True)


def _holds_memory() -> object:
    return np.ones(1_300_000_000, np.uint8).sum() and 0


SELF_TEST = {
    kind.name: kind
    for kind in (
        _fails("fails: traceback", lambda: {}["missing"]),
        _fails("fails: slow", lambda: time.sleep(60)),
        _fails("fails: memory", _holds_memory),
        _fails("fails: wrong", lambda: 1),
        _fails("fails: traceback of a dead process", lambda: os._exit(3)),
    )
}
assert not set(itertools.chain(KINDS)) & SELF_TEST.keys()
