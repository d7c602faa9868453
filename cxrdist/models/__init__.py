"""The models by the names that recipes use. Importing it registers the published ones with timm, under their own names.

`timm.create_model("eva_x_base_patch16", img_size=448, num_classes=5)` works after `import cxrdist.models`.
"""

from cxrdist import recipes
from cxrdist.errors import UserError
from cxrdist.models import backbones, chexfound, eva_x, frozen, rad_dino
from cxrdist.models.architecture import Architecture
from cxrdist.recipes import Recipe
from cxrdist.task import LAYOUTS

__all__ = ["ARCHITECTURES", "FAMILIES", "Architecture", "architecture_of", "recipe_for"]
ARCHITECTURES: dict[str, Architecture] = {
    each.name: each for each in (*eva_x.ARCHITECTURES, chexfound.ARCHITECTURE, rad_dino.ARCHITECTURE)
}
FAMILIES = {"timm": backbones.timm_architecture, "glori": frozen.glori_architecture}


def architecture_of(name: str) -> Architecture:
    """The architecture that a recipe's `model` names; UserError lists the known ones."""
    family, _, rest = name.partition(":")
    if rest and family in FAMILIES:
        return FAMILIES[family](rest)
    if name not in ARCHITECTURES:
        known = ", ".join([*ARCHITECTURES, *(f"{each}:NAME" for each in FAMILIES)])
        raise UserError(f"model {name!r} is unknown; one of {known}")
    return ARCHITECTURES[name]


def recipe_for(model: str, task: str, num_images: int | None = None) -> Recipe:
    """The recipe that `--model` stands for: `recipes.recipe_for`, or the plain one of any architecture FAMILY:NAME."""
    if ":" not in model:
        return recipes.recipe_for(model, task, num_images)
    architecture = architecture_of(model)
    recipe = recipes.plain(
        model, task, architecture.image_size, frozen=architecture.frozen, layers=architecture.layers is not None
    )
    return recipe if num_images is None or task in LAYOUTS else recipes.fitted(recipe, num_images)
