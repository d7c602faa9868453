"""Records what the code of a checkout produces, so that a refactor can be shown to change nothing, bit for bit.

  python tests/golden/record.py --project DIR --out FILE.json     run DIR's code on fixed inputs, about two minutes
  python tests/golden/record.py --compare A.json B.json           exit 1, and every difference by name

It drives command lines only and imports nothing of the project, so that one script runs on old and new code. Recorded
are stored images, metrics rows, hashes of trained tensors, score tables and submissions. The JSON documents beside them
are not: their format may change. Results are equal on one kind of CPU and one version of torch only, so both are
recorded, and a difference there is named first.
"""

import argparse
import hashlib
import io
import json
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file

# the competition's label columns
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
NUM_TRAIN, NUM_TEST = 40, 11
UNREADABLE = "00000920_001_001.jpg"  # in the template; no image
OVERSIZED = (3, 17)  # train images of 2,400 px and more, which `--mode fast` decodes at half size

EVA_X_SETS = ("image_size=64", "model_kwargs=depth=2,embed_dim=48,num_heads=3", "warmup_steps=2")
CHEXFOUND_SETS = (
    "image_size=64",
    "model_kwargs=decoder_dim=32,depth=4,embed_dim=32,init_values=1.0,num_heads=2",
    "warmup_steps=2",
)
# the published layer-wise rows: constant rates, no clipping, an EMA that does not ramp
LAYERWISE_SETS = (
    "image_size=32",
    "model_kwargs=depth=12,embed_dim=24,num_heads=2",
    "augment=crop_flip",
    "ema_decay=0.9",
)
# name: (recipe, processes, --set values); all crop and flip: that commit composed the other steps into one warp
RUNS: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "eva_x_1": ("demo_eva_x", 1, EVA_X_SETS),
    "eva_x_2": ("demo_eva_x", 2, EVA_X_SETS),
    "chexfound_1": ("demo_chexfound", 1, CHEXFOUND_SETS),
    "chexfound_2": ("demo_chexfound", 2, CHEXFOUND_SETS),
    "layerwise_2": ("eva_x_tiny", 2, LAYERWISE_SETS),
}
TRAIN_FLAGS = (
    *("--div", "b", "--init", "random", "--precision", "fp32", "--device-batch-size", "2", "--threads", "1"),
    *("--folds", "3", "--validate-fold", "0", "--log-every", "1", "--wandb", "off", "--timeout-s", "120"),
    *("--set", "global_batch_size=8", "--set", "epochs=2", "--set", "member_epochs=1,2"),
)
INFER_FLAGS = ("--div", "b", "--device-batch-size", "4", "--precision", "fp32")
# keys that rows of metrics.jsonl may have in the second record only: key -> reason
ALLOWED_NEW_KEYS: dict[str, str] = {}


def main() -> int:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--project", type=Path, metavar="DIR", help="checkout whose code runs")
    flags.add_argument("--out", type=Path, metavar="FILE", help="record to write")
    flags.add_argument("--compare", type=Path, nargs=2, metavar=("A", "B"), help="records to compare")
    args = flags.parse_args()
    if args.compare:
        return report(*(json.loads(path.read_text(encoding="utf-8")) for path in args.compare))
    if args.project is None or args.out is None:
        flags.error("give --project DIR and --out FILE, or --compare A B")
    with tempfile.TemporaryDirectory(prefix="cxrdist_record_") as folder:
        document = record(args.project.resolve(), Path(folder))
    args.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"{args.out}: {args.out.stat().st_size:,} bytes")
    return 0


