"""Everything that runs on a GPU, run on tensors that say cuda:0 and hold nothing: no host sync, no mix of devices.

Needs no GPU. A fake tensor has a shape, a dtype and a device, and the dispatcher treats it as such: reading a value of
one raises, as does a CPU constant beside it. `detector` sees what that leaves: copies to the host, blocking copies from
it, synchronisation. A backward pass cannot run here; `gpu-check` and the GPU tests have it.
"""

import functools
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode

from cxrdist import recipes
from cxrdist.augment import views
from cxrdist.augment.pipeline import TrainingAugment
from cxrdist.augment.views import VIEWS, make_views
from cxrdist.distributed.precision import DTYPES, autocast
from cxrdist.inference.passes import Member, plan_passes
from cxrdist.inference.score import run_passes
from cxrdist.models import ARCHITECTURES, architecture_of
from cxrdist.scoring.tables import Checkpoint
from cxrdist.training.batch_norm import BatchNorms
from cxrdist.training.ema import Ema
from cxrdist.training.learner import LoopState
from cxrdist.training.losses import LOSSES
from cxrdist.training.meter import Meter
from cxrdist.training.optim import GuardedAdamW, groups_of, lr_factors

pytestmark = pytest.mark.fake_cuda

GPU = torch.device("cuda:0")
SIZE, NUM_LABELS, KEYS = 112, 5, np.arange(4)  # px: a multiple of every patch
SIZES = {"embed_dim": 32, "depth": 4, "num_heads": 2}
MODELS = {name: SIZES | {"depth": 1} for name in ARCHITECTURES if name.startswith("eva_x")} | {
    "chexfound": {**SIZES, "decoder_dim": 16, "num_queries": 8},
    "rad_dino": {**SIZES, "decoder_dim": 16},
    "timm:test_resnet": {},
    "timm:swin_tiny_patch4_window7_224": {"embed_dim": 24},
}


class HostSyncError(Exception):
    """The host waited for the device."""


class Detector(TorchDispatchMode):
    """Raises where data goes from the device to the host, or comes to it in a copy that blocks."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            target, source = (out, args[0]) if len(args) < 2 else args[:2]
            blocks = not (kwargs or {}).get("non_blocking", len(args) > 2 and args[2])
            if source.is_cuda and not target.is_cuda:
                raise HostSyncError(f"{func}: a copy to the host")
            if target.is_cuda and not source.is_cuda and (source.dim() or len(args) < 2) and blocks:
                raise HostSyncError(f"{func}: a blocking copy from the host")
        return out


def refuse(name):
    def refused(self=None, *args, **kwargs):
        if not isinstance(self, torch.Tensor) or self.is_cuda:
            raise HostSyncError(name)
        return originals[name](self, *args, **kwargs)

    originals = {name: getattr(torch.Tensor, name, None)}
    return refused


@pytest.fixture
def detector(monkeypatch) -> Iterator[Detector]:
    """Inside, cuda:0 tensors are fake; `with detector:` is a steady step, in which the host must not wait."""
    for module in (torch.cuda, torch.cuda.Stream, torch.cuda.Event):
        monkeypatch.setattr(module, "synchronize", refuse("synchronize"))
    for name in ("cpu", "tolist", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, refuse(name))
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)
    library = torch.library.Library("aten", "IMPL")
    library.impl("_fused_adamw_.tensor_lr", lambda *args, **kwargs: None, "Meta")
    clear_caches()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        real = torch.from_numpy
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
        monkeypatch.setattr(torch, "from_numpy", lambda array: mode.from_tensor(real(array)))
        yield Detector()
    clear_caches()
    library._destroy()


def clear_caches() -> None:
    """Constants that functions of the project keep by device: fake ones must not stay, nor real ones be used here."""
    for name, module in list(sys.modules.items()):
        if name.startswith("cxrdist."):
            for each in vars(module).values():
                if isinstance(each, functools._lru_cache_wrapper):
                    each.cache_clear()


def fake_model(name: str, training: bool = True, num_labels: int = NUM_LABELS) -> torch.nn.Module:
    with unset_fake_temporarily(), torch.device("meta"):
        model = architecture_of(name).build(SIZE, num_labels, 0.1, **MODELS[name])
    return model.to_empty(device=GPU).train(training)


def pixels(channels: int = 1) -> torch.Tensor:
    return torch.empty((len(KEYS), channels, 48, 48), dtype=torch.uint8, device=GPU)


def steady(detector, act):
    """What `act` returns the second time: its constants are on the device by then."""
    act()
    with detector:
        return act()


AUGMENTS = {name: TrainingAugment(SIZE, steps, seed=0) for name, steps in recipes.AUGMENTS.items()}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("steps", AUGMENTS)
def test_augmentation(detector, steps, channels):
    augment = AUGMENTS[steps]
    images = steady(detector, lambda: augment(pixels(channels), KEYS, 0))
    assert images.shape == (len(KEYS), 3, SIZE, SIZE)
    assert images.device == GPU


def test_views(detector):
    made = steady(detector, lambda: dict(make_views(pixels(), VIEWS, SIZE)))
    assert all(image.shape == (len(KEYS), 3, SIZE, SIZE) and image.device == GPU for image in made.values())


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_forward(detector, name, precision):
    images = torch.empty(len(KEYS), 3, SIZE, SIZE, device=GPU)
    for training in (True, False):
        model = fake_model(name, training)
        if training and hasattr(model, "set_grad_checkpointing"):
            model.set_grad_checkpointing(True)
        with autocast(precision, GPU), detector:
            logits = model(images)
        assert logits.shape == (len(KEYS), NUM_LABELS)
        assert logits.device == GPU


def test_every_architecture_is_among_them():
    assert set(MODELS) >= set(ARCHITECTURES)


def test_batch_norm_over_ranks(detector):
    model = fake_model("timm:test_resnet")
    norms = BatchNorms(model, True, (0, 2), lambda rows: rows + rows)
    images = torch.empty(len(KEYS), 3, SIZE, SIZE, device=GPU)

    def forward() -> torch.Tensor:
        norms.begin(first=True, counted=True)
        logits = model(images)
        norms.end()
        norms.close_step(torch.zeros((), device=GPU))
        return logits

    assert steady(detector, forward).device == GPU


@pytest.mark.parametrize("masked", [False, True])
def test_loss(detector, masked):
    logits, targets = (torch.empty(len(KEYS), NUM_LABELS, device=GPU) for _ in range(2))
    criterion = LOSSES["focal_bce"](recipes.eva_x("b"), torch.empty(NUM_LABELS, device=GPU), masked)
    with detector:
        loss = criterion(logits, targets)
    assert all(part.device == GPU and part.dtype == torch.float32 for part in loss.values())


@pytest.mark.parametrize("loss_scale", [None, 2.0**16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("make", [recipes.eva_x, recipes.chexfound])
def test_a_step_of_training_after_its_backward_pass(detector, monkeypatch, make, loss_scale):
    """Loss scaling, clipping, schedule, AdamW, EMA, the loop's sums and what the log remembers."""
    recipe = make("b")
    model = fake_model(recipe.model)
    groups = groups_of(architecture_of(recipe.model), model, recipe)
    with unset_fake_temporarily():
        factors = lr_factors("cosine", 100, 10)
    options = {"factors": factors, "clip_grad_norm": 1.0, "loss_scale": loss_scale}
    with monkeypatch.context() as patch:  # it asks whether the factors move, once
        patch.setattr("cxrdist.training.optim.bool", lambda moving: True, raising=False)
        optimizer = GuardedAdamW(groups, betas=recipe.betas, **options)
    ema = Ema(model, recipe.ema_decay, True, frozenset(architecture_of(recipe.model).frozen_names(model)))
    state = LoopState(("total", "focal"), GPU)
    meter = SimpleNamespace(_finite=[], _images=0)
    batch = SimpleNamespace(rows=KEYS, weight=0.5)
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss, upstream: torch.mul(loss, upstream))

    def step() -> None:
        loss = dict.fromkeys(state.parts, torch.empty((), device=GPU))
        optimizer.backward(loss["total"], batch.weight)
        for parameter in optimizer.named.values():
            parameter.grad = torch.empty_like(parameter)
        state.add(loss, batch.weight)
        Meter.saw(meter, batch, torch.empty(len(KEYS), NUM_LABELS, device=GPU))
        skipped = optimizer.step()
        ema.update(skipped)
        state.close_step(skipped)

    steady(detector, step)
    on_device = [ema.num_updates, state.window, state.epoch_sums, *optimizer.state_dict().values()]
    assert {each.device for each in on_device} == {GPU}


