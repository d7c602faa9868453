"""Makes tests/golden/version1/: files of format version 1 as the code before the refactor wrote them (commit c512b50).

  python tests/golden/make_version1.py --project DIR      DIR: a checkout of that commit; about two minutes

Shards, unfinished and finished runs, score tables and averaged weights that users have on disk: code of today must read
them, and resume what is unfinished. Models are a few numbers wide and images smooth, so that all of it fits in git.
Needs no network; replaces the folder. `expected.json` holds the commands and the machine, README.md says what is what.
"""

import argparse
import json
import shlex
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from record import (
    LABELS,
    environment,
    files_sha256,
    run_module,
    smooth,
    tensors_sha256,
    write_template,
)

FOLDER = Path(__file__).parent / "version1"
NUM_PATIENTS, NUM_TEST = 6, 5  # two train images of each patient
UNREADABLE = "00000300_001_001.jpg"  # a test image that is no image
NUM_STEPS = 6  # optimizer steps, three an epoch
STOP_AFTER = {"eva_x": 4, "chexfound": 2}  # one half run ends inside its second epoch, one inside its first
SHARED_FLAGS = (
    *("--div", "b", "--shards", "shards", "--init", "random", "--precision", "fp32", "--device-batch-size", "2"),
    *("--threads", "1", "--folds", "3", "--validate-fold", "0", "--log-every", "3", "--keep-steps", "1"),
    *("--checkpoint-minutes", "60", "--timeout-s", "120", "--wandb", "off"),
    # three images a step and two a pass: the last pass of a step is smaller, and the last step of an epoch has two
    *("--set", "epochs=2", "--set", "member_epochs=1,2", "--set", "global_batch_size=3", "--set", "seed=22"),
    *("--set", "image_size=32", "--set", "warmup_steps=2"),
)
MODEL_FLAGS = {
    "eva_x": ("--model", "demo_eva_x", "--set", "model_kwargs=depth=2,embed_dim=4,num_heads=1"),
    "chexfound": (
        *("--model", "demo_chexfound", "--set"),
        "model_kwargs=decoder_dim=8,depth=4,embed_dim=8,init_values=1.0,num_heads=2",
    ),
}
MEMBERS = ("--member", "eva_x=run_full_eva_x@1,2:tta", "--member", "chexfound=run_full_chexfound@1,2")
INFER_FLAGS = ("--div", "b", "--shards", "shards", "--device-batch-size", "4", "--precision", "fp32", *MEMBERS)
COMMANDS = {
    "train_eva_x": ("cxrdist.train", *SHARED_FLAGS, *MODEL_FLAGS["eva_x"]),
    "train_chexfound": ("cxrdist.train", *SHARED_FLAGS, *MODEL_FLAGS["chexfound"]),
    "out": ("cxrdist.infer", *INFER_FLAGS, "--template", "template.csv"),
    "oof": ("cxrdist.infer", *INFER_FLAGS, "--split", "train", "--fold", "0"),
    "average": ("cxrdist.average", "--from", "run_full_chexfound@1,2"),
}
README = """# Files of format version 1

Written by the code of commit {commit} with `tests/golden/make_version1.py`, on synthetic images and models a few
numbers wide. Tests read them with the code of today. Do not make them again with newer code: that they are old is the
point.

| | |
|---|---|
| `shards/` | division b: {train} train images of {patients} patients, {test} test images; `{unreadable}` is left out |
| `labels.csv`, `template.csv` | the train images' label CSV; a sample submission, its rows shuffled |
| `run_half_*/` | stopped by `--max-steps` inside an epoch ({stops}); to finish them: the flags below, `--resume` |
| `run_full_*/` | the same command, undisturbed; a half run resumed by the old code was equal to it, bit for bit. |
| | Their step checkpoint is not kept (size): its tensors' hashes are in `expected.json` |
| `out/` | score tables and submission of both full runs |
| `oof/` | score tables of fold 0 of the training split |
| `average/` | `cxrdist.average` of the CheXFound run's two epochs; its backbone lies in `run_full_chexfound/` |
| `expected.json` | the commands as lists, and the machine that ran them: numbers are equal on its like only |

The commands, run in this folder on one process and one thread (`OMP_NUM_THREADS=1 MKL_NUM_THREADS=1`), `--out` added:

```
{commands}
```
"""


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--project", type=Path, required=True, metavar="DIR", help="checkout of the old code")
    project = flags.parse_args().project.resolve()
    machine = environment(project)
    newest_steps = {}
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    with tempfile.TemporaryDirectory(prefix="cxrdist_version1_") as folder:
        scratch = Path(folder)
        make_shards(project, scratch)
        for name in MODEL_FLAGS:
            newest_steps[f"run_full_{name}"] = make_runs(project, name, scratch)
        make_tables(project, scratch)
        run(project, "average", "--out", "average")
    for lock in FOLDER.rglob(".lock"):
        lock.unlink()
    write_documents(machine, newest_steps)
    sizes = [path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()]
    print(f"{FOLDER}: {len(sizes)} files, {sum(sizes):,} bytes")


def run(project: Path, name: str, *more: str) -> None:
    module, *arguments = COMMANDS[name]
    run_module(project, FOLDER, module, *arguments, *more)


