"""The models by the names that recipes use. Importing it registers the published ones with timm, under their own names.

`timm.create_model("eva_x_base_patch16", img_size=448, num_classes=5)` works after `import cxrdist.models`.
"""

from cxrdist.errors import UserError
from cxrdist.models import chexfound, eva_x
from cxrdist.models.architecture import Architecture

__all__ = ["ARCHITECTURES", "Architecture", "architecture_of"]
ARCHITECTURES: dict[str, Architecture] = {each.name: each for each in (*eva_x.ARCHITECTURES, chexfound.ARCHITECTURE)}


def architecture_of(name: str) -> Architecture:
    """The architecture that a recipe's `model` names; UserError lists the known ones."""
    if name not in ARCHITECTURES:
        raise UserError(f"model {name!r} is unknown; one of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]
