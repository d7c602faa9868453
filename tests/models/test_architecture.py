"""A model from outside: one module registers it, and all that follows from an Architecture works for it."""

import dataclasses

import pytest
import torch
from torch import nn

from cxrdist.errors import UserError
from cxrdist.models import ARCHITECTURES, Architecture, architecture_of
from cxrdist.models.architecture import Recognised
from cxrdist.models.weights.fit import default_init_path, load_backbone, load_init
from cxrdist.models.weights.layouts import architecture_of_file, read_weights
from cxrdist.models.weights.safetensors import tensors_sha256, write_safetensors
from cxrdist.recipes import Group
from cxrdist.training.optim import param_groups

pytestmark = pytest.mark.fast


class Toy(nn.Module):
    def __init__(self, image_size, num_classes, drop_rate, width=8):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, stride=2), nn.BatchNorm2d(width), nn.ReLU())
        self.head = nn.Sequential(nn.Dropout(drop_rate), nn.Linear(width, num_classes))

    def forward(self, images):
        return self.head(self.stem(images).mean(dim=(2, 3)))


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "toy", Architecture(name="toy", create=Toy, sizes=("width",)))
    return architecture_of("toy")


def test_a_convolutional_model_is_built_for_any_labels_and_sizes(toy):
    model = toy.build(33, 5, drop_rate=0.5, width=4)
    assert model(torch.zeros(2, 3, 33, 33)).shape == (2, 5)
    assert model.head[0].p == 0.5
    assert toy.frozen_names(model) == []
    assert toy.trainable_names(model) == [name for name, _ in model.named_parameters()]
    with pytest.raises(UserError, match="toy has no depth; model_kwargs may be width"):
        toy.build(33, 5, depth=2)
    with pytest.raises(
        UserError, match=r"'resnet' is unknown; one of eva_x, .*chexfound, rad_dino, toy, timm:NAME, glori:NAME"
    ):
        architecture_of("resnet")


def test_its_trained_state_comes_back_with_buffers(toy):
    model, other = toy.build(32, 3), toy.build(32, 3)
    model(torch.randn(4, 3, 32, 32))  # moves BatchNorm's buffers
    state = {name: tensor.clone() for name, tensor in toy.trained_state_dict(model).items()}
    assert {"stem.1.running_mean", "stem.1.num_batches_tracked"} <= state.keys()
    toy.load_trained_state_dict(other, state, "toy.safetensors")
    names = list(state)
    assert tensors_sha256(model.state_dict(), names) == tensors_sha256(other.state_dict(), names)
    with pytest.raises(
        UserError, match=r"toy\.safetensors.*other shape: head\.1\.bias \(3,\), model \(4,\), head\.1\.w"
    ):
        toy.load_trained_state_dict(toy.build(32, 4), state, "toy.safetensors")
    groups = (Group(pattern="^stem", lr=None), Group(pattern="^head", lr=1e-3))
    param_groups(model, groups)
    counts = toy.count_parameters(model)
    assert (counts.trained, counts.never_updated, counts.frozen, counts.idle) == (27, 240, 0, 0)


def test_its_own_files_start_it_and_others_are_refused(toy, tmp_path, golden):
    model, again = toy.build(32, 3), toy.build(32, 3)
    model(torch.randn(4, 3, 32, 32))
    path = tmp_path / "model.safetensors"
    write_safetensors(path, model.state_dict())
    load_init(toy, again, path, complete=True)
    names = list(model.state_dict())
    assert tensors_sha256(model.state_dict(), names) == tensors_sha256(again.state_dict(), names)
    write_safetensors(tmp_path / "stem.safetensors", model.stem.state_dict(prefix="stem."))
    assert "fresh head (head.1.bias, head.1.weight)" in load_init(toy, toy.build(32, 4), tmp_path / "stem.safetensors")
    with pytest.raises(UserError, match=r"missing: head\.1\.bias"):
        load_init(toy, again, tmp_path / "stem.safetensors", complete=True)
    with pytest.raises(UserError, match=r"missing: stem.*unexpected: blocks"):
        load_init(toy, again, golden / "evax" / "base_mim.pt")
    with pytest.raises(UserError, match="holds no weights of eva_x, "):
        read_weights(path)
    with pytest.raises(UserError, match="toy has no official weights: use --init FILE, or --init random"):
        default_init_path(toy)


def test_its_files_are_recognised_where_it_says_how(toy, tmp_path, monkeypatch):
    def recognise(path, state):
        return Recognised("toy", state) if "stem.0.weight" in state else None

    monkeypatch.setitem(ARCHITECTURES, "toy", dataclasses.replace(toy, recognise=recognise))
    write_safetensors(tmp_path / "eva_x.safetensors", toy.build(32, 3).state_dict())
    found = read_weights(tmp_path / "eva_x.safetensors")
    assert (found.layout, architecture_of_file(found)) == ("toy", "toy")
    with pytest.raises(UserError, match="holds weights of toy, but the model is eva_x"):
        load_init(architecture_of("eva_x"), toy.build(32, 3), tmp_path / "eva_x.safetensors")


def test_a_frozen_stem_is_stored_apart_and_shared(toy, tmp_path):
    toy = dataclasses.replace(toy, frozen="stem.")
    model, other = toy.build(32, 3), toy.build(32, 3)
    assert list(toy.trained_state_dict(model)) == ["head.1.weight", "head.1.bias"]
    write_safetensors(tmp_path / "model.safetensors", model.state_dict())
    head = other.head[1].weight.clone()
    load_backbone(toy, other, tmp_path / "model.safetensors")
    assert torch.equal(other.stem[0].weight, model.stem[0].weight)
    assert torch.equal(other.head[1].weight, head)
    toy.share_frozen(other, model)
    assert other.stem is model.stem
