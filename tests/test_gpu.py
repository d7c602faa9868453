"""What only a GPU shows; `./launch.sh gpu-check` runs these first."""

import numpy as np
import pytest
import torch

from cxrdist import recipes
from cxrdist.augment.pipeline import TrainingAugment
from cxrdist.augment.views import VIEWS, make_views
from cxrdist.bench.gpu import training_step
from cxrdist.distributed.precision import DTYPES, autocast
from cxrdist.models import architecture_of
from cxrdist.runs.member import build_model
from cxrdist.task import TASKS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GPU = torch.device("cuda")
PRECISIONS = ["fp16", *(["bf16"] if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else [])]


def images(channels: int = 1) -> torch.Tensor:
    smooth = torch.nn.functional.interpolate(
        torch.rand(4, channels, 16, 16, generator=torch.Generator().manual_seed(0)), (512, 512), mode="bicubic"
    )
    return (smooth * 255).clamp(0, 255).byte()


@pytest.mark.parametrize("make", [recipes.eva_x, recipes.chexfound])
@pytest.mark.parametrize("precision", ["fp32", *PRECISIONS])
def test_a_real_step_never_waits_for_the_device(make, precision):
    step = training_step(make("b"), GPU, precision, 2, compiled=False)
    step()  # allocates
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("steps", recipes.AUGMENTS)
def test_augmented_pixels_are_the_cpus(steps):
    """A level apart at most where a sample falls between two, and in few pixels."""
    augment = TrainingAugment(448, recipes.AUGMENTS[steps], seed=0)
    on_cpu = augment.levels(images(), np.arange(4), 0)
    difference = (augment.levels(images().to(GPU), np.arange(4), 0).cpu() - on_cpu).abs()
    assert difference.mean() < 0.05


def test_views_are_the_cpus_but_for_rounding():
    on_cpu = dict(make_views(images(), VIEWS, 448))
    for name, view in make_views(images().to(GPU), VIEWS, 448):
        assert torch.allclose(view.cpu(), on_cpu[name], atol=1e-6), name


@pytest.mark.parametrize("make", [recipes.eva_x, recipes.chexfound])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_logits_in_half_precision_are_near_those_in_float32(make, precision):
    recipe = make("b")
    torch.manual_seed(0)
    model = build_model(recipe, TASKS["b"]).to(GPU).eval()
    inputs = torch.randn(2, 3, recipe.image_size, recipe.image_size, device=GPU)
    with torch.no_grad():
        exact = model(inputs)
        architecture_of(recipe.model).hold_frozen(model, DTYPES[precision])
        with autocast(precision, GPU):
            half = model(inputs).float()
    assert (half - exact).abs().max() < 0.05 * exact.abs().max()
