"""What people get wrong in their first week, command by command, read as they read it.

Each row is a mistake, what the line must name, and the remedy that it must give. Whatever the mistake: one line on
stderr, no traceback, exit code 2, nothing written anywhere, and no image decoded for it.
"""

import importlib.util
import os
import re
import shlex
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from cxrdist import __main__ as commands
from cxrdist.data.loader import Loader
from cxrdist.demo import phantoms
from cxrdist.files import LOCK_FILE, folder_lock
from cxrdist.inference.predictor import Predictor
from cxrdist.scoring import evaluation
from cxrdist.shards import adopt, writer
from tests.mistakes_world import make_mistakes_world

pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules")
LONGEST = 320  # characters of a line that is read, not skimmed
NUM_ROWS = 10
FEW = {  # commands that have less to get wrong
    "recipes": "one name",
    "completion": "one word",
}
HELP = "cxrdist {command} --help"  # the remedy of a line that only says which flag is missing
TINY = "--model eva_x_tiny --init random"
TB = "--shards shards/tb"
OWN = "--images images --csv table.csv --labels Nodule --out sets/new"
NEW = f"{TB} --split new --out sc"
EVA = "--member eva=runs/eva_x_tiny_tb"
SCORES = "--scores predictions/tb/scores/eva.csv"
LUNG = "predictions/lung/scores/lung.csv"
EARLY = "predictions/tb/scores/early.csv"
EXTERNAL = "--external tb=predictions/tb/scores/eva.csv"
SHEET = "--augment-sheet look.png"
DEMO = "--images images --csv table.csv --task task.toml --out dm"


class Mistake(NamedTuple):
    """flags: as typed after the command. without: packages that this machine lacks."""

    flags: str
    names: str
    remedy: str
    without: str = ""


