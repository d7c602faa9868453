"""EVA-X equals the official code's numbers, and each known mistake would be seen."""

import functools
import json

import numpy as np
import pytest
import timm
import torch
from torch.nn import functional as F

from cxrdist.errors import UserError
from cxrdist.models import architecture_of, eva_x
from cxrdist.models.weights.fit import load_init
from cxrdist.recipes import eva_x as eva_x_recipe
from cxrdist.training.optim import param_groups

LOGITS_ATOL, TOKENS_ATOL = 5e-6, 2e-5
NAMES = {"base": "eva_x", "tiny": "eva_x_tiny"}
FILES = {"base": ("base_mim.pt", "base_mim_with_args.pt"), "tiny": ("tiny_mim_module.pt",)}
pytestmark = pytest.mark.fast


def loaded(model, golden, variant, file=None):
    outputs = np.load(golden / "evax" / f"{variant}_outputs.npz")
    report = load_init(architecture_of(NAMES[variant]), model, golden / "evax" / (file or FILES[variant][0]))
    with torch.no_grad():
        model.head.weight.copy_(torch.from_numpy(outputs["head_weight"]))
        model.head.bias.copy_(torch.from_numpy(outputs["head_bias"]))
    return model, outputs, report


def logits_error(model, outputs, images, max_abs):
    with torch.no_grad():
        return max_abs(model(images), outputs[f"{images.shape[-1]}_logits"])


@pytest.mark.parametrize("size", [224, 448])
@pytest.mark.parametrize(("variant", "file"), [(variant, file) for variant in FILES for file in FILES[variant]])
def test_logits_equal_the_official_ones(variant, file, size, golden, pattern, max_abs, small_eva_x):
    model, outputs, report = loaded(small_eva_x(variant, size), golden, variant, file)
    images = pattern(size, size)
    assert logits_error(model, outputs, images, max_abs) <= LOGITS_ATOL
    with torch.no_grad():
        features = model.forward_features(images)
        pre_logits = model.forward_head(features, pre_logits=True)
    assert max_abs(pre_logits, outputs[f"{size}_pre_logits"]) <= LOGITS_ATOL
    assert "eva_x_mim" in report
    assert "fresh head" in report


@pytest.mark.parametrize(("variant", "every"), [("base", 4), ("tiny", 8)])
def test_tokens_position_embedding_and_rotary_table_equal_the_official_ones(
    variant, every, golden, pattern, max_abs, small_eva_x
):
    for size in (224, 448):
        model, outputs, _ = loaded(small_eva_x(variant, size), golden, variant)
        states = []
        model.blocks[0].register_forward_hook(lambda module, args, out, states=states: states.append(out))
        with torch.no_grad():
            features = model.forward_features(pattern(size, size))
        if f"{size}_rope" in outputs:
            assert max_abs(model.rope.get_embed(), outputs[f"{size}_rope"]) <= 1e-6
        if size == 224:
            assert max_abs(states[0], outputs["224_block0"]) <= TOKENS_ATOL
            assert max_abs(features, outputs["224_features"]) <= TOKENS_ATOL
        else:
            assert max_abs(features[:, ::every], outputs[f"448_features_every{every}"]) <= TOKENS_ATOL
            if "448_pos_embed" in outputs:
                assert max_abs(model.pos_embed, outputs["448_pos_embed"]) <= 1e-6


def test_published_fine_tuned_epoch_gives_its_probabilities(golden, pattern, max_abs, small_eva_x):
    model = small_eva_x("base", 448)
    load_init(architecture_of("eva_x"), model, golden / "evax" / "base448_ema_f6.pth", complete=True)
    outputs = np.load(golden / "evax" / "base448_ema_f6_outputs.npz")
    with torch.no_grad():
        logits = model(pattern(448, 448))
    assert max_abs(logits, outputs["logits"]) <= LOGITS_ATOL
    assert max_abs(logits.sigmoid(), outputs["probs"]) <= 1e-6