@pytest.mark.parametrize("precision", DTYPES)
def test_passes_of_inference(detector, precision):
    """Two heads on one frozen backbone, and another model; every view."""
    shares = dict.fromkeys(("plain", "hflip", "center1.1", "bright1.05"), 0.25)
    members = [
        Checkpoint(source=sha, sha256=sha, model=model, backbone_sha256=shared, image_size=SIZE, views=shares)
        for sha, model, shared in (("0", "chexfound", "same"), ("1", "chexfound", "same"), ("2", "eva_x", None))
    ]
    passes = plan_passes([Member("all", tuple(members))])
    models = {each.sha256: fake_model(each.model, False) for each in members}
    logits = steady(detector, lambda: run_passes(pixels(), passes, models, precision))
    assert len(logits) == 3 * len(shares)
    assert all(each.dtype == torch.float32 and each.device == GPU for each in logits)


PLANTS = {
    "item": lambda images: images.sum().item(),
    "bool": lambda images: bool((images > 0).any()),
    "boolean index": lambda images: images[images > 0],
    "nonzero": lambda images: images.nonzero(),
    "cpu": lambda images: images.cpu(),
    "to cpu": lambda images: images.to("cpu", non_blocking=True),
    "copy": lambda images: torch.empty(1).copy_(images.sum().view(1)),
    "tolist": lambda images: images.sum(0).tolist(),
    "numpy": lambda images: images.detach().numpy(),
    "CPU constant": lambda images: images + torch.ones(SIZE),
    "constant made in the step": lambda images: torch.ones(SIZE).to(GPU),
    "synchronize": lambda images: torch.cuda.synchronize(),
    "event": lambda images: torch.cuda.Event.synchronize(None),
}


@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_wait_is_found(detector, monkeypatch, plant):
    """In the middle of the views, where they are normalised."""
    steady(detector, lambda: list(make_views(pixels(), VIEWS, SIZE)))
    monkeypatch.setattr(views, "normalise", lambda images, out=None, stats=None: PLANTS[plant](images))
    waits = (HostSyncError, DataDependentOutputException, DynamicOutputShapeException)
    found = pytest.raises((*waits, RuntimeError), match="(?s)cuda:0.*cpu" if plant == "CPU constant" else None)
    with found as caught, detector:
        list(make_views(pixels(), VIEWS, SIZE))
    assert plant == "CPU constant" or isinstance(caught.value, waits)
