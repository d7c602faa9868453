"""What the entries share: flags (one spelling, one help text), a parser that suggests flags, and how an entry ends."""

import argparse
import contextlib
import difflib
import json
import math
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from cxrdist.distributed import environment
from cxrdist.errors import UserError, redacted
from cxrdist.files import is_utf8
from cxrdist.recipe_file import RecipeFile, read_recipe_file
from cxrdist.task import TASKS, Task, load_task, parse_readings


class Parser(argparse.ArgumentParser):
    """argparse with no abbreviations, defaults in its help, and "did you mean" for a mistyped flag or command.

    check: raises UserError for flags that contradict each other.
    """

    def __init__(self, *args: Any, check: Callable[[argparse.Namespace], None] | None = None, **kwargs: Any) -> None:
        ours: dict[str, Any] = {"allow_abbrev": False, "formatter_class": _Help}
        super().__init__(*args, **(ours | kwargs))
        self._check, self._words = check, list[str]()

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found = super().parse_args(args, namespace)
        if self._check is not None:
            self._check(found)
        return found

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        for word in words:
            if not is_utf8(word):  # nor could a path be written into a document
                self.error(f"argument {word!a} is not UTF-8; rename that file or folder")
        for place in range(len(words) - 1, 0, -1):  # argparse takes `-clahe` for a flag
            if words[place - 1] == "--augment" and re.match(r"-[A-Za-z]", words[place]):
                words[place - 1 : place + 1] = [f"--augment={words[place]}"]
        self._words = words
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        known = [option for action in self._actions for option in action.option_strings if action.dest != "help"]
        message = re.sub(r"invalid (int|float) value: ('.*')$", _not_a_number, message)
        if message.startswith(("unrecognized arguments:", "the following arguments are required:")):
            for word in (word.split("=")[0] for word in self._words if word.startswith("--")):
                if word not in known and (close := difflib.get_close_matches(word, known, n=1, cutoff=0.7)):
                    message += f" (you wrote {word}: did you mean {close[0]}?)"
        if re.match(r"unrecognized arguments: [^-]", message):
            message += " (a value needs its flag before it)"
        line = f"error: {redacted(message)}; see `{self.prog} --help`\n"
        self.exit(2, line if environment.rank_text() == "0" else "")  # every rank makes the same mistake: said once


def _not_a_number(found: re.Match[str]) -> str:
    return f"{found[2]} is not {'an integer' if found[1] == 'int' else 'a number'}"


