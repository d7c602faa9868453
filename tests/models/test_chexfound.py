"""CheXFound and GLoRI equal the official numbers, the backbone is frozen, and each known mistake would be seen."""

import copy
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch.nn import functional as F

from cxrdist.errors import UserError
from cxrdist.models import chexfound
from cxrdist.models.weights.fit import load_init
from cxrdist.recipes import chexfound as chexfound_recipe
from cxrdist.training.optim import param_groups

CHEXFOUND = chexfound.ARCHITECTURE
LOGITS_ATOL, TOKENS_ATOL = 5e-6, 2e-5
SIZES = [(96, 96), (128, 128), (64, 64), (64, 96)]
fast = pytest.mark.fast


def loaded(model, golden):
    load_init(CHEXFOUND, model, golden / "chexfound")
    return model


def reference(golden, name):
    return np.load(golden / "chexfound" / name)


@fast
@pytest.mark.parametrize("size", SIZES)
def test_backbone_tokens_equal_the_official_ones(size, golden, pattern, max_abs, small_chexfound):
    outputs, key = reference(golden, "backbone_outputs.npz"), f"{size[0]}x{size[1]}"
    model, images = loaded(small_chexfound(size), golden), pattern(*size)
    features = model.features(images)
    assert features.dtype == torch.float32
    assert max_abs(features, np.concatenate(list(outputs[f"{key}_patch"]), axis=-1)) <= TOKENS_ATOL
    with torch.no_grad():
        prefixes = model.backbone.forward_intermediates(
            images, indices=4, norm=True, output_fmt="NLC", intermediates_only=True, return_prefix_tokens=True
        )
    assert max_abs(torch.stack([prefix[:, 0] for _, prefix in prefixes]), outputs[f"{key}_cls"]) <= TOKENS_ATOL
    assert max_abs(model.backbone.pos_embed, outputs[f"{key}_pos"][:, 1:]) <= 1e-6
    if f"{key}_reg" in outputs:
        assert max_abs(prefixes[-1][1][:, 1:], outputs[f"{key}_reg"]) <= TOKENS_ATOL
        states = []
        model.backbone.blocks[0].register_forward_pre_hook(lambda module, args: states.append(args[0]))
        model.features(images)
        assert max_abs(states[0], outputs[f"{key}_tokens_in"]) <= TOKENS_ATOL
        # Before the norm tokens reach 14.5: in float32 another CPU's rounding alone moves them by 3.4e-5, so ours is
        # computed in float64 and what is left is the rounding of the official run (1.7e-5).
        exact = model.double().backbone.forward_intermediates(
            images.double(), indices=1, output_fmt="NLC", intermediates_only=True
        )
        assert max_abs(exact[0], outputs[f"{key}_patch_nonorm_last"]) <= TOKENS_ATOL


@fast
@pytest.mark.parametrize("num_classes", [40, 14])
@pytest.mark.parametrize("size", [96, 128])
def test_logits_and_attention_equal_the_official_ones(size, num_classes, golden, pattern, max_abs, small_chexfound):
    outputs = reference(golden, "glori_outputs.npz")
    model, images = loaded(small_chexfound(size, num_classes), golden), pattern(size, size)
    with torch.no_grad():
        maps = model.attention(images)
        assert max_abs(model(images), outputs[f"{size}_logits{num_classes}"]) <= LOGITS_ATOL
    assert max_abs(maps, outputs[f"{size}_attn"][:, :, :num_classes]) <= LOGITS_ATOL
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 8, num_classes))


@fast
def test_gradients_equal_the_official_ones_and_unused_queries_get_exactly_zero(
    golden, pattern, max_abs, small_chexfound
):
    outputs = reference(golden, "glori_outputs.npz")
    model = loaded(small_chexfound(96), golden)
    loss = F.binary_cross_entropy_with_logits(model(pattern(96, 96)), torch.from_numpy(outputs["grad_targets"]))
    loss.backward()
    assert abs(loss.item() - float(outputs["grad_loss"])) <= 1e-6
    compared = 0
    for name, parameter in model.glori.named_parameters():
        if f"grad.{name}" in outputs:
            assert max_abs(parameter.grad, outputs[f"grad.{name}"]) <= 1e-6, name
        else:
            assert abs(float(parameter.grad.norm()) - float(outputs[f"gradnorm.{name}"][0])) <= 1e-6, name
        compared += 1
    assert compared == 19
    assert not model.glori.query_embed.weight.grad[14:].any()
    assert not model.glori.duplicate_pooling.grad[14:].any()
    assert all(parameter.grad is None for parameter in model.backbone.parameters())


@fast
@pytest.mark.parametrize("weights", ["model", "ema"])
def test_published_epoch_gives_its_logits(weights, golden, pattern, max_abs, small_chexfound):
    model = small_chexfound(96)
    load_init(CHEXFOUND, model, golden / "chexfound" / "model3_finetuned.pth", weights=weights, complete=True)
    with torch.no_grad():
        logits = model(pattern(96, 96))
    assert max_abs(logits, reference(golden, "glori_outputs.npz")[f"ft_{weights}_logits"]) <= LOGITS_ATOL


