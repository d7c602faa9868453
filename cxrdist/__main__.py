"""The commands by name: `cxrdist COMMAND ...`, or `python -m cxrdist COMMAND ...`.

Flags are read first, by the command's module in `cxrdist.flags`, so that help and mistakes need no torch. Then the
command runs as `cxrdist MODULE` does; training and inference in as many processes as this machine has GPUs.
"""

import argparse
import ast
import difflib
import importlib
import runpy
import sys
from pathlib import Path

from cxrdist import __version__
from cxrdist.cli import Parser, run_entry
from cxrdist.distributed.environment import is_launched
from cxrdist.flags import COMMANDS

RENAMED = {"recipes": "recipe_list"}  # recipes.py holds the recipes themselves
LAUNCHED = {"train": "run the same command with --resume", "infer": "run the same command again"}


def about(command: str) -> str:
    """The first line of a command's help, read without importing it."""
    place = Path(__file__).parent
    path = place / "flags" / f"{command}.py"
    if not path.is_file():
        path = place / command / "__main__.py"
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").splitlines()[0]


def chosen(words: list[str]) -> str:
    """The command that the first word names; ends the process with the list of them where there is none."""
    lines = []
    for group, names in COMMANDS.items():
        lines += [f"{group}:", *(f"  {name:<12}{about(name)}" for name in names)]
    told = "\n".join([*lines, "", "cxrdist COMMAND --help lists a command's flags"])
    parser = Parser(prog="cxrdist", usage="cxrdist COMMAND [FLAGS]", epilog=told, add_help=False)
    parser.add_argument("-h", "--help", action="help", help="show this")
    parser.add_argument("--version", action="version", version=f"cxrdist {__version__}")
    parser.add_argument("command", metavar="COMMAND", help="one of these:")
    first = words[:1] or ["--help"]
    if first[0].startswith("-") and first[0] not in ("-h", "--help", "--version"):
        parser.error(f"{first[0]}: a command comes first, e.g. cxrdist train {first[0]} ...")
    command: str = parser.parse_args(first).command
    known = [name for names in COMMANDS.values() for name in names]
    if command not in known:
        close = difflib.get_close_matches(command.lower(), [*known, "--help", "--version"], n=1)
        parser.error(f"there is no command {command!r}" + (f" (did you mean {close[0]}?)" if close else ""))
    return command


def parsed(command: str, words: list[str]) -> argparse.Namespace | None:
    """The flags of a command; None for one that reads them itself."""
    if command == "bench":
        return None
    flags = importlib.import_module(f"cxrdist.flags.{command}")
    found: argparse.Namespace = flags.parser().parse_args(words)
    return found


def run(command: str, words: list[str]) -> int:
    args = parsed(command, words)
    module = f"cxrdist.{RENAMED.get(command, command)}"
    if command in LAUNCHED and args is not None and not args.dry_run and not is_launched():
        from cxrdist.distributed.launch import launch

        return launch(module, words, again=LAUNCHED[command])
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    return 0


def main() -> None:
    """Run the command that the first argument names, with the other arguments; without any, list the commands."""
    command = chosen(sys.argv[1:])
    words = sys.argv[2:]
    sys.argv[:2] = [f"cxrdist {command}"]
    code = 0

    def run_it() -> None:
        nonlocal code
        code = run(command, words)

    raise SystemExit(run_entry(run_it) or code)


if __name__ == "__main__":
    main()
