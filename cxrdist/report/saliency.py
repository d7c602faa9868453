"""Sections with images: what training saw, and where each model looked."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import nn

from cxrdist.augment.pipeline import TrainingAugment
from cxrdist.augment.views import make_views, resize
from cxrdist.data.loader import Loader
from cxrdist.errors import UserError
from cxrdist.models.architecture import Architecture
from cxrdist.recipes import Recipe
from cxrdist.report.page import Section, figure_html, grid, plain
from cxrdist.scoring.evaluation import Evaluation
from cxrdist.scoring.metrics import Floats
from cxrdist.scoring.tables import ScoreTable

NUM_EXAMPLES = 6  # images with saliency maps
NUM_AUGMENTED = 4  # training images, each in as many epochs
NOTHING = ("no ", "normal")  # beginnings of labels that say that nothing was found, so there is nothing to look at


@dataclass(frozen=True)
class Example:
    """A scored image, and the label whose map is shown (its place) with its probability."""

    image_name: str
    label: int
    prob: float


def augmented_section(loader: Loader, recipe: Recipe) -> Section:
    """Stored training images, a row each, and what training made of them in four epochs."""
    figure = augmented_figure(loader, recipe, NUM_AUGMENTED)
    about = "Stored images and what training made of them in four epochs; draws depend only on seed, epoch and image."
    return Section("Training images", about, figure_html(figure, "augmented training images"))


def augmented_figure(loader: Loader, recipe: Recipe, num_images: int) -> Figure:
    """So many images of a set, a row each: as stored, and as the recipe's augmentation makes them in four epochs."""
    index = loader.index
    rows = np.linspace(0, len(index) - 1, min(num_images, len(index))).astype(np.int64)
    images = read_images(loader, rows)
    augment = TrainingAugment(recipe.image_size, recipe.augment, recipe.seed, colour=index.num_channels == 3)
    stages = {"as stored": resize(images, recipe.image_size)}
    stages |= {f"epoch {epoch + 1}": augment.levels(images, index.keys[rows], epoch) for epoch in range(4)}
    figure, axes = grid(len(rows), len(stages), 11, 11 / len(stages) * len(rows) + 0.4)
    for column, (title, stage) in zip(axes.T, stages.items(), strict=True):
        column[0].set_title(title, fontsize=9)
        for axis, image in zip(column, stage, strict=True):
            _show(axis, image)
    for axis, row in zip(axes[:, 0], rows, strict=True):
        axis.set_ylabel(plain(index.image_names[row]), fontsize=7)
    return figure


def choose_examples(asked: list[str], table: ScoreTable, targets: Floats, result: Evaluation) -> list[Example]:
    """Images asked for with their top true label, else the top positive image of the best labels by AUROC, once."""
    row_of = {name: row for row, name in enumerate(table.image_names)}
    finding = np.array([not label.lower().startswith(NOTHING) for label in table.labels])
    if asked:
        if unknown := [name for name in asked if name not in row_of]:
            raise UserError(f"--show {unknown[0]}: not among the scored images")
        scores = np.where((targets > 0) & finding, 1 + table.probs, table.probs)
        chosen = {name: int(np.argmax(scores[row_of[name]])) for name in asked}
    else:
        auroc = np.where(finding, np.nan_to_num(np.array(result.scores[0].auroc), nan=-1.0), -1.0)
        chosen = {}
        for label in np.argsort(-auroc, kind="stable")[: np.count_nonzero(auroc >= 0)].tolist():
            ranked = np.argsort(-table.probs[:, label], kind="stable")
            names = [name for name in table.image_names[ranked[targets[ranked, label] > 0]] if name not in chosen]
            if names and len(chosen) < NUM_EXAMPLES:
                chosen[names[0]] = label
    return [Example(name, label, float(table.probs[row_of[name], label])) for name, label in chosen.items()]


def saliency_section(
    name: str,
    architecture: Architecture,
    model: nn.Module,
    image_size: int,
    images: torch.Tensor,
    examples: Sequence[Example],
    labels: Sequence[str],
) -> Section:
    """Maps of the model called `name` over stored images (B, C, S, S); its architecture must make some."""
    assert architecture.saliency is not None
    _, inputs = next(make_views(images, ("plain",), image_size, architecture.stats))
    maps = architecture.saliency(model, inputs, np.array([example.label for example in examples], dtype=np.int64))
    num_rows = -(-len(examples) // 3)  # of three pairs: the image, and the image under its map
    figure, axes = grid(num_rows, 6, 11, num_rows * 2.3)
    for axis in axes.ravel()[2 * len(examples) :]:
        axis.axis("off")
    for pair, image, heat, example in zip(axes.reshape(-1, 2), images, maps, examples, strict=False):
        for axis in pair:
            _show(axis, image[:1])
        heat = heat - heat.min()
        heat = heat / max(float(heat.max()), 1e-12)
        style = {"cmap": "inferno", "extent": (0, image.shape[2], image.shape[1], 0), "interpolation": "bilinear"}
        pair[1].imshow(heat, alpha=0.25 + 0.45 * np.sqrt(heat), **style)
        pair[0].set_title(plain(labels[example.label]), fontsize=8.5, loc="left", fontweight="bold")
        caption = f"{example.image_name.rsplit('.', 1)[0]}, score {example.prob:.2f}"
        pair[0].set_xlabel(plain(caption), fontsize=7.5, loc="left", color="#5b6776")
    note = " Images with the finding and a high ensemble score. A map shows what moved the score, not the disease."
    title = f"{architecture.saliency_title} of {name}"
    return Section(title, architecture.saliency_about + note, figure_html(figure, title))


def read_images(loader: Loader, rows: NDArray[np.int64]) -> torch.Tensor:
    """(B, C, S, S) uint8 of the given rows, on the loader's device."""
    return next(loader.batches([rows])).images


def _show(axis: Any, levels: torch.Tensor) -> None:
    """Draw an image (C, H, W) of grey levels or colours in [0, 255], without a frame."""
    pixels = levels.round().clamp(0, 255).to(torch.uint8).numpy() if levels.is_floating_point() else levels.numpy()
    extent = (0, pixels.shape[2], pixels.shape[1], 0)
    axis.imshow(np.moveaxis(pixels, 0, 2), cmap="gray", vmin=0, vmax=255, extent=extent)
    axis.set(xticks=(), yticks=())
    axis.spines[:].set_visible(False)
