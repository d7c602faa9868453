"""FAULTS row 25, the remote half: an address that would run a shell is refused by the entries; nothing is written."""

import importlib

import pytest

from cxrdist.errors import UserError

pytestmark = pytest.mark.fault


@pytest.mark.parametrize("entry", ["train", "infer"])
def test_training_and_inference_refuse_a_shell_before_anything_starts(entry, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(f"cxrdist.{entry}")
    out = [] if entry == "train" else ["--out", "scores"]
    with pytest.raises(UserError, match=r"s3://, gs://, https://, hf:// only"):
        module.main(["--task", "b", "--shards-url", "pipe:touch touched", *out])
    assert not list(tmp_path.iterdir())
