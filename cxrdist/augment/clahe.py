"""Contrast-limited adaptive histogram equalisation as the published run had it: on the L of OpenCV's 8-bit LAB.

kornia's own CLAHE spreads what it clips another way, and takes twice as long on one channel; OpenCV's is not on the
device. CLAHE makes ten levels of one of L, so the way to LAB and back is OpenCV's own, in integers with its fixed-point
constants: kornia's float conversion is up to 6 levels off on a tinted image.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

TILES = 8  # a side
BINS = 256
ONE = 2**15  # in the fixed point of X, Y and Z under their cube roots
BASE = 2**14  # the same on the way back
WHITE = np.array([0.950456, 1.0, 1.088754])
TO_XYZ = np.array([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]])
TO_RGB = np.array([[3.240479, -1.53715, -0.498535], [-0.969256, 1.875991, 0.041556], [0.055648, -0.204043, 1.057311]])
XYZ_SHARES = np.rint(4096 * TO_XYZ / WHITE[:, None]).astype(int).tolist()  # of sRGB's light, in 4096
RGB_SHARES = np.rint(4096 * TO_RGB * WHITE).astype(int).tolist()


def clip_counts(clip_limit: NDArray[np.float64], image_size: int) -> NDArray[np.float64]:
    """(n,) pixels that one bin of a tile's histogram may hold, from OpenCV's relative clip limit."""
    return np.maximum(np.floor(clip_limit * (image_size // TILES) ** 2 / BINS), 1.0)


def equalise(levels: Tensor, counts: Tensor) -> Tensor:
    """CLAHE with 8x8 tiles: (n, C, S, S) float32 integer levels, within 1 of albumentations 2.0.8.

    levels: (n, C, S, S) float32 integers in [0, 255], grey or RGB; S a multiple of 8. counts: (n,) of `clip_counts`.
    """
    tables = _tables_of_lightness(levels.device)
    if levels.shape[1] == 1:
        plane = equalise_plane(_look_up(tables.lightness_of_grey, levels[:, 0]), counts)
        return _look_up(tables.grey, plane).unsqueeze(1).float()
    light = _look_up(tables.linear, levels).unbind(1)
    x, y, z = (_look_up(tables.root, _weighted(light, shares, 12)) for shares in XYZ_SHARES)
    lightness = ((296 * y - 16 * 255 * ONE // 100 + ONE // 2) >> 15).clamp_(0, 255)
    a = (500 * (x - y) + 128 * ONE + ONE // 2) >> 15
    b = (200 * (y - z) + 128 * ONE + ONE // 2) >> 15
    lightness = equalise_plane(lightness, counts)
    root = _look_up(tables.root_of_lightness, lightness)
    x = root + (((a * (5 * 53687) + 128) >> 13) - 128 * BASE // 500)
    z = root - (((b * 41943 + 16) >> 9) - 128 * BASE // 200 + 1)
    xyz = (_cubed(x), _look_up(tables.luminance, lightness), _cubed(z))
    rgb = torch.stack([_weighted(xyz, shares, 14).clamp_(0, 4095) for shares in RGB_SHARES], 1)
    return _look_up(tables.gamma, rgb).float()


def _weighted(planes: Sequence[Tensor], shares: list[int], bits: int) -> Tensor:
    """The sum of three int32 planes times their shares, rounded to `bits` fewer bits."""
    first, second, third = (plane * share for plane, share in zip(planes, shares, strict=True))
    return first.add_(second).add_(third).add_(1 << (bits - 1)).bitwise_right_shift_(bits)


def _cubed(root: Tensor) -> Tensor:
    """CIE's f backwards, in 2^14: the cube, or a line below 6/29."""
    line = torch.div(root * 108, 841, rounding_mode="trunc") - BASE * 16 // 116 * 108 // 841
    cube = torch.div(torch.div(root * root, BASE, rounding_mode="floor") * root, BASE, rounding_mode="floor")
    return torch.where(root <= 3390, line, cube)


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


class Tables(NamedTuple):
    """int32 tables by level: OpenCV's fixed-point steps, rounded where it rounds."""

    linear: Tensor  # sRGB level -> light, of 2040
    root: Tensor  # light -> CIE's f, of 2^15
    lightness_of_grey: Tensor  # grey level -> 8-bit L
    root_of_lightness: Tensor  # L -> CIE's f, of 2^14
    luminance: Tensor  # L -> Y, of 2^14
    gamma: Tensor  # light, of 4096 -> sRGB level
    grey: Tensor  # L -> grey level


@cache
def _tables_of_lightness(device: torch.device) -> Tables:
    level = np.arange(256)
    share = level / 255.0
    linear = np.rint(2040 * np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)).astype(int)
    share = np.arange(2041) / 2040.0
    f = np.where(share < 216 / 24389, share * (841 / 108) + 16 / 116, np.cbrt(share))
    root = np.rint(ONE * f.astype(np.float32)).astype(int)  # two of 2,041 entries are halves only in float32
    lightness = ((296 * root - 16 * 255 * ONE // 100 + ONE // 2) >> 15).clip(0)
    dark, star = level <= 20, (level / 2.55 + 16) / 116
    back = np.rint(BASE * np.where(dark, 16 / 116 + level * 5 / (3 * 17 * 29), star)).astype(int)
    luminance = np.rint(BASE * np.where(dark, level * 180 / (17 * 29**3), star**3)).astype(int)
    share = np.arange(4096) / 4096
    gamma = np.rint(255 * np.where(share <= 0.0031308, 12.92 * share, 1.055 * share ** (1 / 2.4) - 0.055)).astype(int)
    grey = gamma[((luminance * sum(RGB_SHARES[1]) + 2**13) >> 14).clip(0, 4095)]
    tables = (linear, root, lightness[linear], back, luminance, gamma.clip(0, 255), grey)
    return Tables(*(torch.from_numpy(table.astype(np.int32)).to(device) for table in tables))
