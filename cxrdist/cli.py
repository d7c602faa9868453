"""The command-line flags that several entries share (one spelling, one help text), and a parser that suggests flags."""

import argparse
import difflib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from cxrdist.labels import DIVISIONS


class Parser(argparse.ArgumentParser):
    """argparse with no abbreviations, and "did you mean" for a mistyped flag."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments:"):
            known = [option for action in self._actions for option in action.option_strings]
            for word in message.split(":", 1)[1].split():
                close = difflib.get_close_matches(word.split("=")[0], known, n=1) if word.startswith("-") else []
                if close:
                    message += f" (did you mean {close[0]}?)"
        self.exit(2, f"error: {message}; see `{self.prog} --help`\n")


def at_least(minimum: float, kind: type[int] | type[float] = int) -> Callable[[str], Any]:
    """An argparse type: a number of that kind that is finite and not below `minimum`."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not minimum <= value < math.inf:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not {'a whole number' if kind is int else 'a number'} of at least {minimum}"
            )
        return value

    return parse


SHARED_FLAGS: dict[str, dict[str, Any]] = {
    "--div": {"choices": DIVISIONS, "required": True, "help": "division of the competition"},
    "--data": {"type": Path, "metavar": "DIR", "help": "folder in the competition's layout (train1.csv, train1/, ...)"},
    "--images": {"type": Path, "metavar": "DIR", "help": "folder of images"},
    "--csv": {"type": Path, "metavar": "FILE", "help": "label CSV (train) or sample submission (test)"},
    "--shards": {
        "type": Path,
        "metavar": "DIR",
        "help": "shard set made by cxrdist.preprocess (default: shards/div_<div>)",
    },
    "--shards-url": {
        "metavar": "URL",
        "help": "copy the shard set from s3://, https:// or hf:// into --shards first, checking every hash",
    },
    "--out": {"type": Path, "metavar": "DIR", "help": "where to write"},
    "--init": {
        "metavar": "FILE|random",
        "help": "weights to start from; without it the official file is looked for in weights/",
    },
    "--resume": {"action": "store_true", "help": "go on from the newest checkpoint that is whole"},
    "--set": {
        "action": "append",
        "default": [],
        "metavar": "FIELD=VALUE",
        "dest": "overrides",
        "help": "override one recipe field, e.g. --set ema_decay=0.9995 (repeatable)",
    },
    "--device-batch-size": {
        "type": at_least(1),
        "metavar": "N",
        "help": "images per device and forward pass: for speed and memory; rounding and dropout masks change with it",
    },
    "--precision": {
        "choices": ("auto", "bf16", "fp16", "fp32"),
        "default": "auto",
        "help": "auto: what accelerate was told, else the best the hardware has",
    },
    "--expect-processes": {
        "type": at_least(1),
        "metavar": "N",
        "help": "stop at once unless exactly N processes were started",
    },
    "--max-hours": {
        "type": at_least(0, float),
        "metavar": "H",
        "help": "checkpoint and stop before this many hours are over",
    },
    "--json": {"type": Path, "metavar": "FILE", "help": "also write the result as JSON"},
}


def add_flags(parser: argparse.ArgumentParser, *names: str, **changes: dict[str, Any]) -> None:
    """Add shared flags by name; `changes` maps a flag (as its attribute name) to keyword arguments that differ."""
    for name in names:
        options = SHARED_FLAGS[name] | changes.get(name[2:].replace("-", "_"), {})
        parser.add_argument(name, **options)
