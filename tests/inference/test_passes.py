"""The plan of passes: what is asked for on the command line, and each distinct pass once."""

import dataclasses

import numpy as np
import pytest

from cxrdist.errors import UserError
from cxrdist.inference import members as member_specs
from cxrdist.inference import passes
from cxrdist.inference.parts import Basis, Part, PartStore, merge
from cxrdist.inference.passes import Member
from cxrdist.scoring.tables import Checkpoint

pytestmark = pytest.mark.fast
TTA = {"plain": 2 / 6, "hflip": 1 / 6, "center1.1": 1 / 6, "bright0.95": 1 / 6, "bright1.05": 1 / 6}
BASIS = Basis(shards="s", rows="r", columns=(("c", 448, "plain"),), device_batch_size=4, precision="fp32", device="cpu")


def checkpoint(source: str, sha256: str, backbone: str | None, image_size: int, views: dict[str, float] = TTA):
    return Checkpoint(
        source=source,
        model="eva_x" if backbone is None else "chexfound",
        sha256=sha256,
        backbone_sha256=backbone,
        image_size=image_size,
        views=views,
        num_views=6 if views is TTA else 1,
    )


def published() -> list[Member]:
    eva_x = tuple(checkpoint(f"eva@{e}", f"e{e}", None, 448) for e in (5, 6))
    chexfound = tuple(checkpoint(f"chex@{e}", f"c{e}", "vit", 512, {"plain": 1.0}) for e in (5, 6))
    return [Member("eva_x", eva_x), Member("chexfound", chexfound)]


def test_the_published_ensemble_needs_10_and_1_passes_instead_of_12_and_2():
    members = published()
    plan = passes.plan_passes(members)
    assert [item.image_size for item in plan].count(448) == 10
    assert [len(item.heads) for item in plan if item.image_size == 512] == [2]
    assert passes.num_naive_passes(members) == 14
    text = passes.describe_plan(members, plan, 47927)
    assert "11 backbone passes instead of 14: 2 equal views or weights and 1 shared frozen backbone run" in text
    assert "plain (counts 2x)" in text
    assert len(passes.columns_of(plan)) == len(set(passes.columns_of(plan))) == 12


@pytest.mark.parametrize(
    ("chosen", "told"),
    [
        (slice(1), "10 backbone passes instead of 12: 2 equal views or weights run once; each image decoded once"),
        (slice(1, 2), "1 backbone pass instead of 2: 1 shared frozen backbone run once; each image decoded once"),
    ],
)
def test_the_plan_names_only_what_is_shared(chosen, told):
    members = published()[chosen]
    assert told in passes.describe_plan(members, passes.plan_passes(members), 3)


def test_the_plan_of_one_pass_saves_nothing():
    alone = [Member("one", (checkpoint("run@1", "e1", None, 448, {"plain": 1.0}),))]
    assert passes.describe_plan(alone, passes.plan_passes(alone), 3).endswith("\n  1 backbone pass")


def test_equal_weights_in_two_members_and_backbones_of_another_size_are_kept_apart_only_where_they_differ():
    member = published()[0]
    assert len(passes.plan_passes([member, Member("again", member.checkpoints)])) == 10
    heads = tuple(checkpoint(f"{size}", f"c{size}", "vit", size, {"plain": 1.0}) for size in (512, 448))
    assert len(passes.plan_passes([Member("chexfound", heads)])) == 2


@pytest.mark.parametrize(
    ("text", "epochs", "views", "weight", "source"),
    [
        ("eva_x=runs/eva_x_b@5,6:tta", (5, 6), member_specs.VIEW_SETS["tta"], None, "runs/eva_x_b"),
        ("chexfound=runs/c@6", (6,), None, None, "runs/c"),
        ("x=C:/weights/ema_model_f5.pth", None, None, None, "C:/weights/ema_model_f5.pth"),
        ("x=run:plain,hflip*0.5", None, ("plain", "hflip"), 0.5, "run"),
        ("x=a@b.safetensors*2", None, None, 2.0, "a@b.safetensors"),
        ("x=w.pth#eva_x_224:tta*3", None, member_specs.VIEW_SETS["tta"], 3.0, "w.pth"),
    ],
)
def test_a_member_is_read_as_written(text, epochs, views, weight, source):
    spec = member_specs.parse_member(text)
    assert (spec.epochs, spec.views, spec.weight, str(spec.source)) == (epochs, views, weight, source)
    assert not spec.raw


@pytest.mark.parametrize(
    ("text", "views", "weight"),
    [
        ("x=run@5,6:tta:raw", member_specs.VIEW_SETS["tta"], None),
        ("x=run@5,6:raw*2", None, 2.0),
        ("x=run@5,6:raw", None, None),
        ("x=run@5,6:raw:plain", ("plain",), None),
        ("x=run@5,6:plain,hflip:raw*0.5", ("plain", "hflip"), 0.5),
    ],
)
def test_raw_weights_are_asked_for_beside_the_views(text, views, weight):
    spec = member_specs.parse_member(text)
    assert (spec.raw, spec.epochs, spec.views, spec.weight, str(spec.source)) == (True, (5, 6), views, weight, "run")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("runs/eva_x_b@5,6", "give it a name, e.g. --member eva_x=runs/eva_x_b@5,6"),
        ("../x=run", "a name has letters"),
        ("x=run:tte", "view 'tte' is unknown"),
        ("x=run:rawer", "view 'rawer' is unknown"),
        ("x=run:raw:raw", "view 'raw' is unknown"),
        ("x=run@5,5", "named twice"),
        ("x=run*-1", "0 or more"),
        ("x=run*two", "'two' is not a number"),
        ("x=w.pth#eva_x_225", "recipe 'eva_x_225' is unknown"),
    ],
)
def test_a_member_written_wrongly_is_named(text, message):
    with pytest.raises(UserError, match=message):
        member_specs.parse_member(text)


def test_parts_come_back_intact_damaged_ones_are_left_out_and_merge_misses_nothing(tmp_path, capsys):
    store = PartStore(tmp_path, BASIS)
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 5, 14)).astype(np.float32)
    store.write(Part(np.array([0, 2]), np.array([4, 1, 0]), logits[:, :3], {3: "half a JPEG"}), rank=0)
    store.write(Part(np.array([1]), np.array([2, 5]), logits[:, 3:], {}), rank=1)
    parts = store.read_all()
    merged, rows, unreadable = merge(list(parts.values()), 6, np.arange(6))
    assert rows.tolist() == [0, 1, 2, 4, 5]
    assert unreadable == {3: "half a JPEG"}
    np.testing.assert_array_equal(merged, logits[:, [2, 1, 3, 0, 4]])
    damaged = store.folder / "00000001-1.npz"
    damaged.write_bytes(damaged.read_bytes()[:-30])
    parts = store.read_all()
    assert list(parts) == ["00000000-0.npz"]
    assert "00000001-1.npz is damaged" in capsys.readouterr().out
    with pytest.raises(UserError, match="2 images have no score yet"):
        merge(list(parts.values()), 6, np.arange(6))
    assert PartStore(tmp_path, dataclasses.replace(BASIS, precision="bf16")).read_all() == {}
