"""The commands by name: `cxrdist COMMAND ...`, or `python -m cxrdist COMMAND ...`.

Each is a module of the package and runs as `python -m cxrdist.MODULE` does; no other one is imported.
"""

import ast
import runpy
import sys
from pathlib import Path

from cxrdist import __version__
from cxrdist.cli import Parser

GROUPS = {  # what people do, in that order
    "data": ("preprocess", "verify"),
    "train": ("recipes", "train", "folds", "average"),
    "score": ("infer", "ensemble", "evaluate", "calibrate"),
    "use": ("predict", "app", "export"),
    "machine": ("doctor", "demo", "bench"),
}
RENAMED = {"recipes": "recipe_list"}  # recipes.py holds the recipes themselves
MODULES = {name: RENAMED.get(name, name) for names in GROUPS.values() for name in names}


def about(module: str) -> str:
    """The first line of a command's docstring, read without importing it."""
    place = Path(__file__).parent / module
    path = place / "__main__.py" if place.is_dir() else place.with_suffix(".py")
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").splitlines()[0]


def main() -> None:
    """Run the command that the first argument names, with the other arguments; without any, list the commands."""
    lines = [
        "\n".join([f"{group}:", *(f"  {name:<12}{about(MODULES[name])}" for name in names)])
        for group, names in GROUPS.items()
    ]
    told = "\n".join([*lines, "", "cxrdist COMMAND --help lists a command's flags"])
    parser = Parser(prog="cxrdist", epilog=told)
    parser.add_argument("--version", action="version", version=f"cxrdist {__version__}")
    parser.add_argument("command", choices=MODULES, metavar="COMMAND")
    command = parser.parse_args(sys.argv[1:2] or ["--help"]).command
    del sys.argv[1]
    runpy.run_module(f"cxrdist.{MODULES[command]}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
