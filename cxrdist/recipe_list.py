"""List the recipes with what they cost, or show one with every field. Its flags: `cxrdist.flags.recipes`."""

import dataclasses
import inspect
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

from cxrdist.cli import run_entry
from cxrdist.documents import Document
from cxrdist.errors import UserError
from cxrdist.estimate.count import GB, best_device_batch, count_cost, memory_bytes
from cxrdist.flags.recipes import parser
from cxrdist.models import recipe_for
from cxrdist.recipe_file import read_recipe_file
from cxrdist.recipes import RECIPES, Group, Inference, Recipe, Step, plain
from cxrdist.task import TASKS, near

TASK = TASKS["b"]  # whose seeds and number of labels are shown
PRECISION = "bf16"
COUNTED = f"counted in {PRECISION}, not measured"


def main(argv: list[str] | None = None) -> None:
    """Print the table line by line, since counting takes a second a recipe; or one recipe."""
    name = parser().parse_args(argv).name
    for line in listing() if name is None else shown(name):
        print(line, flush=True)


def listing() -> Iterator[str]:
    """The table of all recipes: cost, what it is, and the command."""
    yield f"{'recipe':<16}{'GFLOP/image':>12}{'GB':>7}{'batch':>7}  what it is, and the command"
    for name, function in RECIPES.items():
        flops, memory, batch = cost_of(function(TASK.name))
        yield f"{name:<16}{flops:>12.3g}{memory:>7.1f}{batch:>7}  {_doc(function).splitlines()[0]}"
        yield f"{'':<44}{command_of(name, function)}"
    yield f"GFLOP: forward and backward; GB: of one GPU at train's default device batch there; {COUNTED}"
    yield "`cxrdist recipes NAME` shows all of one, `cxrdist train --model NAME --dry-run` estimates hours"


def shown(name: str) -> Iterator[str]:
    """All that a recipe's docstring says, its cost, and each field with its value and what it is.

    Raises UserError for an unknown name, and for a file as `RecipeFile` does.
    """
    function: Callable[..., Any]
    if ".py:" in name or name.endswith(".py"):
        file = read_recipe_file(name)
        function, recipe = file.function(), file.build(TASK.name)
    elif ":" in name:
        function, recipe = plain, recipe_for(name, TASK.name)
    elif name in RECIPES:
        function, recipe = RECIPES[name], RECIPES[name](TASK.name)
    else:
        known = ", ".join([*RECIPES, "timm:NAME"])
        meant = near(name, RECIPES)
        told = f"did you mean {meant}?" if meant else f"one of {known}, or FILE.py:NAME for one of your own"
        raise UserError(f"{name!r} is no recipe: {told}")
    flops, memory, batch = cost_of(recipe)
    yield f"{_doc(function)}\n"
    yield f"command: {command_of(name, function)}"
    yield f"cost: {flops:.3g} GFLOP an image, forward and backward; {memory:.1f} GB of a GPU with {batch}; {COUNTED}\n"
    yield f"fields, for task {TASK.name}; change one with --set NAME=VALUE, the augmentation with --augment,"
    yield "the learning rates with --lr X: the largest becomes X, the others keep their ratio to it"
    for kind, values in ((Recipe, recipe), (Inference, recipe.inference)):
        texts = descriptions(kind)
        for field in dataclasses.fields(kind):
            if field.name != "inference":  # its own fields are --set by their names
                yield from _lines(field.name, getattr(values, field.name), texts[field.name])


def cost_of(recipe: Recipe) -> tuple[float, float, int]:
    """GFLOP of an image forward and backward, and the GB of one GPU at the default device batch, and that batch."""
    cost = count_cost(recipe, TASK.num_labels, PRECISION)
    batch = best_device_batch(cost, recipe.global_batch_size, "cuda", 1, math.inf)
    return cost.step_flops / 1e9, memory_bytes(cost, batch, "cuda", 1) / GB, batch


def command_of(name: str, function: Callable[..., Any]) -> str:
    """The command in a recipe's docstring, else the one that trains it on task b."""
    flag = "--recipe" if ".py:" in name else "--model"
    said = re.search(r"Command: `([^`]+)`", _doc(function))
    return said[1] if said else f"accelerate launch -m cxrdist.train --div {TASK.name} {flag} {name}"


def descriptions(kind: type[Document]) -> dict[str, str]:
    """What a dataclass's docstring says of its fields, in lines of `name: text`."""
    return dict(re.findall(r"^(\w+): (.+)$", inspect.getdoc(kind) or "", re.MULTILINE))


def _doc(function: Callable[..., Any]) -> str:
    return inspect.getdoc(function) or "(it has no docstring)"


def _lines(name: str, value: Any, text: str) -> Iterator[str]:
    """A field as `--set` takes it and what it is; learning rates and augmentation with a line for each row."""
    rows = value if value and isinstance(value, tuple) and isinstance(value[0], Group | Step) else ()
    field = f"{name} = {'' if rows else _text(value)}"
    yield f"{field:<40}  # {text}"
    for row in rows:
        if isinstance(row, Group):
            yield f"    lr {_text(row.lr):<8} weight decay {row.weight_decay:<8g} '{row.pattern}'"
        else:
            yield f"    {row.name}:{','.join(f'{key}={each}' for key, each in (*row.args, ('p', row.p)))}"


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(":".join(map(str, each)) if isinstance(each, tuple) else str(each) for each in value)
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


if __name__ == "__main__":
    raise SystemExit(run_entry(main))
