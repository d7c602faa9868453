"""Measure this machine and the project: `cxrdist bench NAME`. Each module in this folder with a `run` is one.

A benchmark has `add_arguments(parser)` and `run(args) -> list[Row]`; its first docstring line is its help.
"""

import argparse
import ast
import importlib
import json
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

import cxrdist.bench
from cxrdist.bench.timing import FAILED, Row, as_json, table
from cxrdist.cli import Parser, add_flags, run_entry
from cxrdist.errors import UserError
from cxrdist.files import check_outputs, write_output
from cxrdist.flags.model import check_device

MAY_BE_0 = ("statistics",)  # numbers that may be 0
NAMES = sorted({module.name for module in pkgutil.iter_modules(cxrdist.bench.__path__)} - {"__main__", "timing"})


def about(name: str) -> str:
    """The first line of a benchmark's help, read without importing it."""
    source = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").splitlines()[0]


def main(argv: list[str] | None = None) -> None:
    """Run one benchmark, print its rows as a table, and write them to `--json FILE` where asked for."""
    argv = sys.argv[1:] if argv is None else argv
    chooser = Parser(prog="cxrdist bench", description="\n".join(f"  {name:<12}{about(name)}" for name in NAMES))
    chooser.add_argument("name", choices=NAMES, metavar="NAME", help="one of these; NAME --help lists its flags")
    name = chooser.parse_args(argv[:1]).name
    module = importlib.import_module(f"cxrdist.bench.{name}")
    parser = Parser(prog=f"cxrdist bench {name}", description=module.__doc__)
    module.add_arguments(parser)
    add_flags(parser, "--json")
    args = parser.parse_args(argv[1:])
    check_numbers(args)
    if args.json is not None and not args.json.parent.is_dir():
        raise UserError(f"--json {args.json}: there is no folder {args.json.parent}")
    if args.json is not None:
        check_outputs([args.json], flag="--json")
    rows = cast(Callable[..., list[Row]], module.run)(args)
    print(table(rows))
    if args.json is not None:
        write_output(args.json, json.dumps(as_json(rows), indent=1) + "\n")
    if failed := [row.variant for row in rows if row.stage == FAILED]:
        raise UserError(f"{', '.join(failed)}: failed, see the table")


def check_numbers(args: argparse.Namespace) -> None:
    """UserError for a number that no benchmark can take, or a device that is none."""
    for name, value in vars(args).items():
        for number in value if isinstance(value, list) else [value]:
            is_number = isinstance(number, int | float) and not isinstance(number, bool)
            if is_number and (number < 0 or (number == 0 and name not in MAY_BE_0)):
                raise UserError(f"--{name.replace('_', '-')} {number}: give a number above 0")
    if (device := getattr(args, "device", None)) is not None:
        check_device(device)


if __name__ == "__main__":
    raise SystemExit(run_entry(main))
