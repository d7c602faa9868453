"""What a user has after a first week, small, and made by the commands themselves: for the tests of their mistakes."""

import contextlib
import csv
import io
import json
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from PIL import Image

from cxrdist import calibrate, export, infer, preprocess, train

LABELS = ("Tuberculosis", "Nodule", "Normal")
SMALL = "--set image_size=32 --set model_kwargs=depth=2,embed_dim=24,num_heads=2 --set global_batch_size=8"
TRAIN = f"--model eva_x_tiny --init random {SMALL} --precision fp32 --threads 1 --wandb off"
PRECISE = "--precision fp32 --device-batch-size 8"
TASK = 'name = "tb"\nlabels = ["Tuberculosis", "Nodule", "Normal"]\n[columns]\nimage = "file"\npatient = "who"\n'
RECIPES = """
from dataclasses import replace

from cxrdist.recipes import eva_x


def longer(task):
    return replace(eva_x(task), name="longer", epochs=12)


def wrong(task):
    return replace(eva_x(task), epoch=12)


def nothing(task):
    eva_x(task)
"""


def make_mistakes_world(folder: Path) -> None:
    """Fill `folder`, where commands are then typed: images, tables, shards, runs, scores, a calibration, a bundle."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        write_images(Path("images"), 30)
        write_images(Path("new"), 3, "new")
        write_images(Path("others"), 3, "other")
        write_tables()
        columns = "--patient-column who --workers 1 --size 384"
        run(preprocess, f"--images images --csv table.csv --labels {','.join(LABELS)} --name tb {columns}")
        run(preprocess, "--images new --out shards/tb --split new --workers 1 --size 384")
        run(preprocess, f"--images images --csv lung.csv --labels Mass,Edema --name lung {columns}")
        run(train, f"--shards shards/tb {TRAIN} --set epochs=2 --set member_epochs=1,2")
        run(train, f"--shards shards/lung {TRAIN} --set epochs=1 --set member_epochs=1")
        scored = f"--split train --fold 0 {PRECISE}"
        run(infer, f"--shards shards/tb {scored} --member eva=runs/eva_x_tiny_tb@2 --member early=runs/eva_x_tiny_tb@1")
        run(infer, f"--shards shards/tb --split train {PRECISE} --member eva=runs/eva_x_tiny_tb@2 --out seen")
        run(infer, f"--shards shards/lung {scored} --member lung=runs/eva_x_tiny_lung@1")
        write_truth()
        run(calibrate, "--scores predictions/tb/scores/eva.csv --csv truth.csv --resamples 5 --out calibration")
        run(export, "eva=runs/eva_x_tiny_tb@2 --out bundle")
        write_wrong_files()


def run(entry: ModuleType, line: str) -> None:
    entry.main(line.split())


def write_images(folder: Path, number: int, name: str = "chest") -> None:
    rng = np.random.default_rng(0)
    folder.mkdir()
    for place in range(number):
        noise = Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8))
        noise.resize((96, 80), Image.Resampling.BICUBIC).save(folder / f"{name}{place:02d}.png")


def write_table(name: str, rows: list[list[object]]) -> None:
    with Path(name).open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)


def write_tables() -> None:
    """Good tables, and those that are wrong in one thing each."""
    names = [path.name for path in sorted(Path("images").iterdir())]
    rng = np.random.default_rng(1)

    def table(*labels: str) -> list[list[object]]:
        cells = rng.integers(0, 2, (len(names), len(labels))).tolist()
        return [["file", "who", *labels], *([name, f"p{row // 2}", *cells[row]] for row, name in enumerate(names))]

    good = table(*LABELS)
    write_table("table.csv", good)
    write_table("lung.csv", table("Mass", "Edema"))
    write_table("header.csv", good[:1])
    write_table("words.csv", [*good[:3], [names[2], "p1", "yes", 0, 1], *good[4:]])
    write_table("blanks.csv", [*good[:3], [names[2], "p1", "", 0, 1], *good[4:]])
    write_table("unsure.csv", [*good[:3], [names[2], "p1", -1, 0, 1], *good[4:]])
    write_table("twice.csv", [*good, good[1]])
    write_table("short.csv", [*good[:3], [names[2], "p1", 0]])
    write_table("elsewhere.csv", [good[0], *([f"x{row[0]}", *row[1:]] for row in good[1:])])
    write_table("template.csv", [["file", *LABELS], *([f"new{place:02d}.png", 0, 0, 0] for place in range(3))])
    Path("empty.csv").touch()
    Path("latin.csv").write_bytes("file,who,Nodule\nchest00.png,M\xfcller,1\n".encode("latin-1"))
    Path("excel.xlsx").write_bytes(b"PK\x03\x04" + bytes(range(256)) * 4)
    Path("task.toml").write_text(TASK)
    Path("broken.toml").write_text("name = tb\n")
    Path("labels.txt").write_text("Tuberculosis\nNodule\n")


def write_truth() -> None:
    """Labels that the scores of these images agree with, which a model of two epochs does not."""
    head, *rows = csv.reader(Path("predictions/tb/scores/eva.csv").read_text().splitlines())
    scores = np.array([row[1:] for row in rows], dtype=float)
    found = (scores >= np.median(scores, axis=0)).astype(int).tolist()
    names = [row[0] for row in rows]
    write_table(
        "truth.csv", [["file", "who", *head[1:]], *([name, name, *found[row]] for row, name in enumerate(names))]
    )


def write_wrong_files() -> None:
    """Folders that are not finished, files that are something else, and files that cxrdist did not write."""
    shutil.copytree("runs/eva_x_tiny_tb", "runs/unfinished", ignore=shutil.ignore_patterns("checkpoints"))
    shutil.copytree("runs/eva_x_tiny_tb", "runs/damaged")
    next(Path("runs/damaged/checkpoints/epoch_02").glob("ema.*")).write_bytes(b"cut")
    shutil.copytree("shards/tb", "shards/no_tars")
    for tar in Path("shards/no_tars").glob("*.tar"):
        tar.unlink()
    shutil.copytree("shards/tb", "shards/damaged")
    tar = next(Path("shards/damaged").glob("train-*.tar"))
    tar.write_bytes(tar.read_bytes()[:-5000])
    Path("runs/notes").mkdir()
    Path("runs/notes/todo.txt").write_text("train again\n")
    Path("notes.txt").write_text("call the radiologist\n")
    Path("broken.png").write_text("<html>not found</html>")
    Path("broken.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}")
    Path("version.pt").write_text("version https://git-lfs.github.com/spec/v1\n")
    Path("my_recipes.py").write_text(RECIPES)
    Path("mine.csv").write_text("my own results\n")
    Path("mine").mkdir()
    Path("mine/report.html").write_text("my own report\n")
    Path("empty").mkdir()
    Path("dicoms").mkdir()
    Path("dicoms/a.dcm").write_bytes(bytes(128) + b"DICM")
    Path("competition/train2").mkdir(parents=True)
    shutil.copy("images/chest00.png", "competition/train2")
    Path("scores").mkdir()
    table = Path("predictions/tb/scores/eva.csv").read_text().splitlines()
    Path("scores/part.csv").write_text("\n".join(table[:3]) + "\n")
    Path("scores/text.csv").write_text("\n".join([table[0], table[1].rpartition(",")[0] + ",high"]) + "\n")
    Path("scores/labels.csv").write_text("\n".join([table[0].replace("Nodule", "Nodules"), *table[1:]]) + "\n")
    Path("scores/eva.csv").write_text("\n".join(table) + "\n")
    Path("settings.json").write_text(json.dumps({"lr": 1}))
    Path("map.toml").write_text('[lung]\n"Nodulus" = "Mass"\n')
