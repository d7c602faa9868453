"""Damage and hostile values: bytes, JSON, tables, texts and pickles, changed by a seeded generator."""

import copy
import json
import random
from collections.abc import Callable
from typing import Any

Mutator = Callable[[random.Random, bytes], bytes]
DEEP = 50_000
RAW = {  # JSON that Python values cannot say, by the text that stands for it
    "@deep": "[" * DEEP + "]" * DEEP,
    "@cut": "[" * DEEP,
    "@infinity": "1e999",
    "@digits": "1" + "0" * 400,
    "@many": "1" + "0" * 5000,
    "@surrogate": '"\\ud800"',
    "@nan": "NaN",
}
VALUES: tuple[Any, ...] = (
    *RAW,
    *(None, True, False, 0, -1, 1, 2, 255, 2**31, 2**63, -(2**63), 10**18, 0.5, -0.5, 1e308, 1e-320),
    *(
        "",
        " ",
        "nan",
        "inf",
        "a\nb",
        "a\0b",
        "../../x",
        "/etc/passwd",
        "x" * 5000,
        "\u0660\u0660",
        "\u202e",
        "1e9",
        "-1",
        "0",
    ),
    *([], {}, [[]], [1, 2], {"a": None}, ["x"] * 3000),
)
CELLS = (
    *(
        "",
        " ",
        "nan",
        "NaN",
        "inf",
        "-inf",
        "1e999",
        "-1",
        "2",
        "0.5",
        "1e-400",
        "0x10",
        "1_0",
        "1,0",
        "\u0660",
        "½",
        "TRUE",
    ),
    *(
        "a\nb",
        "a\0b",
        '"',
        "'",
        "=1+1",
        "../x",
        "/x",
        "x" * 5000,
        "\ufeff",
        "\u2028",
        "9" * 400,
        "-0",
        "+1",
        "1e5",
        "[]",
    ),
    *("['a'", "['" + "x" * 999 + "']", "|", "a|b|", "None", "\ud800"),
)


def damaged(rng: random.Random, data: bytes) -> bytes:
    """What disks, copies and interrupted writes do."""
    kind, size = rng.randrange(12), len(data)
    place = rng.randrange(size) if size else 0
    changed = bytearray(data)
    if kind <= 2:
        for _ in range((1, 1, 8)[kind]):
            if size:
                changed[rng.randrange(size)] ^= 1 << rng.randrange(8)
    elif kind <= 4:
        del changed[place:]
    elif kind == 5:
        return rng.choice(
            (b"", b"\0", b"\0" * size, b"\xff" * min(size, 4096), b"PK\x03\x04", b"\x1f\x8b\x08", b"{", b"[")
        )
    elif kind == 6:
        changed[place : place + rng.choice((1, 16, 512, 4096))] = bytes(rng.choice((1, 16, 512, 4096)))
    elif kind == 7:
        changed[place:place] = data[place : place + rng.choice((1, 64, 4096))]
    elif kind == 8:
        del changed[place : place + rng.choice((1, 2, 64, 512))]
    elif kind == 9:
        changed[place:place] = rng.choice((b"\xff\xfe", b"\xc3", b"\xed\xa0\x80", b"\0", b"\r", b"\x85"))
    elif kind == 10:
        changed[place : place + 8] = rng.choice((b"\xff" * 8, b"\xff" * 7 + b"\x7f", b"\x80" + bytes(7), bytes(8)))
    else:
        changed += data if rng.random() < 0.5 else bytes(rng.randrange(256) for _ in range(64))
    return bytes(changed)


