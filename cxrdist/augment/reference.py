"""The published augmentation as it ran: step after step, each resampling on its own and rounded to grey levels.

One image at a time, for comparison: every step is within 1 level of albumentations 2.0.8 for the same parameters.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from cxrdist.augment.clahe import clip_counts, equalise
from cxrdist.augment.draws import Draws, Floats
from cxrdist.augment.views import resize


def stepwise(images: Tensor, draws: Draws, image_size: int) -> Tensor:
    """(B, C, H, W) uint8 -> (B, C, S, S) float32 integer grey levels, augmented as `draws` says."""
    return torch.cat([list(steps(images[row : row + 1], draws, row, image_size))[-1][1] for row in range(len(images))])


def steps(image: Tensor, draws: Draws, row: int, image_size: int) -> Iterator[tuple[str, Tensor]]:
    """The steps that row `row` of `draws` takes on `image` (1, C, H, W): each one's name and result (1, C, S, S)."""
    x, y, width, height = draws.crop[row].tolist()
    levels = resize(image[..., y : y + height, x : x + width], image_size)
    yield "crop", levels
    if draws.flip[row]:
        levels = levels.flip(-1)
        yield "flip", levels
    if draws.angle[row] != 0.0:
        angle = np.deg2rad(draws.angle[row])
        cos, sin = np.cos(angle), np.sin(angle)
        levels = _affine(levels, np.array([[cos, -sin], [sin, cos]]), np.zeros(2))
        yield "rotate", levels
    if draws.clip_limit[row] > 0.0:
        count = torch.from_numpy(clip_counts(draws.clip_limit[row : row + 1], image_size)).float()
        levels = equalise(levels, count.to(levels.device))
        yield "clahe", levels
    if draws.adjusted[row]:
        levels = (levels * float(draws.contrast[row]) + float(draws.brightness[row])).clamp_(0.0, 255.0).floor_()
        yield "brightness", levels
    if draws.cut[row]:
        levels = levels.clone()
        for left, top, right, bottom in draws.holes[row].tolist():
            levels[..., top:bottom, left:right] = 0.0
        yield "holes", levels
    if draws.shifted[row]:
        levels = _affine(levels, np.diag(1.0 / draws.scale[row]), draws.shift[row].astype(np.float64))
        yield "shift", levels


def _affine(levels: Tensor, backward: Floats, shift: Floats) -> Tensor:
    """Bilinear, black outside: output p shows backward @ (p - shift), both counted from the centre."""
    size = levels.shape[-1]
    place = torch.arange(size, device=levels.device, dtype=torch.float64) - (size - 1) / 2
    x, y = (place - shift[0]).view(1, -1), (place - shift[1]).view(-1, 1)
    planes = [backward[axis, 0] * x + backward[axis, 1] * y for axis in (0, 1)]
    grid = (torch.stack(planes, -1) * (2.0 / size)).float().expand(len(levels), -1, -1, -1)
    return grid_sample(levels, grid, mode="bilinear", padding_mode="zeros", align_corners=False).round_()
