"""Errors that a user can fix: the message names the file, row or flag and the remedy, in one line.

Everything below the entries raises `UserError` (a `ValueError`). A traceback is for our own mistakes only.
"""


class UserError(ValueError):
    """A user's mistake or a damaged input: the message names what, where and the remedy, in one line."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or of another run; resume falls back to the one before."""