MISTAKES = {
    "": [
        Mistake("trian --task b", "'trian'", "did you mean train"),
        Mistake("recipe", "'recipe'", "did you mean recipes"),
        Mistake("Train --task b", "'Train'", "did you mean train"),
        Mistake("train.py --task b", "'train.py'", "did you mean train"),
        Mistake("predictions", "'predictions'", "did you mean predict"),
        Mistake("--task b train", "--task", "a command comes first, e.g. cxrdist train --task"),
        Mistake("--verison", "--verison", "cxrdist --help"),
        Mistake("help train", "'help'", "did you mean --help"),
        Mistake("version", "'version'", "did you mean --version"),
        Mistake("tb", "'tb'", "cxrdist --help"),
    ],
    "preprocess": [
        Mistake(f"{OWN} --images imagse", "imagse", "no such image folder; check the path"),
        Mistake(f"{OWN} --images table.csv", "--images table.csv", "takes the folder of the images"),
        Mistake(f"{OWN} --csv tabel.csv", "tabel.csv", "no such CSV file; check the path"),
        Mistake(f"{OWN} --csv images", "images: is a folder", "give the CSV file in it"),
        Mistake("--images images --csv table.csv", "table.csv", "give --labels .*columns of table.csv: file, who"),
        Mistake(f"{OWN} --labels Nodules", "'Nodules'", "give --labels Nodule,"),
        Mistake(f"{OWN} --labels labels.txt", "labels.txt", "write --labels @labels.txt"),
        Mistake(f"{OWN} --patient-column Patient", "'Patient'", "its columns: file, who"),
        Mistake(f"{OWN} --image-column image", "'image'", "give --image-column file"),
        Mistake(f"{OWN} --csv header.csv", "header.csv", "no rows; is this the right file"),
        Mistake(f"{OWN} --csv empty.csv", "empty.csv", "a CSV with a header and one row per image is needed"),
        Mistake(f"{OWN} --csv latin.csv", "latin.csv", "save it as CSV UTF-8"),
        Mistake(f"{OWN} --csv excel.xlsx", "excel.xlsx", "save the sheet as CSV"),
        Mistake(f"{OWN} --csv words.csv --labels Tuberculosis", "line 4, column 'Tuberculosis': 'yes'", "correct"),
        Mistake(f"{OWN} --csv blanks.csv --labels Tuberculosis", "line 4, column 'Tuberculosis'", "--blank zero"),
        Mistake(f"{OWN} --csv unsure.csv --labels Tuberculosis", "'-1' means uncertain", "--uncertain zero"),
        Mistake(f"{OWN} --csv short.csv", "short.csv, line 4: 3 cells", "correct that line"),
        Mistake(f"{OWN} --csv twice.csv", "'chest00.png' is in line 2 and again in line 32", "keep one"),
        Mistake(f"{OWN} --labels file", "'chest00.png' is neither 0 nor 1", "take another column"),
        Mistake(f"{OWN} --images others", "no column names images of others", "give --image-column, or other --images"),
        Mistake(f"{OWN} --images empty", "empty: no .png", "name another"),
        Mistake("--images images --labels Nodule", "--csv FILE", "needs --csv FILE with the labels"),
        Mistake("--csv table.csv --labels Nodule", "--images DIR", "give either --images"),
        Mistake(f"images {OWN}", "images", "a value needs its flag before it"),
        Mistake(f"{OWN} --out images", "--out images", "give a folder of its own"),
        Mistake(f"{OWN} --out notes.txt", "notes.txt is a file", "give another folder"),
        Mistake(
            "--images images --csv table.csv --labels Nodule --name tb", "shards/tb/train.json", "give another --out"
        ),
        Mistake(f"{OWN} --task tb", "--task tb: no such task", "--task shards/tb"),
        Mistake(f"{OWN} --task broken.toml", "broken.toml", "correct it there"),
        Mistake("--data competition", "--data competition", "add --task a or --task b"),
        Mistake("--data competition --task b", "no folder test2 in it", "task b has train2.csv, train2/, test2/"),
        Mistake("--data images --task nih", "--data", "give --images DIR and --csv FILE"),
        Mistake(f"{OWN} --size 100", "100 px", "give --size 384 to 2048"),
        Mistake(f"{OWN} --size large", "--size: 'large'", "is not an integer"),
        Mistake(f"{OWN} --label Nodule", "--label", "did you mean --labels"),
        Mistake(f"{OWN} --blank mask", "--blank mask", "the nearest is 'masked'"),
        Mistake(f"{OWN} --uncertain Mass=one", "'Mass'", "the labels are Nodule"),
        Mistake(f"{OWN} --split ../new", "'../new'", "use letters, digits"),
        Mistake(f"{OWN} --adopt images/*.tar", "--images DIR", "give either --images"),
        Mistake("--adopt shards/none/*.tar --labels Nodule", "shards/none", "is no folder"),
        Mistake("--images https://example.org/x --labels Nodule", "https://example.org/x", "s3:// or gs://"),
        Mistake(f"{OWN} --csv s3://bucket/table.csv", "--csv: s3://bucket/table.csv", "copy it here first"),
        Mistake("--images dicoms --out shards/tb --split dicom", "DICOM", r"pip install 'cxrdist\[dicom\]'", "pydicom"),
        Mistake("--images s3://bucket/x --out shards/tb --split s3", "s3://", r"pip install 'cxrdist\[s3\]'", "s3fs"),
        Mistake(f"{OWN} --node-rank 2 --num-nodes 2", "--node-rank 2", "from 0 to 1"),
    ],
    "verify": [
        Mistake("", "--shards", "give --shards DIR"),
        Mistake("--shards shards/none", "shards/none: no such folder", "cxrdist preprocess"),
        Mistake("--shards shards/tbb", "shards/tbb: no such folder", "did you mean shards/tb"),
        Mistake("--shards shards", "shards: no shard set here", "give shards/damaged, shards/lung"),
        Mistake("--shards images", "images: no shard set here", "cxrdist preprocess"),
        Mistake("--shards shards/tb/train.json", "shards/tb/train.json: is a file", "such as shards/tb$"),
        Mistake("--shards runs/eva_x_tiny_tb", "is the folder of a run", "give the shard set that it was trained on"),
        Mistake("--shards s3://bucket/tb", "s3://bucket/tb is an address", "take as --shards-url"),
        Mistake("shards/tb", "shards/tb", "a value needs its flag before it"),
        Mistake("--shard shards/tb", "--shard", "did you mean --shards"),
        Mistake(f"{TB} --split valid", "no split 'valid'", "finished: train, new"),
        Mistake(f"{TB} --task tb", "no such task", "--shards shards/tb"),
        Mistake(f"{TB} --task b", "of another task", "give the shards of the task"),
        Mistake("--shards shards/no_tars", "shards/no_tars/train-000000.tar", "copy the shard set again"),
        Mistake("--shards shards/damaged", "619,640 bytes instead of", "copy the shard set again"),
        Mistake(f"{TB} --report look", "--report look", r"ends with \.html"),
        Mistake(f"{TB} --report mine/report.html", "mine/report.html: is there", "give another, or move it away"),
        Mistake(f"{TB} --report shards/tb/look.html", "lies in an input folder", "give one outside shards/tb"),
        Mistake(f"{TB} --report notes.txt/look.html", "notes.txt: not a folder", "give another"),
        Mistake(f"{TB} --table --report look.html", "--table", "in a command of its own"),
    ],
    "recipes": [
        Mistake("resnet50", "'resnet50'", "one of eva_x, chexfound, .*timm:NAME"),
        Mistake("EVA-X", "'EVA-X'", "did you mean eva_x"),
        Mistake("timm:convnextv5", "timm:convnextv5", "did you mean timm:convnextv2"),
        Mistake("my_recipe.py:longer", "my_recipe.py: no such file", "check the path"),
        Mistake("my_recipes.py", "my_recipes.py", "write it as FILE.py:NAME"),
        Mistake("my_recipes.py:long", "'long'", "did you mean longer"),
        Mistake("my_recipes.py:shorter", "'shorter'", "it has: longer, wrong, nothing$"),
        Mistake("my_recipes.py:wrong", "my_recipes.py, line 12", "lists the fields of a recipe"),
        Mistake("my_recipes.py:nothing", "my_recipes.py:nothing", "end it with `return Recipe"),
        Mistake("eva_x chexfound", "chexfound", HELP),
    ],
    "train": [
        Mistake(TINY, "--shards", "give --shards DIR"),
        Mistake(f"b {TINY}", "arguments: b", "a value needs its flag before it"),
        Mistake(f"--shards shards/none {TINY}", "shards/none: no such folder", "cxrdist preprocess"),
        Mistake(
            f"--shards runs/eva_x_tiny_tb {TINY}", "is the folder of a run", "the shard set that it was trained on"
        ),
        Mistake(f"--shards shards {TINY}", "shards: no shard set here", "give shards/damaged, shards/lung"),
        Mistake(f"--shards s3://bucket/tb {TINY}", "s3://bucket/tb", "--shards-url"),
        Mistake(f"--shards-url s3://bucket/tb {TINY}", "--shards-url", "give that, too, with --shards DIR"),
        Mistake(f"{TB} {TINY} --cache-gb 1", "--cache-gb", "give all three"),
        Mistake(f"--shards shards/no_tars {TINY}", "shards/no_tars/train-000000.tar", "copy the shard set again"),
        Mistake(f"{TB} {TINY} --task b", "of another task", "give the shards of the task"),
        Mistake(TB, "eva_x_base_patch16_merged520k_mim.pt in weights/", "--init FILE takes others"),
        Mistake(f"{TB} --model chexfound", "glori.pth in weights/", "--init FILE takes others"),
        Mistake(f"{TB} --init none.pt", "--init none.pt", "no such file"),
        Mistake(f"{TB} --init notes.txt --model eva_x_tiny --out new", "notes.txt", "get it again"),
        Mistake(
            f"{TB} --init version.pt --model eva_x_tiny --out new", "version.pt: is a Git LFS pointer", "git lfs pull"
        ),
        Mistake(f"{TB} --init runs/eva_x_tiny_tb", "is a run folder", "--init runs/.*/epoch_02/ema.safetensors"),
        Mistake(f"{TB} --model eva --init random", "'eva'", "one of eva_x, chexfound"),
        Mistake(f"{TB} --model timm:resnet5 --init random", "timm:resnet5", "did you mean timm:resnet50"),
        Mistake(f"{TB} {TINY} --set epoch=3", "--set epoch", "did you mean epochs"),
        Mistake(f"{TB} {TINY} --set lr=0.1", "--set lr", "learning rates: --lr X"),
        Mistake(f"{TB} {TINY} --lr 0", "--lr 0", "give a number above 0"),
        Mistake(f"{TB} {TINY} --lr 1e-4 --scale-lr linear", "--scale-lr", "give one of them"),
        Mistake(f"{TB} {TINY} --epochs 3 --set epochs=4", "--epochs N", "give one of them"),
        Mistake(f"{TB} {TINY} --folds 3 --validate-fold none", "--folds 3", "add --validate-fold K, else leave"),
        Mistake(f"{TB} {TINY} --tracker trackio", "trackio", r"pip install 'cxrdist\[trackio\]'", "trackio"),
        Mistake(f"{TB} {TINY} --set epochs", "--set epochs", "write it as FIELD=VALUE"),
        Mistake(f"{TB} {TINY} --set epochs=many", "epochs=many", "a valid integer"),
        Mistake(f"{TB} {TINY} --set loss=focal --out new", "'focal'", "focal_bce"),
        Mistake(f"{TB} {TINY} --batch-size 8", "--batch-size", "did you mean --device-batch-size"),
        Mistake(f"{TB} {TINY} --device-batch-size 0", "--device-batch-size: '0'", "at least 1"),
        Mistake(f"{TB} {TINY} --precision fp8", "--precision", "choose from 'auto', 'bf16'"),
        Mistake(f"{TB} {TINY} --augment -clache", "'clache'", "it has crop, flip, rotate, clahe"),
        Mistake(f"{TB} {TINY} --augment flips", "'flips'", r"to add one: \+flips"),
        Mistake(f"{TB} {TINY} --train last", "--train: 'last'", "last:3"),
        Mistake(f"{TB} {TINY} --folds 5 --validate-fold 5", "--validate-fold 5", "folds run from 0 to 4"),
        Mistake(f"{TB} {TINY} --folds 20 --validate-fold 0", "--folds 20", "use 2 to 15"),
        Mistake(f"{TB} --recipe my_recipes.py", "my_recipes.py", "write it as FILE.py:NAME"),
        Mistake(f"{TB} --recipe my_recipes.py:longer --model eva_x", "--model", "not allowed with argument --recipe"),
        Mistake(f"{TB} {TINY} --out notes.txt", "notes.txt is a file", "give another folder"),
        Mistake(f"{TB} {TINY} --out shards/tb/run", "lies in an input folder", "give one outside shards/tb"),
        Mistake(f"{TB} {TINY}", "runs/eva_x_tiny_tb holds a finished run", "give another --out"),
        Mistake(f"{TB} {TINY} --resume", "runs/eva_x_tiny_tb was started with another recipe", "give another --out"),
        Mistake(f"{TB} {TINY} --out runs/busy", "runs/busy is in use by another run", "give this one its own folder"),
        Mistake(f"{TB} {TINY} --backbone none.pt", "--backbone: none.pt", "check the path"),
        Mistake(f"{TB} {TINY} --continue-init --out new", "--continue-init", "goes with --init FILE"),
        Mistake(f"{TB} {TINY} --expect-processes 2", "2 expected", "use `cxrdist train`"),
        Mistake(f"{TB} {TINY} --max-unreadable lots", "'lots'", "e.g. 1%"),
        Mistake(f"{TB} {TINY} --max-hours soon", "--max-hours: 'soon'", "is not a number"),
        Mistake(f"{TB} {TINY} {EVA}", "--member", HELP),
    ],
    "watch": [
        Mistake("runs/none", "runs/none: no such folder", "give a run's folder"),
        Mistake("runs/eva_x_tiny_tb runs/none", "runs/none: no such folder", "give a run's folder"),
        Mistake("runs/notes", "runs/notes: holds no run", "give what training calls --out"),
        Mistake("shards/tb", "shards/tb: holds no run", "give what training calls --out"),
        Mistake("empty", "empty: holds no run", "give what training calls --out"),
        Mistake("notes.txt", "notes.txt: is no folder", "give a run's folder"),
        Mistake("runs/eva_x_tiny_tb/metrics.jsonl", "metrics.jsonl: is no folder", "give a run's folder"),
        Mistake("runs/eva_x_tiny_tb@2", "runs/eva_x_tiny_tb@2: no such folder", "give a run's folder"),
        Mistake("eva=runs/eva_x_tiny_tb", "eva=runs/eva_x_tiny_tb: no such folder", "give a run's folder"),
        Mistake("--run runs/eva_x_tiny_tb", "--run", HELP),
        Mistake("--every fast", "--every: 'fast'", "a number of at least 0.1"),
        Mistake("--every 0", "--every: '0'", "a number of at least 0.1"),
    ],
    "folds": [
        Mistake(TINY, "--shards", "give --shards DIR"),
        Mistake(f"b {TINY}", "arguments: b", "a value needs its flag before it"),
        Mistake(f"--shards shards/none {TINY}", "shards/none: no such folder", "cxrdist preprocess"),
        Mistake(f"--shards shards/no_tars {TINY}", "shards/no_tars/train-000000.tar", "copy the shard set again"),
        Mistake(f"{TB} --model eva", "'eva'", "one of eva_x, chexfound"),
        Mistake(f"{TB} --model eva_x_tiny", "in weights/", "--init FILE takes others"),
        Mistake(f"{TB} {TINY} --folds 1", "--folds: '1'", "at least 2"),
        Mistake(f"{TB} {TINY} --folds 20", "--folds 20", "give fewer folds"),
        Mistake(f"{TB} {TINY} --only 7", "fold 7", "they are 0 to 4"),
        Mistake(f"{TB} {TINY} --only first", "'first'", "from 0, nor all"),
        Mistake(f"{TB} {TINY} --validate-fold 2", "--validate-fold", "--only K does one fold"),
        Mistake(f"{TB} {TINY} --resume", "--resume", "resumed without it"),
        Mistake(f"{TB} {TINY} --member 'my model'", "'my model'", "a name has letters"),
        Mistake(f"{TB} {TINY} --set epoch=3", "--set epoch", "did you mean epochs"),
        Mistake(f"{TB} {TINY} --out notes.txt", "notes.txt: not a folder", "give another"),
        Mistake(f"{TB} {TINY} --out shards/tb", "lies in an input folder", "give one outside shards/tb"),
    ],
    "average": [
        Mistake("--out avg", "--from", HELP),
        Mistake("--from runs/eva_x_tiny_tb@1,2", "--out", HELP),
        Mistake("--from runs/eva_x_tiny_tb --out avg", "--from runs/eva_x_tiny_tb", "write it as RUN@EPOCHS"),
        Mistake("--from runs/eva_x_tiny_tb@1-2 --out avg", "runs/eva_x_tiny_tb@1-2", "write it as RUN@EPOCHS"),
        Mistake("--from runs/eva_x_tiny_tb@1,9 --out avg", "epoch_09", "has epochs: 1, 2; name one of these"),
        Mistake("--from runs/eva_x_tiny_tb@1,1 --out avg", "runs/eva_x_tiny_tb@1", "name each checkpoint once"),
        Mistake("--from runs/eva_x_tiny_tb@2 --out avg", "one checkpoint", "name at least two"),
        Mistake("--from runs/none@1,2 --out avg", "runs/none: no such folder", "as `cxrdist train` writes it"),
        Mistake("--from runs/notes@1,2 --out avg", "runs/notes: holds no recipe.json", "as `cxrdist train` writes it"),
        Mistake("--from notes.txt@1,2 --out avg", "notes.txt: is a file", "give the folder of a run"),
        Mistake("--from runs/unfinished@1,2 --out avg", "has epochs: none yet", "train with --resume"),
        Mistake("--from runs/damaged@1,2 --out avg", "ema.safetensors is damaged", "copy it again"),
        Mistake(
            "--from runs/eva_x_tiny_tb@2 --from runs/eva_x_tiny_lung@1 --out avg", "cannot be averaged", "tb and lung"
        ),
        Mistake("--from runs/eva_x_tiny_tb@1,2 --out runs/eva_x_tiny_lung", "runs/eva_x_tiny_lung", "give another"),
        Mistake("--from runs/eva_x_tiny_tb@1,2 --out runs/eva_x_tiny_tb/avg", "an input folder", "give one outside"),
        Mistake("--from runs/eva_x_tiny_tb@1,2 --out notes.txt", "notes.txt", "give another"),
        Mistake("--from runs/eva_x_tiny_tb@1,2 --out avg --weights raw", "'raw'", "choose from 'ema', 'model'"),
    ],
    "infer": [
        Mistake(EVA, "--shards", "give --shards DIR"),
        Mistake(f"new {EVA}", "new", "a value needs its flag before it"),
        Mistake(f"--shards shards/none {EVA}", "shards/none: no such folder", "cxrdist preprocess"),
        Mistake(f"--shards new {EVA}", "new: no shard set here", "cxrdist preprocess"),
        Mistake(f"{TB} {EVA}", "no split 'test'", "finished: train, new"),
        Mistake(f"{TB} --split valid {EVA}", "no split 'valid'", "--split valid"),
        Mistake(f"{NEW} --member runs/eva_x_tiny_tb", "runs/eva_x_tiny_tb", "give it a name, e.g. --member eva_x="),
        Mistake(f"{NEW} --member eva=runs/none", "runs/none", "check the path"),
        Mistake(NEW, "--member eva_x: runs/eva_x_tb", "check the path"),
        Mistake(f"{NEW} {EVA}@9", "epoch_09", "has epochs: 1, 2; name one of these"),
        Mistake(f"{NEW} --member eva=runs/unfinished", "has epochs: none yet", "train with --resume"),
        Mistake(f"{NEW} --member eva=runs/damaged", "ema.safetensors is damaged", "copy it again"),
        Mistake(f"{NEW} --member eva=runs/notes", "runs/notes: holds no recipe.json", "as `cxrdist train` writes it"),
        Mistake(f"{NEW} --member eva=notes.txt", "notes.txt", "get it again"),
        Mistake(f"{NEW} --member eva=broken.safetensors", "broken.safetensors", "get it or make it again"),
        Mistake(f"{NEW} --member eva=version.pt", "version.pt: is a Git LFS pointer", "git lfs pull"),
        Mistake(f"{NEW} --member lung=runs/eva_x_tiny_lung", "another task than the shards'", "use a run of that task"),
        Mistake(f"{NEW} {EVA}:ttta", "'ttta'", "tta, plain or"),
        Mistake(f"{NEW} {EVA}*two", "'two'", "a number of 0 or more"),
        Mistake(f"{NEW} {EVA}#eva_x", "runs/eva_x_tiny_tb is a run", "leave out #eva_x"),
        Mistake(f"{NEW} --members eva=runs/eva_x_tiny_tb", "--members", "did you mean --member"),
        Mistake(f"{NEW} {EVA} --fold 0", "--fold", "add --split train"),
        Mistake(f"{TB} --out sc {EVA} --split train --fold 9", "fold 9", "has the folds 0, 1, 2, 3, 4"),
        Mistake(f"{NEW} {EVA} --template none.csv", "none.csv", "check the path"),
        Mistake(f"{NEW} {EVA} --template table.csv", "'who' is not a label", "a template has file and labels alone"),
        Mistake(f"{NEW} {EVA} --out notes.txt", "notes.txt: not a folder", "give another"),
        Mistake(f"{NEW} {EVA} --out shards/tb", "lies in an input folder", "give one outside shards/tb"),
        Mistake(
            f"{TB} --split train --fold 0 --member late=runs/eva_x_tiny_tb", "early.csv", "another folder by --out"
        ),
        Mistake(
            f"{TB} --split new --out seen {EVA}@2", "seen/scores/eva.csv: holds scores of split 'train'", "by --out"
        ),
        Mistake(f"{NEW} {EVA} --task b", "of another task", "give the shards of the task"),
        Mistake(f"{NEW} {EVA} --average mean", "'mean'", "choose from 'prob', 'logit', 'rank'"),
        Mistake(f"{NEW} {EVA} --bundle bundle", "--bundle", HELP),
        Mistake(f"--shards shards/no_tars --split new {EVA}", "new-000000.tar", "copy the shard set again"),
    ],
    "ensemble": [
        Mistake("", "--scores", "give --scores FILES"),
        Mistake("predictions/tb/scores/eva.csv", "eva.csv", "a value needs its flag before it"),
        Mistake("--scores none.csv", "none.csv: no such file", "check the path"),
        Mistake("--scores predictions/tb/scores", "predictions/tb/scores: is a folder", "give a file"),
        Mistake("--scores table.csv", "table.csv is not a score table (its columns: file, who", "give one of infer's"),
        Mistake("--scores scores/text.csv", "scores/text.csv, line 2: 'high'", "numbers in"),
        Mistake("--scores empty.csv", "empty.csv", "give one of infer's"),
        Mistake(f"{SCORES} {LUNG}", "'eva' and 'lung'", "score both with one shard set"),
        Mistake(f"{SCORES} scores/labels.csv", "'Nodule' and 'Nodules'", "score both with one shard set"),
        Mistake(f"{SCORES} scores/part.csv", "4 missing", "--allow-missing"),
        Mistake(f"{SCORES} predictions/tb/scores/eva.csv", "'eva' and both hold image", "name each table once"),
        Mistake(f"{SCORES} --out predictions/tb/scores/eva.csv", "is an input of this command", "give another"),
        Mistake(f"{SCORES} --out mine.csv", "mine.csv: is there", "give another, or move it away"),
        Mistake(f"{SCORES} --out new.json", "new.json", r"name it \.csv"),
        Mistake(f"{SCORES} --out runs", "runs: is a folder", "give another name"),
        Mistake(f"{SCORES} --out notes.txt/new.csv", "notes.txt: not a folder", "give another"),
        Mistake(f"{SCORES} --weights 1 2", "2 numbers for 1 members", "give one per member"),
        Mistake(f"{SCORES} {EARLY} --weights 0 0", "weights 0, 0", "one of them positive"),
        Mistake(f"{SCORES} {EARLY} --weights one two", "'one'", "is not a number"),
        Mistake(f"{SCORES} --template template.csv", "'new00.png'", "is it the template of this task and split"),
        Mistake(f"{SCORES} --csv table.csv", "--csv", "go with --fit"),
        Mistake("--fit predictions/tb/scores/eva.csv", "--csv FILE", "give --csv FILE with the labels"),
        Mistake(
            "--fit predictions/tb/scores/eva.csv --csv lung.csv", "'Tuberculosis'", "give the labels of the scored"
        ),
        Mistake(
            "--fit predictions/tb/scores/eva.csv --shards shards/lung", "another task", "give the shards that were"
        ),
        Mistake(f"--fit predictions/tb/scores/eva.csv {TB} --weights 1", "--weights", "or have them found"),
    ],
    "evaluate": [
        Mistake("", "--scores", "give --scores FILES"),
        Mistake(f"{SCORES}", "--csv", "give --csv FILE with the labels"),
        Mistake(f"--scores none.csv {TB}", "none.csv: no such file", "check the path"),
        Mistake("--scores table.csv --csv table.csv", "table.csv is not a score table", "give one of infer's"),
        Mistake(f"{SCORES} --csv none.csv", "none.csv: no such CSV file", "check the path"),
        Mistake(f"{SCORES} --csv images", "images: is a folder", "give the CSV file in it"),
        Mistake(f"{SCORES} --csv lung.csv", "'Tuberculosis'", "file, who, Mass, Edema; give the labels of the scored"),
        Mistake(f"{SCORES} --csv elsewhere.csv", "6 of 6 scored images", "give the label CSV of the images"),
        Mistake(f"{SCORES} --csv header.csv", "header.csv", "is this the right file"),
        Mistake(f"{SCORES} --csv blanks.csv", "line 4, column 'Tuberculosis'", "--blank zero"),
        Mistake(f"{SCORES} --shards shards/none", "shards/none: no such folder", "cxrdist preprocess"),
        Mistake(f"{SCORES} --shards shards/lung", "another task than the scores", "give the shards that were scored"),
        Mistake(f"{SCORES} {LUNG} {TB}", "'eva' and 'lung'", "score both with one shard set"),
        Mistake("--scores scores/part.csv --csv table.csv", "'part'", "--task"),
        Mistake("--scores scores/part.csv --csv table.csv --task task.toml", "28 of 30", "--allow-missing"),
        Mistake(f"{SCORES} {TB} --run runs/none", "--run runs/none", "give the folder of a run"),
        Mistake(f"{SCORES} {TB} --run runs/unfinished", "no finished epoch", "finish it, or leave it out"),
        Mistake(f"{SCORES} {TB} --run runs/eva_x_tiny_tb --show x.png", "--show x.png", "such as chest"),
        Mistake(f"{SCORES} {TB} --out mine", "mine/report.html: is there", "give another, or move it away"),
        Mistake(f"{SCORES} {TB} --out shards/tb", "lies in an input folder", "give one outside shards/tb"),
        Mistake(f"{SCORES} {TB} --out notes.txt", "notes.txt: not a folder", "give another"),
        Mistake(f"--scores {EARLY} {TB} --calibration calibration", "other members", "cxrdist calibrate"),
        Mistake(f"{SCORES} {TB} --calibration none", "--calibration: none", "that `cxrdist calibrate` wrote"),
        Mistake(f"{SCORES} {TB} --calibration settings.json", "settings.json", "that `cxrdist calibrate` wrote"),
        Mistake(f"{SCORES} {TB} --timings notes.txt", "--timings notes.txt", "needs a JSON object"),
        Mistake(f"{SCORES} {TB} --resamples many", "--resamples: 'many'", "not an integer"),
        Mistake("--external tb", "--external tb", r"write NAME=SCORES\.csv"),
        Mistake(f"{EXTERNAL}@shards/none", "shards/none", "check the path"),
        Mistake(f"{EXTERNAL}@table.csv#nhi", "nhi", "one of a, b"),
        Mistake(f"{EXTERNAL}@shards/tb {SCORES}", "--external", "leave out --scores"),
        Mistake(f"{EXTERNAL}@shards/tb --map map.toml", "map.toml: [lung]", "there are: tb"),
        Mistake(f"{SCORES} {TB} --map map.toml", "--map", "give those, or leave it out"),
    ],
    "calibrate": [
        Mistake("--csv table.csv", "--scores", HELP),
        Mistake(f"{SCORES} --out cal", "--csv FILE", "give --csv FILE with the labels"),
        Mistake(f"--scores none.csv {TB}", "none.csv: no such file", "check the path"),
        Mistake(
            f"--scores seen/scores/eva.csv {TB} --out cal", "was trained on these very images", "out-of-fold scores"
        ),
        Mistake("--scores scores/part.csv --csv table.csv", "'part'", "say so with --unseen"),
        Mistake(f"{SCORES} --labels none.csv --out cal", "none.csv: no such CSV file", "check the path"),
        Mistake(f"{SCORES} --labels Nodule,Normal --out cal", "Nodule,Normal: no such CSV file", "check the path"),
        Mistake(f"{SCORES} --csv lung.csv --out cal", "'Tuberculosis'", "give the labels of the scored"),
        Mistake(f"{SCORES} --csv elsewhere.csv --out cal", "6 of 6 scored images", "give the label CSV of the images"),
        Mistake(f"{SCORES} --csv blanks.csv --out cal", "line 4, column 'Tuberculosis'", "--blank zero"),
        Mistake(
            f"{SCORES} --shards shards/lung --out cal", "another task than the scores", "give the shards that were"
        ),
        Mistake(f"{SCORES} {LUNG} {TB} --out cal", "'eva' and 'lung'", "score both with one shard set"),
        Mistake(f"{SCORES} {TB} --threshold best", "--threshold best", "give youden, f1, sensitivity=0.9"),
        Mistake(f"{SCORES} {TB} --threshold sensitivity=90", "sensitivity=90", "sensitivity=0.9"),
        Mistake(f"{SCORES} {TB} --method isotonic", "'isotonic'", "choose from 'platt', 'temperature'"),
        Mistake(f"{SCORES} {TB} --average rank", "'rank'", "choose from 'prob', 'logit'"),
        Mistake(f"{SCORES} {TB} --out notes.txt", "notes.txt: not a folder", "give another"),
        Mistake(f"{SCORES} {TB} --out shards/tb", "lies in an input folder", "give one outside shards/tb"),
        Mistake(f"{SCORES} {TB} --out cal --weights 1 1", "2 numbers for 1 members", "give one per member"),
    ],
    "predict": [
        Mistake("--bundle bundle", "IMAGE|DIR", HELP),
        Mistake("new", "--bundle DIR", "give the model"),
        Mistake(f"new --bundle bundle {EVA}", "--bundle DIR", "not both"),
        Mistake("new/new99.png --bundle bundle", "new/new99.png: no such image or folder", "check the path"),
        Mistake("empty --bundle bundle", "empty: no .png", "name another"),
        Mistake("broken.png --bundle bundle", "broken.png", "repair them or leave them out"),
        Mistake("table.csv --bundle bundle", "table.csv", "repair them or leave them out"),
        Mistake("dicoms --bundle bundle", "a.dcm", r"pip install 'cxrdist\[dicom\]'", "pydicom"),
        Mistake("new new --bundle bundle", "'new00.png'", "in two commands"),
        Mistake("new --bundle bundel", "--bundle bundel: no such folder", "that `cxrdist export` wrote"),
        Mistake("new --bundle runs/eva_x_tiny_tb", "no config.json", "--member NAME=runs/eva_x_tiny_tb"),
        Mistake("new --bundle bundle/config.json", "bundle/config.json: is a file", "give a folder"),
        Mistake("new --member runs/eva_x_tiny_tb", "runs/eva_x_tiny_tb", "give it a name, e.g. --member eva_x="),
        Mistake("new --member eva=runs/none", "runs/none", "check the path"),
        Mistake("new --member eva=runs/unfinished", "has epochs: none yet", "train with --resume"),
        Mistake(f"new {EVA}@9", "epoch_09", "has epochs: 1, 2; name one of these"),
        Mistake("new --member eva=broken.safetensors", "does not say its task", "--task TASK"),
        Mistake(f"new {EVA} --member lung=runs/eva_x_tiny_lung", "of different tasks", "each task by themselves"),
        Mistake("new --bundle bundle --device gpu", "--device gpu", "give cpu, cuda"),
        Mistake(
            "new --bundle bundle --calibration none.json", "none.json: no such file", "that `cxrdist calibrate` wrote"
        ),
        Mistake(
            "new --member early=runs/eva_x_tiny_tb@1 --calibration calibration", "other members", "calibrate these"
        ),
        Mistake("new --bundle bundle --csv new/new00.png", "--csv new/new00.png: is an input", "give another"),
        Mistake("new --bundle bundle --csv mine.csv", "--csv mine.csv: is there", "give another, or move it away"),
        Mistake("new --bundle bundle --json notes.txt/x.json", "--json notes.txt/x.json", "give another"),
        Mistake("new --bundle bundle --csv x.csv --json x.json", "--json x.json", "give another"),
        Mistake("new --bundle bundle --maps notes.txt", "--maps notes.txt: is a file", "give a folder"),
        Mistake("new --bundle bundle --maps new", "--maps new: is an input", "give another"),
        Mistake("new --bundle bundle --task b", "a bundle says its task", "give neither"),
        Mistake("new --bundle bundle --out found.csv", "--out", HELP),
        Mistake("new --bundle bundle --device-batch-size 0", "--device-batch-size: '0'", "at least 1"),
    ],
    "app": [
        Mistake("", "--bundle DIR", "give the model"),
        Mistake("bundle", "bundle", "a value needs its flag before it"),
        Mistake("--bundle none", "--bundle none: no such folder", "that `cxrdist export` wrote"),
        Mistake("--bundle runs/eva_x_tiny_tb", "no config.json", "--member NAME=runs/eva_x_tiny_tb"),
        Mistake("--bundel bundle", "--bundel", "did you mean --bundle"),
        Mistake("--bundle bundle", "Gradio", r"pip install 'cxrdist\[app\]'", "gradio"),
        Mistake("--bundle bundle --port 99999", "--port 99999", "give 0 to 65535"),
        Mistake("--bundle bundle --port http", "--port: 'http'", "an integer"),
        Mistake("--bundle bundle --port {port}", "--port {port}", "give another --host or --port"),
        Mistake("--bundle bundle --device tpu", "--device tpu", "give cpu, cuda"),
        Mistake("--bundle bundle --port 0 --calibration none.json", "none.json", "that `cxrdist calibrate` wrote"),
        Mistake("--member runs/eva_x_tiny_tb --port 0", "runs/eva_x_tiny_tb", "give it a name"),
        Mistake("--member eva=runs/none --port 0", "runs/none", "check the path"),
        Mistake("--member eva=runs/unfinished --port 0", "has epochs: none yet", "train with --resume"),
        Mistake(f"{EVA} --member lung=runs/eva_x_tiny_lung --port 0", "of different tasks", "each task by themselves"),
        Mistake("--bundle bundle --share", "--share", HELP),
    ],
    "export": [
        Mistake("runs/eva_x_tiny_tb", "--out", HELP),
        Mistake("--out model", "what to export", "cxrdist export runs/eva_x_tb"),
        Mistake("runs/eva_x_tiny_tb --output model", "--output", "did you mean --out"),
        Mistake("runs/none --out model", "runs/none", "check the path"),
        Mistake("runs/notes --out model", "runs/notes: holds no recipe.json", "as `cxrdist train` writes it"),
        Mistake("runs/unfinished --out model", "has epochs: none yet", "train with --resume"),
        Mistake("runs/damaged --out model", "ema.safetensors is damaged", "copy it again"),
        Mistake("runs/eva_x_tiny_tb@9 --out model", "epoch_09", "has epochs: 1, 2; name one of these"),
        Mistake("runs/eva_x_tiny_tb runs/eva_x_tiny_lung --out model", "of different tasks", "each task by themselves"),
        Mistake("broken.safetensors --out model", "does not say its task", "--task TASK"),
        Mistake("notes.txt --task b --out model", "notes.txt", "get it again"),
        Mistake("runs/eva_x_tiny_tb --out runs/eva_x_tiny_tb", "lies in an input folder", "give one outside"),
        Mistake("runs/eva_x_tiny_tb --out notes.txt", "notes.txt: not a folder", "give another"),
        Mistake(
            "runs/eva_x_tiny_tb --out model --calibration none.json", "none.json", "that `cxrdist calibrate` wrote"
        ),
        Mistake("runs/eva_x_tiny_tb@1 --out model --calibration calibration", "other members", "calibrate these"),
        Mistake("runs/eva_x_tiny_tb --out model --metrics notes.txt", "--metrics notes.txt", "give OUT/metrics.json"),
        Mistake("runs/eva_x_tiny_tb --out model --check new", "--check", "goes with --onnx"),
        Mistake("runs/eva_x_tiny_tb --out model --onnx", "needs onnx", r"pip install 'cxrdist\[onnx\]'", "onnx"),
        Mistake("runs/eva_x_tiny_tb --out model --onnx --check none", "--check none", "give X-rays"),
        Mistake("runs/eva_x_tiny_tb --out model --task lung", "no such task", "one of a, b"),
        Mistake("runs/eva_x_tiny_tb --out model --average rank", "'rank'", "choose from 'prob', 'logit'"),
        Mistake("runs/eva_x_tiny_tb --out model --backbone none.pt", "--backbone: none.pt", "check the path"),
    ],
    "doctor": [
        Mistake("gpu", "gpu", "a value needs its flag before it"),
        Mistake("--sheet look.png", "--sheet", HELP),
        Mistake(TB, "--shards", "goes with --augment-sheet"),
        Mistake("--augment -clahe", "--augment", "goes with --augment-sheet"),
        Mistake(SHEET, "--shards", "give --shards DIR"),
        Mistake(f"{SHEET} --shards shards/none", "shards/none: no such folder", "cxrdist preprocess"),
        Mistake(f"{SHEET} --shards images", "images: no shard set here", "cxrdist preprocess"),
        Mistake(f"--augment-sheet look.jpg {TB}", "look.jpg", r"ends with \.png"),
        Mistake(f"--augment-sheet notes.txt/look.png {TB}", "notes.txt: not a folder", "give another"),
        Mistake(f"--augment-sheet shards/tb/look.png {TB}", "lies in an input folder", "give one outside shards/tb"),
        Mistake(f"{SHEET} {TB} --bill", "--bill", "give one of them"),
        Mistake(f"{SHEET} {TB} --model eva", "'eva'", "one of eva_x, chexfound"),
        Mistake(f"{SHEET} {TB} --augment -clache", "'clache'", "it has crop, flip, rotate, clahe"),
        Mistake(f"{SHEET} {TB} --set epoch=3", "--set epoch", "did you mean epochs"),
        Mistake(f"{SHEET} {TB} --task b", "of another task", "give the shards of the task"),
    ],
    "demo": [
        Mistake("--images images", "--csv FILE", "go together"),
        Mistake(f"{DEMO} --images none", "--images none: no such folder", "check the path"),
        Mistake(f"{DEMO} --images empty", "--images empty", "give the folder that holds the images"),
        Mistake(f"{DEMO} --images others", "none of its images is in others", "give the table of these images"),
        Mistake(f"{DEMO} --csv none.csv", "none.csv: no such CSV file", "check the path"),
        Mistake(f"{DEMO} --csv excel.xlsx", "excel.xlsx", "save the sheet as CSV"),
        Mistake(f"{DEMO} --csv blanks.csv", "line 4, column 'Tuberculosis'", "--blank zero"),
        Mistake(f"{DEMO} --task b", "'Image_name' is missing", r"--task FILE\.toml"),
        Mistake(f"{DEMO} --task tb", "--task tb: no such task", "one of a, b"),
        Mistake("--patients 5 --out dm", "--patients 5", "use at least 10"),
        Mistake("--patients many --out dm", "--patients: 'many'", "not an integer"),
        Mistake("--seed -1 --out dm", "--seed: '-1'", "at least 0"),
        Mistake("--folds 1 --out dm", "--folds: '1'", "at least 2"),
        Mistake("--out notes.txt", "notes.txt is a file", "give another folder"),
        Mistake("--out dm --set epoch=3", "--set epoch", "did you mean epochs"),
        Mistake("folds", "folds", "a value needs its flag before it"),
        Mistake("--model eva_x", "--model", HELP),
    ],
    "bench": [
        Mistake("", "NAME", HELP),
        Mistake("ordre", "'ordre'", "choose from 'augment', 'data'"),
        Mistake("order --shard 4", "--shard", "did you mean --shards"),
        Mistake("order --shards many", "--shards: 'many'", "not an integer"),
        Mistake("order --shards 0", "--shards 0", "a number above 0"),
        Mistake("order --windows 4 -1", "--windows -1", "a number above 0"),
        Mistake("order --windows", "--windows", "at least one argument"),
        Mistake("order --batch-size -5", "--batch-size -5", "a number above 0"),
        Mistake("order --json runs", "--json runs: is a folder", "give another name"),
        Mistake("order --json none/x.json", "--json none/x.json", "there is no folder none"),
        Mistake("order --json mine.csv", "--json mine.csv: is there", "give another, or move it away"),
        Mistake("model --device gpu", "--device gpu", "give cpu, cuda"),
        Mistake("onnx", "onnx", r"pip install 'cxrdist\[onnx\]'", "onnxruntime"),
    ],
    "completion": [
        Mistake("", "shell", HELP),
        Mistake("cmd", "'cmd'", "choose from 'bash', 'zsh'"),
        Mistake("bash zsh", "zsh", HELP),
        Mistake("--bash", "shell", HELP),
    ],
}
ROWS = [pytest.param(name, row, id=f"{name} {row.flags}") for name, rows in MISTAKES.items() for row in rows]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder in which the commands are typed; in it, another training is at work in `runs/busy`."""
    folder = tmp_path_factory.mktemp("mistakes") / "world"
    make_mistakes_world(folder)
    with folder_lock(folder / "runs" / "busy"):
        yield folder


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """One that is taken."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield taken.getsockname()[1]


