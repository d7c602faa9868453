"""Inference end to end on a small division: one process against two, and what it refuses before computing."""

import numpy as np
import pandas as pd

from cxrdist.labels import LABELS


def test_submission_has_the_templates_rows_and_the_plan_is_printed(world, tmp_path, capsys):
    world.run(tmp_path, "--template", str(world.template))
    printed = capsys.readouterr().out
    assert "11 backbone passes instead of 14" in printed
    assert "unreadable: 00000099_001_001.jpg: cannot identify image file" in printed
    result, template = pd.read_csv(tmp_path / "submission.csv"), pd.read_csv(world.template)
    assert result.columns.tolist() == template.columns.tolist()
    assert result["Image_name"].tolist() == template["Image_name"].tolist()
    assert len(result) == 24
    probs = result[list(LABELS)].to_numpy()
    assert ((probs > 0) & (probs < 1)).all()
    assert len(np.unique(probs[:, 0])) == 24


def test_two_processes_write_the_same_bytes_as_one(world, tmp_path):
    world.run(tmp_path / "one")
    result = world.launch(tmp_path / "two", "--expect-processes", "2")
    assert result.returncode == 0, result.stderr
    assert "2 processes on cpu, fp32" in result.stdout
    for name in ("submission.csv", "scores/eva_x.csv", "scores/chexfound.csv"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
