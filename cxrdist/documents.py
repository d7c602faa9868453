"""Documents: what one command writes for another, as dataclasses with typed JSON.

Whatever is wrong with a file (cut, not UTF-8, a key that is missing or unknown, a value of another type) is one
UserError that names the file and the place in it.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any, Self

from pydantic import ConfigDict, TypeAdapter, ValidationError

from cxrdist import files
from cxrdist.errors import UserError

BUNDLE = "config.json"  # the document that makes a folder a bundle

MAX_BYTES = 2**29  # of a document: a split's JSON lists every image left out, 100 bytes each
LogRow = dict[str, Any]  # a line of metrics.jsonl or timings.jsonl


class Document:
    """Base of a frozen dataclass that is stored as JSON. Numbers are finite; floats survive the round trip exactly."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    def to_json(self) -> str:
        """The document as JSON text that ends with a line break."""
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False, allow_nan=False) + "\n"  # type: ignore[call-overload]

    @classmethod
    def from_json(cls, content: bytes | str, source: object, *, strict: bool = True) -> Self:
        """The document in JSON `content`; UserError names `source`, the key and what is wrong there.

        strict: a text is not taken for the number or truth value that it spells.
        """
        try:
            return _adapter(cls).validate_json(content, strict=strict)  # type: ignore[no-any-return, arg-type]
        except ValidationError as error:
            raise UserError(f"{source}: {problem(error)}") from None

    @classmethod
    def read(cls, path: Path) -> Self:
        """The document in the file `path`; UserError also when it cannot be read or is larger than 512 MB."""
        return cls.from_json(read_bounded(path), path)


def read_bounded(path: Path) -> bytes:
    """The bytes of a document's file; UserError when it is missing, no regular file, or larger than 512 MB."""
    return files.read_bytes(path, MAX_BYTES)


def read_json_lines(path: Path) -> tuple[list[LogRow], int]:
    """The JSON objects of a file with one a line, and how many lines are none (damage, or half of one at the end).

    None where the file is missing; UserError when it cannot be read or is larger than 512 MB.
    """
    rows, num_bad = [], 0
    for line in read_bounded(path).splitlines() if path.exists() else ():
        if (row := json_row(line)) is not None:
            rows.append(row)
        else:
            num_bad += 1
    return rows, num_bad


def json_row(line: bytes) -> LogRow | None:
    """The JSON object that a line is; None where it is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def problem(error: ValidationError) -> str:
    """The first thing that is wrong, in one line."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    text = first["msg"].removeprefix("Value error, ").replace("\n", " ")
    more = f" ({error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{where}: {text}{more}" if where else f"{text}{more}"


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