def json_damaged(rng: random.Random, data: bytes) -> bytes:
    """A document with a field of another type, value or name, missing, added or twice; or its bytes damaged."""
    if rng.random() < 0.25:
        return damaged(rng, data)
    document = json.loads(data)
    for _ in range(rng.choice((1, 1, 1, 3))):
        holder = [document]
        places = [(holder, 0), *_places(document)]
        parent, key = rng.choice(places)
        kind = rng.randrange(10)
        if kind <= 6:
            parent[key] = copy.deepcopy(rng.choice(VALUES))  # shared, it could come to hold itself
        elif kind == 7 and parent is not holder:
            del parent[key]
        elif isinstance(parent[key], dict):
            name = rng.choice(("extra", "", "x" * 300, "a\0b", "../x", *list(parent[key])[:1]))
            parent[key][name] = copy.deepcopy(rng.choice(VALUES))
        elif isinstance(parent[key], list) and parent[key]:
            parent[key].extend(parent[key][: rng.choice((1, 1000))])
        document = holder[0]
    return _text(document)


def _places(value: Any) -> list[tuple[Any, Any]]:
    found = []
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        found += [(value, key), *_places(entry)]
    return found


def _text(document: Any) -> bytes:
    text = json.dumps(document, indent=1)
    for name, raw in RAW.items():
        text = text.replace(f'"{name}"', raw)
    return text.encode()


def json_lines_damaged(rng: random.Random, data: bytes) -> bytes:
    if rng.random() < 0.3:
        return damaged(rng, data)
    lines = data.splitlines()
    place = rng.randrange(len(lines))
    lines[place] = json_damaged(rng, lines[place]).replace(b"\n", rng.choice((b"", b"\n")))
    return b"\n".join(lines) + b"\n"


def table_damaged(rng: random.Random, data: bytes) -> bytes:
    """A CSV with other cells, rows or columns, quotes or line ends; or its bytes damaged."""
    if rng.random() < 0.2:
        return damaged(rng, data)
    if rng.random() < 0.01:
        extra = b",".join(b"c%d" % number for number in range(40_000))
        head, _, rest = data.partition(b"\n")
        return head + b"," + extra + b"\n" + rest.replace(b"\n", b"," * 40_000 + b"\n")
    rows = [line.split(",") for line in data.decode().splitlines()]
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        row = rng.randrange(len(rows))
        place = rng.randrange(len(rows[row])) if rows[row] else 0
        kind = rng.randrange(10)
        if kind <= 4 and rows[row]:
            rows[row][place] = rng.choice(CELLS)
        elif kind == 5:
            rows.insert(row, list(rng.choice(rows)))
        elif kind == 6:
            del rows[row][place : place + 1]
        elif kind == 7:
            rows[row].insert(place, rng.choice(CELLS))
        elif kind == 8 and len(rows) > 1:
            del rows[row]
        else:
            column = rng.randrange(len(rows[0])) if rows[0] else 0
            for cells in rows:
                cells[column : column + 1] = rng.choice(([], ["1"], cells[column : column + 1] * 2))
    end, separator = rng.choice((*["\n"] * 5, "\r\n", "\r", "\n\n")), rng.choice((*[","] * 8, ";", "\t"))
    text = end.join(separator.join(cells) for cells in rows) + rng.choice(("\n", ""))
    return text.encode("utf-8", "surrogatepass")


def text_damaged(rng: random.Random, data: bytes) -> bytes:
    """A flag's value: characters cut, repeated, swapped, or numbers made extreme."""
    text = data.decode()
    for _ in range(rng.choice((1, 1, 2, 4))):
        place = rng.randrange(len(text) + 1)
        kind = rng.randrange(6)
        if kind == 0:
            text = text[:place]
        elif kind == 1:
            text = text[:place] + rng.choice(tuple("=,:*@#-.0 \n\t\\/[]{}\"'\ufeff\u0660")) + text[place:]
        elif kind == 2:
            text = text[:place] + text[place + 1 :]
        elif kind == 3:
            text = text[:place] + str(rng.choice(VALUES)) + text[place:]
        elif kind == 4:
            name, equals, _ = text.partition("=")
            text = f"{name}{equals}{rng.choice(VALUES)}"
        else:
            text = text[:place] + text[:place][-20:] * rng.choice((1, 50)) + text[place:]
    return text.encode("utf-8", "surrogatepass")
