"""The measured page: what was run is kept with its commit, and every figure finds its rows."""

import argparse
import fnmatch
import json
import re
from pathlib import Path
from typing import Any

import pytest

from cxrdist.bench import measured
from cxrdist.bench.measured import BENCHES, FIGURES, Figure, Measured, Pick, Taken, page, shown
from cxrdist.bench.timing import FAILED, Row

pytestmark = pytest.mark.fast
ROWS = (
    Row("one core", "bare decode", 100.0, 0.5, 1.0),
    Row("one core", "cxrdist loader", 90.0, 5.24, 0.9, "96.1% of x"),
)


def taken(name: str, commit: str = "abc1234") -> Taken:
    about: dict[str, Any] = {"date": "2026-01-01", "machine": "2 cores", "seconds": 1.0}
    return Taken(name=name, words=BENCHES[name], commit=commit, rows=ROWS, **about)


def asked(folder: Path, *only: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    measured.add_arguments(parser)
    return parser.parse_args(["--out", str(folder / "measured.json"), *(("--only", *only) if only else ())])


def test_numbers_come_from_the_row_that_is_named_and_a_missing_one_is_a_dash():
    picks = (Pick("data", "one *", "cxrdist loader"), Pick("data", "one *", "cxrdist*", "limit", " of it"))
    rows = {"data": taken("data")}
    assert shown(Figure("a", "b", picks), rows) == "5.2x, 0.90 of it"
    assert shown(Figure("a", "b", (*picks, Pick("data", "*", "*loader", r"([\d.]+%) of"))), rows).endswith(", 96.1 %")
    assert shown(Figure("a", "b", (picks[0], Pick("data", "*", "nobody", after=" x"))), rows) == "5.2x, - x"
    assert shown(Figure("a", "b", picks), {}) == "-"


def test_a_benchmark_of_this_commit_is_kept_and_what_failed_is_told(tmp_path, monkeypatch):
    ran: list[str] = []

    def take(name: str, commit: str) -> Taken | str:
        ran.append(name)
        return "no GPU" if name == "onnx" else taken(name, commit)

    monkeypatch.setattr(measured, "take", take)
    monkeypatch.setattr(measured, "commit_of_code", lambda: "abc1234")
    rows = measured.run(asked(tmp_path, "data", "order"))
    assert [(row.stage, row.variant) for row in rows] == [("measured", "data"), ("measured", "order")]
    rows = measured.run(asked(tmp_path))
    assert ran == ["data", "order", *(name for name in BENCHES if name not in ("data", "order"))]
    assert [row.variant for row in rows if row.stage == FAILED] == ["onnx"]
    stored = Measured.read(tmp_path / "measured.json").by_name()
    assert list(stored) == [name for name in BENCHES if name != "onnx"]
    assert stored["data"].rows == ROWS
    text = (tmp_path / "measured.md").read_text()
    assert f"| {FIGURES[3].what} | {FIGURES[3].against} | 0.90, - webdataset" in text
    assert "| data | abc1234 |" in text
    monkeypatch.setattr(measured, "commit_of_code", lambda: "def5678")
    measured.run(asked(tmp_path))
    assert len(ran) == 2 * len(BENCHES)


def test_every_figure_names_a_run_and_every_row_that_was_measured_is_found():
    """In the page of the project: a bench that renames its rows would silently empty a figure."""
    assert {pick.bench for figure in FIGURES for pick in figure.picks} <= set(BENCHES)
    path = Path(__file__).parents[2] / "docs" / "measured.json"
    stored = Measured.read(path)
    assert page(stored) == path.with_suffix(".md").read_text(encoding="utf-8")
    for figure in FIGURES:
        for pick in figure.picks:
            rows = stored.by_name()[pick.bench].rows if pick.bench in stored.by_name() else ()
            skipped = any(row.note.startswith("skipped") for row in rows)
            found = [row for row in rows if fnmatch.fnmatchcase(row.stage, pick.stage)]
            found = [row for row in found if fnmatch.fnmatchcase(row.variant, pick.variant)]
            assert found or skipped or not rows, f"{figure.what}: no row {pick.stage!r}, {pick.variant!r}"
            if found and pick.show not in ("baseline", "limit"):
                assert re.search(pick.show, found[0].note), f"{figure.what}: {found[0].note!r}"


def test_a_benchmark_is_run_in_a_process_of_its_own(tmp_path, monkeypatch):
    words = ("order", "--shards", "4", "--per-shard", "500", "--windows", "2", "1")
    monkeypatch.setitem(BENCHES, "order", words)
    (row,) = measured.run(asked(tmp_path, "order"))
    assert row.stage == "measured"
    (found,) = json.loads((tmp_path / "measured.json").read_text())["taken"]
    assert found["words"] == list(words)
    assert found["rows"][0]["stage"] == "neighbours"
    monkeypatch.setitem(BENCHES, "order", ("order", "--shards", "no"))
    (row,) = measured.run(asked(tmp_path, "order"))
    assert row.stage == FAILED
    assert "--shards" in row.note
