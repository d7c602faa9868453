"""Sections with images: what training saw, and where each model looked."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from cxrdist.augment.pipeline import TrainingAugment
from cxrdist.augment.views import make_views, resize
from cxrdist.data.loader import Loader
from cxrdist.errors import UserError
from cxrdist.models.architecture import Architecture, Maps
from cxrdist.recipes import Recipe
from cxrdist.report.page import Section, figure_html, grid, plain
from cxrdist.scoring.evaluation import Evaluation
from cxrdist.scoring.metrics import Floats
from cxrdist.scoring.tables import ScoreTable

MEANING = "A map shows what moved the score, not the disease."
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
        _show(pair[0], image)
        _show(pair[1], torch.from_numpy(overlay(image.permute(1, 2, 0).numpy(), heat)).permute(2, 0, 1))
        pair[0].set_title(plain(labels[example.label]), fontsize=8.5, loc="left", fontweight="bold")
        caption = f"{example.image_name.rsplit('.', 1)[0]}, score {example.prob:.2f}"
        pair[0].set_xlabel(plain(caption), fontsize=7.5, loc="left", color="#5b6776")
    note = f" Images with the finding and a high ensemble score. {MEANING}"
    title = f"{architecture.saliency_title} of {name}"
    return Section(title, architecture.saliency_about + note, figure_html(figure, title))


def overlay(levels: NDArray[np.uint8], heat: Maps) -> NDArray[np.uint8]:
    """(S, S, 3) uint8: the image (S, S, 1 or 3) under its map (h, w), scaled to its own range and stretched over it."""
    span = heat - heat.min()
    span = span / max(float(span.max()), 1e-12)
    size = (levels.shape[1], levels.shape[0])
    wide = np.asarray(Image.fromarray(span.astype(np.float32)).resize(size, Image.Resampling.BILINEAR)).clip(0, 1)
    alpha = (0.25 + 0.45 * np.sqrt(wide))[..., None]
    colours = matplotlib.colormaps["inferno"](wide)[..., :3] * 255
    return np.asarray(np.rint(levels * (1 - alpha) + colours * alpha), dtype=np.uint8)


def overlay_png(levels: NDArray[np.uint8], heat: Maps, caption: str) -> bytes:
    """The bytes of a PNG: the image, the image under its map, and a line below that says what it is."""
    grey = np.broadcast_to(levels, (*levels.shape[:2], 3))
    pictures = np.concatenate([grey, overlay(levels, heat)], axis=1)
    sheet = Image.new("RGB", (pictures.shape[1], pictures.shape[0] + 44), "white")
    sheet.paste(Image.fromarray(pictures))
    text = f"{caption}. {MEANING}".encode("latin-1", "replace").decode("latin-1")  # what the built-in font has
    ImageDraw.Draw(sheet).text((12, pictures.shape[0] + 12), text, "black", ImageFont.load_default(size=17))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


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
