"""FAULTS rows 38, 39 and 55: damaged images are named wherever they are read, and nothing stale is averaged in."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from cxrdist import ensemble, infer
from cxrdist.data.reader import ShardReader
from cxrdist.errors import UserError
from cxrdist.inference import score
from cxrdist.scoring.tables import ScoreTable, TableMeta, write_table
from cxrdist.shards import verify
from cxrdist.shards.index import MAKE_AGAIN, ShardIndex, open_index
from cxrdist.task import TASKS
from tests import training_runs

pytestmark = pytest.mark.fault
VERSION_1 = Path(__file__).parents[1] / "golden" / "version1" / "shards"


def change(folder: Path, index: ShardIndex, row: int, edit: Callable[[bytes], bytes]) -> None:
    """Replace the stored bytes of one image by edited ones of the same length."""
    with (folder / index.shards[index.shard_ids[row]]).open("r+b") as tar:
        tar.seek(int(index.offsets[row]))
        data = edit(tar.read(int(index.lengths[row])))
        assert len(data) == index.lengths[row]
        tar.seek(int(index.offsets[row]))
        tar.write(data)


def flip(data: bytes, bit: int) -> bytes:
    return data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]


def flip_one(data: bytes) -> bytes:
    return flip(data, 8 * (len(data) * 2 // 3))


def zero_4_kb(data: bytes) -> bytes:
    start = len(data) // 3
    return data[:start] + bytes(min(4096, len(data) - start)) + data[start + 4096 :]


def damaged(index: ShardIndex, row: int) -> str:
    """What a message says of a damaged image."""
    return f"{index.shards[index.shard_ids[row]]}, key {index.key_text(row)} ({index.image_names[row]}): damaged: "


def assert_named(output: str, wanted: str) -> None:
    """At least one rank says it, perhaps behind a progress bar; torch's launcher repeats it after `traceback : `."""
    assert re.search(rf"(?<!traceback : )error( \[rank \d\])?: .*{wanted}.*{re.escape(MAKE_AGAIN)}", output), output
    assert "cxrdist/train.py" not in output, "no traceback of ours"
    assert "cxrdist/infer.py" not in output, "no traceback of ours"


@pytest.mark.parametrize("version", [1, 2])
def test_every_flipped_bit_of_a_jpeg_is_found_though_most_decode(world, tmp_path, version):
    folder = shutil.copytree(world.shards if version == 2 else VERSION_1, tmp_path / "shards")
    index = open_index(folder, "test")
    assert (index.checksums is None) == (version == 1)
    row, decoded, rng = 1, 0, np.random.default_rng(0)
    data = ShardReader(index).read(row)
    bits = rng.choice(8 * len(data), 100, replace=False).tolist()
    for bit in bits:
        changed = flip(data, bit)
        change(folder, index, row, lambda _, changed=changed: changed)
        try:
            simplejpeg.decode_jpeg(changed, "GRAY")
            decoded += 1
        except ValueError:
            pass
        with pytest.raises(UserError, match="damaged") as caught:
            ShardReader(index).read(row)
        assert damaged(index, row) in str(caught.value)
        assert str(caught.value).endswith(MAKE_AGAIN)
    assert decoded > 30, "the decoder alone does not see them"


@pytest.mark.parametrize(("edit", "processes"), [(flip_one, 1), (zero_4_kb, 2)])
def test_damage_ends_a_training_that_skips_bad_images(uneven_shards, tmp_path, processes, edit):
    shards = shutil.copytree(uneven_shards, tmp_path / "shards")
    index = open_index(shards, "train")
    change(shards, index, 33, edit)
    ended = training_runs.train(shards, tmp_path / "run", "--on-bad", "skip", processes=processes)
    assert ended.code != 0
    assert_named(ended.output, re.escape(damaged(index, 33)))
    assert "finished" not in ended.output
    assert not list((tmp_path / "run" / "checkpoints").glob("epoch_*"))


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("edit", [flip_one, zero_4_kb])
def test_damage_ends_an_inference_without_a_result_and_a_mended_tar_lets_it_resume(
    world, infer_world, tmp_path, processes, edit
):
    shards = shutil.copytree(world.shards, tmp_path / "shards")
    index, out = open_index(shards, "test"), tmp_path / "out"
    change(shards, index, 20, edit)
    arguments = world.arguments(out, "--max-unreadable", "100%", "--checkpoint-minutes", "0", shards=shards)
    with infer_world.launched(arguments, processes) as process:
        _, stderr = process.communicate(timeout=100)
    assert process.returncode != 0
    assert_named(stderr, re.escape(damaged(index, 20)))
    assert not (out / "scores").exists()
    assert not (out / "submission.csv").exists()
    name = index.shards[index.shard_ids[20]]
    shutil.copy(world.shards / name, shards / name)
    infer.main(arguments)
    world.run(tmp_path / "undisturbed")
    assert (out / "submission.csv").read_bytes() == (tmp_path / "undisturbed" / "submission.csv").read_bytes()


def overwrite(path: Path) -> None:
    with path.open("r+b") as tar:
        tar.write(b"x" * path.stat().st_size)


def cut(path: Path) -> None:
    os.truncate(path, 700)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(("harm", "told"), [(overwrite, "damaged: "), (cut, "the shard was cut; ")])
def test_a_tar_that_is_overwritten_or_cut_in_mid_training_is_named(uneven_shards, tmp_path, harm, told, processes):
    shards, run = shutil.copytree(uneven_shards, tmp_path / "shards"), tmp_path / "run"
    process = training_runs.start(shards, run, "--on-bad", "skip", processes=processes, fault={"slow_s": 0.2})
    try:
        while process.poll() is None and not (run / "metrics.jsonl").is_file():
            time.sleep(0.02)
        harm(shards / "train-000000.tar")
    finally:
        ended = training_runs.finish(process)
    assert ended.code != 0
    assert_named(ended.output, f"train-000000.tar, key 000000.*{told}")
    assert "cxrdist/train.py" not in ended.output, "no traceback of ours"


