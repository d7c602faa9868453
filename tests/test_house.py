"""The house: imports point down, each subject has one place, and what must not be repeated elsewhere is not."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from cxrdist.task import COMPETITION_LABELS

pytestmark = pytest.mark.fast

PACKAGE = Path(__file__).parents[1] / "cxrdist"
ENTRIES = {"preprocess", "verify", "train", "infer", "ensemble", "evaluate", "average", "folds", "doctor"}
ENTRIES |= {"demo", "bench", "predict", "calibrate", "export", "app", "watch", "completion"}
ENTRIES |= {"recipe_list"}  # `cxrdist recipes`
# From the bottom; what is on one line may import what is below, and itself.
LAYERS = (
    {"__init__"},
    {"errors", "splitmix", "terminal"},
    {"files"},
    {"documents"},
    {"task"},
    {"tables"},
    {"published"},
    {"recipes"},
    {"recipe_file"},
    {"distributed"},
    {"shards", "data", "augment", "models", "training", "runs", "inference", "scoring", "report", "estimate", "web"},
    {"cli", "steps", "truth"},
    {"flags"},
    {"external", "shard_sets"},
    ENTRIES,
    {"__main__"},
)
NEIGHBOURS = {
    "data": {"shards"},
    "runs": {"models"},
    "training": {"data", "models", "scoring"},
    "inference": {"shards", "data", "models", "runs", "augment", "scoring"},
    "report": {"scoring", "data", "models", "augment", "runs"},
    "estimate": {"models", "augment", "shards"},
    "web": {"data", "inference", "report", "scoring", "shards"},
}
NO_LABELS = {  # lines in which 14 is another number
    "models/eva_x": {'"ref_feat_shape": (14, 14),'},
    "models/rad_dino": {"PATCH = 14"},
    "augment/clahe": {  # bits of OpenCV's fixed point
        "BASE = 2**14",
        "rgb = torch.stack([_weighted(xyz, shares, 14).clamp_(0, 4095) for shares in RGB_SHARES], 1)",
        "grey = gamma[((luminance * sum(RGB_SHARES[1]) + 2**13) >> 14).clip(0, 4095)]",
    },
}
EXCEPTIONS = {("cli", "models/convert"), ("cli", "training/dashboard")}  # commands in folders: their flags are entries'
MODULES = {
    path.relative_to(PACKAGE).with_suffix("").as_posix().removesuffix("/__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
WITHOUT_HEAVY = [name for name in MODULES if name.split("/")[0] not in ("demo", "bench")]


def tree_of(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text(encoding="utf-8"))


def imported(name: str) -> set[str]:
    """The modules of this package that a module imports, wherever the statement stands; the package's own face none,
    which imports what it shows when it is first used.
    """
    if name == "__init__":
        return set()
    found = set()
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{name}: a relative import"
    ours = {text.removeprefix("cxrdist").removeprefix(".").replace(".", "/") for text in found if text[:7] == "cxrdist"}
    return {text or "__init__" for text in ours if (text or "__init__") in MODULES} - {name}


def place(name: str) -> str:
    return name.split("/")[0]


def layer(name: str) -> int:
    return next(number for number, names in enumerate(LAYERS) if place(name) in names)


def test_every_module_has_a_layer():
    known = set().union(*LAYERS)
    assert {place(name) for name in MODULES} <= known


def test_imports_point_down():
    wrong = []
    for name in MODULES:
        for other in imported(name):
            same = place(name) == place(other)
            allowed = same or layer(other) < layer(name) or place(other) in NEIGHBOURS.get(place(name), ())
            if place(name) in ("demo", "bench", "folds"):  # these drive and measure the others
                allowed = allowed or place(other) in ("demo", *ENTRIES)
            if not allowed and (place(other), name) not in EXCEPTIONS:
                wrong.append(f"{name} imports {other}")
    assert wrong == []


def test_no_cycle():
    list(TopologicalSorter({name: imported(name) for name in MODULES}).static_order())


def test_only_distributed_the_entries_and_tracking_know_accelerate_and_wandb():
    for name in WITHOUT_HEAVY:
        roots = set()
        for node in ast.walk(tree_of(name)):
            if isinstance(node, ast.Import):
                roots |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                roots.add(node.module.split(".")[0])
        if place(name) != "distributed" and place(name) not in ENTRIES and name != "training/tracking":
            assert not roots & {"accelerate", "wandb"}, name


def constants(name: str) -> list[ast.Constant]:
    """The constants of a module's code, without docstrings."""
    tree, docstrings = tree_of(name), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            docstrings.add(node.body[0].value)  # type: ignore[attr-defined]
    return [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and node not in docstrings]


def test_no_label_and_no_count_of_labels_outside_the_task_and_the_phantoms():
    labels = "|".join(map(re.escape, COMPETITION_LABELS))
    for name in MODULES:
        if name in ("task", "demo/phantoms"):
            continue
        for node in constants(name):
            if isinstance(node.value, str):
                assert not re.search(rf"\b({labels})\b", node.value), f"{name}:{node.lineno}: {node.value!r}"
    for name in WITHOUT_HEAVY:
        lines = {node.lineno for node in constants(name) if node.value == 14 and type(node.value) is int}
        found = {MODULES[name].read_text().splitlines()[line - 1].split("  #")[0].strip() for line in lines}
        assert found <= NO_LABELS.get(name, set()), name


def test_nothing_outside_models_asks_what_kind_of_model_it_has():
    kinds = {"CheXFound", "Eva", "GLoRI", "VisionTransformer"}
    for name in WITHOUT_HEAVY:
        if place(name) == "models":
            continue
        for node in ast.walk(tree_of(name)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
                assert not {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)} & kinds, name


def test_the_launcher_is_asked_in_one_place():
    for name in MODULES:
        if place(name) != "distributed":
            words = {node.value for node in constants(name) if isinstance(node.value, str)}
            assert not words & {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}, name


def test_no_lambda_is_handed_to_a_collective():
    for name in MODULES:
        for node in ast.walk(tree_of(name)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "on_main":
                assert not any(isinstance(part, ast.Lambda) for part in ast.walk(node)), f"{name}:{node.lineno}"


def test_the_only_atomic_write_and_lock_are_in_files():
    for name in WITHOUT_HEAVY:
        if name in ("files", "models/weights/safetensors"):
            continue
        text = MODULES[name].read_text()
        assert "fcntl" not in text, name
        assert "os.replace(" not in text, name
        assert "ENOSPC" not in text or name == "training/tracking", name


def functions(name: str) -> list[tuple[str, int]]:
    return [
        (node.name, (node.end_lineno or 0) - node.lineno + 1)
        for node in ast.walk(tree_of(name))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def test_functions_fit_a_screen():
    """60 lines, but for the visible loop and the phantoms' drawing."""
    long = {(name, function) for name in WITHOUT_HEAVY for function, length in functions(name) if length > 60}
    assert long <= {("train", "train")}, long


def test_entries_stay_short():
    lines = {name: len(MODULES[name].read_text().splitlines()) for name in WITHOUT_HEAVY}
    assert lines["train"] <= 400
    assert lines["infer"] <= 250


def test_a_document_is_a_dataclass():
    """`dict[str, Any]` is for rows on their way to the log and for keyword arguments; few others are left."""
    rows_or_keywords = {"training/meter", "training/tracking", "training/validate", "cli"}
    uses = {
        name: len(re.findall(r"dict\[str, Any\]", MODULES[name].read_text()))
        for name in WITHOUT_HEAVY
        if name not in rows_or_keywords and place(name) != "models"
    }
    assert sum(uses.values()) < 12, {name: count for name, count in uses.items() if count}
