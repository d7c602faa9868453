"""Contrast-limited adaptive histogram equalisation as the published run had it: on the L of OpenCV's 8-bit LAB.

kornia's own CLAHE spreads what it clips another way, and takes twice as long on one channel; OpenCV's is not on the
device. Only the conversion of colour images is kornia's.
"""

from functools import cache

import numpy as np
import torch
from kornia.color import lab_to_rgb, rgb_to_lab
from numpy.typing import NDArray
from torch import Tensor

TILES = 8  # a side
BINS = 256
RGB_SHARES = (871.0, 2929.0, 296.0)  # of 4096, in luminance


def clip_counts(clip_limit: NDArray[np.float64], image_size: int) -> NDArray[np.float64]:
    """(n,) pixels that one bin of a tile's histogram may hold, from OpenCV's relative clip limit."""
    return np.maximum(np.floor(clip_limit * (image_size // TILES) ** 2 / BINS), 1.0)


def equalise(levels: Tensor, counts: Tensor) -> Tensor:
    """CLAHE with 8x8 tiles: (n, C, S, S) float32 integer levels, within 2 of albumentations 2.0.8 on three channels.

    levels: (n, C, S, S) float32 integers in [0, 255], grey or RGB; S a multiple of 8. counts: (n,) of `clip_counts`.
    """
    linear, lightness, lightness_of_grey, grey = _tables_of_lightness(levels.device)
    if levels.shape[1] == 1:
        plane = equalise_plane(_look_up(lightness_of_grey, levels[:, 0]), counts)
        return _look_up(grey, plane).unsqueeze(1)
    red, green, blue = _look_up(linear, levels).unbind(1)
    luminance = ((red * RGB_SHARES[0] + green * RGB_SHARES[1] + blue * RGB_SHARES[2] + 2048.0) / 4096.0).floor_()
    plane = equalise_plane(_look_up(lightness, luminance), counts)
    # on a GPU kornia's matrix is a convolution, which by default computes with 10-bit mantissas
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        chroma = rgb_to_lab(levels / 255.0)[:, 1:].round_()
        rgb = lab_to_rgb(torch.cat(((plane / 2.55).unsqueeze(1), chroma), 1))
    return (rgb * 255.0).round_().clamp_(0.0, 255.0)


def equalise_plane(plane: Tensor, counts: Tensor) -> Tensor:
    """OpenCV's CLAHE of (n, S, S) float32 integer levels, whatever they mean; `counts` as in `equalise`."""
    num, size, _ = plane.shape
    device, tile_px = plane.device, size // TILES
    if size % TILES:
        raise ValueError(f"CLAHE needs a size that is a multiple of {TILES} px, not {size}")
    pixel = torch.arange(size, device=device, dtype=torch.int32)
    image = torch.arange(num, device=device, dtype=torch.int32).view(-1, 1, 1)
    levels = plane.int()
    tile = pixel // tile_px
    cells = levels + ((image * TILES + tile.view(-1, 1)) * TILES + tile) * BINS
    histogram = torch.zeros(num * TILES * TILES * BINS, device=device)
    histogram.scatter_add_(0, cells.view(-1).long(), torch.ones(1, device=device).expand(cells.numel()))
    tables = _tables(histogram.view(num, TILES * TILES, BINS), counts.view(-1, 1, 1), tile_px**2)

    # A pixel lies between the centres of four tiles. With the rim's tiles repeated once around, the four tables of a
    # pixel are everywhere the same distances apart, and one index serves for all.
    around = torch.arange(-1, TILES + 1, device=device).clamp_(0, TILES - 1)
    tables = tables.view(num, TILES, TILES, BINS).index_select(1, around).index_select(2, around).view(-1)
    place = pixel * (1.0 / tile_px) - 0.5
    before = place.floor()
    share = place - before
    first = before.int() + 1
    side = TILES + 2
    index = (levels + ((image * side + first.view(-1, 1)) * side + first) * BINS).view(-1)
    corners = [tables[tiles * BINS :].index_select(0, index).view(plane.shape) for tiles in (0, 1, side, side + 1)]
    upper, upper_right, lower, lower_right = corners
    rest = 1.0 - share  # two products and a sum, as in OpenCV: torch.lerp would round some pixels to the other side
    upper.mul_(rest).add_(upper_right.mul_(share))
    lower.mul_(rest).add_(lower_right.mul_(share))
    share, rest = share.view(-1, 1), rest.view(-1, 1)
    return upper.mul_(rest).add_(lower.mul_(share)).round_()


def _tables(histogram: Tensor, counts: Tensor, area: int) -> Tensor:
    """(n, tiles, 256) counts -> new level of each level: the clipped histogram's cumulative sum.

    What is clipped goes evenly to all bins, the remainder to every k-th bin.
    """
    excess = (histogram - counts).clamp_(min=0.0).sum(-1, keepdim=True)
    share = torch.floor(excess / BINS)
    rest = excess - share * BINS
    step = torch.floor(BINS / rest.clamp(min=1.0)).clamp_(min=1.0)
    bins = torch.arange(BINS, device=histogram.device, dtype=histogram.dtype)
    extra = (torch.remainder(bins, step) == 0) & (torch.floor(bins / step) < rest)
    clipped = torch.minimum(histogram, counts) + share + extra
    return (clipped.cumsum(-1) * (255.0 / area)).round_().clamp_(0.0, 255.0)


def _look_up(table: Tensor, levels: Tensor) -> Tensor:
    return table.index_select(0, levels.reshape(-1).int()).view(levels.shape)


@cache
def _tables_of_lightness(device: torch.device) -> list[Tensor]:
    """sRGB level -> light, of 2040; light -> 8-bit CIE L; grey level -> L; L -> grey level.

    CLAHE makes ten levels of one of L, so L must be OpenCV's own: its fixed-point steps, rounded where it rounds.
    """
    level = np.arange(256)
    share = level / 255.0
    linear = np.rint(2040 * np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)).astype(int)
    share = np.arange(2041) / 2040.0
    root = np.rint(2**15 * np.where(share < 216 / 24389, share * (841 / 108) + 16 / 116, np.cbrt(share)))
    lightness = np.floor((296 * root - 16 * 255 * 2**15 // 100 + 2**14) / 2**15).clip(0)
    star = level / 2.55
    share = np.where(star > 8, ((star + 16) / 116) ** 3, star * 27 / 24389)
    grey = np.rint(255 * np.where(share <= 0.0031308, 12.92 * share, 1.055 * share ** (1 / 2.4) - 0.055))
    tables = (linear, lightness, lightness[linear], grey)
    return [torch.from_numpy(table).float().to(device) for table in tables]
