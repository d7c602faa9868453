"""Maps of what a model looked at."""

import numpy as np
import pytest
import torch

from cxrdist.models import architecture_of

pytestmark = pytest.mark.fast


def test_attention_of_each_finding_sums_to_one_over_its_own_grid():
    torch.manual_seed(0)
    sizes = {"embed_dim": 32, "depth": 4, "num_heads": 2, "decoder_dim": 32, "init_values": 1.0}
    model = architecture_of("chexfound").build(80, 14, **sizes).eval()
    images = torch.randn(2, 3, 80, 80)
    maps = architecture_of("chexfound").saliency(model, images, np.array([3, 9]))
    assert maps.shape == (2, 5, 5)
    np.testing.assert_allclose(maps.sum(axis=(1, 2)), 1, rtol=1e-5)
    wanted = model.attention(images)[1, :, 9].mean(dim=0).reshape(5, 5).detach().numpy()
    np.testing.assert_allclose(maps[1], wanted, rtol=1e-5)


def test_grad_cam_is_the_gradient_weighted_token_sum_of_the_label_asked_for():
    torch.manual_seed(0)
    model = architecture_of("eva_x_tiny").build(64, 14, embed_dim=48, depth=2, num_heads=3).eval()
    images = torch.randn(2, 3, 64, 64)
    maps = architecture_of("eva_x_tiny").saliency(model, images, np.array([3, 9]))
    assert maps.shape == (2, 4, 4)
    assert (maps >= 0).all()
    assert (maps > 0).any()
    tokens = model.forward_features(images).detach().requires_grad_()
    model.forward_head(tokens)[1, 9].backward()
    weights = tokens.grad[1, 1:].mean(dim=0)
    wanted = (tokens[1, 1:].detach() @ weights).relu().reshape(4, 4).numpy()
    np.testing.assert_allclose(maps[1], wanted, atol=1e-6)
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.patch_embed.parameters())
