"""Errors that a user can mend, and the one place that turns them into one clear line and an exit code.

Everything below the entries raises `UserError` (a `ValueError`) whose text names the file, row or flag and the remedy.
A traceback is for our own mistakes only.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable


class UserError(ValueError):
    """A user's mistake or a damaged input: the message names what, where and the remedy, in one line."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or of another run; resume falls back to the one before."""


def run_entry(main: Callable[[], None]) -> int:
    """Run an entry's `main` and return the process's exit code.

    0 on success; 2 for a `UserError` (printed to stderr as one line, with the rank where there are several);
    130 when interrupted. Any other exception is ours and passes through with its traceback.
    """
    rank = os.environ.get("RANK")
    where = f" [rank {rank}]" if rank not in (None, "0") else ""
    try:
        main()
    except UserError as error:
        print(f"error{where}: {error}", file=sys.stderr, flush=True)
        _tell_launcher(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        print("interrupted: run the same command again to go on from what is already written", file=sys.stderr)
        return 130
    return 0


def _tell_launcher(text: str) -> None:
    """Leave `text` where torch's launcher looks for a failed rank's reason: it then ends its own traceback with it."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump({"message": text, "timestamp": int(time.time())}, file)
