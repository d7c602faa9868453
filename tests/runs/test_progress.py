"""How far a run is, from its logs: as they grow, are cut by a resume, are damaged, or are larger than what is read."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from cxrdist.errors import UserError
from cxrdist.runs import progress
from cxrdist.runs.progress import Curve, Progress, find_runs

pytestmark = pytest.mark.fast


def make_run(run: Path, *, epochs: int = 3, batch: int = 10, images: int = 95, folds: int | None = None) -> Path:
    run.mkdir(parents=True)
    (run / "recipe.json").write_text(json.dumps({"epochs": epochs, "global_batch_size": batch}))
    (run / "run.json").write_text(json.dumps({"data": {"images": images, "folds": folds}}))
    (run / "metrics.jsonl").touch()
    return run


def add(run: Path, *rows: dict[str, Any], log: str = "metrics.jsonl") -> None:
    with (run / log).open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def trained(step: int, epoch: int = 1, loss: float | None = 0.5) -> dict[str, Any]:
    return {"kind": "train", "step": step, "epoch": epoch, "loss": loss}


def seen(run: Path) -> Progress:
    found = Progress(run)
    found.update()
    return found


def test_steps_epochs_best_and_time_left(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    found = seen(run)
    assert (found.step, found.total_steps, found.seconds_left) == (0, (30, True), None)
    add(run, trained(5), trained(10), {"kind": "epoch", "step": 10, "epoch": 1})
    add(run, {"kind": "validation", "step": 10, "epoch": 1, "validation/auroc_macro": 0.8})
    add(run, trained(20, 2), {"kind": "epoch", "step": 20, "epoch": 2})
    add(run, {"kind": "validation", "step": 20, "epoch": 2, "validation/auroc_macro": 0.7})
    add(run, {"step": 20, "images_per_s": 4.0, "wait_share": 0.25}, log="timings.jsonl")
    found.update()
    assert (found.step, found.epoch, found.total_steps, found.finished) == (20, 2, (30, True), False)
    assert (found.auroc, found.best, found.aurocs.values) == (0.7, (0.8, 1), [0.8, 0.7])
    assert (found.images_per_s, found.wait_share, found.seconds_left) == (4.0, 0.25, 25.0)
    add(run, {"kind": "epoch", "step": 30, "epoch": 3})
    found.update()
    assert found.finished
    assert found.seconds_left is None


def test_the_total_of_a_fold_is_an_estimate_until_an_epoch_is_over(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", images=101, folds=5)
    assert seen(run).total_steps == (27, False)
    add(run, {"kind": "epoch", "step": 8, "epoch": 1})
    assert seen(run).total_steps == (24, True)


def test_rows_that_a_resume_cut_no_longer_count(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    add(run, trained(1, loss=0.9))
    size = (run / "metrics.jsonl").stat().st_size
    add(run, trained(2, loss=0.1))
    found = seen(run)
    os.truncate(run / "metrics.jsonl", size)
    found.update()
    assert (found.step, found.losses.values) == (1, [0.9])
    add(run, trained(2, loss=0.8), trained(3, loss=0.7))  # longer than what was read, and another second row
    found.update()
    assert found.losses.values == [0.9, 0.8, 0.7]
    os.truncate(run / "metrics.jsonl", size)
    add(run, trained(2, loss=0.6), trained(3, loss=0.5), trained(4, loss=0.4))
    found.update()
    assert found.losses.values == [0.9, 0.6, 0.5, 0.4]


def test_damaged_lines_are_counted_and_half_a_line_waits_for_its_end(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    add(run, trained(1), trained(2, loss=float("nan")), trained(-5), trained(10**40), {"step": 3})
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b"\xff\xfe\n[]\n" + b"[" * 5000 + b"\n" + b"9" * 5000 + b'\n{"kind": "train", "step"')
    found = seen(run)
    assert (found.step, found.loss, found.losses.values) == (2, None, [0.5])
    assert found.notes == ["7 damaged lines left out"]
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b': 4, "epoch": 1, "loss": 0.25}\n')
    found.update()
    assert (found.step, found.losses.values) == (4, [0.5, 0.25])
    assert found.notes == ["7 damaged lines left out"]


def test_of_a_large_log_the_end_is_read_and_then_only_what_is_new(tmp_path: Path, monkeypatch: Any) -> None:
    run = make_run(tmp_path / "run")
    add(run, *(trained(step, loss=step / 1000) for step in range(1, 1001)))
    monkeypatch.setattr(progress, "MAX_BYTES", 2000)
    found = seen(run)
    first = 1000 - len(found.losses.values) + 1
    assert 960 < first < 975
    assert found.losses.values == [step / 1000 for step in range(first, 1001)]
    assert found.notes == [f"a long log: shown from step {first}"]
    add(run, trained(1001, loss=2.0))
    found.update()
    assert found.losses.values[-2:] == [1.0, 2.0]
    assert found._metrics.num_bad == 0


def test_a_line_without_an_end_does_not_fill_the_memory(tmp_path: Path, monkeypatch: Any) -> None:
    run = make_run(tmp_path / "run")
    monkeypatch.setattr(progress, "MAX_BYTES", 2000)
    found = seen(run)
    for _ in range(5):
        with (run / "metrics.jsonl").open("a") as file:
            file.write("x" * 1500)
        found.update()
        assert len(found._metrics._part) <= 2000
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n")
    add(run, trained(1))
    found.update()
    assert (found.step, found.notes) == (1, ["1 damaged line left out"])


def test_a_run_is_silent_after_the_time_of_some_rows(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    add(run, {"step": 10, "images_per_s": 1.0, "wait_share": 0.0}, log="timings.jsonl")
    for log in progress.LOGS:
        os.utime(run / log, (1000, 1000))
    found = seen(run)
    assert found.silent_s(1299.0) is None
    assert found.silent_s(1301.0) == 301.0
    add(run, {"step": 20, "images_per_s": 1.0, "wait_share": 0.0}, log="timings.jsonl")  # 100 s a row
    for log in progress.LOGS:
        os.utime(run / log, (1000, 1000))
    found.update()
    assert found.silent_s(1399.0) is None
    assert found.silent_s(1401.0) == 401.0
    assert found.silent_s(0.0) is None  # a clock that is behind


def test_a_run_that_was_stopped_in_order_is_so_until_a_later_row(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    found = seen(run)
    for step in (10, 20):
        add(run, {"step": step, "images_per_s": 1.0, "wait_share": 0.0}, log="timings.jsonl")
        found.update()
        assert not found.stopped
        add(run, {"step": step, "stopped": "SIGINT"}, log="timings.jsonl")
        found.update()
        found.update()  # nothing new
        assert found.stopped
        assert found.images_per_s == 1.0
        assert found.notes == []


def test_a_log_that_cannot_be_read_is_said_and_hides_no_other_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()
    found = seen(run)
    assert any("is a folder; give a file" in note for note in found.notes)
    (run / "recipe.json").write_text("{")
    assert seen(run).total_steps is None


def test_a_curve_keeps_its_shape_and_not_every_point(monkeypatch: Any) -> None:
    monkeypatch.setattr(progress, "MAX_POINTS", 8)
    kept = Curve()
    for value in range(1000):
        kept.add(value)
    assert 4 <= len(kept.values) <= 8
    assert kept.values == list(range(0, 1000, kept.values[1]))


def test_runs_are_found_in_folders_and_a_folder_without_any_is_named(tmp_path: Path) -> None:
    one = make_run(tmp_path / "runs" / "one")
    fold = make_run(tmp_path / "runs" / "x_folds" / "x_fold0")
    (one / "checkpoints").mkdir()
    assert find_runs([tmp_path / "runs"]) == [one, fold]
    assert find_runs([one, tmp_path / "runs"]) == [one, fold]
    (tmp_path / "empty").mkdir()
    for wrong, said in ((tmp_path / "empty", "holds no run"), (tmp_path / "none", "no such folder")):
        with pytest.raises(UserError, match=f"{wrong.name}: {said}.*give"):
            find_runs([one, wrong])


def test_ten_megabytes_are_read_in_a_second_of_cpu(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    row = json.dumps(trained(1) | {f"lr/{place}": 0.1 for place in range(20)}) + "\n"
    (run / "metrics.jsonl").write_text(row * (10_000_000 // len(row)))
    begun = time.process_time()
    found = seen(run)
    assert time.process_time() - begun < 1.0
    begun = time.process_time()
    found.update()
    assert time.process_time() - begun < 0.05