def resized_otherwise(mode, antialias):
    def rule(pos_embed, grid):
        side = round((pos_embed.shape[1] - 1) ** 0.5)
        old = pos_embed[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        new = F.interpolate(old, size=grid, mode=mode, antialias=antialias)
        return torch.cat([pos_embed[:, :1], new.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)

    return rule


@pytest.mark.parametrize("variant", ["base", "tiny"])
@pytest.mark.parametrize(("mode", "antialias"), [("bicubic", False), ("bilinear", True)])
def test_another_position_resampling_is_seen(
    variant, mode, antialias, golden, pattern, max_abs, small_eva_x, monkeypatch
):
    monkeypatch.setattr(eva_x, "resize_pos_embed", resized_otherwise(mode, antialias))
    model, outputs, _ = loaded(small_eva_x(variant, 448), golden, variant)
    assert logits_error(model, outputs, pattern(448, 448), max_abs) > 1e-2


@pytest.mark.parametrize("variant", ["base", "tiny"])
def test_a_wrong_norm_epsilon_is_seen(variant, golden, pattern, max_abs, small_eva_x):
    model, outputs, _ = loaded(small_eva_x(variant, 224), golden, variant)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert {norm.eps for norm in norms} == {1e-6}
    for norm in norms:
        norm.eps = 1e-5
    assert logits_error(model, outputs, pattern(224, 224), max_abs) > 2 * LOGITS_ATOL


@pytest.mark.parametrize("variant", ["base", "tiny"])
@pytest.mark.parametrize("kwargs", [{"ref_feat_shape": None}, {"use_rot_pos_emb": False}])
def test_wrong_rotary_positions_are_seen(variant, kwargs, golden, pattern, max_abs):
    name = {"base": "eva_x_base_patch16", "tiny": "eva_x_tiny_patch16"}[variant]
    builder = functools.partial(
        eva_x._eva_x, name, False, img_size=448, num_classes=14, embed_dim=48, depth=2, num_heads=3
    )
    model, outputs, _ = loaded(builder(**kwargs).eval(), golden, variant)
    assert logits_error(model, outputs, pattern(448, 448), max_abs) > 0.1


@pytest.mark.parametrize("variant", ["base", "tiny"])
@pytest.mark.parametrize("pooling", ["cls", "mean with cls"])
def test_another_pooling_is_seen(variant, pooling, golden, pattern, max_abs, small_eva_x, monkeypatch):
    model, outputs, _ = loaded(small_eva_x(variant, 224), golden, variant)
    pool = (lambda x, **_: x[:, 0]) if pooling == "cls" else (lambda x, **_: x.mean(dim=1))
    monkeypatch.setattr(model, "pool", pool)
    assert logits_error(model, outputs, pattern(224, 224), max_abs) > 5e-3


def test_full_size_has_the_published_parameters_in_the_published_order(golden):
    published = json.loads((golden / "recipe" / "evax_param_groups.json").read_text())
    with torch.device("meta"):
        model = architecture_of("eva_x").build(448, 14)
    param_groups(model, eva_x_recipe("b").groups)
    counts = architecture_of("eva_x").count_parameters(model)
    assert counts.trained + counts.never_updated == published["total_parameters"] == 86_313_230
    assert counts.never_updated == 603_648
    assert (counts.frozen, counts.idle) == (0, 0)
    names = [name.removeprefix("backbone.") for group in published["groups"] for name in group["names"]]
    assert [
        name for name in architecture_of("eva_x").trainable_names(model) if name not in ("cls_token", "pos_embed")
    ] == names
    assert architecture_of("eva_x").frozen_names(model) == []
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


def test_timm_creates_every_size_under_its_official_name():
    assert {*eva_x.SIZES, "chexfound_vitl16_glori"} <= set(timm.list_models())
    with torch.device("meta"):
        for name, width in (("eva_x_tiny", 192), ("eva_x_small", 384), ("eva_x_base", 768)):
            model = timm.create_model(f"{name}_patch16", img_size=448, num_classes=14)
            assert tuple(model.pos_embed.shape) == (1, 785, width)
            assert model.head.out_features == 14
            assert (model.blocks[0].attn.qkv is None) == (width == 768)
        assert timm.create_model("eva_x_tiny_patch16", depth=3).pos_embed.shape[1] == 197
        assert len(timm.create_model("eva_x_tiny_patch16", depth=3).blocks) == 3


def test_a_new_head_starts_at_torchs_default_scale():
    weight = architecture_of("eva_x_tiny").build(112, 14).head.weight
    assert 0.5 < weight.abs().max() * 192**0.5 <= 1.0


def test_unknown_models_and_sizes_are_named():
    with pytest.raises(UserError, match="eva_y"):
        architecture_of("eva_y").build(224, 14)
    with pytest.raises(UserError, match="decoder_dim"):
        architecture_of("eva_x_tiny").build(112, 14, decoder_dim=3)
    with pytest.raises(UserError, match=r"image_size=120 is not valid \(a multiple of 16 px, at most 4096\)"):
        architecture_of("eva_x_tiny").build(120, 14)


def test_a_parameter_without_a_group_is_named():
    with torch.device("meta"):
        model = architecture_of("eva_x_tiny").build(112, 14)
    with pytest.raises(UserError, match="cls_token"):
        param_groups(model, eva_x_recipe("b").groups[1:])
