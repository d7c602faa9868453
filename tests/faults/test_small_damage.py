"""Small damage where a fallback is promised, and documents, recipes, indexes and weights of hostile content: named."""

import io
import json
import pickle
import resource
import struct
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cxrdist.documents import read_json_lines
from cxrdist.errors import CheckpointError, UserError
from cxrdist.evaluate import read_metrics
from cxrdist.inference.parts import Basis, Part, PartStore
from cxrdist.models import architecture_of
from cxrdist.models.weights.layouts import read_weights, safe_torch_load
from cxrdist.recipes import Recipe, demo_eva_x, from_json, to_json, with_overrides
from cxrdist.report.figures import training_section
from cxrdist.runs import checkpoint, start
from cxrdist.runs.documents import Facts, RunDocument, Sessions, StepState, read_versioned
from cxrdist.shards.convert import Converted, convert_bytes
from cxrdist.tables import read_cells, read_label_csv
from cxrdist.task import TASKS
from cxrdist.training import tracking

pytestmark = pytest.mark.fast
FACTS = Facts(task="b", split="train", shards="s", images=8, positives={}, folds=None, validate_fold=None)
SESSION = start.describe_session(torch.device("cpu"), 1, 4, "fp32")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with two step checkpoints."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text(RunDocument(id="0", data=FACTS).to_json())
    start.write_start(folder, demo_eva_x("b"), TASKS["b"], SESSION)
    for step in (1, 2):
        state = StepState(
            global_step=step, world_size=1, device_batch_size=4, precision="fp32", data=FACTS, frozen=None
        )
        tensors = {"model": {"x": torch.ones(3)}}
        checkpoint.write_checkpoint(checkpoint.step_folder(folder, step), tensors, {"state": state})
    return folder


def test_a_flipped_bit_anywhere_in_the_newest_manifest_falls_back_to_the_one_before(run: Path) -> None:
    manifest = checkpoint.step_folder(run, 2) / "manifest.json"
    content = manifest.read_bytes()
    same = json.loads(content)
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        manifest.write_bytes(flipped)
        newest, warnings = checkpoint.newest_step(run)
        if newest == checkpoint.step_folder(run, 2):  # white space for another
            assert json.loads(bytes(flipped)) == same
        else:
            assert newest == checkpoint.step_folder(run, 1)
            assert "manifest.json" in warnings[0] or "step_2" in warnings[0]
            assert "\n" not in warnings[0]


def test_a_manifest_with_names_that_no_file_can_have_is_damage(run: Path) -> None:
    manifest = checkpoint.step_folder(run, 2) / "manifest.json"
    for name in ("x" * 300, "a\0b", "../recipe.json", ""):
        manifest.write_text(json.dumps({"format_version": 2, "files": {name: {"bytes": 1, "sha256": "0"}}}))
        with pytest.raises(CheckpointError):
            checkpoint.check(manifest.parent)


def test_a_cut_environment_is_kept_aside_with_a_warning_and_the_run_goes_on(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "environment.json"
    cut = path.read_bytes()[:50]
    path.write_bytes(cut)
    start.write_start(run, demo_eva_x("b"), TASKS["b"], SESSION)
    assert len(read_versioned(Sessions, path).sessions) == 1
    assert path.with_suffix(".damaged").read_bytes() == cut
    assert "environment.json" in capsys.readouterr().err


def test_a_recipe_that_is_not_utf8_is_named(run: Path) -> None:
    (run / "recipe.json").write_bytes(b"\xff" + (run / "recipe.json").read_bytes())
    with pytest.raises(UserError, match=r"recipe\.json is not a recipe"):
        start.find_start(run, demo_eva_x("b"), FACTS, resume=True, say=print)


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped"])
def test_a_damaged_part_is_left_out_to_be_scored_again(damage: str, tmp_path: Path) -> None:
    part = Part(np.array([0]), np.arange(4), np.zeros((1, 4, 2), np.float32), {})
    store = PartStore(tmp_path, Basis(shards="", rows="", columns=(), device_batch_size=4, precision="", device="cpu"))
    store.write(part, 0)
    (path,) = store.folder.iterdir()
    content = path.read_bytes()
    places = range(len(content)) if damage == "flipped" else [0]
    for place in places:
        flipped = bytearray(content)
        flipped[place] ^= 16
        path.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "flipped": bytes(flipped)}[damage])
        assert store.read_all() == {}
    path.write_bytes(content)
    assert len(store.read_all()) == 1


BAD_LINES = (
    b"\xff\xfe",
    b"{",
    b"[1]",
    b"null",
    b'{"kind": "train"}',
    b'{"step": "x"}',
    b'{"step": null}',
    b"[" * 99_999,
)


