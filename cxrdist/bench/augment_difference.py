"""What composing the augmentation into one warp changes, against the published steps, for the same parameters.

Draws on synthetic X-rays; the black of borders and holes is counted on a white image, without CLAHE and brightness.
Ratios are default over reference. `--picture FILE` draws both and their difference.
"""

import argparse
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cxrdist.augment.composed import composed
from cxrdist.augment.draws import Draws, draw
from cxrdist.augment.reference import stepwise
from cxrdist.augment.views import resize
from cxrdist.bench.timing import Row
from cxrdist.demo.phantoms import render, sample_studies

STAGE = "default against reference"
NUM_IMAGES = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-draws", type=int, default=2000, metavar="N", help="augmented images (default 2000)")
    parser.add_argument("--image-size", type=int, default=448, metavar="PX", help="model size (default 448)")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="also draw the comparison as a PNG")


@dataclass
class Difference:
    """Statistics of the same draws made both ways; index 0 is the default, 1 the reference. Maps are (S, S)."""

    mean: NDArray[np.float64]  # (2, S, S) grey level over draws
    std: NDArray[np.float64]  # (2, S, S)
    gradient: NDArray[np.float64]  # (2,) mean difference of neighbouring pixels
    black: NDArray[np.float64]  # (2, draws) share of a white image that turns black
    change: dict[str, float]  # mean absolute difference of a pixel, by the steps that the image took
    examples: list[tuple[str, Tensor, Tensor]]


def run(args: argparse.Namespace) -> list[Row]:
    torch.set_num_threads(1)
    found = compare(phantoms(NUM_IMAGES), args.num_draws, args.image_size)
    if args.picture is not None:
        _picture(found, args.picture)
    shift = np.abs(found.mean[0] - found.mean[1])
    black = np.abs(found.black[0] - found.black[1])
    notes = {
        "per-pixel mean": f"{found.mean[0].mean():.2f} and {found.mean[1].mean():.2f} levels; "
        f"a pixel's differs by {shift.mean():.2f}, at most {shift.max():.2f}",
        "per-pixel standard deviation": f"ratio {found.std[0].mean() / found.std[1].mean():.4f}, "
        f"of a pixel {np.quantile(found.std[0] / found.std[1], [0.01, 0.99]).round(3).tolist()} (1-99 %)",
        "sharpness": f"mean gradient ratio {found.gradient[0] / found.gradient[1]:.3f}",
        "black of borders and holes": f"{found.black[0].mean():.4%} and {found.black[1].mean():.4%} of the area; "
        f"in one image they differ by {black.mean():.4%}, at most {black.max():.4%}",
    }
    notes |= {f"change of a pixel, {steps}": f"{value:.2f} levels" for steps, value in found.change.items()}
    return [Row(STAGE, name, None, note=note) for name, note in notes.items()]


def phantoms(num: int) -> Tensor:
    """(num, 1, 600, 600) uint8 synthetic chest X-rays."""
    pixels = [torch.from_numpy(render(study, 0, seed=7)) for study in sample_studies(num, seed=7)[:num]]
    return torch.cat([resize(image[None, None], 600) for image in pixels]).byte()


def compare(images: Tensor, num_draws: int, image_size: int) -> Difference:
    """Make `num_draws` augmented images of `images` both ways, and compare them."""
    sums = np.zeros((2, 2, image_size, image_size))
    gradient = np.zeros(2)
    black: list[list[float]] = [[], []]
    changes: dict[str, list[float]] = {}
    examples: list[tuple[str, Tensor, Tensor]] = []
    for image, draws in _draws(images, num_draws, image_size):
        both = _both_ways(image, draws, image_size)
        for way, levels in enumerate(both):
            pixels = levels[0, 0].double().numpy()
            sums[way] += np.stack([pixels, pixels**2])
            gradient[way] += np.abs(np.diff(pixels)).mean()
        plain = dataclasses.replace(draws, clip_limit=np.zeros(1), contrast=np.ones(1), brightness=np.zeros(1))
        for way, levels in enumerate(_both_ways(torch.full_like(image, 255), plain, image_size)):
            black[way].append(1.0 - levels.mean().item() / 255.0)
        name = _steps(draws)
        if name not in changes and len(examples) < 5 and name != "crop and flip":
            examples.append((name, *both))
        changes.setdefault(name, []).append((both[0] - both[1]).abs().mean().item())
    mean, square = sums[:, 0] / num_draws, sums[:, 1] / num_draws
    change = {name: float(np.mean(values)) for name, values in sorted(changes.items())}
    std = np.sqrt(np.maximum(square - mean**2, 1e-9))
    return Difference(mean, std, gradient / num_draws, np.array(black), change, examples)


def _draws(images: Tensor, num_draws: int, image_size: int) -> Iterator[tuple[Tensor, Draws]]:
    size = (images.shape[2], images.shape[3])
    for key in range(num_draws):
        image = images[key % len(images)][None]
        yield image, draw(np.array([key]), seed=0, epoch=1, source_size=size, image_size=image_size)


def _both_ways(image: Tensor, draws: Draws, image_size: int) -> tuple[Tensor, Tensor]:
    ((_, levels),) = composed(image, draws, image_size)
    return levels, stepwise(image, draws, image_size)


def _steps(draws: Draws) -> str:
    """The steps that set the two ways apart."""
    taken = {"rotation": draws.angle != 0, "CLAHE": draws.clip_limit > 0, "shift": draws.shifted}
    return " + ".join(name for name, some in taken.items() if some.any()) or "crop and flip"


def _picture(found: Difference, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows: list[tuple[str, Any, Any, float]] = [
        ("mean of all draws", found.mean[0], found.mean[1], 10.0),
        ("standard deviation", found.std[0], found.std[1], 10.0),
    ]
    rows += [(name, default[0, 0].numpy(), other[0, 0].numpy(), 5.0) for name, default, other in found.examples]
    figure, axes = pyplot.subplots(len(rows), 3, figsize=(7.5, 2.5 * len(rows)), squeeze=False)
    for line, (name, default, other, gain) in zip(axes, rows, strict=True):
        largest = max(np.max(default), np.max(other))
        panels = (
            (f"{name}\ndefault", default, "gray", (0.0, largest)),
            ("reference", other, "gray", (0.0, largest)),
            (f"difference x {gain:.0f}", gain * (default - other), "RdBu", (-255.0, 255.0)),
        )
        for axis, (title, values, colours, (low, high)) in zip(line, panels, strict=True):
            axis.imshow(values, cmap=colours, vmin=low, vmax=high)
            axis.set_title(title, fontsize=8)
            axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=70)
    pyplot.close(figure)
