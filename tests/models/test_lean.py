"""Less traffic under autocast: the same numbers in float32, none further from them in half precision."""

import copy

import pytest
import torch
from timm.layers.mlp import SwiGLU
from timm.layers.norm import LayerNorm
from timm.models.vision_transformer import Block
from torch import nn

from cxrdist.estimate.counter import GpuNorms
from cxrdist.models import architecture_of
from cxrdist.models.lean import LeanBlock, LeanNorm, LeanSwiGLU
from cxrdist.models.weights.fit import load_init

pytestmark = pytest.mark.fast
TIMMS = {LeanNorm: LayerNorm, LeanSwiGLU: SwiGLU, LeanBlock: Block}


def timms_own(model: nn.Module) -> nn.Module:
    own = copy.deepcopy(model)
    for module in own.modules():
        module.__class__ = TIMMS.get(type(module), type(module))
    return own


@pytest.fixture(params=["eva_x", "eva_x_tiny", "chexfound"])
def model(request, golden, small_eva_x, small_chexfound):
    """A small one with the random norms, biases and LayerScale of the golden files, which hide nothing."""
    name = request.param
    if name == "chexfound":
        made, source = small_chexfound(96), golden / "chexfound"
    else:
        variant = {"eva_x": "base", "eva_x_tiny": "tiny"}[name]
        made, source = small_eva_x(variant, 224), golden / "evax" / f"{variant}_outputs.npz"
        source = golden / "evax" / {"base": "base_mim.pt", "tiny": "tiny_mim_module.pt"}[variant]
    load_init(architecture_of(name), made, source)
    return name, made


def test_float32_and_the_state_dict_are_timms_bit_for_bit(model, pattern):
    _, ours = model
    own = timms_own(ours)
    assert any(type(module) in TIMMS for module in ours.modules())
    assert not any(type(module) in TIMMS for module in own.modules())
    assert list(own.state_dict()) == list(ours.state_dict())
    images = pattern(*ours.get_submodule("backbone" if hasattr(ours, "backbone") else "").patch_embed.img_size)
    for each in (ours, own):
        each.train()
        torch.manual_seed(0)
        each(images).square().sum().backward()
    assert torch.equal(ours.eval()(images), own.eval()(images))
    for (name, parameter), other in zip(ours.named_parameters(), own.parameters(), strict=True):
        assert (parameter.grad is None) == (other.grad is None), name
        assert parameter.grad is None or torch.equal(parameter.grad, other.grad), name


def draw(model: nn.Module, seed: int) -> None:
    """Random weights with norms and LayerScale that are not 1, as trained ones."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("gamma") or ("norm" in name and name.endswith("weight")):
            noise = 0.8 + 0.25 * noise
        elif parameter.ndim > 1 and len(parameter) > 1:
            noise *= parameter[0].numel() ** -0.5
        else:
            noise *= 0.2
        parameter.data.copy_(noise)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("eva_x", {"embed_dim": 48, "depth": 2, "num_heads": 3}),
        ("chexfound", {"embed_dim": 32, "depth": 8, "num_heads": 4, "decoder_dim": 16}),
    ],
)
def test_half_precision_is_no_further_from_float32_than_timms_own(name, sizes, dtype):
    """Logits, in the mean over 40 draws of weights; one draw's rounding errors differ by 10 % either way."""
    architecture = architecture_of(name)
    distances: list[list[float]] = []  # ours and timm's own
    for seed in range(40):
        ours = architecture.build(32, 14, 0.0, **sizes)
        draw(ours, seed)
        own, exact = timms_own(ours), copy.deepcopy(ours).double()
        architecture.hold_frozen(ours, dtype)
        images, pair = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(seed)), []
        with torch.no_grad():
            wanted = exact(images.double())
            for each in (ours, own):
                with torch.autocast("cpu", dtype), GpuNorms():
                    logits = each(images)
                pair.append(float((logits - wanted).square().mean().sqrt()))
        distances.append(pair)
    growth = torch.tensor(distances).log().mean(dim=0)
    assert growth[0] - growth[1] < 0.03, growth.exp()


def test_a_held_backbone_gives_what_autocast_gives_and_what_is_trained_stays_float32(small_chexfound):
    model = small_chexfound(32)
    draw(model, 0)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = model(images)
        architecture_of("chexfound").hold_frozen(model, torch.float32)
        assert torch.equal(model(images), before)
        architecture_of("chexfound").hold_frozen(model, torch.bfloat16)
        held = model(images)
        architecture_of("chexfound").hold_frozen(model, torch.bfloat16)  # shared by several heads: held once
        assert torch.equal(model(images), held)
        assert model.features(images).dtype == torch.bfloat16
    torch.testing.assert_close(held, before, rtol=0.05, atol=0.05)
    assert {block.attn.qkv.weight.dtype for block in model.backbone.blocks} == {torch.bfloat16}
    trained = architecture_of("chexfound").trained_state_dict(model)
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