def record(project: Path, folder: Path) -> dict[str, Any]:
    """Run the project's commands in `folder` and return what they produced."""
    write_inputs(folder / "inputs")
    document: dict[str, Any] = {"environment": environment(project), "inputs": files_sha256(folder / "inputs")}

    train_images = ("--images", "inputs/train", "--csv", "inputs/train.csv", "--rows-per-shard", "16")
    test_images = ("--images", "inputs/test", "--csv", "inputs/template.csv", "--split", "test")
    base = ("--div", "b", "--workers", "1")
    run_module(project, folder, "cxrdist.preprocess", *base, *train_images, "--out", "shards")
    run_module(project, folder, "cxrdist.preprocess", *base, *test_images, "--out", "shards")
    run_module(project, folder, "cxrdist.preprocess", *base, *train_images, "--mode", "fast", "--out", "fast")
    document["shards"] = read_shards(folder / "shards")
    document["shards_fast"] = read_shards(folder / "fast")

    document["runs"] = {}
    for name, (recipe, processes, values) in RUNS.items():
        sets = [part for value in values for part in ("--set", value)]
        place = ("--model", recipe, "--shards", "shards", "--out", f"runs/{name}")
        run_module(project, folder, "cxrdist.train", *TRAIN_FLAGS, *place, *sets, processes=processes)
        document["runs"][name] = read_run(folder / "runs" / name)

    eva_x = ("--member", "eva_x=runs/eva_x_1@1,2:tta")
    both = (*eva_x, "--member", "chexfound=runs/chexfound_1@1,2:plain*0.5")
    template = ("--template", "inputs/template.csv")
    document["inference"] = {}
    for name, processes, flags in (
        ("test_1", 1, (*both, *template)),
        ("test_2", 2, (*both, *template)),
        ("test_2_logit", 2, (*both, *template, "--average", "logit")),
        ("fold_1", 1, (*eva_x, "--split", "train", "--fold", "0")),  # folds come from a recipe's seed: one member
    ):
        place = ("--shards", "shards", "--out", name)
        run_module(project, folder, "cxrdist.infer", *INFER_FLAGS, *place, *flags, processes=processes)
        tables = [*sorted((folder / name / "scores").glob("*.csv")), folder / name / "submission.csv"]
        document["inference"][name] = {path.name: read_table(path) for path in tables if path.exists()}

    scores = ("--scores", "test_1/scores/eva_x.csv", "test_1/scores/chexfound.csv")
    ensemble = (*scores, *template)
    document["ensemble"] = {}
    for name, flags in (
        ("prob", ()),
        ("logit", ("--average", "logit", "--weights", "2", "1")),
        ("rank", ("--average", "rank", "--average-studies")),
    ):
        run_module(project, folder, "cxrdist.ensemble", *ensemble, *flags, "--out", f"{name}.csv")
        document["ensemble"][name] = read_table(folder / f"{name}.csv")
    return document


def run_module(project: Path, folder: Path, module: str, *arguments: str, processes: int = 1) -> str:
    """Run a module of `project` in `folder` on one thread per process and return its output; stop if it fails."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", module, *arguments]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    quiet = {"WANDB_MODE": "disabled", "ACCELERATE_USE_CPU": "true", "PYTHONDONTWRITEBYTECODE": "1"}
    started = time.monotonic()
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | threads | quiet | {"PYTHONPATH": str(project)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stdout[-6000:]}")
    print(f"{time.monotonic() - started:5.1f} s  {module} {' '.join(arguments)[-90:]}", flush=True)
    return done.stdout


def environment(project: Path) -> dict[str, Any]:
    """What the numbers depend on beside the code. Stops if Python would import cxrdist from elsewhere."""
    found = run_python(project, "import cxrdist; print(cxrdist.__file__)")
    if not Path(found).resolve().is_relative_to(project):
        raise SystemExit(f"cxrdist would be imported from {found}, not from {project}")
    git = subprocess.run(["git", "-C", str(project), "rev-parse", "HEAD"], capture_output=True, text=True)
    return {
        "commit": git.stdout.strip(),
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "torch_cpu_capability": run_python(project, "import torch; print(torch.backends.cpu.get_cpu_capability())"),
        **{name: version(name) for name in ("torch", "numpy", "pillow", "simplejpeg", "timm", "kornia", "accelerate")},
    }


def run_python(project: Path, code: str) -> str:
    options: dict[str, Any] = {"capture_output": True, "text": True, "check": True, "cwd": tempfile.gettempdir()}
    variables = os.environ | {"PYTHONPATH": str(project)}
    return str(subprocess.run([sys.executable, "-c", code], env=variables, **options).stdout).strip()


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


# ---- inputs


def write_inputs(folder: Path) -> None:
    """train/ and test/ images, train.csv with the competition's columns, and template.csv, whose rows are shuffled."""
    rng = np.random.default_rng(20240601)
    train = [f"{12 + i // 3:08d}_{1 + i % 3 // 2:03d}_{1 + i % 3 % 2:03d}" for i in range(NUM_TRAIN)]
    test = [f"{900 + i // 2:08d}_001_{1 + i % 2:03d}" for i in range(NUM_TEST)]
    names = {split: [name + extension(i) for i, name in enumerate(stems)] for split, stems in
             (("train", train), ("test", test))}  # fmt: skip
    for split, files in names.items():
        (folder / split).mkdir(parents=True)
        for i, name in enumerate(files):
            write_image(folder / split / name, i, rng, oversized=split == "train" and i in OVERSIZED)
    write_label_csv(folder / "train.csv", names["train"], rng)
    (folder / "test" / UNREADABLE).write_bytes(b"not an image")
    write_template(folder / "template.csv", [*names["test"], UNREADABLE], rng)


