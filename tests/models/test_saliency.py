"""Maps of what a model looked at."""

import numpy as np
import pytest
import torch

from cxrdist.models import CheXFound, build_model
from cxrdist.models.saliency import attention_maps, grad_cam

pytestmark = pytest.mark.fast


def test_attention_of_each_finding_sums_to_one_over_its_own_grid():
    torch.manual_seed(0)
    sizes = {"embed_dim": 32, "depth": 4, "num_heads": 2, "decoder_dim": 32, "init_values": 1.0}
    model = build_model("chexfound", 80, **sizes).eval()
    assert isinstance(model, CheXFound)
    images = torch.randn(2, 3, 80, 80)
    maps = attention_maps(model, images, np.array([3, 9]))
    assert maps.shape == (2, 5, 5)
    np.testing.assert_allclose(maps.sum(axis=(1, 2)), 1, rtol=1e-5)
    wanted = model.attention(images)[1, :, 9].mean(dim=0).reshape(5, 5).detach().numpy()
    np.testing.assert_allclose(maps[1], wanted, rtol=1e-5)


def test_grad_cam_is_the_gradient_weighted_token_sum_of_the_label_asked_for():
    torch.manual_seed(0)
    model = build_model("eva_x_tiny", 64, embed_dim=48, depth=2, num_heads=3).eval()
    images = torch.randn(2, 3, 64, 64)
    maps = grad_cam(model, images, np.array([3, 9]))
    assert maps.shape == (2, 4, 4)
    assert (maps >= 0).all()
    assert (maps > 0).any()
    tokens = model.forward_features(images).detach().requires_grad_()
    model.forward_head(tokens)[1, 9].backward()
    weights = tokens.grad[1, 1:].mean(dim=0)
    wanted = (tokens[1, 1:].detach() @ weights).relu().reshape(4, 4).numpy()
    np.testing.assert_allclose(maps[1], wanted, atol=1e-6)
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.patch_embed.parameters())
