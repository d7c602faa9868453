"""Permission denied, long names, names that are not UTF-8, pipes and folders as files: named, and nothing waits."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cxrdist import ensemble, files
from cxrdist.cli import Parser
from cxrdist.data.folds import read_split
from cxrdist.documents import Document, read_bounded
from cxrdist.errors import UserError
from cxrdist.inference.parts import Basis, PartStore
from cxrdist.models.weights.safetensors import file_sha256, read_safetensors
from cxrdist.runs.checkpoint import check
from cxrdist.scoring.tables import ScoreTable, TableMeta, read_table, write_table
from cxrdist.shards.index import open_index
from cxrdist.shards.sources import list_images
from cxrdist.tables import read_label_csv
from cxrdist.task import TASKS

pytestmark = pytest.mark.fast

TASK = TASKS["b"]
READERS: dict[str, Callable[[Path], Any]] = {
    "document": read_bounded,
    "typed document": TableMeta.read,
    "score table": read_table,
    "label table": lambda path: read_label_csv(path, TASK),
    "weights": read_safetensors,
    "hash": file_sha256,
    "split": lambda path: read_split(path, TASK),
    "bytes": files.read_bytes,
}


@pytest.mark.parametrize("name", READERS)
def test_what_is_no_file_is_named_and_nothing_waits(name: str, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path, tmp_path / "missing", tmp_path / ("x" * 300), tmp_path / "pipe" / "below"):
        with pytest.raises((UserError, OSError)) as caught:  # an entry names an OSError by its path, too
            READERS[name](path)
        assert str(path)[:200] in str(caught.value)


def test_a_denied_file_is_named(tmp_path: Path) -> None:
    """In a process of another user: root may read everything."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user")
    tmp_path.chmod(0o755)
    denied = tmp_path / "denied.csv"
    denied.write_text("x")
    denied.chmod(0o600)
    script = (
        "import os, sys; sys.path.insert(0, sys.argv[2]); from pathlib import Path; from cxrdist import files\n"
        "path = Path(sys.argv[1]); os.setgid(65534); os.setuid(65534)\n"
        "for act in (files.read_bytes, lambda p: files.write_atomically(p.with_name('new'), 'x'),\n"
        "            lambda p: files.check_outputs([p.with_name('new')]), files.open_to_append):\n"
        "    try: act(path)\n"
        "    except files.UserError as error: print(error)\n"
    )
    command = [sys.executable, "-c", script, str(denied), str(Path(files.__file__).parents[1])]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(told) == 4
    assert all("ermission" in line and str(tmp_path) in line for line in told)


def test_pipes_in_a_shard_set_a_run_and_an_output_folder_are_named(uneven_shards: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    for path in uneven_shards.iterdir():
        if path.is_file():
            (shards / path.name).write_bytes(path.read_bytes())
    for name in ("train.index.arrow", "train-000000.tar", "train.json"):
        content = (shards / name).read_bytes()
        (shards / name).unlink()
        os.mkfifo(shards / name)
        with pytest.raises(UserError, match=name):
            open_index(shards, "train")
        (shards / name).unlink()
        (shards / name).write_bytes(content)
    os.mkfifo(tmp_path / "manifest.json")
    with pytest.raises(UserError, match=r"manifest\.json"):
        check(tmp_path)
    os.mkfifo(tmp_path / ".lock")
    with pytest.raises(UserError, match=r"\.lock: not a regular file"), files.folder_lock(tmp_path):
        pass
    basis = Basis(shards="", rows="", columns=(), device_batch_size=1, precision="fp32", device="cpu")
    store = PartStore(tmp_path / "parts", basis)
    store.folder.mkdir(parents=True)
    os.mkfifo(store.folder / "00000000-0.npz")
    assert store.read_all() == {}


@pytest.mark.parametrize("name", ["x" * 300, "file/below.csv", "pipe"])
def test_an_output_that_cannot_be_is_named_before_the_work(name: str, tmp_path: Path) -> None:
    probs = np.full((1, TASK.num_labels), 0.5, np.float32)
    write_table(tmp_path / "a.csv", ScoreTable(np.array(["1"], object), probs, TableMeta(member="a", task=TASK)))
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=name[:100]):
        ensemble.main(["--scores", str(tmp_path / "a.csv"), "--out", str(tmp_path / name)])


def test_names_that_are_not_utf8_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = os.fsdecode(b"caf\xe9")
    with pytest.raises(SystemExit):
        Parser(prog="x").parse_args([bad])
    assert r"'caf\udce9' is not UTF-8" in capsys.readouterr().err
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / f"{bad}.png").write_bytes(b"")
    with pytest.raises(UserError, match="is not UTF-8; rename it"):
        list_images(tmp_path / "images")
    with pytest.raises(UserError, match=r"a\.json: cannot hold .* which is not UTF-8"):
        files.write_atomically(tmp_path / "a.json", TableMeta(member=bad).to_json())
    assert not (tmp_path / "a.json").exists()
    assert issubclass(TableMeta, Document)
