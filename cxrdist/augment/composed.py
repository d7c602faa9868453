"""The published augmentation with one resampling: crop, flip, rotation, shift and scale composed into one warp.

Resampling three times, as published, blurs; once is sharper and less work. Black falls where the published order puts
it: what the rotation leaves outside is black before CLAHE and brightness, what the last shift leaves outside stays
black, and nothing outside the crop window is ever seen.

Positions run through three frames, from the output back to the stored image, each counted in px from its own centre:
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
FRAME = slice(0, 4)  # slope and offset in x, in y
ROTATION = slice(4, 7)  # cos, sin, half width of what is not black
SOURCE_X, SOURCE_Y = slice(7, 11), slice(11, 15)  # slope, offset, smallest, largest; in grid_sample's coordinates
TONE = slice(15, 18)  # CLAHE's count, contrast, brightness
HOLES = slice(18, 18 + 4 * MAX_HOLES)  # centre and half width, in x and in y


def composed(images: Tensor, draws: Draws, image_size: int) -> Iterator[tuple[slice, Tensor]]:
    """Augment images (B, C, H, W), uint8 on any device, by their `draws`, part by part, to `image_size` (S, px).

    Returns: pairs (rows of the batch, (b, C, S, S) float32 integer levels). A part is one image on a CPU, where the
    work then stays in the cache, and the full batch on a GPU.
    """
    num, _, height, width = images.shape
    part = num if images.is_cuda else 1
    parts = [slice(start, min(start + part, num)) for start in range(0, num, part)]
    table = _table(draws, (height, width), image_size)
    # Which images a step concerns is known here: the rows travel with the table, and nothing waits for the device.
    steps = (draws.clip_limit > 0.0, draws.adjusted, draws.cut | draws.shifted)
    chosen = [np.flatnonzero(step[rows]) for rows in parts for step in steps]
    packed = torch.from_numpy(np.concatenate([table.ravel(), *chosen]).astype(np.float32))
    if images.is_cuda:
        packed = packed.pin_memory().to(images.device, non_blocking=True)
    flat, *ids = torch.split(packed, [table.size, *map(len, chosen)])
    columns = flat.view(*table.shape, 1, 1)  # each is (B, 1, 1)
    centre = (image_size - 1) / 2
    place = torch.arange(image_size, device=images.device, dtype=torch.float32) - centre
    for index, rows in enumerate(parts):
        values = columns[rows]
        with_clahe, with_tone, with_mask = (some.long() for some in ids[3 * index : 3 * index + 3])
        slope_x, offset_x, slope_y, offset_y = values[:, FRAME].unbind(1)
        x = place * slope_x + offset_x  # (b, 1, S)
        y = place.view(-1, 1) * slope_y + offset_y  # (b, S, 1)
        inside_x, inside_y = x.clamp(-centre, centre), y.clamp(-centre, centre)
        levels = _warp(images[rows], values, inside_x, inside_y, rotated=bool(draws.angle[rows].any()))
        count, contrast, brightness = values[:, TONE].unsqueeze(1).unbind(2)  # (b, 1, 1, 1)
        if len(with_clahe):
            levels.index_copy_(0, with_clahe, equalise(levels[with_clahe], count[with_clahe].view(-1)))
        if len(with_tone):
            adjusted = (levels[with_tone] * contrast[with_tone]).add_(brightness[with_tone])
            levels.index_copy_(0, with_tone, adjusted.clamp_(0.0, 255.0).floor_())  # truncated, as published
        if len(with_mask):
            kept = _kept(x[with_mask], y[with_mask], values[with_mask], (image_size + 1) / 2)
            levels.index_copy_(0, with_mask, (levels[with_mask] * kept.unsqueeze(1)).round_())
        yield rows, levels


def _table(draws: Draws, source_size: tuple[int, int], size: int) -> NDArray[np.float32]:
    columns: list[Floats] = []
    for axis in (0, 1):
        slope = 1.0 / draws.scale[:, axis]
        columns += [slope, -draws.shift[:, axis] * slope]
    angle = np.deg2rad(draws.angle)
    columns += [np.cos(angle), np.sin(angle), np.where(draws.angle == 0.0, 2.0 * size, (size + 1) / 2)]
    for axis in (0, 1):
        # The resize's half-pixel centres put the crop's centre on the window's; it sees the window's own pixels only.
        extent = source_size[1 - axis]
        start, length = draws.crop[:, axis], draws.crop[:, axis + 2]
        mirror = np.where(draws.flip, -1.0, 1.0) if axis == 0 else 1.0
        columns += [mirror * length / size * 2.0 / extent]
        columns += [(2.0 * px + 1.0) / extent - 1.0 for px in (start + (length - 1) / 2, start, start + length - 1)]
    columns += [clip_counts(draws.clip_limit, size), draws.contrast, draws.brightness]
    for low, high in (draws.holes[:, hole, ends].T for hole in range(MAX_HOLES) for ends in ([0, 2], [1, 3])):
        columns += [(low + high - 1) / 2 - (size - 1) / 2, (high - low + 1) / 2]
    return np.stack(columns, 1).astype(np.float32)


def _warp(images: Tensor, values: Tensor, x: Tensor, y: Tensor, rotated: bool) -> Tensor:
    """(b, C, S, S) integer levels of `images` at frame positions x (b, 1, S) and y (b, S, 1); black beside the crop."""
    grid = torch.empty((len(images), 2, x.shape[2], x.shape[2]), device=images.device)
    planes = grid.unbind(1)
    source = [values[:, columns].unbind(1) for columns in (SOURCE_X, SOURCE_Y)]
    if rotated:
        cos, sin, half_width = values[:, ROTATION].unbind(1)
        torch.add(x * cos, y * -sin, out=planes[0])
        torch.add(x * sin, y * cos, out=planes[1])
        inside = _share_inside(planes[0], 0.0, half_width).mul_(_share_inside(planes[1], 0.0, half_width))
        for plane, (slope, offset, smallest, largest) in zip(planes, source, strict=True):
            torch.addcmul(offset, plane, slope, out=plane).clamp_(smallest, largest)
    else:  # a column, or a row, is the same all over the image
        for plane, position, (slope, offset, smallest, largest) in zip(planes, (x, y), source, strict=True):
            plane.copy_((position * slope).add_(offset).clamp_(smallest, largest))
    # Two planes seen as pairs: writing the pairs themselves takes 3 times as long, and torch's affine_grid (kornia's
    # warp_affine) twice as long as the sampling.
    pairs = grid.permute(0, 2, 3, 1)
    levels = grid_sample(images.float(), pairs, mode="bilinear", padding_mode="border", align_corners=False)
    if rotated:
        levels.mul_(inside.unsqueeze(1))
    return levels.round_()


def _share_inside(place: Tensor, centre: Tensor | float, half_width: Tensor | float) -> Tensor:
    """The share of a bilinear sample at `place` that falls on a run of n pixels; `half_width` is (n + 1) / 2."""
    distance = (place - centre).abs_()
    return torch.sub(half_width, distance, out=distance).clamp_(0.0, 1.0)


def _kept(x: Tensor, y: Tensor, values: Tensor, half_width: float) -> Tensor:
    """(b, S, S) share of each output pixel that lies in the frame and in none of its holes."""
    kept = _share_inside(x, 0.0, half_width) * _share_inside(y, 0.0, half_width)
    x, y = (position.clamp(1.0 - half_width, half_width - 1.0) for position in (x, y))
    for hole in torch.split(values[:, HOLES], 4, dim=1):
        centre_x, half_x, centre_y, half_y = hole.unbind(1)
        kept.mul_(1.0 - _share_inside(x, centre_x, half_x) * _share_inside(y, centre_y, half_y))
    return kept