def extension(i: int) -> str:
    return ".png" if i % 5 in (2, 4) else ".jpg"


def write_image(path: Path, i: int, rng: np.random.Generator, *, oversized: bool) -> None:
    """Image `i`: grey, grey stored as RGB, colour, 16-bit grey or with alpha, in one of several sizes."""
    width, height = ((600, 600), (333, 601), (811, 640), (600, 750), (257, 190))[i % 7 % 5]
    if oversized:
        width, height = 2500, 2437 - i
    grey = smooth(rng, (width, height), 14)
    if path.suffix == ".jpg":
        channels = 1 if i % 4 == 0 or oversized else 3
        image = Image.fromarray(grey)
        if channels == 3 and i % 4 == 1:
            image = Image.merge("RGB", [image] * 3)
        elif channels == 3:
            image = Image.merge("RGB", [image, *(Image.fromarray(smooth(rng, (width, height), 9)) for _ in range(2))])
        image.save(path, "JPEG", quality=92)
        return
    if i % 3 == 0:
        Image.fromarray(grey.astype(np.uint16) * 13).save(path)
    elif i % 3 == 1:
        alpha = Image.fromarray(smooth(rng, (width, height), 3))
        Image.merge("RGBA", [*(Image.fromarray(smooth(rng, (width, height), 8)) for _ in range(3)), alpha]).save(path)
    else:
        Image.fromarray(grey).save(path)


def smooth(rng: np.random.Generator, size: tuple[int, int], cells: int) -> NDArray[np.uint8]:
    """A (height, width) uint8 picture: `cells` x `cells` random grey levels, enlarged to `size` (width, height)."""
    coarse = Image.fromarray(rng.integers(0, 256, (cells, cells), dtype=np.uint8))
    return np.asarray(coarse.resize(size, Image.Resampling.BICUBIC))


def write_label_csv(path: Path, names: list[str], rng: np.random.Generator) -> None:
    columns = ("Image_name", "Patient_ID", "Study", "Sex", "Age", "ViewCategory", "ViewPosition", *LABELS)
    lines = [",".join(columns)]
    for i, name in enumerate(names):
        labels = (rng.random(len(LABELS)) < 0.35).astype(int)
        about = (("Female", "Male")[i % 2], 20 + i, ("Frontal", "Lateral")[i % 2], ("PA", "LL", "AP")[i % 3])
        lines.append(",".join(map(str, (name, int(name[:8]), name[9:12], *about, *labels))))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_template(path: Path, names: list[str], rng: np.random.Generator) -> None:
    """A sample submission with its rows shuffled."""
    rows = [f"{names[i]}," + ",".join("0" * len(LABELS)) for i in rng.permutation(len(names))]
    path.write_text("\n".join([",".join(("Image_name", *LABELS)), *rows]) + "\n", encoding="utf-8")