@pytest.mark.parametrize("bad", BAD_LINES)
def test_a_bad_line_of_the_log_is_dropped_with_a_warning(
    bad: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [{"kind": "train", "step": step, "epoch": 1, "loss": 0.5} for step in (1, 2)]
    lines = [json.dumps(good[0]).encode(), bad, json.dumps(good[1]).encode()]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    assert tracking._history(tmp_path) == good
    assert "1 damaged lines" in capsys.readouterr().err
    assert read_metrics(tmp_path) == good
    assert "1 damaged lines" in capsys.readouterr().err


def test_a_validation_row_without_a_score_is_drawn_without_it(tmp_path: Path) -> None:
    rows = [{"kind": "train", "step": 1, "epoch": 1, "loss": 0.5}, {"kind": "validation", "step": 1, "epoch": 1}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert training_section({"run": read_metrics(tmp_path)}, {"run": 0}).body


def test_a_log_that_is_missing_has_no_rows(tmp_path: Path) -> None:
    assert read_json_lines(tmp_path / "none") == ([], 0)


# Recipes.


@pytest.mark.parametrize(
    "text",
    [
        *("image_size=160000", "model_kwargs=num_heads=0", "model_kwargs=num_heads=7", "model_kwargs=depth=100000"),
        *("model_kwargs=embed_dim=60000", "model_kwargs=embed_dim=-1", "epochs=10000000000", "global_batch_size=0"),
        *("seed=-1", "seed=99999999999999999999", "focal_gamma=1e300", "ema_decay=nan", "image_size=100"),
    ],
)
def test_numbers_of_a_recipe_are_named_before_memory_is_used(text: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    with pytest.raises(UserError, match=text.split("=")[0]):
        build(with_overrides(demo_eva_x("b"), [text]))
    assert time.perf_counter() - begin < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


def build(recipe: Recipe) -> None:
    architecture_of(recipe.model).build(recipe.image_size, 14, **dict(recipe.model_kwargs))


def test_sizes_are_checked_without_a_change_of_the_random_numbers() -> None:
    """Small variants begin with the weights that they always began with."""
    torch.manual_seed(3)
    expected = architecture_of("eva_x_tiny").create(32, 2, 0.0, depth=2)
    torch.manual_seed(3)
    found = architecture_of("eva_x_tiny").build(32, 2, 0.0, depth=2)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, found.state_dict()[name]), name


@pytest.mark.parametrize(("key", "value"), [("pattern", "("), ("lr", -1.0), ("lr", 1e300), ("weight_decay", -1.0)])
def test_a_group_that_no_optimizer_takes_is_named(key: str, value: Any) -> None:
    document = json.loads(to_json(demo_eva_x("b")))
    document["groups"][0][key] = value
    with pytest.raises(UserError, match="groups"):
        from_json(json.dumps(document))


# Memory.


def legacy(item: bytes) -> bytes:
    """A legacy torch file whose object is {"a": item}."""
    start_of_file = [pickle.dumps(value, protocol=2) for value in (0x1950A86A20F9469CFC6C, 1001, {})]
    return b"".join(start_of_file) + b"\x80\x02}X\x01\0\0\0a" + item + b"s." + pickle.dumps([], protocol=2)


THREE_GB = b"J" + struct.pack("<i", 800_000_000)
STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu" + THREE_GB + b"NtQ"
OTHERS = [b"cbuiltins\nbytearray\n", b"ctorch\nTensor\n", b"ctorch\nFloatTensor\n"]


def in_zip(content: bytes, compression: int) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", compression) as archive:
        archive.writestr("a/data.pkl", content)
        archive.writestr("a/version", b"3")
    return target.getvalue()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        *((lambda name=name: legacy(name + THREE_GB + b"\x85R"), r"\w+\.\w+") for name in OTHERS),
        (lambda: legacy(STORAGE), "declares 800,000,000 values"),
        (lambda: legacy(b"X" + struct.pack("<I", 2**31 - 1) + b"x"), "cut short"),
        (lambda: in_zip(b"\x80\x02]" + b"N0" * 100_000_000 + b".", zipfile.ZIP_DEFLATED), "unpacks to more than"),
        (lambda: in_zip(b"\x80\x02cbuiltins\nbytearray\n" + THREE_GB + b"\x85R.", zipfile.ZIP_STORED), "bytearray"),
    ],
)
def test_a_weight_file_that_asks_for_gigabytes_is_refused_before_they_are_taken(
    make: Callable[[], bytes], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(make())
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch was asked to read it"))
    with pytest.raises(UserError, match=reason) as caught:
        safe_torch_load(path)
    assert str(path) in str(caught.value)


def test_a_tensor_of_more_values_than_are_stored_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"cls_token": torch.zeros(1).expand(800_000_000)}, path)
    assert path.stat().st_size < 10_000
    with pytest.raises(UserError, match="no tensor of its own values"):
        read_weights(path)


def png(width: int, height: int, depth: int, colour: int) -> bytes:
    """A PNG of zeros: `depth` bits a channel, colour 0 (grey) or 6 (RGBA)."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    line = bytes(1 + width * depth // 8 * (4 if colour == 6 else 1))
    packer = zlib.compressobj(9)
    pixels = b"".join(packer.compress(line) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("depth", "colour"), [(16, 0), (8, 6)])
def test_a_small_png_of_many_pixels_takes_less_than_a_gigabyte(depth: int, colour: int) -> None:
    content = png(9000, 9900, depth, colour)  # 89.1 million pixels; 89.5 are refused
    assert len(content) < 500_000
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark of the resident memory
    before = memory("VmRSS")
    assert isinstance(convert_bytes(content), Converted)
    assert memory("VmHWM") - before < 2**30
    assert "decompression bomb" in str(convert_bytes(png(9000, 10000, depth, colour)))


def memory(name: str) -> int:
    """Bytes, a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def test_40_000_more_columns_take_no_more_than_linear_time(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    header = ",".join(["Image_name", *(f"c{number}" for number in range(40_000))])
    path.write_text(f"{header}\n" + f"a.jpg{',' * 40_000}\n" * 3)
    begin = time.perf_counter()
    assert len(read_cells(path)) == 3
    with pytest.raises(UserError, match="is missing"):
        read_label_csv(path, TASKS["b"])
    assert time.perf_counter() - begin < 3


def test_an_error_is_one_line_whatever_it_quotes() -> None:
    text = str(UserError("a\nb\u2028c" + "x" * 10_000 + "end"))
    assert text.startswith("a b c")
    assert text.endswith("end")
    assert len(text) <= 2000
