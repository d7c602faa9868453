"""timm's models read as they are: names, sizes, files, layers, maps."""

import numpy as np
import pytest
import timm
import torch

from cxrdist import recipes
from cxrdist.errors import UserError
from cxrdist.models import architecture_of, recipe_for
from cxrdist.models import backbones as module
from cxrdist.models.weights.fit import default_init_path, load_download, load_init
from cxrdist.models.weights.safetensors import write_safetensors

pytestmark = pytest.mark.fast


def test_size_normalisation_and_head_are_those_of_its_configuration() -> None:
    vit, convnext = architecture_of("timm:vit_tiny_patch16_224.augreg_in21k"), architecture_of("timm:convnext_atto")
    assert (vit.image_size, vit.multiple_of, vit.mean, vit.head) == (224, 16, (0.5, 0.5, 0.5), ("head.",))
    assert (convnext.image_size, convnext.multiple_of, convnext.head) == (224, 1, ("head.fc.",))
    assert recipe_for("timm:tf_efficientnetv2_s", "b").image_size == 300
    assert vit.build(64, 5).pos_embed.shape[1] == 1 + 16
    swin = architecture_of("timm:swin_tiny_patch4_window7_224").build(64, 3, embed_dim=24)  # 0.1 unless it is told
    assert all(getattr(layer, "drop_prob", 0.0) == 0.0 for layer in swin.modules())


@pytest.mark.parametrize(
    ("model", "size"),
    [
        ("timm:vit_tiny_patch16_224", 96),
        ("timm:test_resnet", 64),
        ("timm:test_efficientnet", 64),
        ("timm:test_convnext", 64),
        ("timm:eva02_tiny_patch14_224", 56),
        ("timm:regnetx_002", 64),
    ],
)
def test_a_file_of_other_labels_and_size_gives_timms_own_numbers(model: str, size: int, tmp_path) -> None:
    """Against timm's own loading of the same file, which pads what is left out of the classifier at random."""
    torch.manual_seed(0)
    name = model.removeprefix("timm:")
    source = timm.create_model(name, num_classes=7)
    write_safetensors(tmp_path / "other.safetensors", source.state_dict())
    architecture = architecture_of(model)
    ours = architecture.build(size, 3).eval()
    report = load_init(architecture, ours, tmp_path / "other.safetensors")
    assert "labels of another data set" in report
    assert "fresh head" in report
    kwargs = {"img_size": size} if hasattr(ours, "patch_embed") else {}
    theirs = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay={"state_dict": source.state_dict()}, num_classes=3, **kwargs
    )
    theirs.load_state_dict(
        {k: v for k, v in ours.state_dict().items() if k.startswith(architecture.head)}, strict=False
    )
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert torch.equal(ours(images), theirs.eval()(images))
    with pytest.raises(UserError, match="has no official weights: use --init FILE, or --init timm"):
        default_init_path(architecture)


def test_a_file_of_another_model_is_refused(tmp_path) -> None:
    write_safetensors(tmp_path / "resnet.safetensors", timm.create_model("test_resnet").state_dict())
    for model in ("timm:test_vit", "glori:test_vit"):
        architecture = architecture_of(model)
        with pytest.raises(UserError, match=r"resnet\.safetensors.*(does not fit|cannot read)"):
            load_init(architecture, architecture.build(64, 3), tmp_path / "resnet.safetensors")


def test_a_download_is_checked_as_a_file_is_and_its_failure_named(monkeypatch) -> None:
    architecture = architecture_of("timm:test_vit")
    source = timm.create_model("test_vit")
    monkeypatch.setattr(module, "load_state_dict_from_hf", lambda hub, **more: source.state_dict())
    model = architecture.build(160, 3)
    assert "test_vit" in load_download(architecture, model)
    assert model.norm.weight.equal(source.norm.weight)
    assert model.blocks[0].attn.qkv.weight.equal(source.blocks[0].attn.qkv.weight)
    monkeypatch.setattr(
        module, "load_state_dict_from_hf", lambda hub, **more: {k: v for k, v in list(source.state_dict().items())[3:]}
    )
    with pytest.raises(UserError, match="does not fit the model; missing"):
        load_download(architecture, model)

    def offline(hub, **more):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(module, "load_state_dict_from_hf", offline)
    with pytest.raises(
        UserError, match=r"--init timm: timm/test_vit\.r160_in1k cannot be loaded .no route.*--init FILE"
    ):
        load_download(architecture, model)
    with pytest.raises(UserError, match="eva_x is no model of timm's"):
        load_download(architecture_of("eva_x"), model)


def test_the_layers_that_are_trained_end_at_the_head() -> None:
    architecture = architecture_of("timm:vit_tiny_patch16_224")
    model = architecture.build(64, 3)
    assert architecture.trained_names(model, "head") == {"head.weight", "head.bias"}
    last = architecture.trained_names(model, "last:2")
    assert {name.split(".")[1] for name in last if name.startswith("blocks.")} == {"10", "11"}
    assert {name for name in last if not name.startswith("blocks.")} == {
        *("norm.weight", "norm.bias"),
        "head.weight",
        "head.bias",
    }
    assert architecture.trained_names(model, "last:99") == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "convnext_atto", "test_resnet", "swin_tiny_patch4_window7_224"]
)
def test_layer_decay_is_timms(name: str) -> None:
    from timm.optim._param_groups import param_groups_layer_decay

    from cxrdist.training.optim import groups_of

    architecture, recipe = architecture_of(f"timm:{name}"), recipe_for(f"timm:{name}", "b")
    model = architecture.build(224, 3)
    ours = {n: (row.lr, row.weight_decay) for row, members in groups_of(architecture, model, recipe) for n in members}
    names = {parameter: n for n, parameter in model.named_parameters()}
    for group in param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.75):
        for parameter in group["params"]:
            lr, decay = ours[names[parameter]]
            assert lr == pytest.approx(recipe.groups[0].lr * group["lr_scale"], rel=1e-12)
            if names[parameter] not in model.no_weight_decay() if hasattr(model, "no_weight_decay") else True:
                assert decay == (group["weight_decay"] if parameter.ndim > 1 else 0.0)


@pytest.mark.parametrize("model", ["timm:test_resnet", "timm:swin_tiny_patch4_window7_224", "timm:test_vit"])
def test_grad_cam_has_the_features_grid_and_finds_what_raises_the_score(model: str) -> None:
    architecture = architecture_of(model)
    torch.manual_seed(0)
    built = architecture.build(64, 3).eval()
    images = torch.randn(2, 3, 64, 64)
    maps = architecture.saliency(built, images, np.array([0, 2]))
    assert maps.shape == {"timm:test_vit": (2, 4, 4)}.get(model, (2, 2, 2))
    assert maps.dtype == np.float32
    assert (maps >= 0).all()


def test_a_plain_recipe_fits_the_set_and_trains_a_frozen_encoders_head_alone() -> None:
    plain = recipe_for("timm:convnext_atto", "mine", 480)
    assert (plain.name, plain.epochs, plain.layer_decay, plain.decay_vectors) == (
        "timm_convnext_atto",
        100,
        0.75,
        False,
    )
    assert plain.inference.member_epochs == (99, 100)
    frozen = recipe_for("glori:vit_tiny_patch16_224", "b")
    assert [group.pattern for group in frozen.groups] == [r"^backbone\.", r"^glori\."]
    assert frozen.groups[1] == recipes.chexfound("b").groups[1]
    assert recipe_for("eva_x", "b") == recipes.eva_x("b")