# ---- what was produced


def read_shards(folder: Path) -> dict[str, Any]:
    """For every split and key: hashes of the stored JPEG and of its decoded pixels, and the JSON member."""
    shards: dict[str, Any] = {}
    for path in sorted(folder.glob("*.tar")):
        entries = shards.setdefault(path.name.rpartition("-")[0], {})
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, kind = member.name.partition(".")
                file = tar.extractfile(member)
                assert file is not None
                data = file.read()
                entry = entries.setdefault(key, {"tar": path.name})
                if kind == "json":
                    entry["json"] = json.loads(data)
                    continue
                with Image.open(io.BytesIO(data)) as image:
                    pixels = np.asarray(image)
                entry |= {"jpeg": sha256(data), "shape": list(pixels.shape), "pixels": sha256(pixels.tobytes())}
    return shards


def read_run(run: Path) -> dict[str, Any]:
    """Every row of metrics.jsonl, and the hash of every tensor of the last epoch and of the newest step checkpoint."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    newest = max((run / "checkpoints").glob("step_*"), key=lambda folder: int(folder.name[5:]))
    epoch = max((run / "checkpoints").glob("epoch_*"))
    checkpoints = {folder.name: tensors_sha256(folder) for folder in (epoch, newest)}
    backbone = tensors_sha256(run)  # of a model with a frozen backbone that began with --init random
    return {"metrics": [json.loads(line) for line in lines], "checkpoints": checkpoints, "run_folder": backbone}


def tensors_sha256(folder: Path) -> dict[str, dict[str, str]]:
    """File -> tensor -> type, shape and hash of the bytes, of all safetensors directly in `folder`."""
    return {
        path.name: {
            name: f"{tensor.dtype} {list(tensor.shape)} {sha256(np.ascontiguousarray(tensor).tobytes())}"
            for name, tensor in sorted(load_file(path).items())
        }
        for path in sorted(folder.glob("*.safetensors"))
    }


def read_table(path: Path) -> dict[str, Any]:
    return {"sha256": sha256(path.read_bytes()), "lines": path.read_text(encoding="utf-8").split("\n")}


def files_sha256(folder: Path) -> dict[str, str]:
    """Relative path -> hash of every file below `folder`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): sha256(path.read_bytes()) for path in files}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# ---- comparison


def report(first: dict[str, Any], second: dict[str, Any]) -> int:
    """Print every difference; 1 if a recorded result differs. Another environment is named and is no difference."""
    for name, before, after in differences(first.pop("environment"), second.pop("environment"), "environment"):
        print(f"note: {name}: {before} -> {after}")
    found = list(differences(first, second, ""))
    for name, before, after in found:
        print(f"{name}: {before} -> {after}")
    print(f"{len(found)} differences in {count(first):,} recorded values")
    return 1 if found else 0


def differences(first: Any, second: Any, name: str) -> Iterator[tuple[str, str, str]]:
    """(name, first, second) of every leaf that differs, as JSON text: floats are compared by all their digits."""
    if isinstance(first, list) and isinstance(second, list):
        first, second = dict(enumerate(first)), dict(enumerate(second))
    if isinstance(first, dict) and isinstance(second, dict):
        for key in [*first, *(key for key in second if key not in first)]:
            below = f"{name}/{key}" if name else str(key)
            if key not in second:
                yield below, _text(first[key]), "missing"
            elif key not in first:
                if not ("/metrics/" in below and key in ALLOWED_NEW_KEYS):
                    yield below, "missing", _text(second[key])
            else:
                yield from differences(first[key], second[key], below)
    elif json.dumps(first) != json.dumps(second):
        yield name, _text(first), _text(second)


def count(value: Any) -> int:
    if isinstance(value, dict | list):
        return sum(map(count, value.values() if isinstance(value, dict) else value))
    return 1


def _text(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 160 else f"{text[:157]}..."


if __name__ == "__main__":
    raise SystemExit(main())
