"""The published augmentation as it ran: step after step, each resampled on its own and rounded to grey levels.

One image at a time, for comparison: a step is within 1-2 levels of albumentations 2.0.8 for the same parameters.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from cxrdist.augment.clahe import clip_counts, equalise
from cxrdist.augment.draws import Draws, Floats
from cxrdist.augment.views import resize


def stepwise(images: Tensor, draws: Draws, image_size: int) -> Tensor:
    """(B, C, H, W) uint8 -> (B, C, S, S) float32 whole grey levels, augmented as `draws` says."""
    return torch.cat([_one(images[row : row + 1], draws, row, image_size) for row in range(len(images))])


def _one(image: Tensor, draws: Draws, row: int, size: int) -> Tensor:
    x, y, width, height = draws.crop[row].tolist()
    levels = resize(image[..., y : y + height, x : x + width], size)
    if draws.flip[row]:
        levels = levels.flip(-1)
    if draws.angle[row] != 0.0:
        levels = rotate(levels, float(draws.angle[row]))
    if draws.clip_limit[row] > 0.0:
        count = torch.from_numpy(clip_counts(draws.clip_limit[row : row + 1], size)).float()
        levels = equalise(levels, count.to(levels.device))
    if draws.adjusted[row]:
        levels = adjust(levels, float(draws.contrast[row]), float(draws.brightness[row]))
    for left, top, right, bottom in draws.holes[row].tolist():
        levels = levels.clone()
        levels[..., top:bottom, left:right] = 0.0
    if draws.shifted[row]:
        levels = shift_scale(levels, draws.shift[row].tolist(), draws.scale[row].tolist())
    return levels


def rotate(levels: Tensor, angle_deg: float) -> Tensor:
    """(b, C, S, S) turned counter-clockwise about the centre, black outside."""
    cos, sin = np.cos(np.deg2rad(angle_deg)), np.sin(np.deg2rad(angle_deg))
    return _affine(levels, np.array([[cos, -sin], [sin, cos]]), (0.0, 0.0))


def adjust(levels: Tensor, contrast: float, brightness: float) -> Tensor:
    """levels * contrast + brightness, clipped and truncated."""
    return (levels * contrast + brightness).clamp_(0.0, 255.0).floor_()


def shift_scale(levels: Tensor, shift: list[int], scale: list[float]) -> Tensor:
    """(b, C, S, S) scaled about the centre by (x, y), then moved by whole pixels (x, y), black outside."""
    return _affine(levels, np.diag([1.0 / scale[0], 1.0 / scale[1]]), (float(shift[0]), float(shift[1])))


def _affine(levels: Tensor, backward: Floats, shift: tuple[float, float]) -> Tensor:
    """Bilinear, zeros outside: output p shows centre + backward @ (p - centre - shift)."""
    size = levels.shape[-1]
    place = torch.arange(size, device=levels.device, dtype=torch.float64) - (size - 1) / 2
    x, y = (place - shift[0]).view(1, -1), (place - shift[1]).view(-1, 1)
    planes = [backward[axis, 0] * x + backward[axis, 1] * y for axis in (0, 1)]
    grid = (torch.stack(planes, -1) * (2.0 / size)).float().expand(len(levels), -1, -1, -1)
    return grid_sample(levels, grid, mode="bilinear", padding_mode="zeros", align_corners=False).round_()
