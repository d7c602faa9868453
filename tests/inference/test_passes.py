"""The plan of passes: what is asked for on the command line, and each distinct pass once."""

import numpy as np
import pytest

from cxrdist.errors import UserError
from cxrdist.inference.parts import Part, PartStore, merge
from cxrdist.inference.passes import Checkpoint, Member
from cxrdist.inference import passes

pytestmark = pytest.mark.fast
TTA = (("plain", 2 / 6), ("hflip", 1 / 6), ("center1.1", 1 / 6), ("bright0.95", 1 / 6), ("bright1.05", 1 / 6))


def published() -> list[Member]:
    eva_x = tuple(Checkpoint(f"eva@{e}", f"e{e}", None, 448, TTA, 6) for e in (5, 6))
    chexfound = tuple(Checkpoint(f"chex@{e}", f"c{e}", "vit", 512, (("plain", 1.0),), 1) for e in (5, 6))
    return [Member("eva_x", eva_x), Member("chexfound", chexfound)]


def test_the_published_ensemble_needs_10_and_1_passes_instead_of_12_and_2():
    members = published()
    plan = passes.plan_passes(members)
    assert [item.image_size for item in plan].count(448) == 10
    assert [len(item.heads) for item in plan if item.image_size == 512] == [2]
    assert passes.num_naive_passes(members) == 14
    text = passes.describe_plan(members, plan, 47927)
    assert "11 backbone passes instead of 14: 2 equal views or weights and 1 shared frozen backbones" in text
    assert "plain (counts 2x)" in text
    assert len(passes.columns_of(plan)) == len(set(passes.columns_of(plan))) == 12


def test_equal_weights_in_two_members_and_backbones_of_another_size_are_kept_apart_only_where_they_differ():
    member = published()[0]
    assert len(passes.plan_passes([member, Member("again", member.checkpoints)])) == 10
    heads = tuple(Checkpoint(f"{size}", f"c{size}", "vit", size, (("plain", 1.0),), 1) for size in (512, 448))
    assert len(passes.plan_passes([Member("chexfound", heads)])) == 2


@pytest.mark.parametrize(
    ("text", "epochs", "views", "weight", "source"),
    [
        ("eva_x=runs/eva_x_b@5,6:tta", (5, 6), passes.VIEW_SETS["tta"], None, "runs/eva_x_b"),
        ("chexfound=runs/c@6", (6,), None, None, "runs/c"),
        ("x=C:/weights/ema_model_f5.pth", None, None, None, "C:/weights/ema_model_f5.pth"),
        ("x=run:plain,hflip*0.5", None, ("plain", "hflip"), 0.5, "run"),
        ("x=a@b.safetensors*2", None, None, 2.0, "a@b.safetensors"),
    ],
)
def test_a_member_is_read_as_written(text, epochs, views, weight, source):
    spec = passes.parse_member(text)
    assert (spec.epochs, spec.views, spec.weight, str(spec.source)) == (epochs, views, weight, source)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("runs/eva_x_b@5,6", "write NAME=RUN"),
        ("../x=run", "a name has letters"),
        ("x=run:tte", "view 'tte' is unknown"),
        ("x=run@5,5", "named twice"),
        ("x=run*-1", "0 or more"),
    ],
)
def test_a_member_written_wrongly_is_named(text, message):
    with pytest.raises(UserError, match=message):
        passes.parse_member(text)


def test_parts_come_back_whole_damaged_ones_are_left_out_and_merge_misses_nothing(tmp_path, capsys):
    store = PartStore(tmp_path, {"a": 1})
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
    assert PartStore(tmp_path, {"a": 2}).read_all() == {}
