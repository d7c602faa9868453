"""The published augmentation with one resampling: crop, flip, rotation, shift and scale composed into one warp.

Resampling three times, as published, blurs; once is sharper and less work. Black falls where the published order puts
it: what the rotation leaves outside is black before CLAHE and brightness, what the last shift leaves outside stays
black, and nothing outside the crop window is ever seen. It works on one channel (three where the batch has three).

Positions run through three frames, from the output back to the stored image:
output --(shift, scale)--> frame --(rotation)--> crop --(flip, resize)--> source. All but the source are S x S.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import grid_sample

from cxrdist.augment.clahe import clip_counts, equalise
from cxrdist.augment.draws import MAX_HOLES, Draws, Floats

# Columns of the table of parameters, one row an image.
FRAME_X, FRAME_Y = slice(0, 2), slice(2, 4)  # slope, offset
ROTATION = slice(4, 9)  # cos, sin, x offset, y offset, margin
SOURCE_X, SOURCE_Y = slice(9, 13), slice(13, 17)  # slope, offset, smallest, largest; in grid_sample's coordinates
TONE = slice(17, 20)  # CLAHE's count, contrast, brightness
HOLES = slice(20, 20 + 4 * MAX_HOLES)


def composed(images: Tensor, draws: Draws, image_size: int) -> Iterator[tuple[slice, Tensor]]:
    """Augment a batch part by part.

    Args:
        images: (B, C, H, W) uint8 on any device.
        draws: the parameters of the B images.
        image_size: S, px.
    Returns: pairs (rows of the batch, (b, C, S, S) float32 whole grey levels). A part is one image on a CPU, where the
    work then stays in the cache, and the whole batch on a GPU.
    """
    num, _, height, width = images.shape
    part = num if images.is_cuda else 1
    parts = [slice(start, min(start + part, num)) for start in range(0, num, part)]
    table = _table(draws, (height, width), image_size)
    # Which images a step concerns is known here: the rows travel with the table, and nothing waits for the device.
    steps = (draws.clip_limit > 0.0, draws.adjusted, draws.cut)
    chosen = [np.flatnonzero(step[rows]) for rows in parts for step in steps]
    packed = torch.from_numpy(np.concatenate([table.ravel(), *chosen]).astype(np.float32))
    if images.is_cuda:
        packed = packed.pin_memory().to(images.device, non_blocking=True)
    flat, *ids = torch.split(packed, [table.size, *map(len, chosen)])
    rows_of_table = flat.view(table.shape)
    position = torch.arange(image_size, device=images.device, dtype=torch.float32)
    for index, rows in enumerate(parts):
        with_clahe, with_tone, with_holes = (some.long() for some in ids[3 * index : 3 * index + 3])
        values = rows_of_table[rows].unsqueeze(-1).unsqueeze(-1)  # a column is (b, 1, 1)
        slope_x, offset_x = values[:, FRAME_X].unbind(1)
        slope_y, offset_y = values[:, FRAME_Y].unbind(1)
        x = position * slope_x + offset_x  # (b, 1, S)
        y = position.view(-1, 1) * slope_y + offset_y  # (b, S, 1)
        kept = _share_inside(x, 0, image_size) * _share_inside(y, 0, image_size)
        x, y = x.clamp_(0, image_size - 1), y.clamp_(0, image_size - 1)
        levels = _warp(images[rows], values, x, y, rotated=bool(draws.angle[rows].any()))
        count, contrast, brightness = values[:, TONE].unbind(1)
        if len(with_clahe):
            flattened = equalise(levels[with_clahe], count[with_clahe].view(-1))
            levels.index_copy_(0, with_clahe, flattened)
        if len(with_tone):
            adjusted = levels[with_tone] * contrast[with_tone].unsqueeze(1) + brightness[with_tone].unsqueeze(1)
            levels.index_copy_(0, with_tone, adjusted.clamp_(0.0, 255.0).floor_())  # truncated, as published
        if len(with_holes):
            kept.index_copy_(
                0, with_holes, kept[with_holes] * _outside_holes(values[with_holes], x[with_holes], y[with_holes])
            )
        if len(with_holes) or draws.shifted[rows].any():
            levels.mul_(kept.unsqueeze(1)).round_()
        yield rows, levels


def _table(draws: Draws, source_size: tuple[int, int], size: int) -> NDArray[np.float32]:
    centre = (size - 1) / 2
    columns: list[Floats] = []
    for axis in (0, 1):
        slope = 1.0 / draws.scale[:, axis]
        columns += [slope, centre - (centre + draws.shift[:, axis]) * slope]
    angle = np.deg2rad(draws.angle)
    cos, sin = np.cos(angle), np.sin(angle)
    margin = np.where(draws.angle == 0.0, 4.0 * size, 0.0)
    columns += [cos, sin, centre * (1.0 - cos + sin), centre * (1.0 - sin - cos), margin]
    for axis in (0, 1):
        # Half-pixel centres: source = start + (crop + 0.5) * length / size - 0.5, held inside the window's own pixels.
        extent = source_size[1 - axis]
        start, length = draws.crop[:, axis], draws.crop[:, axis + 2]
        slope = length / size
        offset = start + 0.5 * slope - 0.5
        if axis == 0:
            offset = np.where(draws.flip, offset + slope * (size - 1), offset)
            slope = np.where(draws.flip, -slope, slope)
        columns += [2.0 * slope / extent]
        columns += [(2.0 * place + 1.0) / extent - 1.0 for place in (offset, start, start + length - 1)]
    columns += [clip_counts(draws.clip_limit, size), draws.contrast, draws.brightness]
    columns += list(draws.holes.reshape(len(angle), -1).T)
    return np.stack(columns, 1).astype(np.float32)


def _warp(images: Tensor, values: Tensor, x: Tensor, y: Tensor, rotated: bool) -> Tensor:
    """(b, C, S, S) whole levels of `images` at frame positions x (b, 1, S) and y (b, S, 1); black beside the crop."""
    num, size = len(images), x.shape[2]
    grid = torch.empty((num, 2, size, size), device=images.device)
    inside = None
    if rotated:
        cos, sin, offset_x, offset_y, margin = values[:, ROTATION].unbind(1)
        x, y = (x * cos + offset_x) - y * sin, x * sin + (y * cos + offset_y)  # (b, S, S)
        inside = _share_inside(x, -margin, size + margin).mul_(_share_inside(y, -margin, size + margin))
    for axis, (place, columns) in enumerate(((x, SOURCE_X), (y, SOURCE_Y))):
        slope, offset, smallest, largest = values[:, columns].unbind(1)
        grid[:, axis] = torch.clamp(place * slope + offset, smallest, largest)
    # Two planes seen as pairs: writing the pairs themselves takes 3 times as long, and torch's affine_grid 6 times as
    # long as the sampling.
    pairs = grid.permute(0, 2, 3, 1)
    levels = grid_sample(images.float(), pairs, mode="bilinear", padding_mode="border", align_corners=False)
    if inside is not None:
        levels.mul_(inside.unsqueeze(1))
    return levels.round_()


def _share_inside(place: Tensor, low: Tensor | int, high: Tensor | int) -> Tensor:
    """How much of a bilinear sample at `place` falls on the pixels low, ..., high - 1 of a row."""
    return (place - (low - 1)).clamp_(0.0, 1.0).mul_((high - place).clamp_(0.0, 1.0))


def _outside_holes(values: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """(b, S, S) share of a sample that no hole covers."""
    outside = torch.ones_like(x * y)
    for box in torch.split(values[:, HOLES], 4, dim=1):
        left, top, right, bottom = box.unbind(1)
        outside.mul_(1.0 - _share_inside(x, left, right) * _share_inside(y, top, bottom))
    return outside
