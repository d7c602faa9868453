"""From score tables and labels to numbers and one self-contained page."""

import json
import re

import numpy as np
import pytest

from cxrdist import evaluate
from cxrdist.errors import UserError
from cxrdist.labels import LABELS, read_label_csv
from cxrdist.scoring.metrics import macro_auroc
from cxrdist.scoring.tables import read_table


def test_report_is_one_page_without_any_outside_address_and_its_numbers_are_those_of_the_metrics(
    world, tmp_path, capsys
):
    world.run(tmp_path / "out")
    tables = [tmp_path / "out" / "scores" / f"{name}.csv" for name in ("eva_x", "chexfound")]
    for run in (world.eva_x, world.chexfound):
        rows = [{"kind": "train", "step": i, "epoch": 1 + i // 5, "loss": 1 / (1 + i)} for i in range(10)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "timings.json").write_text('{"train eva_x": 125.0}')
    evaluate.main(
        [
            *("--scores", *map(str, tables), "--csv", str(world.truth), "--out", str(tmp_path / "report")),
            *("--run", str(world.eva_x), "--run", str(world.chexfound), "--shards", str(world.shards)),
            *("--timings", str(tmp_path / "timings.json"), "--resamples", "50"),
        ]
    )
    numbers = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert [score["name"] for score in numbers["scores"]] == ["ensemble", "eva_x", "chexfound"]
    table = read_table(tables[0])
    truth = read_label_csv(world.truth).set_index("image_name").loc[list(table.image_names), list(LABELS)]
    assert numbers["scores"][1]["macro_auroc"] == pytest.approx(macro_auroc(truth.to_numpy(), table.probs)[0])
    assert f"macro AUROC {numbers['scores'][0]['macro_auroc']:.4f}" in capsys.readouterr().out
    page = (tmp_path / "report" / "report.html").read_text()
    assert "not for clinical use" in page
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", page)
    assert page.count("data:image/png") >= 8
    for title in ("AUROC per label", "Grad-CAM of eva_x_b", "Attention of chexfound_b", "Files and times"):
        assert title in page
    assert np.isfinite(numbers["scores"][0]["macro_interval"]).all()


def test_labels_of_other_images_and_wrong_weights_are_named(world, tmp_path):
    world.run(tmp_path / "out")
    table = str(tmp_path / "out" / "scores" / "eva_x.csv")
    other = tmp_path / "other.csv"
    other.write_text("\n".join(world.truth.read_text().splitlines()[:5]) + "\n")
    with pytest.raises(UserError, match="has no labels for 19 of 23 scored images"):
        evaluate.main(["--scores", table, "--csv", str(other), "--out", str(tmp_path / "report")])
    with pytest.raises(UserError, match="2 numbers for 1 members"):
        evaluate.main(["--scores", table, "--csv", str(world.truth), "--weights", "1", "2"])
    assert not (tmp_path / "report").exists()
