"""FAULTS row 13 (submission part): a full disk is named, and what was there still loads."""

import os
import subprocess
import sys

import pandas as pd
import pytest

pytestmark = pytest.mark.fault
SCRIPT = """
set -e
mount -t tmpfs -o size=1m none "$DISK"
fill() { dd if=/dev/zero of="$DISK/filler" bs=1k count=4096 2>/dev/null || true; }
infer() { "$PYTHON" -m cxrdist.infer "$@"; }
fill
if infer "$@" 2> "$KEEP/first"; then echo "a full disk was not noticed"; exit 9; fi
[ ! -e "$DISK/out/submission.csv" ] || exit 8
rm "$DISK/filler"
infer "$@" > /dev/null
cp "$DISK/out/submission.csv" "$KEEP/good.csv"
rm -r "$DISK/out/scores"
fill
if infer "$@" 2> "$KEEP/second"; then echo "a full disk was not noticed"; exit 9; fi
cp "$DISK/out/submission.csv" "$KEEP/after.csv"
rm "$DISK/filler"
infer "$@" > "$KEEP/third"
cp "$DISK/out/submission.csv" "$KEEP/again.csv"
"""


def test_a_full_disk_is_named_and_what_was_there_still_loads(world, tmp_path):
    disk, keep = tmp_path / "disk", tmp_path / "keep"
    disk.mkdir()
    keep.mkdir()
    probe = ["unshare", "-rm", "sh", "-c", f"mount -t tmpfs -o size=1m none {disk}"]
    if subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("no permission to mount a small disk in a namespace of one's own")
    environment = os.environ | {"DISK": str(disk), "KEEP": str(keep), "PYTHON": sys.executable}
    arguments = world.arguments(disk / "out", "--template", str(world.template))
    result = subprocess.run(
        ["unshare", "-rm", "bash", "-c", SCRIPT, "bash", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, (result.returncode, result.stdout, result.stderr)
    for name, path in (("first", "parts"), ("second", "scores/eva_x.csv")):
        last = (keep / name).read_text().strip().splitlines()[-1]
        assert last.startswith("error: ")
        assert str(disk / "out" / path) in last
        assert "the disk is full" in last
        assert "free in" in last
    assert len(pd.read_csv(keep / "good.csv")) == 24
    for name in ("after.csv", "again.csv"):
        assert (keep / name).read_bytes() == (keep / "good.csv").read_bytes()
    assert "resuming:" in (keep / "third").read_text()