@pytest.fixture(autouse=True)
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes time is refused: a mistake is named before it begins."""

    def work(*args: object, **kwargs: object) -> None:
        raise AssertionError("work began")

    for owner, name in (
        (Loader, "batches"),
        (Predictor, "_logits"),
        (writer, "_make_missing"),
        (adopt, "write_indexes"),
        (evaluation, "evaluate"),
        (phantoms, "write_division"),
    ):
        monkeypatch.setattr(owner, name, work)


def snapshot(folder: Path) -> dict[str, tuple[int, int] | None]:
    """Size and time of every file, but for locks, and every folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        about = path.stat()
        if path.name != LOCK_FILE:
            found[str(path)] = None if path.is_dir() else (about.st_size, about.st_mtime_ns)
    return found


def test_ten_mistakes_are_tried_of_each_command() -> None:
    assert MISTAKES.keys() - {""} == {name for names in commands.COMMANDS.values() for name in names}
    assert [name for name, rows in MISTAKES.items() if len(rows) < NUM_ROWS and name not in FEW] == []
    assert FEW.keys() <= MISTAKES.keys()


@pytest.mark.parametrize(("command", "mistake"), ROWS)
def test_a_mistake_is_one_line_that_names_the_thing_and_the_remedy(
    command: str,
    mistake: Mistake,
    place: Path,
    port: int,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name, value in {"CXRDIST_PROCESSES": "1", "ACCELERATE_USE_CPU": "true", "COLUMNS": "80"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "environ", os.environ.copy())  # launching sets some of its own
    if mistake.without:
        found = importlib.util.find_spec
        lacks: Any = lambda name, *more: None if name == mistake.without else found(name, *more)  # noqa: E731
        monkeypatch.setattr(importlib.util, "find_spec", lacks)
        monkeypatch.setitem(sys.modules, mistake.without, None)
    monkeypatch.chdir(place)
    before = snapshot(place)
    monkeypatch.setattr(sys, "argv", ["cxrdist", *shlex.split(f"{command} {mistake.flags.format(port=port)}")])
    with pytest.raises(SystemExit) as ended:
        commands.main()
    told = capfd.readouterr().err
    assert ended.value.code == 2, told
    assert snapshot(place) == before
    assert told.startswith("error: "), told
    assert told.count("\n") == 1, told
    assert len(told) <= LONGEST, told
    assert mistake.names.format(port=port) in told
    assert re.search(mistake.remedy.replace("{command}", command), told.strip()), told
