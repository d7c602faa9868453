"""What this machine has and what cxrdist would use on it. Its flags: `cxrdist.flags.doctor`."""

import contextlib
import importlib.metadata
import io
import os
import platform
import shutil
import socket
import sys
import tomllib
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from cxrdist import files, recipes
from cxrdist.cli import run_entry, shards_of
from cxrdist.distributed.environment import machine_memory, usable_cores
from cxrdist.distributed.plan import PROJECT, plan_launch, visible_gpus
from cxrdist.distributed.precision import hardware_of, resolve_precision
from cxrdist.errors import UserError
from cxrdist.flags.doctor import parser
from cxrdist.models import architecture_of, recipe_for
from cxrdist.models.compiled import LAUNCH_BOUND_BATCH
from cxrdist.models.weights.fit import init_files
from cxrdist.shards.index import open_index
from cxrdist.training.tracking import resolve_mode

SHOWN = ("torch", "accelerate", "timm", "kornia", "webdataset", "simplejpeg", "wandb", "numpy", "pillow")
NUM_SHEET_IMAGES = 8
MIN_FREE_GB = 20  # shards of one division (13 GB) and the checkpoints of both runs


def main(argv: list[str] | None = None) -> None:
    problems: list[str] = []
    args = parser().parse_args(argv)
    if args.augment_sheet:
        augment_sheet(args, args.augment_sheet)
        return
    if args.bill:
        print(*("\t".join(row) for row in bill()), sep="\n")
        return
    rows = {
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()} ({sys.executable})",
        "versions": versions(problems),
        "cpu": f"{usable_cores()} cores usable, {memory()}",
        "gpu": gpus(problems),
        "processes": processes(problems),
        "precision": precision(),
        "compile": compiling(len(visible_gpus())),
        "disk": disk(problems),
        "wandb": wandb_state(),
        **{model: weights(model) for model in ("eva_x", "chexfound")},
    }
    for name, text in [*rows.items(), *(("problem", text) for text in problems)]:
        print(f"{name:<11}{text}")
    if not problems:
        print("no problem found; `cxrdist demo` runs all steps on made-up X-rays")


def augment_sheet(args: Namespace, out: Path) -> None:
    """Write the figure of `report.sheet.augmented_figure` to `out`; UserError for what the recipe cannot do."""
    from cxrdist.data.loader import Loader  # kornia and matplotlib, which --plan shall not wait for
    from cxrdist.report.sheet import augmented_figure

    shards = shards_of(args)
    files.check_outputs([out], [shards], flag="--augment-sheet")
    index = open_index(shards, "train", args.task)
    recipe = recipe_for(args.model, index.task.name)
    recipe = recipes.with_overrides(recipe, args.overrides + [f"augment={edit}" for edit in args.augment])
    with Loader(index) as loader:
        figure = augmented_figure(loader, recipe, NUM_SHEET_IMAGES)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=100, facecolor="white")
    files.write_output(out, content.getvalue())
    print(
        f"{out}: {min(NUM_SHEET_IMAGES, len(index))} images of {shards}, as stored and in four epochs of {recipe.name}"
    )


def versions(problems: list[str]) -> str:
    """The versions that matter; adds a problem for each package that is missing or outside the project's range."""
    pyproject = PROJECT / "pyproject.toml"
    if pyproject.is_file():
        texts = tomllib.loads(pyproject.read_text())["project"]["dependencies"]
    else:
        texts = importlib.metadata.requires("cxrdist") or []
    for wanted in map(Requirement, texts):
        found = _version(wanted.name)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        if found is None:
            problems.append(f"{wanted.name} is not installed; {_remedy(wanted)}")
        elif not wanted.specifier.contains(found, prereleases=True):
            problems.append(f"{wanted.name} {found} is not {wanted.specifier}; {_remedy(wanted)}")
    return ", ".join(f"{name} {version}" for name in SHOWN if (version := _version(name)) is not None)


def _remedy(wanted: Requirement) -> str:
    in_clone = (PROJECT / "launch.sh").is_file()  # a wheel has none
    return "run `./launch.sh setup`" if in_clone else f"run `pip install '{wanted.name}{wanted.specifier}'`"