def make_shards(project: Path, scratch: Path) -> None:
    """Images (not kept), CSVs and shards. Each patient has every label once, so that every fold has an AUROC."""
    rng = np.random.default_rng(20240602)
    columns = ("Image_name", "Patient_ID", "Study", "Sex", "Age", "ViewCategory", "ViewPosition", *LABELS)
    lines = [",".join(columns)]
    for split in ("train", "test"):
        (scratch / split).mkdir()
    for patient in range(NUM_PATIENTS):
        labels = (rng.random(len(LABELS)) < 0.5).astype(int)
        for image, values in enumerate((labels, 1 - labels)):
            name = f"{100 + patient:08d}_{1 + image:03d}_001.jpg"
            write_image(scratch / "train" / name, rng, channels=3 if patient == 2 else 1)
            about = (("Female", "Male")[patient % 2], 30 + 7 * patient, "Frontal", ("PA", "AP")[image])
            lines.append(",".join(map(str, (name, 100 + patient, f"{1 + image:03d}", *about, *values))))
    (FOLDER / "labels.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    names = [f"{200 + i // 2:08d}_001_{1 + i % 2:03d}.jpg" for i in range(NUM_TEST)]
    for i, name in enumerate(names):
        write_image(scratch / "test" / name, rng, channels=3 if i == 3 else 1)
    (scratch / "test" / UNREADABLE).write_bytes(b"not an image")
    write_template(FOLDER / "template.csv", [*names, UNREADABLE], rng)
    base = ("--div", "b", "--workers", "1", "--out", "shards")
    train = ("--images", str(scratch / "train"), "--csv", "labels.csv", "--rows-per-shard", "8")
    test = ("--images", str(scratch / "test"), "--csv", "template.csv", "--split", "test")
    run_module(project, FOLDER, "cxrdist.preprocess", *base, *train)
    run_module(project, FOLDER, "cxrdist.preprocess", *base, *test)


def write_image(path: Path, rng: np.random.Generator, *, channels: int) -> None:
    """A few soft blobs, saved as PNG whatever the name says: JPEG noise would make the stored images larger."""
    planes = [Image.fromarray(smooth(rng, (600, 600), 3) // 2 + 60) for _ in range(channels)]
    image = planes[0] if channels == 1 else Image.merge("RGB", planes)
    image.save(path, "PNG")


def make_runs(project: Path, name: str, scratch: Path) -> dict[str, dict[str, str]]:
    """The undisturbed run and the stopped one; a copy of the latter, resumed, has to equal the former.

    Returns the hashes of the undisturbed run's last step checkpoint, which is removed.
    """
    half, full, resumed = FOLDER / f"run_half_{name}", FOLDER / f"run_full_{name}", scratch / f"resumed_{name}"
    run(project, f"train_{name}", "--out", full.name)
    run(project, f"train_{name}", "--out", half.name, "--max-steps", str(STOP_AFTER[name]))
    if not (half / "checkpoints" / f"step_{STOP_AFTER[name]}").is_dir() or steps_done(full) != NUM_STEPS:
        raise SystemExit(f"{half} was not stopped after {STOP_AFTER[name]} steps of {NUM_STEPS}")
    shutil.copytree(half, resumed)
    run(project, f"train_{name}", "--out", str(resumed), "--resume")
    if results(resumed) != results(full):
        raise SystemExit(f"{half}, resumed, is not equal to {full}")
    print(f"{half.name}, resumed, equals {full.name}")
    newest = full / "checkpoints" / f"step_{NUM_STEPS}"
    hashes = tensors_sha256(newest)
    shutil.rmtree(newest)
    return hashes


def steps_done(run: Path) -> int:
    return max(int(folder.name.removeprefix("step_")) for folder in (run / "checkpoints").glob("step_*"))


def results(folder: Path) -> dict[str, Any]:
    """Metrics, and the hash of every tensor of every checkpoint."""
    checkpoints = sorted((folder / "checkpoints").iterdir())
    tensors = {checkpoint.name: tensors_sha256(checkpoint) for checkpoint in checkpoints}
    backbone = tensors_sha256(folder)
    return {"metrics": (folder / "metrics.jsonl").read_text(encoding="utf-8"), "tensors": tensors, "frozen": backbone}


def make_tables(project: Path, scratch: Path) -> None:
    """out/ and oof/, without the parts a stopped inference would resume from; the latter are fit to be evaluated."""
    run(project, "out", "--out", "out")
    run(project, "oof", "--out", str(scratch / "oof"))
    shutil.rmtree(FOLDER / "out" / "parts", ignore_errors=True)
    shutil.copytree(scratch / "oof" / "scores", FOLDER / "oof")
    tables = [str(path) for path in sorted((FOLDER / "oof").glob("*.csv"))]
    place = ("--csv", "labels.csv", "--out", str(scratch / "report"), "--resamples", "20")
    run_module(project, FOLDER, "cxrdist.evaluate", "--scores", *tables, *place)


def write_documents(machine: dict[str, Any], newest_steps: dict[str, Any]) -> None:
    document = {
        "environment": machine,
        "commands": {name: list(command) for name, command in COMMANDS.items()},
        "stopped_after_steps": dict(STOP_AFTER),
        "steps": NUM_STEPS,
        "unreadable": UNREADABLE,
        "train_images": 2 * NUM_PATIENTS,
        "test_images": NUM_TEST,
        "newest_step_tensors": newest_steps,
        "sha256": files_sha256(FOLDER),
    }
    (FOLDER / "expected.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    text = README.format(
        commit=machine["commit"][:7],
        train=2 * NUM_PATIENTS,
        patients=NUM_PATIENTS,
        test=NUM_TEST,
        unreadable=UNREADABLE,
        stops=", ".join(f"{name} after step {step} of {NUM_STEPS}" for name, step in STOP_AFTER.items()),
        commands="\n".join(f"python -m {shlex.join(command)}" for command in COMMANDS.values()),
    )
    (FOLDER / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
