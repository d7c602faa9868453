"""Images of a report: what training saw, the most confident scores of each label, and where each model looked."""

import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from cxrdist.augment.pipeline import TrainingAugment
from cxrdist.augment.views import make_views, resize
from cxrdist.data.loader import Loader
from cxrdist.errors import UserError
from cxrdist.models.architecture import Maps
from cxrdist.recipes import Recipe
from cxrdist.report.page import Section, jpeg_html
from cxrdist.runs.member import LoadedMember
from cxrdist.scoring.evaluation import Evaluation
from cxrdist.scoring.metrics import Floats
from cxrdist.scoring.tables import ScoreTable

MEANING = "A map shows what moved the score, not the disease."
FROM_RANDOM = "This model started from random weights: its maps show little."
NUM_EXAMPLES = 6  # images with maps of every model
PER_KIND = 2  # images of a label that are right or wrong in one way
MAX_CONFIDENT = 100  # of these in all, but one of each kind: 2 MB of the page, a pass of the model each
KINDS = (  # (the image has the finding, its score is high)
    ("Right: with the finding, highest scores", True, True),
    ("Wrong: without it, highest scores", False, True),
    ("Wrong: with it, lowest scores", True, False),
)
SMALL_PX, WIDE_PX = 224, 320  # of pictures in the page: 10 kB, 20 kB with colours
IMAGES_AT_ONCE = 8  # through a model
NUM_AUGMENTED = 4  # training images, each in as many epochs
NOTHING = ("no ", "normal")  # beginnings of labels that say that nothing was found, so there is nothing to look at


@dataclass(frozen=True)
class Example:
    """A scored image, and the label whose map is shown (its place) with its probability; kind: of KINDS, its place."""

    image_name: str
    label: int
    prob: float
    kind: int = 0


def augmented_section(loader: Loader, recipe: Recipe) -> Section:
    """Stored training images, a row each, and what training made of them in four epochs."""
    names, stages = augmented_images(loader, recipe, NUM_AUGMENTED)
    body = ""
    for row, name in enumerate(names):
        shown = "".join(_captioned(pixels(stage[row]), f"{title} of {name}", title) for title, stage in stages.items())
        body += f'<div class="row"><h4>{html.escape(name)}</h4><div>{shown}</div></div>'
    about = "Stored images and what training made of them in four epochs; draws depend only on seed, epoch and image."
    return Section("Training images", about, body)


def augmented_images(loader: Loader, recipe: Recipe, num_images: int) -> tuple[list[str], dict[str, torch.Tensor]]:
    """Names and levels (B, C, S, S) of so many images of a set: stored, and as augmented in each of four epochs."""
    index = loader.index
    rows = np.linspace(0, len(index) - 1, min(num_images, len(index))).astype(np.int64)
    images = read_images(loader, rows)
    augment = TrainingAugment(recipe.image_size, recipe.augment, recipe.seed, colour=index.num_channels == 3)
    stages = {"as stored": resize(images, recipe.image_size)}
    stages |= {f"epoch {epoch + 1}": augment.levels(images, index.keys[rows], epoch) for epoch in range(4)}
    return [index.image_names[row] for row in rows], stages


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


