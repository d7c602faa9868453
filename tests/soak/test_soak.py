"""Eight kills of the soak, and that it would notice what it looks for."""

import random
from pathlib import Path

import psutil
import pytest

import tests.soak.__main__ as soak_module
from tests.soak.__main__ import Workload, attempt, main, same_files, soak, start


@pytest.mark.fault
@pytest.mark.timeout(1500)
def test_eight_kills_leave_every_kind_of_run_bitwise_equal(capfd):
    assert main(["--kills", "8", "--seed", "1"]) == 0
    total = capfd.readouterr().out.splitlines()[-1].split()
    assert total[:2] == ["all", "8"]
    assert total[7] == total[8], "runs and those that are equal"


@pytest.mark.parametrize("resumes_well", [True, False])
def test_a_run_that_resumes_wrongly_is_found(tmp_path: Path, resumes_well: bool) -> None:
    program = (
        "import sys, pathlib, time; out = pathlib.Path(sys.argv[1]); again = out.exists(); out.mkdir(exist_ok=True)\n"
        "time.sleep(0.3); (out / 'result').write_text('wrong' if again and sys.argv[2] == 'False' else 'right')"
    )
    workload = Workload(
        "toy",
        lambda out: start(["-c", program, str(out), str(resumes_well)]),
        lambda out, wanted: same_files(out, wanted, "*"),
    )
    result = soak(workload, 6, tmp_path, random.Random(0))
    assert result.victims == {"launcher": 6}
    assert (result.unequal == []) == resumes_well


def test_a_run_that_fails_without_a_kill_is_an_error(tmp_path: Path) -> None:
    workload = Workload("toy", lambda out: start(["-c", "raise SystemExit(3)"]), lambda out, wanted: None)
    with pytest.raises(RuntimeError, match="toy ended with 3 though nothing was killed"):
        soak(workload, 1, tmp_path, random.Random(0))


def test_a_process_that_outlives_the_killed_one_is_an_error_and_is_ended(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(soak_module, "LIMIT_S", 1)
    monkeypatch.setattr(soak_module, "ORPHANS_S", 0.2)
    file = tmp_path / "pid"
    child = f"import os, time; open({str(file)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    program = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}], stdout=-3, stderr=-3)"
    workload = Workload("toy", lambda out: start(["-c", f"{program}; time.sleep(60)"]), lambda out, wanted: None)
    roles = set()
    for seed in range(4):  # either is killed: the launcher, or its child, which this launcher does not notice
        try:
            roles.add(attempt(workload, tmp_path, 1, random.Random(seed)))
        except RuntimeError as error:
            roles.add(str(error))
    assert roles == {"orphaned", "toy has processes left 1 s after a rank was killed"}
    assert not psutil.pid_exists(int(file.read_text())) or psutil.Process(int(file.read_text())).status() == "zombie"
