"""Compiled models: few graphs whatever the sizes of batches, and the numbers of eager ones."""

import re

import numpy as np
import pytest
import torch

from cxrdist.models import architecture_of
from cxrdist.models.compiled import graphs_told
from cxrdist.scoring.tables import read_table
from tests import training_runs

SMALL = {
    "tiny_eva_x": "depth=2,embed_dim=24,num_heads=2",
    "tiny_chexfound": "decoder_dim=16,depth=4,embed_dim=32,num_heads=2",
}


@pytest.mark.parametrize(("name", "px", "sizes"), [("eva_x_tiny", 32, {"depth": 1, "embed_dim": 24, "num_heads": 2})])
def test_a_short_last_batch_costs_one_graph_more_and_no_more(name, px, sizes):
    """Three epochs of training on 4, 4, 3 and 2 images and of validation on 4 and 3."""
    torch.compiler.reset()
    model, told = architecture_of(name).build(px, 3, **sizes), []
    model.compile(backend="eager")
    with graphs_told(told.append):
        for _ in range(3):
            model.train()
            for count in (4, 4, 3, 2):
                model(torch.randn(count, 3, px, px)).sum().backward()
            model.eval()
            with torch.inference_mode():
                for count in (4, 3):
                    model(torch.randn(count, 3, px, px))
    assert told == ["torch.compile: 3 graphs, 0 graph breaks"]  # training 4, training any, validation any


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny_eva_x", "tiny_chexfound"])
def test_compiled_and_eager_steps_follow_one_trace(model, uneven_shards, tmp_path, monkeypatch):
    """20 steps on two processes, 8 compiled, 6 eager, 6 compiled, accumulating 2 passes of 3 and at most 2 images."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    flags = ["--device-batch-size", "3", "--set", "drop_rate=0", "--timeout-s", "300"]
    flags += [] if model == "tiny_chexfound" else ["--grad-checkpointing"]
    flags += ["--set", f"model_kwargs={SMALL[model]}"]
    parts = [["--max-steps", "8", "--compile"], ["--max-steps", "6", "--resume"], ["--compile", "--resume"]]
    for run, launches in (("eager", [[]]), ("mixed", parts)):
        for more in launches:
            ended = training_runs.train(uneven_shards, tmp_path / run, *flags, *more, model=model, timeout=400)
            assert ended.code == 0, ended.output
            if "--compile" in more:
                graphs = re.search(r"torch.compile: (\d+) graphs", ended.output)
                assert graphs is not None
                assert 1 <= int(graphs[1]) <= 6
    losses = [[row["loss"] for row in training_runs.rows(tmp_path / run)] for run in ("eager", "mixed")]
    assert len(losses[0]) == len(losses[1]) == 20
    np.testing.assert_allclose(losses[1], losses[0], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_compiled_inference_gives_the_eager_table(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch.compiler.reset()
    members = [*world.members()[:1], f"eva_x={world.eva_x}@1,2", *world.members()[2:]]
    for name, more in (("eager", ()), ("compiled", ("--compile",))):
        world.run(tmp_path / name, *more, members=members)
    assert re.search(r"torch.compile: [1-6] graphs", capsys.readouterr().out)
    for table in ("eva_x", "chexfound"):
        eager, compiled = (read_table(tmp_path / run / "scores" / f"{table}.csv") for run in ("eager", "compiled"))
        assert (eager.image_names == compiled.image_names).all()
        np.testing.assert_allclose(compiled.probs, eager.probs, rtol=0, atol=1e-6)
