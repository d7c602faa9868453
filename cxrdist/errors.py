"""Errors that a user can fix: the message names the file, row or flag and the remedy, in one line.

Everything below the entries raises `UserError` (a `ValueError`). A traceback is for our own mistakes only.
"""

import re

MAX_CHARACTERS = 2000


def redacted(text: str) -> str:
    """The text with user, password and query of every address in it replaced by `***`: they may be secret."""
    text = re.sub(r"(\w://)[^\s/@]+@", r"\1***@", text)
    text = re.sub(r"(\w://)[^\s/@]*:[^\s@]*@", r"\1***@", text)  # a password with a '/'
    return re.sub(r"(\w://[^\s?#]*[?#])[^\s'\"),;]+", r"\1***", text)


def one_line(text: str) -> str:
    """The text, which may quote anything, without line breaks and control characters, and at most 2,000 long."""
    text = re.sub(r"[\x00-\x1f\x7f\x85\u2028\u2029]+", " ", text)
    return text if len(text) <= MAX_CHARACTERS else f"{text[: MAX_CHARACTERS - 505]} ... {text[-500:]}"


class UserError(ValueError):
    """A user's mistake or a damaged input: the message names what, where and the remedy, in `one_line`.

    Addresses in it are `redacted`.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(redacted(str(message))))


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or of another run; resume falls back to the one before."""