def _version(name: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return None


def bill(root: str = "cxrdist") -> list[tuple[str, str, str]]:
    """(name, version, licence) of every installed package that `root` and its extras need, by name.

    The licence is what the metadata declares, not what libraries inside a wheel have: an SPDX expression, else the
    classifiers, else the first line of free text, else "not declared". Raises UserError if `root` is not installed.
    """
    found: dict[str, tuple[str, str, str]] = {}
    waiting = {(root, extra) for extra in ("", *_metadata(root).get_all("Provides-Extra", []))}
    seen = set(waiting)
    while waiting:
        name, extra = waiting.pop()
        if _version(name) is None:
            continue  # an extra that is not installed
        declared = _metadata(name)
        found[canonicalize_name(name)] = (declared["Name"], declared["Version"], _licence(declared))
        for wanted in map(Requirement, declared.get_all("Requires-Dist", [])):
            if wanted.marker is None or wanted.marker.evaluate({"extra": extra}):
                waiting |= {(wanted.name, more) for more in ("", *wanted.extras)} - seen
        seen |= waiting
    return [row for name, row in sorted(found.items()) if name != root]


def _metadata(name: str) -> Any:
    try:
        return importlib.metadata.metadata(name)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"{name} is not installed; {_remedy(Requirement(name))}") from None


def _licence(declared: Any) -> str:
    classifiers = [text for text in declared.get_all("Classifier", []) if text.startswith("License :: ")]
    named = [text.split(" :: ")[-1] for text in classifiers if text != "License :: OSI Approved"]
    texts = (*declared.get_all("License-Expression", []), "; ".join(named), *declared.get_all("License", []))
    return next((text.strip().split("\n")[0] for text in texts if text.strip()), "not declared")


def memory() -> str:
    total, available = machine_memory()
    text = f"{total / 1e9:.0f} GB memory"
    return text if available is None else f"{text}, {available / 1e9:.0f} GB of it available"


def gpus(problems: list[str]) -> str:
    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        names = ", ".join(f"{card.name} ({card.total_memory / 2**30:.0f} GiB)" for card in cards)
        return f"{len(cards)}: {names}; CUDA {torch.version.cuda}"
    if shutil.which("nvidia-smi") is not None:
        found = f"nvidia-smi is here, but torch {torch.__version__} (built for {torch.version.cuda or 'no CUDA'})"
        remedy = "a torch build that fits the driver (pytorch.org, 'Get Started') and check CUDA_VISIBLE_DEVICES"
        problems.append(f"{found} sees no GPU; install {remedy}")
    return f"none (torch {torch.__version__}): training runs on the CPU, which is fit for the demo only"


def processes(problems: list[str]) -> str:
    plan = plan_launch()
    if not Path(plan.config).is_file():
        problems.append(f"{plan.config} is missing; run from a checkout of the project, or set CXRDIST_ACCEL_CONFIG")
    if plan.num_processes > 1:
        host = socket.gethostname()
        try:
            socket.getaddrinfo(host, None)
        except OSError:
            problems.append(f"the host name {host!r} has no address, which gloo needs; set GLOO_SOCKET_IFNAME=lo")
    return plan.reason


def precision() -> str:
    """What `--precision auto` becomes here."""
    chosen, why = resolve_precision("auto", [hardware_of(device) for device in visible_gpus() or [torch.device("cpu")]])
    return f"{chosen} ({why})"


def compiling(num_gpus: int) -> str:
    """Whether `--compile` is advised for the published recipes, by each GPU's share of the global batch."""
    if num_gpus == 0:
        return "--compile is for GPUs"
    share = -(-recipes.recipe_for("eva_x", "b").global_batch_size // num_gpus)
    if share <= LAUNCH_BOUND_BATCH:
        return f"train with --compile: {share} images a GPU and step, whose launches take as long as the GPU's work"
    return f"--compile is advised with --device-batch-size {LAUNCH_BOUND_BATCH} or less, where launches take longest"


def disk(problems: list[str]) -> str:
    free_gb = shutil.disk_usage(".").free / 1e9
    if free_gb < MIN_FREE_GB:
        problems.append(f"{free_gb:.0f} GB free here; the demo needs 1 GB, a full division about {MIN_FREE_GB} GB")
    return f"{free_gb:.0f} GB free in {Path.cwd()}"


def wandb_state() -> str:
    mode = resolve_mode("auto")
    if mode == "online":
        return "logged in: runs go online (--wandb off: local files only)"
    if os.environ.get("WANDB_MODE"):
        return f"WANDB_MODE={os.environ['WANDB_MODE']}: {mode}; the local metrics are written in any case"
    return "not logged in: metrics stay in local files; `wandb login` or --wandb offline change that"


def weights(model: str) -> str:
    """The files that `train` without --init would start from, or what to get."""
    try:
        files = init_files(architecture_of(model), None)
    except UserError as error:
        return f"no official weights: {error}"
    size_mb = sum(path.stat().st_size for path in files) / 1e6
    return f"starts from {' and '.join(map(str, files))} ({size_mb:.0f} MB)"


if __name__ == "__main__":
    raise SystemExit(run_entry(main))
