"""README and docs/: links resolve, flags exist, and the commands of the three doors run and print what the pages say.

On the three pages a block of `bash` is run, each line as it stands but for the substitutions below; a block of `text`
after it holds lines that must be printed in that order, in which numbers may differ.
"""

import contextlib
import importlib
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest
from PIL import Image, ImageStat

from cxrdist.bench.measured import FIGURES, Measured, shown
from cxrdist.cli import Parser
from cxrdist.demo.phantoms import write_division
from cxrdist.flags import COMMANDS
from tests.faults.test_launch_faults import slurm

REPOSITORY = Path(__file__).parents[1]
DOORS = ("your-x-rays", "grand-xray-slam", "cluster")
PAGES = [REPOSITORY / "README.md", REPOSITORY / "shards" / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
REAL = REPOSITORY.parent / "shared" / "real_cxr"  # developers' X-rays; a clone has none
LABELS = ["Lung Opacity", "Pneumothorax", "Pleural Effusion"]
IMAGE = "Image_name"
NUMBER = re.compile(r"[-+]?\d[\d,.:]*(e-?\d+)?")


class Block(NamedTuple):
    """A fenced block: its language and its lines."""

    language: str
    lines: list[str]


def name_of(page: Path) -> str:
    return page.relative_to(REPOSITORY).as_posix()


def blocks(page: Path) -> list[Block]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [Block(language, text.replace("\\\n", " ").splitlines()) for language, text in found]


# What is written


@pytest.mark.fast
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_resolves(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"https?:", link)]
    for link in links:
        name, _, heading = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{name_of(page)}: {link}"
        if heading:
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert heading in anchors, f"{name_of(page)}: {link}, where there are {anchors}"


def commands_in(text: str) -> Iterator[tuple[str, list[str]]]:
    """(command, flags) of each `cxrdist COMMAND`, `-m cxrdist.COMMAND` or `launch.sh COMMAND` in a page's text."""
    text = text.replace("\\\n", " ")
    pattern = r"(?:cxrdist |-m cxrdist\.|launch\.sh |slurm\.sh )([a-z]+)\b([^`\n]*)"
    for command, words in re.findall(pattern, text):
        if command in [name for names in COMMANDS.values() for name in names]:
            yield command, re.findall(r"(?<![\w-])--[a-z][a-z-]*", words.split(" #")[0])


def known_flags(command: str, words: str = "") -> set[str]:
    if command == "bench":
        (name,) = re.findall(r"^\s*([a-z_]+)", words) or ["order"]
        parser = Parser()
        importlib.import_module(f"cxrdist.bench.{name}").add_arguments(parser)
        return {*parser._option_string_actions, "--json"}
    module = importlib.import_module(f"cxrdist.flags.{command}")
    flags = set(module.parser()._option_string_actions)
    return flags | known_flags("train") if command == "folds" else flags


@pytest.mark.fast
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_flag_of_a_command_is_accepted_by_it(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for command, flags in commands_in(text):
        if command != "bench":
            assert set(flags) <= known_flags(command), f"{name_of(page)}: cxrdist {command} {' '.join(flags)}"
    for words in re.findall(r"cxrdist bench ([a-z][^`\n]*)", text):
        flags = set(re.findall(r"--[a-z][a-z-]*", words))
        assert flags <= known_flags("bench", words), f"{name_of(page)}: cxrdist bench {words}"


@pytest.mark.fast
def test_every_flag_that_is_spoken_of_is_one_of_a_command() -> None:
    """Flags in running text, too, wherever they are not of another program."""
    others = {"--all", "--only", "--once", "--every"}  # of launch.sh and bench
    others |= {"--nodes", "--array", "--gpus-per-node", "--recursive"}  # of sbatch and a store's own tool
    others |= {"--config_file", "--num_machines", "--machine_rank", "--num_processes", "--main_process_ip"}
    others |= {"--main_process_port", "--rdzv_backend", "--max_restarts"}  # of accelerate
    others |= {"--nnodes", "--nproc_per_node", "--rdzv_endpoint", "--rdzv_id"}  # of torchrun
    others |= {
        "--no-deps",
        "--wheel-dir",
        "--constraint",
        "--dest",
        "--no-index",
        "--find-links",
        "--version",
        "--bill",
    }
    known = {flag for names in COMMANDS.values() for name in names for flag in known_flags(name)}
    for page in PAGES:
        if page.stem in ("docker", "install", "measured"):
            continue  # these are about other programs, or written by one
        found = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]*", page.read_text(encoding="utf-8")))
        assert found <= known | others, f"{name_of(page)}: {sorted(found - known - others)}"


