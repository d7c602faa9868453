import shutil

import pytest
import torch

from cxrdist import average, models
from cxrdist import train as train_entry
from cxrdist.errors import UserError
from cxrdist.runs import checkpoint
from tests import training_runs
from tests.training import worker


@pytest.fixture(scope="module")
def run(uneven_shards, tmp_path_factory):
    assert worker.tiny_chexfound("b").name == "tiny_chexfound"  # the import registers the recipe
    folder = tmp_path_factory.mktemp("average") / "run"
    flags = ["--shards", str(uneven_shards), "--out", str(folder), "--wandb", "off", "--set", "epochs=3"]
    flags += ["--set", "member_epochs=2,3"]
    train_entry.main([*training_runs.FLAGS, "--model", "tiny_chexfound", *flags])
    return folder


def test_the_average_is_the_mean_and_loads_like_a_member(run, tmp_path, capsys):
    average.main(["--from", f"{run}@2,3", "--out", str(tmp_path / "mean")])
    assert "the mean of 2 checkpoints" in capsys.readouterr().out
    recipe, model = checkpoint.load_member(tmp_path / "mean", 3)
    assert recipe.member_epochs == (3,)
    parts = [models.trained_state_dict(checkpoint.load_member(run, epoch)[1]) for epoch in (2, 3)]
    for name, tensor in models.trained_state_dict(model).items():
        torch.testing.assert_close(tensor, (parts[0][name] + parts[1][name]) / 2, rtol=1e-6, atol=1e-7)
    original = checkpoint.load_member(run, 3)[1].state_dict()
    assert all(torch.equal(model.state_dict()[name], original[name]) for name in models.frozen_names(model))


def test_what_cannot_be_averaged_is_named(run, tmp_path):
    for text, message in (
        (f"{run}@3", "at least two"),
        (f"{run}@3,9", "has epochs: 1, 2, 3"),
        (str(run), "RUN@EPOCHS"),
    ):
        with pytest.raises(UserError, match=message):
            average.main(["--from", text, "--out", str(tmp_path / "mean")])
    assert not (tmp_path / "mean").exists()
    with pytest.raises(UserError, match="not empty"):
        average.main(["--from", f"{run}@2,3", "--out", str(run)])
    other = tmp_path / "other"
    shutil.copytree(run, other)
    text = (other / "recipe.json").read_text()
    (other / "recipe.json").write_text(text.replace('"div": "b"', '"div": "a"'))
    with pytest.raises(UserError, match="div: 'b' -> 'a'"):
        average.main(["--from", f"{run}@2", "--from", f"{other}@3", "--out", str(tmp_path / "mean")])