def confident_examples(table: ScoreTable, targets: Floats, labels: Sequence[int]) -> list[Example]:
    """For each of the labels, up to PER_KIND images of each of KINDS, most confident first; of many labels one."""
    found, count = [], min(PER_KIND, max(1, MAX_CONFIDENT // (len(labels) * len(KINDS))))
    for label in labels:
        for kind, (_, positive, high) in enumerate(KINDS):
            rows = np.flatnonzero(targets[:, label] > 0.5 if positive else targets[:, label] < 0.5)
            probs = table.probs[rows, label]
            rows = rows[np.argsort(-probs if high else probs, kind="stable")[:count]]
            found += [Example(str(table.image_names[row]), label, float(table.probs[row, label]), kind) for row in rows]
    return found


def label_images(
    loader: Loader,
    examples: Sequence[Example],
    labels: Sequence[str],
    member: LoadedMember | None = None,
    map_title: str = "",
) -> dict[int, str]:
    """HTML of each label's examples, by its place, with the maps of `member` where there is one."""
    pictures: dict[tuple[int, int], str] = {}
    for start in range(0, len(examples), IMAGES_AT_ONCE):
        some = examples[start : start + IMAGES_AT_ONCE]
        images = read_images(loader, rows_of(loader, some))
        heats = maps_of(member, images, some) if member is not None else [None] * len(some)
        for image, heat, example in zip(images, heats, some, strict=True):
            levels, about = pixels(image), f"{labels[example.label]}, {example.image_name}"
            shown = jpeg_html(levels, SMALL_PX, about)
            shown += "" if heat is None else jpeg_html(overlay(levels, heat), SMALL_PX, f"map of {about}")
            there = "present" if KINDS[example.kind][1] else "absent"
            told = f"{example.image_name}: {labels[example.label]} {there}, score {example.prob:.2f}"
            caption = f"<figcaption>{html.escape(told)}</figcaption>"
            place = example.label, example.kind
            pictures[place] = f'{pictures.get(place, "")}<figure class="pair"><div>{shown}</div>{caption}</figure>'
    said = "" if member is None or not member.from_random else f" {FROM_RANDOM}"
    about = "" if member is None else f"{map_title}. {MEANING}{said}"
    found: dict[int, str] = {}
    for label in dict.fromkeys(example.label for example in examples):
        kinds = "".join(
            f"<div><h4>{title}</h4>{pictures.get((label, kind), 'no such image')}</div>"
            for kind, (title, _, _) in enumerate(KINDS)
        )
        found[label] = f'<div class="kinds">{kinds}</div><p>{html.escape(about)}</p>'
    return found


def saliency_section(
    images: torch.Tensor, examples: Sequence[Example], labels: Sequence[str], maps: Mapping[str, Maps], about: str
) -> Section:
    """The examples' images (B, C, S, S), each beside itself under its maps, by their titles."""
    body = ""
    for place, (image, example) in enumerate(zip(images, examples, strict=True)):
        levels = pixels(image)
        shown = _captioned(levels, example.image_name, "as stored", WIDE_PX)
        for title, heats in maps.items():
            shown += _captioned(overlay(levels, heats[place]), f"{title}, {example.image_name}", title, WIDE_PX)
        head = f"{labels[example.label]}: {example.image_name}, score {example.prob:.2f}"
        body += f'<div class="row"><h4>{html.escape(head)}</h4><div>{shown}</div></div>'
    about = f"Images with the finding and a high score of the first table. {about} {MEANING}"
    return Section("Where the models looked", about, body)


def maps_of(member: LoadedMember, images: torch.Tensor, examples: Sequence[Example]) -> Maps:
    """(B, h, w) of a model whose architecture makes maps, over stored images (B, C, S, S), of each example's label."""
    architecture = member.architecture
    assert architecture.saliency is not None
    _, inputs = next(make_views(images, ("plain",), member.recipe.image_size, architecture.stats))
    return architecture.saliency(member.model, inputs, np.array([one.label for one in examples], dtype=np.int64))


def overlay(levels: NDArray[np.uint8], heat: Maps) -> NDArray[np.uint8]:
    """(S, S, 3) uint8: the image (S, S, 1 or 3) under its map (h, w), scaled to its own range and stretched over it."""
    span = heat - heat.min()
    span = span / max(float(span.max()), 1e-12)
    size = (levels.shape[1], levels.shape[0])
    wide = np.asarray(Image.fromarray(span.astype(np.float32)).resize(size, Image.Resampling.BILINEAR)).clip(0, 1)
    alpha = (0.25 + 0.45 * np.sqrt(wide))[..., None]
    colours = matplotlib.colormaps["inferno"](wide)[..., :3] * 255
    return np.asarray(np.rint(levels * (1 - alpha) + colours * alpha), dtype=np.uint8)


def overlay_png(levels: NDArray[np.uint8], heat: Maps, caption: str, note: str = "") -> bytes:
    """The bytes of a PNG: the image, the image under its map, and lines below that say what it is; note: the last."""
    grey = np.broadcast_to(levels, (*levels.shape[:2], 3))
    pictures = np.concatenate([grey, overlay(levels, heat)], axis=1)
    lines = [f"{caption}. {MEANING}", *([note] if note else [])]
    sheet = Image.new("RGB", (pictures.shape[1], pictures.shape[0] + 20 + 24 * len(lines)), "white")
    sheet.paste(Image.fromarray(pictures))
    text = "\n".join(lines).encode("latin-1", "replace").decode("latin-1")  # what the built-in font has
    ImageDraw.Draw(sheet).text((12, pictures.shape[0] + 12), text, "black", ImageFont.load_default(size=17))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def read_images(loader: Loader, rows: NDArray[np.int64]) -> torch.Tensor:
    """(B, C, S, S) uint8 of the given rows, on the loader's device."""
    return next(loader.batches([rows])).images


def rows_of(loader: Loader, examples: Sequence[Example]) -> NDArray[np.int64]:
    """Where the examples lie in the loader's index; UserError where one does not."""
    names = np.array([example.image_name for example in examples], dtype=object)
    rows = loader.index.rows_of(names)
    if len(unknown := names[rows < 0]):
        told = f"no {unknown[0]!r}, which was scored, in split {loader.index.split!r}; other shards?"
        raise UserError(f"{loader.index.folder}: {told}")
    return rows


def pixels(image: torch.Tensor) -> NDArray[np.uint8]:
    """(H, W, C) of levels (C, H, W) in [0, 255]."""
    levels = image.round().clamp(0, 255).to(torch.uint8) if image.is_floating_point() else image
    return np.ascontiguousarray(levels.permute(1, 2, 0).cpu().numpy())


def _captioned(levels: NDArray[np.uint8], alt: str, caption: str, size_px: int = SMALL_PX) -> str:
    return f"<figure>{jpeg_html(levels, size_px, alt)}<figcaption>{html.escape(caption)}</figcaption></figure>"