HARM_IN_MID_RUN = """
import os, sys
from pathlib import Path
import torch
from cxrdist import infer
from cxrdist.cli import run_entry
from cxrdist.inference import score
torch.set_num_threads(1)
tar, how, run_passes, calls = Path(sys.argv[1]), sys.argv[2], score.run_passes, []
def harmful(*args):
    if os.environ.get("RANK", "0") == "0" and not calls:
        calls.append(1)
        if how == "cut":
            os.truncate(tar, 700)
        else:
            with tar.open("r+b") as file:
                file.write(b"x" * tar.stat().st_size)
    return run_passes(*args)
score.run_passes = harmful
raise SystemExit(run_entry(lambda: infer.main(sys.argv[3:])))
"""


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(("how", "told"), [("overwrite", "damaged: "), ("cut", "the shard was cut; ")])
def test_a_tar_that_is_overwritten_or_cut_in_mid_inference_is_named(world, tmp_path, how, told, processes):
    shards, script = shutil.copytree(world.shards, tmp_path / "shards"), tmp_path / "script.py"
    script.write_text(HARM_IN_MID_RUN)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    flags = world.arguments(tmp_path / "out", "--device-batch-size", "1", "--max-unreadable", "100%", shards=shards)
    ended = subprocess.run(
        [sys.executable, *launcher, str(script), str(shards / "test-000002.tar"), how, *flags],
        env=os.environ | {"PYTHONPATH": str(training_runs.REPOSITORY), "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ended.returncode != 0
    assert_named(ended.stderr, f"test-000002.tar, key 000000.*{told}")
    assert "cxrdist/infer.py" not in ended.stderr, "no traceback of ours"
    assert not (tmp_path / "out" / "scores").exists()
    assert not (tmp_path / "out" / "submission.csv").exists()


def test_the_ranks_share_the_headers_and_each_tar_is_read_once(world, monkeypatch):
    index = open_index(world.shards, "test")
    for world_size in (1, 2, 3, 5):
        read: list[int] = []
        monkeypatch.setattr(verify, "_check_shard", lambda _, number, hashes, read=read: read.append(number))
        shares = []
        for rank in range(world_size):
            before = len(read)
            verify.check_headers(index, rank, world_size)
            shares.append(len(read) - before)
        assert sorted(read) == list(range(len(index.shards)))
        assert max(shares) - min(shares) <= 1


def test_a_header_that_only_the_second_rank_reads_ends_both(world, tmp_path):
    shards = shutil.copytree(world.shards, tmp_path / "shards")
    with (shards / "test-000001.tar").open("r+b") as tar:
        tar.write(b"x" * 100)
    result = world.launch(tmp_path / "out", shards=shards)
    assert result.returncode != 0
    named = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert len(named) == 1, result.stderr
    assert "test-000001.tar: damaged: " in named[0]
    assert not (tmp_path / "out").exists()


def test_an_inference_with_fewer_members_does_not_leave_the_others_table_to_be_averaged_in(
    world, tmp_path, monkeypatch
):
    world.run(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(score, "run_passes", None)
    with pytest.raises(UserError, match=r"scores/chexfound\.csv: from an earlier inference with other members"):
        world.run(tmp_path, members=world.members()[:2])
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    (tmp_path / "scores" / "chexfound.json").unlink()  # now a table of somebody else's
    monkeypatch.undo()
    world.run(tmp_path, members=world.members()[:2])
    assert (tmp_path / "scores" / "chexfound.csv").read_bytes() == before[tmp_path / "scores" / "chexfound.csv"]


def test_a_submission_of_an_earlier_inference_is_named(world, tmp_path, capsys):
    world.run(tmp_path)
    shutil.move(tmp_path / "scores", tmp_path / "kept")  # an inference of another split would not replace them
    world.run(tmp_path, "--split", "train")
    assert "submission.csv is of an earlier inference; this one writes none" in capsys.readouterr().out


@pytest.mark.parametrize(("flag", "allowed"), [(None, 1), ("2", 2), ("9%", 3)])
def test_class_means_in_an_ensemble_are_bounded_and_counted(world, tmp_path, capsys, flag, allowed):
    most = [] if flag is None else ["--max-unreadable", flag]
    names = open_index(world.shards, "test").image_names.to_list()
    for missing in (allowed, allowed + 1):
        unreadable = dict.fromkeys(names[:missing], "not an image")
        template, table = tmp_path / "template.csv", tmp_path / "x.csv"
        lines = world.template.read_text().splitlines()
        template.write_text("\n".join(line for line in lines if not line.startswith("00000099")) + "\n")
        kept = np.array(names[missing:], dtype=object)
        probs = np.full((len(kept), 14), 0.5, np.float32)
        meta = TableMeta(member="x", task=TASKS["b"], unreadable=unreadable, asked=len(names))
        write_table(table, ScoreTable(kept, probs, meta))
        flags = ["--scores", str(table), "--template", str(template), "--out", str(tmp_path / f"{missing}.csv"), *most]
        if missing == allowed:
            ensemble.main(flags)
            assert f"23 images; {missing} unreadable (class means): {names[0]}" in capsys.readouterr().out
        else:
            with pytest.raises(UserError, match=f"{missing} of 23 images are unreadable, more than {allowed}"):
                ensemble.main(flags)
            assert not (tmp_path / f"{missing}.csv").exists()
