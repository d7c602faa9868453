"""`--compile` learns what eager learns, and a run may change between the two."""

import re
from pathlib import Path

import pytest

from tests.training_runs import rows, train

SMALL = {
    "tiny_eva_x": "depth=1,embed_dim=24,num_heads=2",
    "tiny_chexfound": "decoder_dim=16,depth=4,embed_dim=16,num_heads=2",
}


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("model", SMALL)
def test_a_compiled_run_of_two_processes_follows_the_eager_one(
    model: str, uneven_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 steps within 1e-5, also where the first 7 were of the other kind. Without dropout, whose masks differ."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    flags = ("--set", f"model_kwargs={SMALL[model]}", "--set", "drop_rate=0", "--device-batch-size", "5")
    losses = {}
    for name, sessions in {
        "eager": [()],
        "compiled": [("--compile",)],
        "then eager": [("--compile", "--max-steps", "7"), ("--resume",)],
        "then compiled": [("--max-steps", "7"), ("--resume", "--compile")],
    }.items():
        for more in sessions:
            ended = train(uneven_shards, tmp_path / name, *flags, *more, model=model, timeout=600)
            assert ended.code == 0, ended.output
            if "--compile" in more:
                graphs = re.search(r"torch\.compile: (\d+) graphs, 0 graph breaks", ended.output)
                assert graphs is not None, ended.output
                print(f"{model}, {name}: {graphs[0]}")
                assert 1 <= int(graphs[1]) <= 6
        losses[name] = [row["loss"] for row in rows(tmp_path / name)]
    assert len(losses["eager"]) == 20
    for name, trace in losses.items():
        assert trace == pytest.approx(losses["eager"], abs=1e-5), name
