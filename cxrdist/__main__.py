"""The commands by name: `cxrdist COMMAND ...`, or `python -m cxrdist COMMAND ...`.

Each is a module of the package and runs as `python -m cxrdist.MODULE` does; no other one is imported.
"""

import ast
import runpy
import sys
from pathlib import Path

from cxrdist.cli import Parser

SAME = (
    "preprocess",
    "verify",
    "train",
    "folds",
    "infer",
    "ensemble",
    "evaluate",
    "average",
    "predict",
    "app",
    "calibrate",
    "export",
    "doctor",
    "demo",
    "bench",
)
MODULES = {name: name for name in SAME} | {"recipes": "recipe_list"}  # recipes.py holds the recipes themselves


def about(module: str) -> str:
    """The first line of a command's docstring, read without importing it."""
    place = Path(__file__).parent / module
    path = place / "__main__.py" if place.is_dir() else place.with_suffix(".py")
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").splitlines()[0]


def main() -> None:
    """Run the command that the first argument names, with the other arguments; without any, list the commands."""
    lines = "\n".join(f"  {name:<12}{about(module)}" for name, module in MODULES.items())
    parser = Parser(prog="cxrdist", epilog=f"commands:\n{lines}\n\ncxrdist COMMAND --help lists a command's flags")
    parser.add_argument("command", choices=MODULES, metavar="COMMAND")
    command = parser.parse_args(sys.argv[1:2] or ["--help"]).command
    del sys.argv[1]
    runpy.run_module(f"cxrdist.{MODULES[command]}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