class _Help(argparse.RawDescriptionHelpFormatter):
    """Every default that there is stands in the help."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        shown = action.option_strings and action.default not in (None, False, argparse.SUPPRESS, "")
        if not shown or "default" in text or isinstance(action.default, list):
            return text
        return f"{text} (default %(default)s)".lstrip()


def at_least(minimum: float, kind: type[int] | type[float] = int) -> Callable[[str], Any]:
    """An argparse type: a number of that kind that is finite and not below `minimum`."""

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            if minimum <= (value := kind(text)) < math.inf:
                return value
        what = "an integer" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{text!r} is not {what} of at least {minimum}")

    return parse


@dataclass(frozen=True)
class Amount:
    """A number, or a share in percent, of a whole that is known later."""

    value: float
    percent: bool

    def of(self, whole: int) -> int:
        """The number; a share is rounded up, so that one of a few is not too many."""
        return math.ceil(round(self.value * whole / 100, 6)) if self.percent else int(self.value)


def amount(text: str) -> Amount:
    """`N` or `P%` as an argparse type."""
    with contextlib.suppress(argparse.ArgumentTypeError):
        if not text.endswith("%"):
            return Amount(at_least(0)(text), percent=False)
        if (value := at_least(0, float)(text[:-1])) <= 100:
            return Amount(value, percent=True)
    raise argparse.ArgumentTypeError(f"{text!r} is neither a number of images, e.g. 20, nor a share, e.g. 1%")


def task_type(text: str) -> Task:
    """`load_task` as an argparse type."""
    try:
        return load_task(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix(f"--task {text}: ")) from None


def recipe_type(text: str) -> RecipeFile:
    """`read_recipe_file` as an argparse type."""
    try:
        return read_recipe_file(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def existing(text: str) -> Path:
    """A path that must be there, as an argparse type."""
    if not Path(text).exists():
        raise argparse.ArgumentTypeError(f"{text}: no such file or folder; check the path")
    return Path(text)


def folder(text: str) -> Path:
    """The folder of a shard set as an argparse type; an address is refused."""
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text} is an address, which train, folds and infer take as --shards-url")
    return Path(text)


def flag(kind: Callable[[str], Any], metavar: str, text: str, **more: Any) -> dict[str, Any]:
    """Keywords of `add_argument` for a flag with a value."""
    text += " (default %(default)s)" if "default" in more else ""
    return {"type": kind, "metavar": metavar, "help": text} | more


AGAIN = "run the same command again to resume from what is already written"
REPORT = "please report the lines above, the command, and what `cxrdist doctor` prints"
AUGMENT = (
    "published, crop_flip or none; +NAME:arg=value,p=0.2 adds a step (of kornia.augmentation), -NAME removes one, "
    "NAME:arg=value changes one (repeatable)"
)
STREAMING = ("--shards-url", "--cache", "--cache-gb")
SHARDS = "shards/<task>, of tasks a and b shards/div_<task>"
READINGS = "error, zero, one, masked, a number, or LABEL=... (default: as the task says)"
SHARED_FLAGS: dict[str, dict[str, Any]] = {
    "--task": flag(
        task_type, "NAME|FILE", f"{', '.join(TASKS)}; or a .toml or .json file (default: the shards say it)"
    ),
    "--data": flag(Path, "DIR", "the competition's folder, as drawn above"),
    "--images": flag(Path, "DIR", "folder of images"),
    "--csv": flag(Path, "FILE", "table of labels, a row an image"),
    "--shards": flag(folder, "DIR", f"a shard set that `cxrdist preprocess` made (default: {SHARDS})"),
    "--shards-url": flag(
        str, "URL", "copy the shards from s3://, gs://, https:// or hf:// into --shards first, checking all hashes"
    ),
    "--cache": flag(Path, "DIR", "with --shards-url and --cache-gb: stream the shards through this folder"),
    "--cache-gb": flag(at_least(0, float), "G", "most that --cache may hold, in 10^9 bytes, over all runs that use it"),
    "--out": flag(Path, "DIR", "where to write"),
    "--init": flag(
        str, "FILE|timm|random", "weights to start from; FILE,FILE: of parts (default: official, in weights/)"
    ),
    "--backbone": flag(existing, "FILE", "where to look first for a run's frozen backbone"),
    "--resume": {"action": "store_true", "help": "resume from the newest complete checkpoint"},
    "--set": flag(str, "FIELD=VALUE", "change a field that `cxrdist recipes NAME` lists, e.g. seed=1 (repeatable)")
    | {"dest": "overrides", "action": "append", "default": []},
    "--augment": flag(str, "EDIT", AUGMENT) | {"action": "append", "default": []},
    "--device-batch-size": flag(
        at_least(1),
        "N",
        "images per device and forward pass, for speed and memory; rounding changes (default: 64, on a CPU 16)",
    ),
    "--precision": {
        "choices": ("auto", "bf16", "fp16", "fp32"),
        "default": "auto",
        "help": "auto: what accelerate was told, else the best the hardware has",
    },
    "--compile": {
        "action": "store_true",
        "help": "torch.compile the models, for speed on a GPU; rounding changes",
    },
    "--expect-processes": flag(at_least(1), "N", "stop at once unless exactly N processes were started"),
    "--max-hours": flag(at_least(0, float), "H", "checkpoint and stop before this many hours are over"),
    "--checkpoint-minutes": flag(
        at_least(0, float), "M", "save this often, also in mid-epoch; 0: each step", default=15.0
    ),
    "--timeout-s": flag(
        at_least(1, float), "S", "seconds without a response before a process counts as lost", default=600.0
    ),
    "--max-unreadable": flag(amount, "N|P%", "stop when more images are unreadable (default 1%%)") | {"default": "1%"},
    "--scores": flag(Path, "FILE", "score tables", nargs="+", required=True),
    "--template": flag(Path, "FILE", "sample submission"),
    "--weights": flag(at_least(0, float), "W", "of the members, in their order (default: as scored)", nargs="+"),
    "--allow-missing": {"action": "store_true", "help": "go on without what the tables lack; it is counted and named"},
    "--average": {
        "choices": ("prob", "logit", "rank"),
        "default": "prob",
        "help": "average probabilities (default, as published), logits, or members' ranks",
    },
    "--average-studies": {"action": "store_true", "help": "give all images of a study their mean"},
    "--blank": flag(str, "HOW", f"what an empty label means: {READINGS}"),
    "--uncertain": flag(str, "HOW", f"what a label -1 means: {READINGS}"),
    "--dry-run": {"action": "store_true", "help": "say what it would need (memory, hours, disk) and stop"},
    "--json": flag(Path, "FILE", "also write the result as JSON"),
}


def add_flags(parser: argparse._ActionsContainer, *names: str, **changes: dict[str, Any]) -> None:
    """Add shared flags by name; `changes` maps a flag (as its attribute name) to keyword arguments that differ."""
    for name in names:
        options = SHARED_FLAGS[name] | changes.get(name[2:].replace("-", "_"), {})
        parser.add_argument(*((name, "--div") if name == "--task" else (name,)), **options)


def with_readings(task: Task, args: argparse.Namespace) -> Task:
    """The task with blank and uncertain cells read as --blank and --uncertain say."""
    given = {name: getattr(args, name) for name in ("blank", "uncertain")}
    read = {name: text and parse_readings(text, task.labels, f"--{name}") for name, text in given.items()}
    return task.with_readings(read["blank"] or None, read["uncertain"] or None)


def shards_of(args: argparse.Namespace) -> Path:
    """The shard set that --shards names, or --task's own folder; UserError where neither was given."""
    if args.shards is None and args.task is None and getattr(args, "shards_url", None):
        raise UserError("--shards-url is copied into a folder: give that, too, with --shards DIR (or stream: --cache)")
    if args.shards is None and args.task is None:
        raise UserError("give --shards DIR (a shard set says its task), or --task NAME for shards/<task>")
    return Path("shards", args.task.folder) if args.shards is None else Path(args.shards)


