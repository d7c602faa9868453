"""BatchNorm over several ranks is that of the whole batch; it moves once a pass, and not in a skipped step."""

import copy

import pytest
import timm
import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import nn

from cxrdist.errors import UserError
from cxrdist.training.batch_norm import BatchNorms

pytestmark = pytest.mark.fast
C = 3


@pytest.fixture(autouse=True)
def _same_images() -> None:
    """A value at ReLU's kink has another gradient where it is rounded otherwise: such images are rare."""
    torch.manual_seed(0)


def synced(norm: nn.Module, total=lambda rows: rows, place=(0, 1)) -> tuple[nn.Sequential, BatchNorms]:
    model = nn.Sequential(copy.deepcopy(norm))
    norms = BatchNorms(model, sync=True, place=place, total=total)
    norms.train(model)
    return model, norms


def make_norm(kind: type, **options) -> nn.Module:
    norm = kind(C, **options)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, BatchNormAct2d])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_on_one_rank_it_is_torchs(kind: type, momentum: float | None) -> None:
    plain = make_norm(kind, momentum=momentum)
    model, norms = synced(plain)
    for step in range(3):
        images = torch.randn(4, C, 5, 6) * 3 + 100.0 * step
        ours, theirs = images.clone().requires_grad_(), images.clone().requires_grad_()
        norms.begin(first=True, counted=True)
        found, wanted = model(ours), plain(theirs)
        norms.end()
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        weights = torch.randn_like(found)
        (found * weights).sum().backward()
        (wanted * weights).sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-3)
        norms.close_step(torch.zeros(()))
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(model[0].get_buffer(name), buffer, rtol=1e-5, atol=1e-5)
    model.eval()
    torch.testing.assert_close(model(images), plain.eval()(images), rtol=1e-4, atol=1e-3)


def row_of(images: torch.Tensor, count: float | None = None) -> torch.Tensor:
    values = images.transpose(0, 1).flatten(1)
    number = torch.tensor([float(values.shape[1]) if count is None else count])
    return torch.cat([values.mean(1), values.var(1, correction=0), number])


@pytest.mark.parametrize("placeholder", [False, True])
def test_two_ranks_have_the_statistics_of_all_their_images(placeholder: bool) -> None:
    """The other rank's row is given; where this rank holds a placeholder, the other's images alone count."""
    norm = make_norm(nn.BatchNorm2d)
    own, other = torch.randn(2, C, 4, 4) + 5.0, torch.randn(6, C, 4, 4) * 2

    def total(rows: torch.Tensor) -> torch.Tensor:
        assert not rows[1].any()
        return rows + torch.stack([torch.zeros(2 * C + 1), row_of(other)])

    model, norms = synced(norm, total, (0, 2))
    norms.begin(first=True, counted=not placeholder)
    found = model(own)
    norms.end()
    counted = other if placeholder else torch.cat([own, other])
    norm.train()(counted)
    values = counted.transpose(0, 1).flatten(1)
    shape = (1, C, 1, 1)
    wanted = (own - values.mean(1).view(shape)) / (values.var(1, correction=0) + norm.eps).sqrt().view(shape)
    wanted = wanted * norm.weight.view(shape) + norm.bias.view(shape)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model[0].running_mean, norm.running_mean)
    torch.testing.assert_close(model[0].running_var, norm.running_var)


def test_it_moves_once_a_pass_and_not_in_a_skipped_step() -> None:
    model, norms = synced(make_norm(nn.BatchNorm2d))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    norms.begin(first=True, counted=True)
    model(torch.randn(4, C, 3, 3))
    norms.end()
    once = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(torch.randn(4, C, 3, 3))  # gradient checkpointing's second forward, in the backward pass
    assert all(buffer.equal(once[name]) for name, buffer in model.named_buffers())
    assert not once["0.running_mean"].equal(before["0.running_mean"])
    norms.begin(first=False, counted=True)
    model(torch.full((4, C, 3, 3), float("nan")))
    norms.end()
    norms.close_step(torch.ones(()))
    assert all(buffer.equal(before[name]) for name, buffer in model.named_buffers())


def test_a_pass_without_any_image_moves_nothing_and_stays_finite() -> None:
    model, norms = synced(make_norm(nn.BatchNorm2d))
    norms.begin(first=True, counted=False)
    assert model(torch.randn(1, C, 3, 3)).isfinite().all()
    assert model[0].running_mean.equal(torch.zeros(C))
    assert int(model[0].num_batches_tracked) == 0


def test_unless_synced_the_statistics_are_the_weights_own_and_weights_are_trained() -> None:
    model = timm.create_model("test_resnet", num_classes=2)
    norms = BatchNorms(model, sync=False, place=(0, 2), total=lambda rows: rows)
    norms.train(model)
    assert model.training
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert norms.buffers == list(before)
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(buffer.equal(before[name]) for name, buffer in model.named_buffers())
    assert model.bn1.weight.grad is not None
    assert "stay as they began: mean 0, deviation 1" in norms.notes(8)[0]
    nn.init.ones_(model.bn1.running_mean)
    assert "stay as the weights brought them" in norms.notes(8)[0]


def test_what_cannot_be_synced_is_named() -> None:
    def make(*layers: nn.Module) -> BatchNorms:
        return BatchNorms(nn.Sequential(*layers), sync=True, place=(0, 2), total=lambda rows: rows)

    with pytest.raises(UserError, match="the model has no BatchNorm"):
        make(nn.Linear(2, 2))
    with pytest.raises(UserError, match="0 is a BatchNorm1d, which cannot be synced"):
        make(nn.BatchNorm1d(2))
    assert "up to 16 images" in make(nn.BatchNorm2d(2)).notes(8)[0]
