"""A contact sheet: what training makes of some images, to be looked at before a run is believed."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cxrdist.augment.draws import Ints
from cxrdist.augment.training import AugmentMode, TrainingAugment
from cxrdist.augment.views import resize

GAP_PX = 3
GAP_LEVEL = 255


def contact_sheet(
    images: Tensor,
    keys: Ints,
    *,
    tile_px: int = 160,
    num_draws: int = 6,
    mode: AugmentMode = "published",
    seed: int = 0,
    first_epoch: int = 1,
    reference: bool = False,
) -> NDArray[np.uint8]:
    """One row an image: its evaluation input, then what `num_draws` epochs show the model.

    Args:
        images: (N, 1 or 3, H, W) uint8 on the host.
        keys: (N,) the images' keys; with the run's seed and epoch the sheet shows exactly what training sees.
        tile_px: the side of a tile, a multiple of 16; the augmentation runs at this size.
    Returns: (rows, columns, 3) uint8 RGB, tiles apart by a white line.
    """
    augment = TrainingAugment(tile_px, mode, seed, reference=reference)
    columns = [resize(images, tile_px)]
    columns += [augment.levels(images, keys, first_epoch + draw) for draw in range(num_draws)]
    tiles = torch.stack(columns, 1).byte().permute(0, 1, 3, 4, 2).numpy()  # (N, columns, S, S, C)
    step = tile_px + GAP_PX
    sheet = np.full((len(images) * step - GAP_PX, len(columns) * step - GAP_PX, 3), GAP_LEVEL, np.uint8)
    for row, tiles_of_row in enumerate(tiles):
        for column, tile in enumerate(tiles_of_row):
            sheet[row * step : row * step + tile_px, column * step : column * step + tile_px] = tile
    return sheet
