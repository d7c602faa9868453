"""The published augmentation's steps as kornia modules, each usable alone in anybody's `AugmentationSequential`.

Stock kornia where it equals the library of the published run (albumentations 2.0.8) within 1 grey level: flip,
rotation, shift and scale. Own subclasses of kornia's bases where it does not: the crop by the published draw without
antialias, CLAHE on LAB's L, contrast about 0 with truncation, holes as run. An image is float32 in [0, 1], as
everywhere in kornia; these steps work on its 256 grey levels and round to them.
"""

import abc
from collections.abc import Mapping
from typing import Any

import kornia.augmentation as K
import numpy as np
import torch
from kornia.augmentation import GeometricAugmentationBase2D, IntensityAugmentationBase2D
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import grid_sample

from cxrdist.augment.clahe import clip_counts, equalise
from cxrdist.augment.draws import Floats

CROP_TRIES = 10
Pair = tuple[float, float]
Params = dict[str, NDArray[Any]]  # kornia's names to arrays (n, ...), a row an image
Size = tuple[int, int]  # height and width, px


def to_device(values: NDArray[Any], device: torch.device) -> Tensor:
    """`values` on `device` in float32, without waiting for the device."""
    tensor = torch.from_numpy(values.astype(np.float32))
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class LevelStep(nn.Module, abc.ABC):
    """A step on grey levels. `num_values` uniform numbers an image, and its size, give its parameters."""

    num_values: int

    @abc.abstractmethod
    def sample(self, values: Floats, size: Size) -> Params:
        """Parameters of n images of `size` from (n, num_values) independent uniform numbers in [0, 1)."""

    @abc.abstractmethod
    def on_levels(self, levels: Tensor, params: Params) -> Tensor:
        """(n, C, H, W) integer levels, uint8 or float32 in [0, 255] -> float32 integer levels."""

    def generate_parameters(self, batch_shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Parameters drawn from torch's generator, for use without this project's draws."""
        values = torch.rand(batch_shape[0], self.num_values, dtype=torch.float64).numpy()
        return {name: torch.from_numpy(rows) for name, rows in self.sample(values, batch_shape[-2:]).items()}  # type: ignore[arg-type]

    def apply_transform(
        self, input: Tensor, params: dict[str, Tensor], flags: Mapping[str, Any], transform: Tensor | None = None
    ) -> Tensor:
        arrays = {name: params[name].cpu().numpy() for name in self.sample(np.zeros((0, self.num_values)), (1, 1))}
        return self.on_levels((input * 255.0).round_(), arrays) / 255.0


class PublishedCrop(LevelStep, GeometricAugmentationBase2D):
    """Random resized crop to `size` px: whole pixels, 10 tries, bilinear without antialias.

    scale: share of the area; ratio: of width to height, log-uniform. An image in which no try fits is taken in full.
    """

    num_values = 4 * CROP_TRIES

    def __init__(self, size: int, scale: Pair = (0.85, 1.0), ratio: Pair = (0.9, 1.1)) -> None:
        super().__init__(p=1.0)
        self.size, self.scale, self.ratio = size, scale, ratio

    def sample(self, values: Floats, size: Size) -> Params:
        """`window` (n, 4): x, y, width, height in px of the image."""
        height, width = size
        area, log_ratio, top, left = np.moveaxis(values.reshape(len(values), CROP_TRIES, 4), 2, 0)
        area = (self.scale[0] + (self.scale[1] - self.scale[0]) * area) * height * width
        low, high = np.log(self.ratio)
        ratio = np.exp(low + (high - low) * log_ratio)
        widths, heights = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
        fits = (widths >= 1) & (widths <= width) & (heights >= 1) & (heights <= height)
        first = (np.arange(len(values)), fits.argmax(1))
        some = fits.any(1)
        crop_width, crop_height = np.where(some, widths[first], width), np.where(some, heights[first], height)
        x = np.floor((width - crop_width + 1) * left[first])
        y = np.floor((height - crop_height + 1) * top[first])
        return {"window": np.stack([x, y, crop_width, crop_height], 1)}

    def compute_transformation(self, input: Tensor, params: dict[str, Tensor], flags: Mapping[str, Any]) -> Tensor:
        """(n, 3, 3) from pixels of the image to pixels of the crop."""
        window = params["window"].cpu().numpy()
        factor = self.size / window[:, 2:]
        matrix = np.tile(np.eye(3), (len(window), 1, 1))
        matrix[:, [0, 1], [0, 1]] = factor
        matrix[:, :2, 2] = (0.5 - window[:, :2]) * factor - 0.5
        return to_device(matrix, input.device)

    def on_levels(self, levels: Tensor, params: Params) -> Tensor:
        """Bilinear among the window's own pixels; within 1 level of OpenCV, which has weights of 11 bits."""
        window, size = params["window"], self.size
        table = []  # for x and y: slope, offset, smallest, largest; in grid_sample's coordinates, from the centre
        for axis, extent in enumerate(levels.shape[:-3:-1]):
            start, length = window[:, axis], window[:, axis + 2]
            ends = (start + (length - 1) / 2, start, start + length - 1)
            table += [length / size * 2.0 / extent, *((2.0 * px + 1.0) / extent - 1.0 for px in ends)]
        columns = to_device(np.stack(table), levels.device).view(2, 4, -1, 1, 1)
        place = torch.arange(size, device=levels.device, dtype=torch.float32) - (size - 1) / 2
        grid = torch.empty((len(window), 2, size, size), device=levels.device)
        for axis, position in enumerate((place, place.view(-1, 1))):
            slope, offset, smallest, largest = columns[axis].unbind()
            grid[:, axis] = (position * slope).add_(offset).clamp_(smallest, largest)
        pairs = grid.permute(0, 2, 3, 1)  # writing the pairs themselves takes 3 times as long
        return grid_sample(levels.float(), pairs, mode="bilinear", padding_mode="border", align_corners=False).round_()


class LabClahe(LevelStep, IntensityAugmentationBase2D):
    """CLAHE on the L of OpenCV's 8-bit LAB, 8x8 tiles; `clip_limit`: OpenCV's, uniform between two."""

    num_values = 1

    def __init__(self, clip_limit: Pair = (1.0, 4.0), p: float = 0.5) -> None:
        super().__init__(p=p)
        self.clip_limit = clip_limit

    def sample(self, values: Floats, size: Size) -> Params:
        low, high = self.clip_limit
        return {"clip_limit": low + (high - low) * values[:, 0]}

    def on_levels(self, levels: Tensor, params: Params) -> Tensor:
        return equalise(levels, to_device(clip_counts(params["clip_limit"], levels.shape[-1]), levels.device))


class ContrastAboutZero(LevelStep, IntensityAugmentationBase2D):
    """level * (1 +- contrast) +- brightness * 255, clipped and truncated."""

    num_values = 2

    def __init__(self, brightness: float = 0.2, contrast: float = 0.2, p: float = 0.5) -> None:
        super().__init__(p=p)
        self.brightness, self.contrast = brightness, contrast

    def sample(self, values: Floats, size: Size) -> Params:
        def around(middle: float, reach: float, column: int) -> Floats:
            low, high = middle - reach, middle + reach
            return np.asarray(low + (high - low) * values[:, column])

        return {"factor": around(1.0, self.contrast, 0), "offset": around(0.0, self.brightness * 255.0, 1)}

    def on_levels(self, levels: Tensor, params: Params) -> Tensor:
        both = to_device(np.stack([params["factor"], params["offset"]]), levels.device)
        factor, offset = both.view(2, -1, 1, 1, 1).unbind()
        return (levels * factor).add_(offset).clamp_(0.0, 255.0).floor_()


class CutHoles(LevelStep, IntensityAugmentationBase2D):
    """1 to `max_holes` black boxes; `sides`: the range of a side, below 1 a share of the image's, else whole px."""

    def __init__(self, max_holes: int = 2, sides: Pair = (0.1, 0.2), p: float = 0.5) -> None:
        super().__init__(p=p)
        self.max_holes, self.sides = max_holes, sides
        self.num_values = 1 + 4 * max_holes

    def sample(self, values: Floats, size: Size) -> Params:
        """`boxes` (n, max_holes, 4): x1, y1, x2, y2 in px, ends excluded; all 0 for no hole."""
        num = 1 + np.floor(self.max_holes * values[:, 0])
        used = np.arange(self.max_holes) < num[:, None]
        height, width, y, x = np.moveaxis(values[:, 1:].reshape(len(values), self.max_holes, 4), 2, 0)
        (smallest, largest), (rows, columns) = self.sides, size
        if largest < 1:
            height, width = (
                np.floor((smallest + (largest - smallest) * share) * px)
                for share, px in ((height, rows), (width, columns))
            )
        else:  # px are drawn up to the longest side itself
            height, width = (
                np.floor(smallest + (min(largest, px) - smallest + 1) * share)
                for share, px in ((height, rows), (width, columns))
            )
        y, x = np.floor((rows - height + 1) * y), np.floor((columns - width + 1) * x)
        return {"boxes": np.where(used[..., None], np.stack([x, y, x + width, y + height], 2), 0.0)}

    def on_levels(self, levels: Tensor, params: Params) -> Tensor:
        boxes = to_device(params["boxes"], levels.device)
        x, y = (torch.arange(px, device=levels.device, dtype=torch.float32) for px in levels.shape[:-3:-1])
        left, top, right, bottom = boxes.unsqueeze(-1).unbind(2)  # each (n, holes, 1)
        columns, rows = (x >= left) & (x < right), (y >= top) & (y < bottom)
        hole = (rows.unsqueeze(-1) & columns.unsqueeze(-2)).any(1, keepdim=True)
        return levels.masked_fill(hole, 0.0)


def warp(levels: Tensor, backward: NDArray[np.float64]) -> Tensor:
    """(n, C, S, S) levels -> the same, integer: output p shows `backward` (n, 2, 3) @ (p, 1), in px from the centre.

    Bilinear, black outside. What kornia's warp_affine does, in a quarter of its time: 1.6 against 6.7 ms an image of
    448 px on one core.
    """
    size = levels.shape[-1]
    across, down, offset = to_device(backward * (2.0 / size), levels.device).view(-1, 2, 3, 1, 1).unbind(2)
    place = torch.arange(size, device=levels.device, dtype=torch.float32) - (size - 1) / 2
    grid = torch.empty((len(backward), 2, size, size), device=levels.device)
    torch.add(place * across, place.view(-1, 1) * down + offset, out=grid)
    pairs = grid.permute(0, 2, 3, 1)  # writing the pairs themselves takes 3 times as long
    return grid_sample(levels, pairs, mode="bilinear", padding_mode="zeros", align_corners=False).round_()


class Rotation(K.RandomRotation):  # type: ignore[misc]
    """Stock rotation about the centre, uniform in +- `degrees`, black outside, with this project's draws."""

    num_values = 1

    def __init__(self, degrees: float = 12.0, p: float = 0.5) -> None:
        super().__init__(degrees, p=p)
        self.most = degrees

    def sample(self, values: Floats, size: Size) -> Params:
        return {"degrees": -self.most + 2.0 * self.most * values[:, 0]}

    def on_levels(self, levels: Tensor, params: Params) -> Tensor:
        """As `LevelStep.on_levels`."""
        angle = np.deg2rad(params["degrees"])
        cos, sin, zero = np.cos(angle), np.sin(angle), np.zeros(len(angle))
        return warp(levels, np.stack([cos, -sin, zero, sin, cos, zero], 1).reshape(-1, 2, 3))


class ShiftScale(K.RandomAffine):  # type: ignore[misc]
    """Stock affine map with this project's draws: x and y apart, shifts in whole px, black outside.

    shift: share of the side at most; scale: 1 +- scale.
    """

    num_values = 4

    def __init__(self, shift: float = 0.03, scale: float = 0.05, p: float = 0.5) -> None:
        super().__init__(0.0, translate=(shift, shift), scale=(1.0 - scale, 1.0 + scale), p=p)
        self.most_shift, self.most_scale = shift, scale

    def sample(self, values: Floats, size: Size) -> Params:
        """Whole pixels are cut towards zero, as the published library's int() does."""
        sides = np.array(size[::-1])
        reach, num = self.most_shift, len(values)
        return {
            "scale": 1.0 - self.most_scale + 2.0 * self.most_scale * values[:, :2],
            "translations": np.trunc((-reach + 2.0 * reach * values[:, 2:]) * sides),
            "center": np.tile((sides - 1) / 2, (num, 1)),
            **{name: np.zeros(num) for name in ("angle", "shear_x", "shear_y")},
        }

    def on_levels(self, levels: Tensor, params: Params) -> Tensor:
        """As `LevelStep.on_levels`."""
        slope = 1.0 / params["scale"]
        backward = np.zeros((len(slope), 2, 3))
        backward[:, [0, 1], [0, 1]] = slope
        backward[:, :, 2] = -params["translations"] * slope
        return warp(levels, backward)


class Flip(K.RandomHorizontalFlip):  # type: ignore[misc]
    """Stock horizontal flip."""

    num_values = 0

    def __init__(self, p: float = 0.5) -> None:
        super().__init__(p=p)

    def sample(self, values: Floats, size: Size) -> Params:
        return {}

    def on_levels(self, levels: Tensor, params: Params) -> Tensor:
        """As `LevelStep.on_levels`."""
        return levels.flip(-1)


PUBLISHED = {
    "crop": PublishedCrop,
    "flip": Flip,
    "rotate": Rotation,
    "clahe": LabClahe,
    "brightness": ContrastAboutZero,
    "holes": CutHoles,
    "shift": ShiftScale,
}
# Where the numbers of a published step begin in the stream that they share; the first decides if the step happens.
PLACES = {"crop": 0, "flip": 41, "rotate": 42, "clahe": 44, "brightness": 46, "holes": 49, "shift": 59}
