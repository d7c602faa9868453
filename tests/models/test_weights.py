"""Every layout is recognised and read exactly; what is hostile, damaged or of another model is refused by name."""

import argparse
import functools
import os
import pathlib
import pickle
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from cxrdist.cli import run_entry
from cxrdist.errors import UserError
from cxrdist.models import architecture_of, convert
from cxrdist.models.weights.fit import default_init_path, init_files, load_backbone, load_init
from cxrdist.models.weights.layouts import architecture_of_file, read_weights, safe_torch_load
from cxrdist.models.weights.safetensors import file_sha256, read_safetensors, write_safetensors

fast = pytest.mark.fast
EVA_X, CHEXFOUND = architecture_of("eva_x"), architecture_of("chexfound")
LAYOUTS = {
    "evax/base_mim.pt": "eva_x_mim",
    "evax/base_mim_with_args.pt": "eva_x_mim",
    "evax/tiny_mim_module.pt": "eva_x_mim",
    "evax/base448_ema_f6.pth": "published_eva_x",
    "chexfound/teacher_checkpoint.pth": "chexfound_teacher",
    "chexfound/glori.pth": "glori",
    "chexfound/model3_finetuned.pth": "published_chexfound",
}


class Hostile:
    """Creates the file `canary` when it is unpickled by a loader that runs code."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


def raw(path):
    return torch.load(path, weights_only=True)


@fast
@pytest.mark.parametrize("file", LAYOUTS)
def test_the_layout_is_recognised_whatever_the_file_is_called(file, golden, tmp_path):
    renamed = tmp_path / "download(1).bin"
    shutil.copy(golden / file, renamed)
    shutil.copy(golden / "chexfound" / "results_eval_linear.json", tmp_path)
    found = read_weights(renamed)
    assert found.layout == LAYOUTS[file]
    assert str(renamed) in found.report
    assert LAYOUTS[file] in found.report
    assert architecture_of_file(found) == ("chexfound" if "chexfound" in file else "eva_x")


@fast
@pytest.mark.parametrize("name", ["eva_x_small", "eva_x_tiny", "chexfound"])
def test_the_tensors_of_a_file_choose_the_architecture_whatever_it_is_called(name, tmp_path):
    """Also between the sizes of one model, at another input size and number of labels."""
    sizes = {"depth": 4, "embed_dim": 32, "num_heads": 2, "decoder_dim": 16} if name == "chexfound" else {"depth": 1}
    model = architecture_of(name).build(64, 3, **sizes)
    write_safetensors(tmp_path / "eva_x.safetensors", model.state_dict())
    assert architecture_of_file(read_weights(tmp_path / "eva_x.safetensors")) == name


@pytest.mark.parametrize("containers", [(), ("state_dict",), ("model_ema",), ("model", "module"), ("module.",)])
def test_eva_x_containers_are_opened(containers, golden, tmp_path):
    state = raw(golden / "evax" / "base_mim.pt")["model"]
    expected = read_weights(golden / "evax" / "base_mim.pt").tensors
    for container in reversed(containers):
        if container == "module.":
            state = {f"module.{name}": tensor for name, tensor in state.items()}
        else:
            state = {container: state, "epoch": 7, "loss": np.float64(0.5), "args": argparse.Namespace(out=Path("x"))}
    torch.save(state, tmp_path / "mim.pt")
    tensors = read_weights(tmp_path / "mim.pt").tensors
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
def test_a_path_among_the_arguments_is_read_from_any_python(module, golden, tmp_path, monkeypatch):
    """Python 3.13 writes it as of pathlib._local, those before and after as of pathlib; any of them reads both."""
    monkeypatch.setitem(sys.modules, module, pathlib)
    monkeypatch.setattr(pathlib.PosixPath, "__module__", module)
    content = raw(golden / "evax" / "base_mim.pt") | {"args": argparse.Namespace(out=Path("x"))}
    torch.save(content, tmp_path / "mim.pt")
    monkeypatch.undo()
    with zipfile.ZipFile(tmp_path / "mim.pt") as file:
        assert f"c{module}\nPosixPath\n".encode() in file.read("mim/data.pkl")
    assert (
        read_weights(tmp_path / "mim.pt").tensors.keys() == read_weights(golden / "evax" / "base_mim.pt").tensors.keys()
    )


def test_official_fine_tuned_eva_x_keeps_its_norm_and_loses_its_foreign_head(golden, tmp_path, small_eva_x):
    state = raw(golden / "evax" / "base_mim.pt")["model"]
    del state["mask_token"], state["lm_head.weight"], state["lm_head.bias"]
    for part in ("weight", "bias"):
        state[f"fc_norm.{part}"] = state.pop(f"norm.{part}") + 1
    state |= {"head.weight": torch.randn(14, 48), "head.bias": torch.randn(14)}
    torch.save({"model": state, "epoch": 3, "args": argparse.Namespace(nb_classes=14)}, tmp_path / "cxr14.pth")
    model = small_eva_x("base", 224)
    before = model.head.weight.clone()
    report = load_init(EVA_X, model, tmp_path / "cxr14.pth")
    assert "eva_x_finetuned" in report
    assert "left out head.weight (labels of another data set)" in report
    assert torch.equal(model.head.weight, before)
    assert torch.equal(model.fc_norm.weight, state["fc_norm.weight"])
    with pytest.raises(UserError, match=r"missing: head\.bias, head\.weight"):
        load_init(EVA_X, model, tmp_path / "cxr14.pth", complete=True)


def test_the_best_classifier_is_the_one_the_last_record_names(golden, tmp_path):
    files = golden / "chexfound"
    official = raw(files / "glori.pth")["model"]
    best = "classifiers_dict.linear:blocks=4:avgpool=False:lr=0_0005000000.decoder."
    found = read_weights(files / "glori.pth")
    assert len(found.tensors) == 19
    for name, tensor in found.tensors.items():
        assert torch.equal(tensor, official[best + name.removeprefix("glori.")])
    assert "lr=0_0005000000" in found.report
    shutil.copy(files / "glori.pth", tmp_path)
    with pytest.raises(UserError, match=r"put results_eval_linear\.json beside it"):
        read_weights(tmp_path / "glori.pth")
    results = tmp_path / "results_eval_linear.json"
    for text, message in [
        ('ITER: 1\n{"best_classifier": {"name": "linear:lr=9"}}\n', "no classifier linear:lr=9"),
        ('ITER: 1\n{"best_classifier"', "without best_classifier"),
        ("nothing\n", "has no record"),
    ]:
        results.write_text(text)
        with pytest.raises(UserError, match=message):
            read_weights(tmp_path / "glori.pth")


@fast
def test_released_head_is_kept_complete_or_adapted_as_published(golden, small_chexfound):
    released = read_weights(golden / "chexfound" / "glori.pth").tensors
    complete, adapted = small_chexfound(96, 40), small_chexfound(96, 14)
    load_init(CHEXFOUND, complete, golden / "chexfound")
    report = load_init(CHEXFOUND, adapted, golden / "chexfound")
    assert all(torch.equal(tensor, released[name]) for name, tensor in complete.state_dict().items() if "glori" in name)
    assert "head of 40 classes" in report
    assert torch.equal(adapted.glori.duplicate_pooling_bias, torch.zeros(14))
    assert torch.equal(adapted.glori.query_embed.weight, released["glori.query_embed.weight"])
    assert torch.equal(adapted.glori.duplicate_pooling, released["glori.duplicate_pooling"])


def test_more_labels_than_the_released_head_has_queries_start_with_a_fresh_head(golden, small_chexfound):
    model = small_chexfound(96, 41, num_queries=41)
    head = {name: tensor.clone() for name, tensor in model.glori.state_dict().items()}
    report = load_init(CHEXFOUND, model, golden / "chexfound")
    assert "head of 40 classes left out: too few for 41" in report
    assert "fresh head" in report
    assert all(torch.equal(head[name], tensor) for name, tensor in model.glori.state_dict().items())
    with pytest.raises(UserError, match="missing: glori"):
        load_init(CHEXFOUND, model, golden / "chexfound", complete=True)


@fast
def test_only_a_teacher_starts_with_a_fresh_head_and_only_a_head_is_refused(golden, small_chexfound, pattern):
    files = golden / "chexfound"
    single, pair, backbone = small_chexfound(96), small_chexfound(96), small_chexfound(96)
    head = {name: tensor.clone() for name, tensor in single.glori.state_dict().items()}
    assert "fresh head" in load_init(CHEXFOUND, single, files / "teacher_checkpoint.pth")
    assert all(torch.equal(head[name], tensor) for name, tensor in single.glori.state_dict().items())
    load_init(CHEXFOUND, pair, Path(f"{files}/glori.pth,{files}/teacher_checkpoint.pth"))
    load_backbone(CHEXFOUND, backbone, files / "teacher_checkpoint.pth")
    images = pattern(96, 96)
    assert torch.equal(single.features(images), pair.features(images))
    assert torch.equal(backbone.features(images), pair.features(images))
    with pytest.raises(UserError, match=r"missing: backbone\..*teacher_checkpoint\.pth"):
        load_init(CHEXFOUND, small_chexfound(96), files / "glori.pth")
    with pytest.raises(UserError, match="missing: glori"):
        load_init(CHEXFOUND, small_chexfound(96), files / "teacher_checkpoint.pth", complete=True)


@fast
def test_published_epoch_can_be_continued(golden, small_chexfound):
    """Weights, EMA and AdamW state come out by our names; two steps were taken, and unused queries never moved."""
    file = golden / "chexfound" / "model3_finetuned.pth"
    found, stored = read_weights(file), raw(file)
    model = small_chexfound(96)
    load_init(CHEXFOUND, model, file, complete=True)
    assert found.epoch == 3
    assert list(found.optimizer) == CHEXFOUND.trainable_names(model)
    assert found.ema.keys() == found.tensors.keys() == model.state_dict().keys()
    released = read_weights(golden / "chexfound" / "glori.pth").tensors
    for number, (name, parameter) in enumerate(model.glori.named_parameters()):
        state = found.optimizer[f"glori.{name}"]
        assert state["step"] == 2
        assert state["exp_avg"].shape == parameter.shape
        assert torch.equal(state["exp_avg_sq"], stored["optimizer_state_dict"]["state"][number]["exp_avg_sq"])
        if name in ("query_embed.weight", "duplicate_pooling"):
            assert not state["exp_avg"][14:].any()
            assert state["exp_avg"][:14].any()
        if parameter.shape == released[f"glori.{name}"].shape:
            # two Adam steps of size lr from the released head, where the gradient was not zero
            moved = (parameter - released[f"glori.{name}"]).abs()
            assert 1e-5 < moved.max() < 2.1 * 2e-4
    optimizer = torch.optim.AdamW(model.glori.parameters(), lr=2e-4, weight_decay=1e-5)
    numbered = {number: found.optimizer[name] for number, name in enumerate(CHEXFOUND.trainable_names(model))}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": numbered})
    model(torch.randn(2, 3, 96, 96)).sum().backward()
    optimizer.step()


def published_eva_x(golden, folder, epoch=5):
    """The pair of files of one published EVA-X epoch, from a golden one: weights + optimizer, and the EMA."""
    ema = raw(golden / "evax" / "base448_ema_f6.pth")["ema_state_dict"]
    names = [name for name in ema if name not in ("backbone.cls_token", "backbone.pos_embed")]
    state = {
        number: {"step": torch.tensor(9.0), "exp_avg": ema[name] * 2, "exp_avg_sq": ema[name] ** 2}
        for number, name in enumerate(names)
    }
    groups = [{"params": [0, 1]}, {"params": []}, {"params": list(range(2, len(names)))}]
    weights = {name: tensor + 1 for name, tensor in ema.items()}
    optimizer = {"state": state, "param_groups": groups}
    best, averaged = folder / f"best_model_f{epoch}.pth", folder / f"ema_model_f{epoch}.pth"
    torch.save({"epoch": epoch, "model_state_dict": weights, "optimizer_state_dict": optimizer}, best)
    torch.save({"epoch": epoch, "ema_state_dict": ema}, averaged)
    return best, averaged, weights, ema


def test_published_eva_x_pair_comes_together_in_either_order(golden, tmp_path, small_eva_x):
    best, averaged, weights, ema = published_eva_x(golden, tmp_path)
    for pair in ((best, averaged), (averaged, best)):
        found = read_weights(*pair)
        assert found.epoch == 5
        assert all(torch.equal(found.tensors[name.removeprefix("backbone.")], weights[name]) for name in weights)
        assert all(torch.equal(found.ema[name.removeprefix("backbone.")], ema[name]) for name in ema)
        for name, state in found.optimizer.items():
            assert torch.equal(state["exp_avg"], ema[f"backbone.{name}"] * 2)
    model = small_eva_x("base", 448)
    load_init(EVA_X, model, Path(f"{best},{averaged}"), weights="ema")
    assert torch.equal(model.head.bias, ema["backbone.head.bias"])
    load_init(EVA_X, model, best)
    assert torch.equal(model.head.bias, weights["backbone.head.bias"])
    other, _, _, _ = published_eva_x(golden, tmp_path, epoch=6)
    with pytest.raises(UserError, match="of epochs 6 and 5"):
        read_weights(other, averaged)
    with pytest.raises(UserError, match="do not complete each other"):
        read_weights(best, best)


def test_an_optimizer_state_of_other_parameters_is_refused(golden, tmp_path):
    best, _, _, _ = published_eva_x(golden, tmp_path)
    stored = raw(best)
    stored["optimizer_state_dict"]["param_groups"][2]["params"].reverse()
    torch.save(stored, best)
    with pytest.raises(UserError, match="do not match"):
        read_weights(best)
    stored["optimizer_state_dict"] = {"state": {}, "param_groups": [{"params": [0]}]}
    torch.save(stored, best)
    with pytest.raises(UserError, match="is not AdamW's"):
        read_weights(best)


LOADS = {
    "safe_torch_load": lambda path, model, out: safe_torch_load(path),
    "read_weights": lambda path, model, out: read_weights(path),
    "load_init": lambda path, model, out: load_init(CHEXFOUND, model, path),
    "load_init, a pair": lambda path, model, out: load_init(CHEXFOUND, model, Path(f"{path},{path}")),
    "load_backbone": lambda path, model, out: load_backbone(CHEXFOUND, model, path),
    "convert": lambda path, model, out: convert.main([str(path), "--out", str(out)]),
}


def save_hostile(path, form, canary):
    content = {"teacher": {"backbone.cls_token": torch.zeros(1, 1, 32)}, "extra": Hostile(canary)}
    if form == "inside args":
        content["extra"] = argparse.Namespace(callback=Hostile(canary))
    if form == "plain pickle":
        path.write_bytes(pickle.dumps(Hostile(canary), protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form != "legacy")
    canary.mkdir()
    with pytest.raises(FileExistsError), path.open("rb") as file:  # the payload is real: other unpicklers run it
        torch.load(file, weights_only=False)
    canary.rmdir()


@fast
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("form", ["zip", "legacy", "plain pickle", "named safetensors", "inside args"])
def test_a_hostile_pickle_is_refused_and_does_nothing(form, load, tmp_path, small_chexfound):
    canary = tmp_path / "canary"
    path = tmp_path / ("weights.safetensors" if form == "named safetensors" else "weights.pth")
    save_hostile(path, form, canary)
    digest = file_sha256(path)
    with pytest.raises(UserError, match=path.name):
        LOADS[load](path, small_chexfound(96), tmp_path / "out.safetensors")
    assert list(tmp_path.iterdir()) == [path]
    assert file_sha256(path) == digest


@pytest.mark.parametrize("name", ["teacher_checkpoint.pth", "glori.pth"])
def test_a_hostile_file_in_a_folder_of_weights_is_refused(name, golden, tmp_path, small_chexfound):
    for file in ("teacher_checkpoint.pth", "glori.pth", "results_eval_linear.json"):
        shutil.copy(golden / "chexfound" / file, tmp_path)
    save_hostile(tmp_path / name, "zip", tmp_path / "canary")
    with pytest.raises(UserError, match=rf"{name}: refused"):
        load_init(CHEXFOUND, small_chexfound(96), tmp_path)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.999])
@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_a_truncated_file_is_named(kind, share, load, golden, tmp_path, small_chexfound):
    intact = golden / "chexfound" / "teacher_checkpoint.pth"
    if kind == "safetensors":
        write_safetensors(tmp_path / "intact.safetensors", read_weights(intact).tensors)
        intact = tmp_path / "intact.safetensors"
    path = tmp_path / f"cut.{kind}"
    content = intact.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UserError, match=rf"cut\.{kind}"):
        LOADS[load](path, small_chexfound(96), tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        (b"hello, these are no weights at all", "not a torch file"),
        (b"\x00" * 4096, "not a torch file"),
    ],
)
def test_a_file_of_something_else_is_named(content, message, tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"weights\.pth.*{message}"):
        read_weights(path)


def test_weights_of_another_model_size_or_project_are_named(golden, tmp_path, small_eva_x, small_chexfound):
    torch.save({"state_dict": {"conv1.weight": torch.zeros(3)}}, tmp_path / "resnet.pth")
    with pytest.raises(
        UserError, match=r"resnet\.pth: holds no weights of eva_x, .*chexfound, rad_dino; .*conv1\.weight"
    ):
        read_weights(tmp_path / "resnet.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="holds a list"):
        read_weights(tmp_path / "list.pth")
    with pytest.raises(UserError, match="holds weights of eva_x, but the model is chexfound"):
        load_init(CHEXFOUND, small_chexfound(96), golden / "evax" / "base_mim.pt")
    with pytest.raises(UserError, match="holds weights of chexfound, but the model is eva_x"):
        load_init(EVA_X, small_eva_x("base", 224), golden / "chexfound" / "model3_finetuned.pth")
    with pytest.raises(UserError, match="two different models"):
        read_weights(golden / "evax" / "base_mim.pt", golden / "chexfound" / "glori.pth")
    with pytest.raises(UserError, match=r"missing: blocks\.0\.attn\.q_bias.*unexpected: blocks\.0\.attn\.k_proj"):
        load_init(architecture_of("eva_x_tiny"), small_eva_x("tiny", 224), golden / "evax" / "base_mim.pt")
    small = architecture_of("eva_x_small").build(224, 14, depth=1)
    write_safetensors(tmp_path / "small.safetensors", small.state_dict())
    with pytest.raises(UserError, match="its sizes are those of --model eva_x_small"):
        load_init(
            architecture_of("eva_x_tiny"),
            architecture_of("eva_x_tiny").build(224, 14, depth=1),
            tmp_path / "small.safetensors",
        )


@fast
def test_missing_unexpected_and_non_finite_tensors_are_listed_before_anything_is_copied(golden, tmp_path, small_eva_x):
    stored = raw(golden / "evax" / "base448_ema_f6.pth")
    state = stored["ema_state_dict"]
    del state["backbone.fc_norm.bias"]
    state["backbone.blocks.7.norm1.weight"] = torch.zeros(48)
    state["backbone.blocks.0.norm1.weight"][3] = float("nan")
    state["backbone.blocks.1.norm1.weight"] = torch.ones(47)
    torch.save(stored, tmp_path / "odd.pth")
    model = small_eva_x("base", 448)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    message = (
        r"missing: fc_norm\.bias; unexpected: blocks\.7\.norm1\.weight; of another shape: blocks\.1\.norm1\.weight "
        r"\(47,\), model \(48,\); not finite floating point: blocks\.0\.norm1\.weight"
    )
    with pytest.raises(UserError, match=message):
        load_init(EVA_X, model, tmp_path / "odd.pth")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("files", "model", "size"),
    [
        (("evax/base_mim_with_args.pt",), "small_eva_x base", 448),
        (("evax/tiny_mim_module.pt",), "small_eva_x tiny", 224),
        (("evax/base448_ema_f6.pth",), "small_eva_x base", 448),
        (("evax/base448_ema_f6.pth",), "small_eva_x base", 224),
        (("chexfound/teacher_checkpoint.pth", "chexfound/glori.pth"), "small_chexfound", 128),
        (("chexfound/model3_finetuned.pth",), "small_chexfound", 96),
    ],
)
def test_converted_files_give_the_same_logits_bit_for_bit(
    files, model, size, golden, tmp_path, pattern, request, capsys
):
    fixture, *variant = model.split()
    name = {"small_eva_x base": "eva_x", "small_eva_x tiny": "eva_x_tiny", "small_chexfound": "chexfound"}[model]
    build = functools.partial(request.getfixturevalue(fixture), *variant, size)
    sources, out = [golden / file for file in files], tmp_path / "converted.safetensors"
    convert.main([*map(str, sources), "--out", str(out)])
    assert str(out) in capsys.readouterr().out
    logits = []
    for path in (Path(",".join(map(str, sources))), out):
        torch.manual_seed(3)  # a fresh head is drawn alike
        built = build()
        load_init(architecture_of(name), built, path, weights="ema")
        with torch.no_grad():
            logits.append(built(pattern(size, size)))
    assert torch.equal(logits[0], logits[1])
    _, metadata = read_safetensors(out)
    assert all(file_sha256(source) in metadata["sources"] for source in sources)


def test_our_own_checkpoint_and_backbone_file_are_read_back(tmp_path, small_chexfound, pattern):
    model, again = small_chexfound(96), small_chexfound(96)
    state = model.state_dict()
    parts = {part: {n: t for n, t in state.items() if n.startswith(part)} for part in ("backbone.", "glori.")}
    for part, tensors in parts.items():
        write_safetensors(tmp_path / f"{part}safetensors", tensors)
    load_init(CHEXFOUND, again, Path(f"{tmp_path}/glori.safetensors,{tmp_path}/backbone.safetensors"), complete=True)
    assert torch.equal(model(pattern(96, 96)), again(pattern(96, 96)))
    CHEXFOUND.load_trained_state_dict(again, read_weights(tmp_path / "glori.safetensors").tensors, "glori.safetensors")


def test_convert_writes_nothing_when_it_fails(golden, tmp_path, capsys):
    source, out = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    write_safetensors(source, {"cls_token": torch.zeros(1)})
    out.write_bytes(b"kept")
    for arguments, message in [
        ([str(source), "--out", str(tmp_path / "d.safetensors")], "no weights of eva_x"),
        ([str(source), "--out", str(out)], "not as cxrdist wrote it"),
        ([str(source), "--out", str(source)], "is an input of this command"),
        ([str(golden / "evax" / "base_mim.pt"), "--out", str(tmp_path / "c.pth")], "name it .safetensors"),
        ([str(tmp_path / "none.pt"), "--out", str(tmp_path / "e.safetensors")], "no such file"),
    ]:
        assert run_entry(functools.partial(convert.main, arguments)) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert out.read_bytes() == b"kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


@fast
def test_without_init_the_missing_file_and_its_source_are_named(golden, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"eva_x_base_patch16_merged520k_mim\.pt in weights/.*MapleF/eva_x.*licen"):
        default_init_path(EVA_X)
    with pytest.raises(UserError, match=r"teacher_checkpoint\.pth and glori\.pth in weights/.*RPIDIAL/CheXFound"):
        default_init_path(CHEXFOUND)
    (tmp_path / "weights").mkdir()
    shutil.copy(golden / "chexfound" / "teacher_checkpoint.pth", "weights")
    with pytest.raises(UserError, match=r"needs glori\.pth.*fresh head"):
        default_init_path(CHEXFOUND)
    shutil.copy(golden / "chexfound" / "glori.pth", "weights")
    assert default_init_path(CHEXFOUND) == Path("weights")
    assert [path.name for path in init_files(CHEXFOUND, None)] == ["teacher_checkpoint.pth", "glori.pth"]
    Path("weights/eva_x_base_patch16_merged520k_mim.pt").touch()
    assert default_init_path(EVA_X) == Path("weights/eva_x_base_patch16_merged520k_mim.pt")
    with pytest.raises(UserError, match="no such file"):
        init_files(EVA_X, Path("weights/nothing.pt"))


def test_a_plain_vision_transformer_is_not_taken_for_eva_x(tmp_path):
    plain = timm.create_model("vit_tiny_patch16_224", depth=1)
    write_safetensors(tmp_path / "vit.safetensors", plain.state_dict())
    with pytest.raises(UserError, match="holds no weights of eva_x"):
        read_weights(tmp_path / "vit.safetensors")
