"""Augmented training images as one figure, for a file of its own."""

from typing import Any

import matplotlib
from matplotlib.figure import Figure

from cxrdist.data.loader import Loader
from cxrdist.recipes import Recipe
from cxrdist.report.saliency import augmented_images, pixels

matplotlib.use("Agg")


def augmented_figure(loader: Loader, recipe: Recipe, num_images: int) -> Figure:
    """So many images of a set, a row each: as stored, and as the recipe's augmentation makes them in four epochs."""
    names, stages = augmented_images(loader, recipe, num_images)
    figure = Figure(figsize=(11, 11 / len(stages) * len(names) + 0.4), layout="constrained")
    axes = figure.subplots(len(names), len(stages), squeeze=False)
    for column, (title, stage) in zip(axes.T, stages.items(), strict=True):
        column[0].set_title(title, fontsize=9)
        for axis, image in zip(column, stage, strict=True):
            _show(axis, pixels(image))
    for axis, name in zip(axes[:, 0], names, strict=True):
        axis.set_ylabel(plain(name), fontsize=7)
    return figure


def plain(text: str) -> str:
    """Text that matplotlib draws as it is: dollar signs would begin a formula."""
    return text.replace("$", r"\$")


def _show(axis: Any, levels: Any) -> None:
    """Draw an image (H, W, C) of grey levels or colours in [0, 255], without a frame."""
    axis.imshow(levels, cmap="gray", vmin=0, vmax=255, extent=(0, levels.shape[1], levels.shape[0], 0))
    axis.set(xticks=(), yticks=())
    axis.spines[:].set_visible(False)
