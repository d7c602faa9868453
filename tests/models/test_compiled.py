"""Compiled models: few graphs, whatever the sizes of batches."""

import pytest
import torch

from cxrdist.models import architecture_of
from cxrdist.models.compiled import graphs_told


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
