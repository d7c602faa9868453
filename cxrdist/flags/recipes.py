"""List the recipes with what they cost, or show one with every field: `cxrdist recipes [NAME|FILE.py:NAME]`."""

from cxrdist.cli import Parser


def parser() -> Parser:
    flags = Parser(prog="cxrdist recipes", description=__doc__)
    flags.add_argument("name", nargs="?", metavar="NAME", help="show this one, or one of your own: FILE.py:NAME")
    return flags
