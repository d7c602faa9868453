"""A recipe in a user's own Python file: `--recipe FILE.py:NAME`, a function of a task's name that returns a Recipe.

The bytes that are read once are those that run, that are copied into the run folder and whose SHA-256 is stated.
"""

import contextlib
import dataclasses
import difflib
import hashlib
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from cxrdist import files
from cxrdist.errors import UserError
from cxrdist.recipes import Recipe

MAX_BYTES = 2**20
ALONE = "the file is copied into the run folder, and its own folder is not searched: let it import installed packages"


@dataclass(frozen=True)
class RecipeFile:
    """The function `name` in the Python file `path`, which holds these bytes."""

    path: Path
    name: str
    content: bytes

    def __str__(self) -> str:
        return f"{self.path}:{self.name}"

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    def function(self) -> Callable[[str], Any]:
        """The function, after the file ran as a module of its own. UserError when it raises, or has no such function.

        Neither is the file's folder searched for modules, nor is anything written beside it.
        """
        module = ModuleType(f"cxrdist_recipe_{self.sha256}")
        module.__file__ = str(self.path)
        sys.modules[module.__name__] = module  # where a dataclass looks up the names of its module
        with self._errors_named():
            exec(compile(self.content, self.path, "exec"), vars(module))
        found = vars(module).get(self.name)
        if callable(found):
            return found  # type: ignore[no-any-return]
        own = [
            name
            for name, each in vars(module).items()
            if isinstance(each, FunctionType) and each.__module__ == module.__name__
        ]
        close = difflib.get_close_matches(self.name, own, 1, 0.5)
        hint = f"did you mean {close[0]}?" if close else f"it has: {', '.join(own) or 'none'}"
        raise UserError(f"{self.path}: no function {self.name!r} in it; {hint}")

    def build(self, task: str) -> Recipe:
        """The recipe for a task's name, with every field checked; UserError where it is none or the function raises."""
        function = self.function()
        with self._errors_named():
            made = function(task)
        if not isinstance(made, Recipe):
            raise UserError(f"{self} returns {type(made).__name__}, not a Recipe: end it with `return Recipe(...)`")
        with self._errors_named():
            text = json.dumps(dataclasses.asdict(made))
        return Recipe.from_json(text, self)

    @contextlib.contextmanager
    def _errors_named(self) -> Iterator[None]:
        """What the user's code raises as a UserError that names the last line of the file that it came through."""
        try:
            yield
        except (Exception, SystemExit) as error:
            frames = traceback.extract_tb(error.__traceback__)
            lines = [frame.lineno for frame in frames if frame.filename == str(self.path)]
            lines += [error.lineno] if isinstance(error, SyntaxError) and error.filename == str(self.path) else []
            where = f"{self.path}, line {lines[-1]}" if lines else str(self)
            remedy = f"; {ALONE}" if isinstance(error, ImportError) else ""
            if isinstance(error, TypeError) and "unexpected keyword argument" in str(error):
                remedy = "; `cxrdist recipes eva_x` lists the fields of a recipe"
            raise UserError(f"{where}: {type(error).__name__}: {error}{remedy}") from None


def read_recipe_file(text: str) -> RecipeFile:
    """What `FILE.py:NAME` names, read but not run; UserError when it is written in another way or cannot be read."""
    path, _, name = text.rpartition(":")
    if not path.endswith(".py") or not name.isidentifier():
        raise UserError(f"{text}: write it as FILE.py:NAME, a function of a Python file, e.g. my_recipes.py:mine")
    return RecipeFile(Path(path), name, files.read_bytes(Path(path), MAX_BYTES))
