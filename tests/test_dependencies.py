"""What is installed: its licences, and the files that fix its versions and hashes."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from cxrdist import doctor
from cxrdist.errors import UserError

pytestmark = pytest.mark.fast
PROJECT = Path(__file__).parents[1]
LATER = {"audioop-lts"}  # needed from Python 3.13 on; lock.txt is for 3.11
LGPL: set[str] = set()  # names of packages under the LGPL that we accept, with the reason beside each


def is_gpl(licence: str) -> bool:
    return bool(re.search(r"GPL|GNU|Affero", licence)) and not is_lgpl(licence)


def is_lgpl(licence: str) -> bool:
    return bool(re.search(r"LGPL|Lesser|Library General", licence))


def pinned(name: str) -> dict[str, str]:
    found = re.findall(r"^([\w.-]+)==([^\s\\]+)", (PROJECT / name).read_text(), re.M)
    return {canonicalize_name(package): version for package, version in found}


def test_no_dependency_is_gpl_and_each_lgpl_one_is_named():
    bill = doctor.bill()
    assert {"torch", "mpmath", "pydicom", "pytest"} <= {name for name, _, _ in bill}  # core, its own, extras, tools
    assert [row for row in bill if is_gpl(row[2])] == []
    assert {name for name, _, licence in bill if is_lgpl(licence)} == LGPL


@pytest.mark.parametrize(
    ("licence", "gpl", "lgpl"),
    [
        ("GPL-3.0-only", True, False),
        ("GNU Affero General Public License v3", True, False),
        ("AGPL-3.0", True, False),
        ("GNU Lesser General Public License v2 (LGPLv2)", False, True),
        ("Apache-2.0 OR BSD-2-Clause", False, False),
    ],
)
def test_licences_are_told_apart(licence, gpl, lgpl):
    assert (is_gpl(licence), is_lgpl(licence)) == (gpl, lgpl)


def test_a_bill_of_what_is_not_installed_is_named():
    with pytest.raises(UserError, match=r"no-such-package is not installed; run `./launch\.sh setup`"):
        doctor.bill("no-such-package")


def test_the_bill_is_one_command(capsys):
    doctor.main(["--bill"])
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert all(len(row) == 3 and all(row) for row in rows)
    assert "timm" in [name for name, _, _ in rows]


def test_the_lock_has_the_versions_of_the_constraints_and_a_hash_of_each_dependency():
    lock, text = pinned("lock.txt"), (PROJECT / "lock.txt").read_text()
    assert len(re.findall(r"^[\w.-]+==\S+ \\\n    --hash=sha256:[0-9a-f]{64}$", text, re.M)) == len(lock)
    constraints = pinned("constraints.txt")
    assert constraints.keys() - lock.keys() == LATER
    assert constraints.items() - lock.items() == {(name, constraints[name]) for name in LATER}
    assert lock.keys() - constraints.keys() == {"setuptools"}
    assert {canonicalize_name(name) for name, _, _ in doctor.bill()} <= lock.keys() | LATER


def test_the_image_copies_files_that_its_context_holds_and_installs_extras_that_there_are():
    text = (PROJECT / "Dockerfile").read_text()
    copied = {name for line in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.M) for name in line.split()}
    ignored = (PROJECT / ".dockerignore").read_text().splitlines()
    assert {"cxrdist", "lock.txt"} <= copied == {line[1:] for line in ignored if line.startswith("!")}
    assert ignored[0] == "*"
    assert [name for name in copied if not (PROJECT / name).exists()] == []
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    links = [path for path in (PROJECT / "cxrdist").iterdir() if path.is_symlink()]
    assert {
        path.resolve().relative_to(PROJECT).parts[0] for path in links
    } <= copied  # what a link leads to, comes along
    assert {project["readme"], *project["license-files"]} <= copied  # a wheel is not built without these
    extras = re.search(r"^ARG EXTRAS=(\S+)$", text, re.M)
    assert extras is not None
    assert set(extras[1].split(",")) <= project["optional-dependencies"].keys()