def run_entry(main: Callable[[], None], *, again: str = AGAIN) -> int:
    """Run an entry's `main` and return the exit code.

    0; 2 for an end that has a name (`UserError` or a row of `ends`), with one line on stderr; 130 if interrupted, and
    rank 0 says what to do: `again`; 1 for a mistake of our own, with its traceback and what to report.
    """
    environment.raise_file_limit()
    for stream in (sys.stdout, sys.stderr):  # a name in bytes or letters that the terminal has not
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        main()
    except KeyboardInterrupt:
        if environment.rank_text() == "0":
            print(f"interrupted: {again}", file=sys.stderr)
        return 130
    except UserError as error:
        _tell(str(error))
        return 2
    except Exception as error:
        from cxrdist.distributed.ends import named  # needs torch, which neither a good end nor a mistake waits for

        if (text := named(error, again)) is not None:
            _tell(text)
            return 2
        traceback.print_exc()
        _tell(f"this is a bug of cxrdist ({type(error).__name__}): {REPORT}")
        return 1
    return 0


def _tell(text: str) -> None:
    """The last line of this process, and of its launcher, where there is one."""
    rank, text = environment.rank_text(), redacted(text)
    written = False
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # torch's launcher then ends its own traceback with it
        with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump({"message": f"error: {text}", "timestamp": int(time.time())}, file)
            written = True
    if rank == "0" or not written or environment.LAUNCHER not in os.environ:  # our own launcher reads these files
        where = "" if rank == "0" else f" [rank {rank}]"
        print(f"error{where}: {text}", file=sys.stderr, flush=True)
