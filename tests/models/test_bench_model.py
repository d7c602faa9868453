"""The benchmark compares equal models: it runs, and stops when the outputs differ."""

import pytest
import torch

from cxrdist.bench import __main__ as bench
from cxrdist.models.chexfound import CheXFound


def test_bench_model_compares_both_models_in_both_precisions(tmp_path, capsys):
    out = tmp_path / "rows.json"
    bench.main(["model", "--depth", "4", "--image-size", "32", "--rounds", "1", "--device", "cpu", "--json", str(out)])
    text = capsys.readouterr().out
    assert text.count("ours") == 4
    assert text.count("plain attention, as in the official code") == 2
    assert text.count("timm's own Eva") == 2
    assert out.exists()


def test_bench_model_refuses_to_time_different_results(monkeypatch):
    monkeypatch.setattr(CheXFound, "head_logits", lambda self, features: torch.randn(len(features), 14))
    with pytest.raises(RuntimeError, match="differ by"):
        bench.main(["model", "--models", "chexfound", "--depth", "4", "--image-size", "32", "--rounds", "1"])
