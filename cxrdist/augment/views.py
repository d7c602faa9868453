"""Evaluation input: stored uint8 images resized to the model's size, as the views that test-time averaging asks for.

The resize is OpenCV's bilinear rule (half-pixel centres, no antialias), rounded to grey levels; the published models
were trained on it, and an antialiased resize is off by up to 50 levels. A view that equals another is computed once.
"""

from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from cxrdist.errors import UserError

VIEWS = ("plain", "hflip", "center1.0", "center1.1", "bright0.95", "bright1.05")
ZOOM = 1.1  # of center1.1: resize to int(size * 1.1), then crop the centre
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
Stats = tuple[tuple[float, float, float], tuple[float, float, float]]  # mean and deviation of RGB in [0, 1]
IMAGENET: Stats = (IMAGENET_MEAN, IMAGENET_STD)


def empty_batch(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """An uninitialised float32 tensor; on a CPU from numpy, which asks for huge pages: filling it takes a third."""
    return torch.empty(shape, device=device) if device.type != "cpu" else torch.from_numpy(np.empty(shape, np.float32))


@cache
def keep_freed_blocks() -> None:
    """Let the process keep blocks of up to 32 MB that it frees: page faults are half the time of a chain of steps.

    glibc raises its threshold to the largest block (of at most 32 MB) that was freed so far, so one is, untouched.
    """
    torch.empty(2**25 - 16_384, dtype=torch.uint8)


def resize(images: Tensor, size: int) -> Tensor:
    """Bilinear resize without antialias, equal to OpenCV's for uint8 images, level by level.

    (B, C, H, W) uint8 -> (B, C, size, size) float32 integer levels in [0, 255]. In integers: the same on every device.
    Source: OpenCV's fixed-point rule: weights of 11 bits, rows after columns with 4 bits dropped in between.
    """
    out = empty_batch((*images.shape[:2], size, size), images.device)
    rows, columns = (_taps(length, size, images.device) for length in images.shape[-2:])
    # A CPU goes plane by plane, so that its work stays in the cache: twice as fast.
    planes = [(images, out)] if images.is_cuda else zip(images.flatten(0, 1), out.flatten(0, 1), strict=True)
    for source, target in planes:
        _resize(source, columns, rows, target)
    return out


def _resize(images: Tensor, columns: list[Tensor], rows: list[Tensor], out: Tensor) -> None:
    left, _, left_weight, right_weight = columns
    upper_row, lower_row, upper_weight, lower_weight = rows
    pairs = images.int()  # a pixel and its right neighbour in one number: picking columns is what takes the time
    pairs[..., :-1] |= pairs[..., 1:] << 8
    pairs = pairs.index_select(-1, left)
    across = (pairs & 255).mul_(left_weight).add_((pairs >> 8).mul_(right_weight))
    across >>= 4
    upper = across.index_select(-2, upper_row).mul_(upper_weight.view(-1, 1))
    lower = across.index_select(-2, lower_row).mul_(lower_weight.view(-1, 1))
    upper >>= 16
    lower >>= 16
    out.copy_(upper.add_(lower).add_(2).bitwise_right_shift_(2))


@cache
def _taps(length: int, size: int, device: torch.device) -> list[Tensor]:
    """The two pixels that each new one is mixed from (the same one at a rim), and their weights of 2048; int32."""
    place = ((np.arange(size) + 0.5) * (length / size) - 0.5).astype(np.float32)
    first = np.floor(place)
    share = np.where((first < 0) | (first >= length - 1), np.float32(0.0), place - first)
    first = first.clip(0, length - 1)
    columns = (first, (first + 1).clip(max=length - 1), np.rint((1 - share) * 2048), np.rint(share * 2048))
    return [torch.from_numpy(column.astype(np.int32)).to(device) for column in columns]


def normalise(levels: Tensor, out: Tensor | None = None, stats: Stats = IMAGENET) -> Tensor:
    """(B, 1 or 3, H, W) grey levels in [0, 255] -> (B, 3, H, W) float32, less the mean, over the deviation."""
    shift, scale = _shift_and_scale(levels.device, stats)
    if out is None:
        out = empty_batch((len(levels), 3, *levels.shape[2:]), levels.device)
    return torch.addcmul(shift, levels.float(), scale, out=out)


@cache
def _shift_and_scale(device: torch.device, stats: Stats) -> list[Tensor]:
    mean, std = map(np.array, stats)
    return [torch.from_numpy(each).float().view(3, 1, 1).to(device) for each in (-mean / std, 1 / (255 * std))]


def distinct_views(views: Sequence[str]) -> dict[str, float]:
    """The views that must be computed, with their weights in the mean over `views` (sum 1), in the order asked for.

    `center1.0` resizes to the model's size and crops all of it: it is `plain`. Raises UserError for an unknown view.
    """
    if not views:
        raise UserError(f"no test-time view was given; choose from {', '.join(VIEWS)}")
    weights: dict[str, float] = {}
    for view in views:
        if view not in VIEWS:
            raise UserError(f"test-time view {view!r} is unknown; choose from {', '.join(VIEWS)}")
        name = "plain" if view == "center1.0" else view
        weights[name] = weights.get(name, 0.0) + 1.0 / len(views)
    return weights


def view_levels(images: Tensor, views: Sequence[str], image_size: int) -> Iterator[tuple[str, Tensor]]:
    """As `make_views`, before normalisation: (name, (B, C, S, S) float32 integer grey levels)."""
    plain = None
    for name in distinct_views(views):
        if name == "center1.1":
            zoomed = int(image_size * ZOOM)
            edge = (zoomed - image_size) // 2
            yield name, resize(images, zoomed)[..., edge : edge + image_size, edge : edge + image_size]
            continue
        if plain is None:
            plain = resize(images, image_size)
        if name == "plain":
            yield name, plain
        elif name == "hflip":
            yield name, plain.flip(-1)
        else:
            factor = float(name.removeprefix("bright"))
            table = torch.arange(256, dtype=torch.float64, device=images.device) * factor
            table = table.clamp_(max=255.0).floor_().float()  # truncated, as published; 1.05 * 60 is 63 in float64 only
            yield name, table.index_select(0, plain.int().view(-1)).view(plain.shape)


def make_views(
    images: Tensor, views: Sequence[str], image_size: int, stats: Stats = IMAGENET
) -> Iterator[tuple[str, Tensor]]:
    """The distinct views (see `distinct_views`) of a batch (B, 1 or 3, H, W), uint8 on any device, one at a time.

    Returns: pairs of a view's name and its (B, 3, S, S) float32 normalised images.
    """
    keep_freed_blocks()
    with torch.autocast(images.device.type, enabled=False):
        for name, levels in view_levels(images, views, image_size):
            yield name, normalise(levels, stats=stats)
