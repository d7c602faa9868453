"""Contrast-limited adaptive histogram equalisation as the published run had it: on the L of OpenCV's 8-bit LAB.

kornia's own CLAHE spreads what it clips another way, and takes 6 times as long on one channel; OpenCV's is not on the
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


def clip_counts(clip_limit: NDArray[np.float64], image_size: int) -> NDArray[np.float64]:
    """(n,) pixels that one bin of a tile's histogram may hold, from OpenCV's relative clip limit."""
    area = (image_size // TILES) ** 2
    return np.maximum(np.floor(clip_limit * area / BINS), 1.0)


def equalise(levels: Tensor, counts: Tensor) -> Tensor:
    """CLAHE with 8x8 tiles.

    Args:
        levels: (n, C, S, S) float32 whole grey levels in [0, 255], or three channels of RGB; S a multiple of 8.
        counts: (n,) float32, from `clip_counts`.
    Returns: (n, C, S, S) float32 whole levels, within 2 of albumentations 2.0.8 on three channels.
    """
    if levels.shape[1] == 3:
        lab = rgb_to_lab(levels / 255.0)
        lightness = equalise_plane((lab[:, 0] * 2.55).round_(), counts)
        chroma = lab[:, 1:].round()
        rgb = lab_to_rgb(torch.cat(((lightness / 2.55).unsqueeze(1), chroma), 1))
        return (rgb * 255.0).round_().clamp_(0.0, 255.0)
    to_lightness, to_grey = _grey_tables(levels.device)
    plane = _look_up(to_lightness, levels[:, 0])
    return _look_up(to_grey, equalise_plane(plane, counts)).unsqueeze(1)


def equalise_plane(plane: Tensor, counts: Tensor) -> Tensor:
    """OpenCV's CLAHE of (n, S, S) float32 whole levels, whatever they mean; `counts` as in `equalise`."""
    num, size, _ = plane.shape
    device = plane.device
    tile_px = size // TILES
    if tile_px * TILES != size:
        raise ValueError(f"CLAHE needs a size that is a multiple of {TILES} px, not {size}")
    pixel = torch.arange(size, device=device)
    tile = pixel // tile_px
    image = torch.arange(num, device=device).view(-1, 1, 1) * (TILES * TILES * BINS)
    whole = plane.long() + image
    cells = (whole + (tile.view(-1, 1) * TILES + tile) * BINS).view(-1)
    histogram = torch.zeros(num * TILES * TILES * BINS, device=device)
    histogram.scatter_add_(0, cells, torch.ones_like(plane).view(-1))
    tables = _tables(histogram.view(num, TILES * TILES, BINS), counts.view(-1, 1, 1), tile_px**2).view(-1)

    # A pixel lies between the centres of four tiles; at the rim two of them, or all four, are one.
    place = pixel / tile_px - 0.5
    before = place.floor()
    share = place - before
    first, second = (before + step for step in (0, 1))
    first, second = (tiles.clamp(0, TILES - 1).long() for tiles in (first, second))

    def at(rows: Tensor, columns: Tensor) -> Tensor:
        index = whole + (rows.view(-1, 1) * TILES + columns) * BINS
        return tables.index_select(0, index.view(-1)).view(plane.shape)

    upper = torch.lerp(at(first, first), at(first, second), share)
    lower = torch.lerp(at(second, first), at(second, second), share)
    return torch.lerp(upper, lower, share.view(-1, 1)).round_()


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
def _grey_tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """sRGB grey level -> 8-bit CIE L, and back; OpenCV's own fixed-point tables are within 1 of both."""
    level = np.arange(256)
    grey = level / 255.0
    luminance = np.where(grey <= 0.04045, grey / 12.92, ((grey + 0.055) / 1.055) ** 2.4)
    root = np.where(luminance > 216 / 24389, np.cbrt(luminance), (24389 / 27 * luminance + 16) / 116)
    lightness = np.rint((116 * root - 16) * 2.55)
    star = level / 2.55
    luminance = np.where(star > 8, ((star + 16) / 116) ** 3, star * 27 / 24389)
    grey = np.where(luminance <= 0.0031308, 12.92 * luminance, 1.055 * luminance ** (1 / 2.4) - 0.055)
    back = np.rint(grey * 255).clip(0, 255)
    return torch.from_numpy(lightness).float().to(device), torch.from_numpy(back).float().to(device)