@pytest.mark.fast
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_page_names_a_machine_or_a_home(page: Path) -> None:
    for line in page.read_text(encoding="utf-8").splitlines():
        assert not re.search(r"/(work|home|root|Users)/|/tmp/", line), line
        assert not re.search(rf"\b{re.escape(socket.gethostname())}\b", line), line


@pytest.mark.fast
def test_the_readme_fits_two_screens_and_says_how_accelerate_starts_it() -> None:
    lines = PAGES[0].read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 130
    assert "accelerate launch -m cxrdist.train --div b" in lines
    assert any("Not for clinical use" in line for line in lines)


@pytest.mark.fast
def test_the_readmes_figures_are_the_measured_ones() -> None:
    """Each line of its table is a figure of `bench measured`, with the number that docs/measured.json has for it."""
    taken = Measured.read(REPOSITORY / "docs" / "measured.json").by_name()
    table = PAGES[0].read_text(encoding="utf-8").split("## Measured")[1].split("\n\n")[1].splitlines()[2:]
    figures = {(figure.what, figure.against): shown(figure, taken) for figure in FIGURES}
    assert table
    for line in table:
        what, against, said = line.strip("| ").split(" | ")
        assert (what, against) in figures, f"{line}: no figure of bench/measured.py"
        number = figures[what, against]
        assert number in (said, "-"), f"README: write {number!r} for {what!r}"


@pytest.mark.fast
def test_every_fault_names_tests_that_there_are() -> None:
    rows = [
        line for line in (REPOSITORY / "docs" / "faults.md").read_text(encoding="utf-8").splitlines() if "](" in line
    ]
    assert len(rows) > 30
    for row in rows:
        for file, names in re.findall(r"\]\(\.\./(tests/[\w/]+\.py)\): ((?:`test_\w+`(?:, )?)+)", row):
            text = (REPOSITORY / file).read_text(encoding="utf-8")
            for name in re.findall(r"`(test_\w+)`", names):
                assert f"def {name}(" in text, f"{file} has no {name}"
        assert "`test_" in row, row


# What is run


class Door:
    """A folder in which the commands of a page run.

    replaced: texts of a command, and what stands for them here. before: texts of a command, and what is done first.
    """

    def __init__(self, page: str, folder: Path) -> None:
        self.blocks, self.folder = blocks(REPOSITORY / "docs" / f"{page}.md"), folder
        self.replaced: dict[str, str] = {}
        self.before: dict[str, Callable[[], None]] = {}
        self.environment = {"CXRDIST_PROCESSES": "1"}  # a second one takes as long to start as the work does

    def run(self, *, skip: Mapping[str, str] | None = None) -> None:
        """Run every `bash` block, and compare what it prints with the `text` block after it.

        skip: a text in a command -> why a block with it is left out.
        """
        for block, after in zip(self.blocks, [*self.blocks[1:], Block("", [])], strict=True):
            if block.language != "bash":
                continue
            if why := next(
                (why for text, why in (skip or {}).items() if any(text in line for line in block.lines)), ""
            ):
                print(f"not run: {block.lines[0]}: {why}")
                continue
            printed = "".join(self.command(line) for line in block.lines)
            if after.language == "text":
                assert_printed(after.lines, printed)

    def command(self, line: str) -> str:
        """What a command prints; it must end well."""
        for text, here in self.replaced.items():
            line = line.replace(text, here)
        for text, first in self.before.items():
            if text in line:
                first()
        jobs = [self.start(line)]
        if "--num_machines" in line:  # the page shows the line of the first node
            jobs.append(self.start(line.replace("--machine_rank 0", "--machine_rank 1")))
        outputs = [job.communicate(timeout=600)[0] for job in jobs]
        for job, output in zip(jobs, outputs, strict=True):
            assert job.returncode == 0, f"{line}\n{output}"
        return outputs[0].replace("\r", "\n")

    def start(self, line: str) -> "subprocess.Popen[str]":
        words, environment = shlex.split(line, comments=True), os.environ | {"COLUMNS": "120"} | self.environment
        if is_training(words):
            words += small(words)
        if words[0] == "sbatch":
            nodes = next(word.removeprefix("--nodes=") for word in words if word.startswith("--nodes="))
            environment["SLURM_NNODES"] = nodes
            words = ["bash", *(word for word in words[1:] if not word.startswith("--nodes="))]
        program = {"cxrdist": "cxrdist", "accelerate": "accelerate.commands.accelerate_cli"}.get(words[0])
        if program is not None:
            words[:1] = [sys.executable, "-m", program]
        environment["PYTHONPATH"] = str(REPOSITORY)
        return subprocess.Popen(
            words, cwd=self.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )


def is_training(words: list[str]) -> bool:
    started = words[:2] == ["cxrdist", "train"] or "cxrdist.train" in words or words[0] == "sbatch"
    return started and "--dry-run" not in words


def small(words: list[str]) -> list[str]:
    """The flags that the pages give for a look without a GPU, in the folder of the full-size run."""
    published = words[words.index("--model") + 1] if "--model" in words else "eva_x"
    flags = ["--model", f"demo_{published}", "--init", "random", "--epochs", "2"]
    flags += [word for field in ("global_batch_size=8", "warmup_steps=0") for word in ("--set", field)]
    if "--out" in words:
        return flags
    task = words[words.index("--div") + 1]
    return [*flags, "--out", f"runs/{published}_{task}" + ("" if words[0] == "cxrdist" else f"_by_{words[0]}")]


def plain(line: str) -> str:
    """A line without what may differ: numbers, and the width of columns."""
    return " ".join(NUMBER.sub("N", line).split())


def assert_printed(documented: list[str], printed: str) -> None:
    lines = iter([plain(line) for line in printed.splitlines()])
    for line in documented:
        assert plain(line) in lines, f"not printed (in this order): {line}\n{printed}"


@pytest.fixture(scope="module")
def division(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `images` and `labels.csv` in the competition's layout: real X-rays where there are any."""
    if (REAL / "train.csv").is_file():
        return REAL
    print(f"no X-rays in {REAL.name} beside the checkout: phantoms")
    folder = tmp_path_factory.mktemp("phantoms")
    write_division(folder / "images", folder / "train.csv", num_patients=40)
    return folder


def images_of(division: Path, rows: pd.DataFrame, folder: Path) -> None:
    folder.mkdir(parents=True)
    for name in rows[IMAGE]:
        shutil.copyfile(division / "images" / name, folder / name)


def own_table(division: Path, folder: Path) -> pd.DataFrame:
    """`xrays` and `labels.csv` as on the page; the rows.

    The labels say how bright an image is, which a few steps can learn: scores that are no better than chance are not
    calibrated.
    """
    rows = pd.read_csv(division / "train.csv", dtype=str).iloc[:100]
    images_of(division, rows, folder / "xrays")
    levels = []
    for name in rows[IMAGE]:
        with Image.open(folder / "xrays" / name) as image:
            levels.append(ImageStat.Stat(image.convert("L").reduce(8)).mean[0])
    rank = pd.Series(levels).rank(pct=True)
    cells = pd.DataFrame({"file": rows[IMAGE], "who": rows["Patient_ID"]})
    for label, positive in zip(LABELS, (rank > 0.5, rank < 0.3, rank > 0.7), strict=True):
        cells[label] = positive.astype(int)
    cells.to_csv(folder / "labels.csv", index=False)
    return rows


def competition(division: Path, folder: Path) -> None:
    """`grand-xray-slam` as drawn on the page, with the same images in both divisions."""
    rows = pd.read_csv(division / "train.csv", dtype=str)
    train, test = rows.iloc[:60], rows.iloc[60:70]
    for number in (1, 2):
        images_of(division, train, folder / "grand-xray-slam" / f"train{number}")
        images_of(division, test, folder / "grand-xray-slam" / f"test{number}")
        train.to_csv(folder / "grand-xray-slam" / f"train{number}.csv", index=False)
        template = test[[IMAGE, *rows.columns[7:]]]
        template.to_csv(folder / "grand-xray-slam" / f"sample_submission_{number}.csv", index=False)


def write_dicoms(folder: Path, division: Path, rows: pd.DataFrame) -> None:
    """`dicoms` with a patient in each header, and `dicoms.csv`."""
    from cxrdist.bench.preprocess import write_dicom

    folder.joinpath("dicoms").mkdir()
    names = [write_dicom(folder / "dicoms", "DICOM, uncompressed", 400, seed).name for seed in range(4)]
    cells = {label: [number % 2 for number in range(4)] for label in LABELS[:2]}
    pd.DataFrame({"file": names} | cells).to_csv(folder / "dicoms.csv", index=False)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_door_to_your_own_x_rays(division: Path, tmp_path: Path) -> None:
    rows = own_table(division, tmp_path)
    with Image.open(division / "images" / rows[IMAGE].iloc[0]) as image:
        image.convert("L").save(tmp_path / "new.jpg")
    skip = {}
    try:
        write_dicoms(tmp_path, division, rows)
    except ImportError as error:
        skip["dicoms"] = f"needs pip install 'cxrdist[dicom]' ({error})"
    Door("your-x-rays", tmp_path).run(skip=skip)
    assert (tmp_path / "report" / "report.html").stat().st_size > 10_000
    assert list(pd.read_csv(tmp_path / "found.csv").columns)[:4] == ["image_name", *LABELS]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_door_to_the_competition(division: Path, tmp_path: Path) -> None:
    competition(division, tmp_path)
    Door("grand-xray-slam", tmp_path).run()
    for number, out in ((1, "out_a"), (2, "out")):
        template = pd.read_csv(tmp_path / "grand-xray-slam" / f"sample_submission_{number}.csv")
        submission = pd.read_csv(tmp_path / out / "submission.csv")
        assert list(submission.columns) == list(template.columns)
        assert list(submission[IMAGE]) == list(template[IMAGE])


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextlib.contextmanager
def object_store() -> Iterator[tuple[dict[str, str], Callable[[Path, str], None]]]:
    """An S3 server with the bucket of the page: its environment, and what copies a folder's files there."""
    server = pytest.importorskip("moto.server", reason="needs moto[server] and s3fs")
    pytest.importorskip("s3fs", reason="needs s3fs")
    import boto3

    store = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    store.start()
    host, port = store.get_host_and_port()
    environment = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
    environment |= {"AWS_ACCESS_KEY_ID": "AKIAEXAMPLE", "AWS_SECRET_ACCESS_KEY": "secret"}
    secrets = {"aws_access_key_id": "AKIAEXAMPLE", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=environment["AWS_ENDPOINT_URL"], **secrets)
    client.create_bucket(Bucket="bucket")

    def copy(folder: Path, name: str) -> None:
        for path in folder.iterdir():
            if path.is_file():
                client.upload_file(str(path), "bucket", f"{name}/{path.name}")

    try:
        yield environment, copy
    finally:
        store.stop()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_door_to_a_cluster(division: Path, tmp_path: Path) -> None:
    own_table(division, tmp_path)
    competition(division, tmp_path)
    (tmp_path / "accel_configs").symlink_to(REPOSITORY / "accel_configs")
    door = Door("cluster", tmp_path)
    door.replaced = {
        "HOST0": "127.0.0.1",
        "29500": str(free_port()),
        "processes 16": "processes 2",
        "accel_configs/nodes.yaml": "accel_configs/cpu.yaml",
        "/nvme/": f"{tmp_path}/nvme/",
        "--cache-gb 500": "--cache-gb 1",  # no more than the disk has
    }
    with object_store() as (environment, copy):
        copy(tmp_path / "xrays", "xrays")
        door.before = {"--shards-url": lambda: copy(tmp_path / "shards" / "tb", "tb")}
        door.environment |= environment | {
            **slurm(tmp_path),
            "SLURM_SUBMIT_DIR": str(tmp_path),
            "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_JOB_NODELIST": "node[0-1]",
            "CXRDIST_PYTHON": sys.executable,
            "CXRDIST_PROCESSES_PER_NODE": "1",
            "CXRDIST_ACCEL_CONFIG": "accel_configs/cpu.yaml",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        door.run()
    assert (tmp_path / "nvme" / "cache").is_dir()
