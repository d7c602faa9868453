"""Print what makes a shell complete cxrdist's commands and flags. Its flags: `cxrdist.flags.completion`."""

import argparse
import importlib
from pathlib import Path

import shtab

from cxrdist.cli import run_entry
from cxrdist.flags import COMMANDS
from cxrdist.flags.completion import parser

WITHOUT = {"bench"}  # its flags are those of each benchmark


def main(argv: list[str] | None = None) -> None:
    print(shtab.complete(all_commands(), parser().parse_args(argv).shell))


def all_commands() -> argparse.ArgumentParser:
    """`cxrdist` with every command below it, as its own parser has it; paths are completed as files."""
    top = argparse.ArgumentParser(prog="cxrdist")
    below = top.add_subparsers()
    for name in (name for names in COMMANDS.values() for name in names):
        own = [] if name in WITHOUT else [importlib.import_module(f"cxrdist.flags.{name}").parser()]
        command = below.add_parser(name, parents=own, add_help=not own, help=name)
        for action in command._actions:
            if action.type is Path:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    return top


if __name__ == "__main__":
    raise SystemExit(run_entry(main))
