"""Score tables: what goes in comes out, averages are the golden ones, and what does not belong together is refused."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from cxrdist.errors import UserError
from cxrdist.scoring import tables as ensemble
from cxrdist.scoring.submission import check_template, template_of, write_submission
from cxrdist.scoring.tables import ScoreTable, TableMeta
from cxrdist.tables import read_template
from cxrdist.task import TASKS, Columns, Task

pytestmark = pytest.mark.fast
TASK = TASKS["b"]
LABELS = TASK.labels
VERSION_1 = Path(__file__).parent.parent / "golden" / "version1"
GOLDEN = Path(__file__).parent.parent / "golden" / "recipe" / "ensemble.npz"


def make_table(num: int = 6, seed: int = 0, task: Task | None = TASK, shards: str = "s", **meta: Any) -> ScoreTable:
    rng = np.random.default_rng(seed)
    names = np.array([f"{i // 2:08d}_001_{i % 2:03d}.jpg" for i in range(num)], dtype=object)
    probs = (rng.random((num, 14 if task is None else task.num_labels)) ** 8).astype(np.float32)
    return ScoreTable(names, probs, TableMeta(member=f"m{seed}", task=task, split="test", shards=shards, **meta))


def studies_of(table: ScoreTable) -> list[tuple[str, str] | None]:
    return [TASK.ids_in_name(name) for name in table.image_names]


def test_average_of_views_epochs_and_members_is_the_golden_one():
    golden = np.load(GOLDEN)
    members = []
    for epoch in (5, 6):
        views = golden[f"evax_ep{epoch}_logits_f16"].astype(np.float32)
        shares = [2 / 6, 1 / 6, 1 / 6, 1 / 6, 1 / 6]  # plain and center1.0 are one view
        members.append(ensemble.average([ensemble.sigmoid(views[v]) for v in (0, 1, 3, 4, 5)], shares))
    eva_x = ensemble.average(members)
    chexfound = ensemble.average([ensemble.sigmoid(golden[f"chex_ep{epoch}_logits"]) for epoch in (5, 6)])
    final = ensemble.average([eva_x, chexfound])
    np.testing.assert_allclose(final, golden["final_all_float32"], rtol=0, atol=2e-7)
    assert 0 < np.abs(final - golden["final_as_notebook"]).max() < 2.5e-4


def test_logit_and_rank_averages_equal_hand_made_ones_and_keep_the_order_of_a_single_member():
    probs = np.random.default_rng(0).random((50, 14)).astype(np.float32)
    for how in ("prob", "logit", "rank"):
        single = ensemble.average([probs], how=how)
        assert (np.diff(np.take_along_axis(single, np.argsort(probs, axis=0), axis=0), axis=0) >= 0).all()
    np.testing.assert_allclose(ensemble.average([probs], how="logit"), probs, rtol=1e-4)
    three = [np.full((1, 14), p, np.float32) for p in (0.2, 0.5, 0.9)]
    odds = (0.25 * 1 * 9) ** (1 / 3)
    np.testing.assert_allclose(ensemble.average(three, how="logit"), odds / (1 + odds), rtol=1e-5)
    ties = np.zeros((4, 14), np.float32)
    ties[2:] = 0.7
    np.testing.assert_allclose(ensemble.average([ties], how="rank")[:, 0], [0.25, 0.25, 0.75, 0.75])
    assert ensemble.average([probs, probs * 0], [1, 3])[0, 0] == pytest.approx(probs[0, 0] / 4)


def test_a_table_survives_the_file_bit_for_bit_with_names_that_look_like_numbers_or_hold_commas(tmp_path):
    table = make_table(4)
    names = np.array(["NA", "00000211_001_001.jpg", 'a,"b" c.jpg', "1.2.840.113.jpg"], dtype=object)
    table = ScoreTable(names, table.probs, table.meta)
    ensemble.write_table(tmp_path / "scores" / "m.csv", table)
    again = ensemble.read_table(tmp_path / "scores" / "m.csv")
    assert again.image_names.tolist() == names.tolist()
    np.testing.assert_array_equal(again.probs, table.probs)
    assert dataclasses.replace(again.meta, sha256="", asked=0) == table.meta
    assert again.meta.asked == 4


def test_a_table_with_other_label_order_values_or_a_changed_file_is_named(tmp_path):
    path = tmp_path / "m.csv"
    ensemble.write_table(path, make_table())
    good = path.read_text()
    path.write_text(good.replace("0000_001_000.jpg", "0009_001_000.jpg"))
    with pytest.raises(UserError, match="changed after it was written"):
        ensemble.read_table(path)
    path.with_suffix(".json").unlink()
    for content, message in (
        (good.replace("Edema", "x").replace("Fracture", "Edema").replace("x", "Fracture", 1), "column 5 is 'Fracture'"),
        (good + good.splitlines()[-1] + "\n", "is in line 7 and again in line 8"),
        (good + ",".join(["new.jpg", *["1.5"] * 14]) + "\n", "'new.jpg', Atelectasis: 1.5"),
        (good + ",".join(["new.jpg", *["nan"] * 14]) + "\n", "not a probability"),
        (good + ",".join(["new.jpg", *["x"] * 14]) + "\n", "line 8"),
        (good + "new.jpg,1\n", "line 8: 2 cells"),
        ("", "its columns: none"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            ensemble.read_table(path)


def test_tables_over_other_images_shards_or_tasks_are_not_averaged_and_row_order_does_not_matter():
    one, two = make_table(6, 0), make_table(6, 1)
    mixed = ScoreTable(two.image_names[::-1].copy(), two.probs[::-1].copy(), two.meta)
    np.testing.assert_array_equal(
        ensemble.average_tables([one, mixed]).probs, ensemble.average_tables([one, two]).probs
    )
    with pytest.raises(UserError, match="2 missing and 0 extra"):
        ensemble.average_tables([one, make_table(4, 1)])
    with pytest.raises(UserError, match="differ in shards: s and t"):
        ensemble.average_tables([one, make_table(6, 1, shards="t")])
    with pytest.raises(UserError, match="differ in task b and a"):
        ensemble.average_tables([one, make_table(6, 1, task=TASKS["a"])])
    with pytest.raises(UserError, match="differ in their labels"):
        ensemble.average_tables([one, make_table(6, 1, task=None, labels=LABELS[::-1])])


def test_study_average_gives_all_images_of_a_study_their_mean():
    table = make_table(6)
    averaged = ensemble.average_studies(table, studies_of(table))
    np.testing.assert_allclose(averaged.probs[0], table.probs[:2].mean(axis=0), rtol=1e-6)
    np.testing.assert_array_equal(averaged.probs[0], averaged.probs[1])
    assert averaged.meta.study_averaged
    one = ScoreTable(np.array(["scan.jpg"], dtype=object), table.probs[:1], table.meta)
    with pytest.raises(UserError, match=r"study of image 'scan\.jpg' is not known"):
        ensemble.average_studies(one, studies_of(one))


def test_out_of_fold_parts_of_a_member_join_and_overlapping_ones_do_not():
    table = make_table(6, out_of_fold=True)
    parts = [ScoreTable(table.image_names[s], table.probs[s], table.meta) for s in (slice(0, 2), slice(2, 6))]
    (joined,) = ensemble.join_parts(parts)
    np.testing.assert_array_equal(joined.probs, table.probs)
    with pytest.raises(UserError, match="both hold image"):
        ensemble.join_parts([table, parts[0]])
    other = dataclasses.replace(table.meta, shards="t")
    with pytest.raises(UserError, match="two parts of member 'm0' differ in shards: s and t"):
        ensemble.join_parts([parts[0], dataclasses.replace(parts[1], meta=other)])


def test_submission_has_the_templates_columns_and_order_each_row_once_and_class_means_for_the_unreadable(tmp_path):
    table = make_table(6, unreadable={"00000009_001_001.jpg": "cannot identify image file"})
    order = [*table.image_names[[3, 0, 5, 1, 4, 2]], "00000009_001_001.jpg"]
    columns = ["Image_name", *reversed(LABELS)]
    template_path = tmp_path / "template.csv"
    pd.DataFrame([[name, *[0] * 14] for name in order], columns=columns).to_csv(template_path, index=False)
    fallback = write_submission(table, read_template(template_path, TASK), tmp_path / "submission.csv", 1)
    assert fallback == {"00000009_001_001.jpg": "cannot identify image file"}
    result = pd.read_csv(tmp_path / "submission.csv")
    assert result.columns.tolist() == columns
    assert result["Image_name"].tolist() == order
    values = result[list(LABELS)].to_numpy().astype(np.float32)
    np.testing.assert_array_equal(values[1], table.probs[0])
    np.testing.assert_allclose(values[6], table.probs.mean(axis=0), rtol=1e-6)


def test_a_template_of_other_images_is_named_and_nothing_is_written(tmp_path):
    table = make_table(2)
    template = template_of(TASK, ["00000000_001_000.jpg", "other.jpg"])
    with pytest.raises(UserError, match=r"1 of 2 images that the shards do not hold, e\.g\. 'other\.jpg'"):
        check_template(template, list(table.image_names), {})
    with pytest.raises(UserError, match=r"'other\.jpg'"):
        write_submission(table, template, tmp_path / "submission.csv", 1)
    assert not list(tmp_path.iterdir())


def test_json_beside_a_table_of_another_format_version_is_refused(tmp_path):
    ensemble.write_table(tmp_path / "m.csv", make_table())
    meta = json.loads((tmp_path / "m.json").read_text())
    (tmp_path / "m.json").write_text(json.dumps(meta | {"format_version": 3}))
    with pytest.raises(UserError, match="format version 3"):
        ensemble.read_table(tmp_path / "m.csv")


def test_a_table_of_three_labels_with_commas_and_quotes_survives_the_file_and_becomes_a_submission(tmp_path):
    columns = Columns(image="path")
    task = Task(name="own", labels=("mass, left", 'so-called "nodule"', "débris"), columns=columns)
    names = np.array(["b/2.png", "a/1.png", "c.png"], dtype=object)
    table = ScoreTable(names, make_table(3, task=task).probs, TableMeta(member="m", task=task, split="valid"))
    ensemble.write_table(tmp_path / "m.csv", table)
    again = ensemble.read_table(tmp_path / "m.csv")
    np.testing.assert_array_equal(again.probs, table.probs)
    assert (again.labels, again.meta.task, again.image_names.tolist()) == (task.labels, task, names.tolist())
    write_submission(again, template_of(task, ["c.png", "a/1.png", "b/2.png"]), tmp_path / "submission.csv", 1)
    frame = pd.read_csv(tmp_path / "submission.csv")
    assert frame.columns.tolist() == ["path", *task.labels]
    np.testing.assert_array_equal(frame[list(task.labels)].to_numpy(np.float32), table.probs[[2, 1, 0]])
    submission = ensemble.read_table(tmp_path / "submission.csv", task)
    assert submission.meta.task == task
    averaged = ensemble.average_tables([again, submission])
    np.testing.assert_allclose(averaged.probs, table.probs, rtol=1e-6)


def test_version_1_tables_are_read_as_tasks_and_come_back_with_the_same_bytes(tmp_path):
    for path in sorted(VERSION_1.glob("o*/**/*.csv")):
        if path.stem == "submission":
            continue
        table = ensemble.read_table(path)
        old = json.loads(path.with_suffix(".json").read_text())
        assert old["format_version"] == 1
        assert (table.meta.task, table.meta.split, table.meta.shards) == (TASKS["b"], old["split"], old["shards"])
        assert (table.meta.out_of_fold, table.meta.unreadable) == (old["out_of_fold"], old["unreadable"])
        assert [item.source for item in table.meta.checkpoints] == [item["source"] for item in old["checkpoints"]]
        assert [item.views for item in table.meta.checkpoints] == [item["views"] for item in old["checkpoints"]]
        ensemble.write_table(tmp_path / "again.csv", table)
        assert (tmp_path / "again.csv").read_bytes() == path.read_bytes()
        assert ensemble.read_table(tmp_path / "again.csv").meta == dataclasses.replace(table.meta)


def test_a_version_1_average_of_tables_without_origin_keeps_its_members_and_the_headers_labels(tmp_path):
    ensemble.write_table(tmp_path / "m.csv", make_table())
    sha256 = hashlib.sha256((tmp_path / "m.csv").read_bytes()).hexdigest()
    members = [{"member": "one", "weight": 2.0}, {"member": "two", "weight": 1}]
    old = {"format_version": 1, "member": "ensemble", "members": members, "average": "prob", "unreadable": {}}
    (tmp_path / "m.json").write_text(json.dumps(old | {"out_of_fold": False, "sha256": sha256}))
    table = ensemble.read_table(tmp_path / "m.csv")
    assert (table.meta.task, table.labels) == (None, LABELS)
    assert table.meta.members == {"one": 2.0, "two": 1.0}
    assert ensemble.task_of(table, None).labels == LABELS


def test_a_table_without_json_says_so_and_takes_its_labels_from_the_header(tmp_path, capsys):
    path = tmp_path / "m.csv"
    path.write_text("image_name,mass,nodule\na.png,0.5,0.25\n")
    table = ensemble.read_table(path)
    assert "m.csv: no JSON beside it says its split, shards and models" in capsys.readouterr().out
    assert (table.name, table.labels, table.meta.task) == ("m", ("mass", "nodule"), None)
    with pytest.raises(UserError, match="name theirs with --task"):
        ensemble.task_of(table, None)
    task = Task(name="own", labels=("mass", "nodule"))
    assert ensemble.task_of(table, task) == ensemble.task_of(ensemble.read_table(path, task), None) == task
    with pytest.raises(UserError, match="column 2 is 'mass' where 'nodule' belongs"):
        ensemble.read_table(path, Task(name="own", labels=("nodule", "mass")))
    for header in ("image_name", "image_name,mass,mass", "patient,mass,nodule"):
        path.write_text(header + "\n")
        with pytest.raises(UserError, match="is not a score table"):
            ensemble.read_table(path)


def test_a_damaged_json_or_another_task_than_the_one_given_is_named(tmp_path):
    path = tmp_path / "m.csv"
    ensemble.write_table(path, make_table())
    with pytest.raises(UserError, match="of another task than --task: task a and b"):
        ensemble.read_table(path, TASKS["a"])
    good = json.loads(path.with_suffix(".json").read_text())
    for content, message in (
        (b'{"format_ver', "is damaged; score again"),
        (b"\xff\xfe", "is damaged; score again"),
        (b"[]", "is damaged; score again"),
        (json.dumps(good | {"weight": "two"}).encode(), "weight: .*; score again, or delete it"),
        (json.dumps(good | {"format_version": 1, "div": "z"}).encode(), "is damaged; score again"),
        (json.dumps({key: value for key, value in good.items() if key != "sha256"}).encode(), "is damaged"),
    ):
        path.with_suffix(".json").write_bytes(content)
        with pytest.raises(UserError, match=message):
            ensemble.read_table(path)