@fast
@pytest.mark.parametrize("size", [448, 224, 640])
def test_position_embedding_of_the_real_grid_follows_dinov2s_rule(size, golden, max_abs):
    real = reference(golden, "pos_embed_512_interp.npz")
    patches = torch.from_numpy(real["pos512"])[:, 1:]
    assert chexfound.resize_pos_embed(patches, (32, 32)) is patches
    ours = chexfound.resize_pos_embed(patches, (size // 16, size // 16))
    complete = torch.cat([torch.from_numpy(real["pos512"])[:, :1], ours], dim=1)
    assert max_abs(complete[:, ::4] if size == 640 else complete, real[f"pos{size}"]) <= 1e-6


def by_output_size(pos_embed, grid):
    side = round(pos_embed.shape[1] ** 0.5)
    old = pos_embed.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    return F.interpolate(old, size=grid, mode="bicubic").permute(0, 2, 3, 1).flatten(1, 2)


def with_antialias(pos_embed, grid):
    side = round(pos_embed.shape[1] ** 0.5)
    old = pos_embed.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    factors = tuple((new + 0.1) / side for new in grid)
    new = F.interpolate(old, scale_factor=factors, mode="bicubic", antialias=True)
    return new.permute(0, 2, 3, 1).flatten(1, 2)


@fast
@pytest.mark.parametrize("rule", [by_output_size, with_antialias])
@pytest.mark.parametrize("size", SIZES[1:])
def test_another_position_resampling_is_seen(rule, size, golden, pattern, max_abs, small_chexfound, monkeypatch):
    monkeypatch.setattr(chexfound, "resize_pos_embed", rule)
    model = loaded(small_chexfound(size), golden)
    tokens = reference(golden, "backbone_outputs.npz")[f"{size[0]}x{size[1]}_patch"]
    assert max_abs(model.features(pattern(*size)), np.concatenate(list(tokens), axis=-1)) > 1e-2


@fast
def test_a_wrong_norm_epsilon_is_seen(golden, pattern, max_abs, small_chexfound):
    model = loaded(small_chexfound(96), golden)
    norms = [module for module in model.backbone.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert {norm.eps for norm in norms} == {1e-6}
    # the fixtures' spread hides the head's epsilon (3e-6 on the logits), so its value is stated
    assert {module.eps for module in model.glori.modules() if isinstance(module, torch.nn.LayerNorm)} == {1e-5}
    for norm in norms:
        norm.eps = 1e-5
    tokens = reference(golden, "backbone_outputs.npz")["96x96_patch"]
    with torch.no_grad():
        assert max_abs(model(pattern(96, 96)), reference(golden, "glori_outputs.npz")["96_logits14"]) > LOGITS_ATOL
        assert max_abs(model.features(pattern(96, 96)), np.concatenate(list(tokens), axis=-1)) > TOKENS_ATOL


@fast
def test_class_token_without_its_position_row_is_seen(golden, pattern, max_abs, small_chexfound):
    model = loaded(small_chexfound(96), golden)
    row = torch.from_numpy(reference(golden, "backbone_outputs.npz")["96x96_pos"])[:, :1]
    model.backbone.cls_token.data -= row
    tokens = reference(golden, "backbone_outputs.npz")["96x96_patch"]
    assert max_abs(model.features(pattern(96, 96)), np.concatenate(list(tokens), axis=-1)) > 100 * TOKENS_ATOL


@fast
def test_backbone_stays_in_eval_mode_and_is_not_trained(small_chexfound, pattern):
    model = small_chexfound(96).train()
    assert model.training
    assert model.glori.layers[0].dropout.training
    assert not any(module.training for module in model.backbone.modules())
    assert not any(parameter.requires_grad for parameter in model.backbone.parameters())
    features = model.features(pattern(96, 96))
    assert not features.requires_grad
    torch.testing.assert_close(features, model.features(pattern(96, 96)), rtol=0, atol=0)
    assert not torch.equal(model(pattern(96, 96)), model(pattern(96, 96)))  # the head's dropout is awake
    with torch.autocast("cpu", torch.bfloat16):
        assert model.features(pattern(96, 96)).dtype == torch.bfloat16  # what the head would cast it to
        model(pattern(96, 96)).float().sum().backward()
    assert all(parameter.grad is not None for parameter in model.glori.parameters())
    assert not copy.deepcopy(model).backbone.training


@fast
def test_stored_state_is_the_head_alone(small_chexfound):
    model, other = small_chexfound(96), small_chexfound(96)
    state = CHEXFOUND.trained_state_dict(model)
    assert (
        list(state)
        == CHEXFOUND.trainable_names(model)
        == [f"glori.{name}" for name, _ in model.glori.named_parameters()]
    )
    assert set(CHEXFOUND.frozen_names(model)) == set(model.state_dict()) - set(state)
    CHEXFOUND.load_trained_state_dict(
        other, {name: tensor.clone() for name, tensor in state.items()}, "head.safetensors"
    )
    assert all(torch.equal(a, b) for a, b in zip(model.glori.parameters(), other.glori.parameters(), strict=True))
    with pytest.raises(UserError, match=r"head\.safetensors.*missing: glori\.duplicate_pooling, .* and 15 more"):
        CHEXFOUND.load_trained_state_dict(
            other, {"glori.embed_standart.bias": state["glori.embed_standart.bias"]}, "head.safetensors"
        )


@fast
def test_full_size_has_the_published_parameters(golden):
    published = json.loads((golden / "recipe" / "chexfound_trainable.json").read_text())
    with torch.device("meta"):
        model = CHEXFOUND.build(512, 14)
        registered = timm.create_model("chexfound_vitl16_glori", num_classes=14)
    param_groups(model, chexfound_recipe("b").groups)
    counts = CHEXFOUND.count_parameters(model)
    assert counts.trained == published["trainable_total_as_notebook"] == 8_723_470
    assert counts.trained - counts.idle == published["parameters_that_ever_get_nonzero_gradient"]
    assert (counts.frozen, counts.never_updated) == (304_627_968, 0)
    rows = [(row["name"].split(".decoder.")[1], tuple(row["shape"])) for row in published["rows"]]
    assert [(name, tuple(parameter.shape)) for name, parameter in model.glori.named_parameters()] == rows
    assert {n: t.shape for n, t in registered.state_dict().items()} == {
        n: t.shape for n, t in model.state_dict().items()
    }


@fast
def test_official_full_size_file_fits_the_module_but_for_mask_token_and_class_position(golden):
    """304,630,016 values there = 304,627,968 here + 1,024 mask token + 1,024 position row of the class token."""
    with torch.device("meta"):
        model = CHEXFOUND.build(512, 14)
        official = {}
        for name, tensor in model.backbone.state_dict().items():
            name = (
                name.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3").replace("reg_token", "register_tokens")
            )
            if name.startswith("blocks."):
                name = f"blocks.{int(name.split('.')[1]) // 6}.{name.removeprefix('blocks.')}"
            official[f"backbone.{name}"] = tensor
        official["backbone.pos_embed"] = torch.empty(1, 1025, 1024)
        official["backbone.mask_token"] = torch.empty(1, 1024)
        official["dino_head.last_layer.weight_v"] = torch.empty(8, 8)
    backbone = [tensor for name, tensor in official.items() if name.startswith("backbone.")]
    assert sum(tensor.numel() for tensor in backbone) == 304_630_016
    found = chexfound.recognise(Path("teacher_checkpoint.pth"), official)
    assert found.layout == "chexfound_teacher"
    assert {name: tensor.shape for name, tensor in found.tensors.items()} == {
        name: tensor.shape for name, tensor in model.state_dict().items() if name.startswith("backbone.")
    }


@fast
def test_queries_beyond_the_classes_are_kept_only_in_the_published_sizes():
    with torch.device("meta"):
        assert CHEXFOUND.build(512, 14).glori.query_embed.num_embeddings == 40
        assert CHEXFOUND.build(128, 14, embed_dim=48, num_heads=3).glori.query_embed.num_embeddings == 14
        assert CHEXFOUND.build(512, 41).glori.query_embed.num_embeddings == 41
        assert timm.create_model("chexfound_vitl16_glori").num_classes == 40  # the released head's
        assert CHEXFOUND.build(128, 14, drop_rate=0.3).glori.layers[0].multihead_attn.drop_rate == 0.3
        with pytest.raises(UserError, match="num_queries=13 is not valid for 14 labels"):
            CHEXFOUND.build(128, 14, num_queries=13)


DDP_STEPS = r"""
import sys
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from cxrdist.models import architecture_of
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
model = architecture_of("chexfound").build(64, 14, embed_dim=48, depth=4, num_heads=3, decoder_dim=16, num_queries=40)
ddp = DistributedDataParallel(model, broadcast_buffers=False)
optimizer = torch.optim.AdamW(model.glori.parameters(), lr=1e-2, weight_decay=0.0)
before = model.glori.query_embed.weight.detach().clone()
torch.manual_seed(rank)
for _ in range(3):
    ddp(torch.randn(2, 3, 64, 64)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
change = (model.glori.query_embed.weight.detach() - before).abs().amax(1)
# one write a line: the ranks share the terminal
sys.stdout.write(f"moved {bool((change[:14] > 1e-3).all())} still {bool((change[14:] == 0).all())}\n")
flat = torch.cat([p.detach().flatten() for p in model.parameters()])
other = flat.clone()
dist.broadcast(other, 0)
assert torch.equal(flat, other), "ranks differ"
buckets = sum(parameter.numel() for parameter in ddp.module.parameters() if parameter.requires_grad)
sys.stdout.write(f"buckets {buckets == sum(p.numel() for p in model.glori.parameters())}\n")
dist.destroy_process_group()
"""


def test_ddp_trains_the_head_without_looking_for_unused_parameters(tmp_path):
    script = tmp_path / "steps.py"
    script.write_text(textwrap.dedent(DDP_STEPS))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("moved True still True") == 2
    assert done.stdout.count("buckets True") == 2
