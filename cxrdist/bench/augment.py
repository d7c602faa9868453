"""Training augmentation, 600 px to model size, against albumentations as published and against a kornia chain.

Everything counts from decoded uint8 images to a normalised float batch, CLAHE included, on one thread; on a GPU the
device's work is waited for. Stage "clahe" times that step alone, every image taking it. Stage "statistics" compares
`--statistics` augmented images with as many of albumentations: the Kolmogorov-Smirnov distance of each statistic's two
samples, and how often steps happen. albumentations 2.0.8 and OpenCV are named as skipped where they are not installed
(`pip install '.[bench]'`).
"""

import argparse
import importlib.util
import time
import warnings
from collections.abc import Callable
from typing import Any

import kornia.augmentation as K
import numpy as np
import torch
from kornia.enhance import equalize_clahe
from numpy.typing import NDArray
from torch import Tensor

from cxrdist.augment.clahe import clip_counts, equalise
from cxrdist.augment.pipeline import TrainingAugment
from cxrdist.augment.views import IMAGENET_MEAN, IMAGENET_STD
from cxrdist.bench.timing import Row, interleaved, rows_of
from cxrdist.recipes import AUGMENTS, PUBLISHED_STEPS

SOURCE_PX = 600
KORNIA, ALBUMENTATIONS = "kornia chain, 3 channels", "albumentations 2.0.8"
OURS = "cxrdist published"
Variant = Callable[[], int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-images", type=int, default=32, metavar="N", help="images of a batch (default 32)")
    parser.add_argument("--image-size", type=int, default=448, metavar="PX", help="model size (default 448)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="turns of each variant (default 7)")
    parser.add_argument("--statistics", type=int, default=2000, metavar="N", help="compared images (0: none)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: GPU if any")


def run(args: argparse.Namespace) -> list[Row]:
    torch.set_num_threads(1)
    device = torch.device(args.device)
    images = soft_images(args.num_images).to(device)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    with_library = bool(importlib.util.find_spec("albumentations"))
    rows: list[Row] = []
    for stage, variants, baselines in (
        ("augment", _chains(images, args.image_size, with_library), (KORNIA, ALBUMENTATIONS)),
        ("clahe", _clahes(images, args.image_size, with_library), ("kornia equalize_clahe, 3 channels",)),
    ):
        waited = {name: until_done(variant, device) for name, variant in variants.items()}
        speeds = interleaved(waited, rounds=args.rounds, clock=clock)
        notes = {name: f"{1000 * len(images) / float(np.median(speed)):.0f} ms" for name, speed in speeds.items()}
        for baseline in baselines:
            if baseline in variants:
                rows += rows_of(f"{stage} / {baseline}", speeds, baseline=baseline, notes=notes)
    if not with_library:
        rows.append(Row("augment", ALBUMENTATIONS, None, note="skipped: albumentations is not installed"))
    elif args.statistics:
        rows += _statistics(args.statistics, args.image_size)
    return rows


def _statistics(num: int, size: int) -> list[Row]:
    """Rows of the distance between the two augmentations of `num` images, drawn apart; 5 % of equal ones lie above
    1.36 * sqrt(2 / num).
    """
    images = soft_images(min(num, 50)).clamp_(min=60)  # black comes from the augmentation
    ours, theirs = TrainingAugment(size, PUBLISHED_STEPS, seed=0), published_transform(size, normalise=False)
    found: dict[str, tuple[list[float], list[float]]] = {}
    for key in range(num):
        image = images[key % len(images)]
        grey = theirs(image=np.repeat(image[0].numpy()[..., None], 3, 2))["image"][..., 0]
        for way, levels in enumerate((ours.levels(image[None], np.array([key]), 1)[0, 0].numpy(), grey)):
            for name, value in _described(levels.astype(np.float32)).items():
                found.setdefault(name, ([], []))[way].append(value)
    line = 1.36 * (2 / num) ** 0.5
    rows = []
    for name, (mine, other) in found.items():
        at = np.sort(mine + other)
        shares = [np.searchsorted(np.sort(sample), at, side="right") / len(sample) for sample in (mine, other)]
        distance = np.abs(shares[0] - shares[1]).max()
        means = f"mean {np.mean(mine):.4g} and {np.mean(other):.4g}"
        rows.append(Row("statistics", name, None, note=f"KS {distance:.3f} (5 % line {line:.3f}), {means}"))
    return rows


def _described(levels: NDArray[np.float32]) -> dict[str, float]:
    edge = len(levels) // 40
    inner = levels[edge:-edge, edge:-edge]
    black = levels == 0
    laplace = inner[2:, 1:-1] + inner[:-2, 1:-1] + inner[1:-1, 2:] + inner[1:-1, :-2] - 4 * inner[1:-1, 1:-1]
    inside = float(black[edge:-edge, edge:-edge].sum())
    return {
        "mean": float(levels.mean()),
        "deviation": float(levels.std()),
        "border share (black near the rim)": (float(black.sum()) - inside) / levels.size,
        "hole share (black inside)": inside / levels.size,
        "saturation (white)": float((levels == 255).mean()),
        "sharpness (variance of the Laplacian)": float(laplace.var()),
    }


def soft_images(num: int, size: int = SOURCE_PX) -> Tensor:
    """(num, 1, size, size) uint8: soft shapes with noise, as an X-ray has."""
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.normal(size=(num, 1, 20, 20)).astype(np.float32))
    smooth = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic")
    noise = torch.from_numpy(rng.normal(size=(num, 1, size, size)).astype(np.float32))
    return (smooth * 45 + noise * 4 + 120).clamp(0, 255).byte()


def until_done(variant: Variant, device: torch.device) -> Variant:
    """`variant`, with the device's work waited for."""

    def run_it() -> int:
        num = variant()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return num

    return run_it


def _chains(images: Tensor, size: int, with_library: bool) -> dict[str, Variant]:
    variants: dict[str, Variant] = {}
    for name, steps in AUGMENTS.items():
        variants[f"cxrdist {name}"] = _ours(images, TrainingAugment(size, steps, seed=0))
    augment = TrainingAugment(size, PUBLISHED_STEPS, seed=0)
    variants["cxrdist published, 3 channels"] = _ours(images.repeat(1, 3, 1, 1), augment)
    if with_library and not images.is_cuda:
        variants[ALBUMENTATIONS] = _albumentations(images, size)
    variants[KORNIA] = _kornia_chain(images.repeat(1, 3, 1, 1), size)
    variants["kornia chain, 1 channel"] = _kornia_chain(images, size)
    return variants


def _ours(images: Tensor, augment: TrainingAugment) -> Variant:
    keys = np.arange(len(images))
    epoch = 0

    def run_it() -> int:
        nonlocal epoch
        epoch += 1
        augment(images, keys, epoch)
        return len(images)

    return run_it


def _albumentations(images: Tensor, size: int) -> Variant:
    transform = published_transform(size)
    rgb = [np.repeat(image[0][..., None], 3, 2) for image in images.numpy()]

    def run_it() -> int:
        torch.stack([transform(image=image)["image"] for image in rgb])
        return len(rgb)

    return run_it


def published_transform(size: int, *, normalise: bool = True) -> Any:
    """The published run's training transform with the arguments it was called with. Needs albumentations 2.0.8.

    normalise: end with ImageNet's normalisation and a tensor, as the run did; else with a uint8 array.
    """
    import albumentations as A
    import cv2
    from albumentations.pytorch import ToTensorV2

    cv2.setNumThreads(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return A.Compose(
            [
                A.RandomResizedCrop((size, size), scale=(0.85, 1.0), ratio=(0.9, 1.1), p=1.0),
                A.HorizontalFlip(p=0.5),
                A.Rotate(limit=12, border_mode=cv2.BORDER_CONSTANT, fill=0, p=0.4),
                A.CLAHE(clip_limit=(1, 4), tile_grid_size=(8, 8), p=0.3),
                A.RandomBrightnessContrast(brightness_limit=0.2, contrast_limit=0.2, p=0.3),
                A.CoarseDropout(max_holes=1, max_height=20, max_width=20, p=0.2),
                A.ShiftScaleRotate(
                    shift_limit=0.03, scale_limit=0.05, rotate_limit=0, border_mode=cv2.BORDER_CONSTANT, p=0.25
                ),
                *([A.Normalize(mean=IMAGENET_MEAN, std=IMAGENET_STD), ToTensorV2()] if normalise else []),
            ],
            seed=0,
        )


def _kornia_chain(images: Tensor, size: int) -> Variant:
    chain = torch.nn.Sequential(
        K.RandomResizedCrop((size, size), scale=(0.85, 1.0), ratio=(0.9, 1.1), align_corners=False),
        K.RandomHorizontalFlip(p=0.5),
        K.RandomRotation(12.0, p=0.4),
        K.RandomClahe(clip_limit=(1.0, 4.0), grid_size=(8, 8), p=0.3),
        K.RandomContrast((0.8, 1.2), p=0.3),
        K.RandomBrightness((0.8, 1.2), p=0.3),
        K.RandomErasing(scale=(0.01, 0.04), ratio=(0.5, 2.0), p=0.2),
        K.RandomAffine(0.0, translate=(0.03, 0.03), scale=(0.95, 1.05), p=0.25),
    ).to(images.device)
    normalise = K.Normalize(mean=torch.tensor(IMAGENET_MEAN), std=torch.tensor(IMAGENET_STD)).to(images.device)

    def run_it() -> int:
        return len(normalise(chain(images.float() / 255.0).expand(-1, 3, -1, -1)))

    return run_it


def _clahes(images: Tensor, size: int, with_library: bool) -> dict[str, Variant]:
    levels = images[..., :size, :size].float().contiguous()
    counts = torch.from_numpy(clip_counts(np.full(len(images), 2.5), size)).float().to(images.device)
    unit, rgb_unit = levels / 255.0, levels.repeat(1, 3, 1, 1) / 255.0

    def one_by_one() -> int:
        return sum(len(equalise(levels[i : i + 1], counts[i : i + 1])) for i in range(len(levels)))

    variants: dict[str, Variant] = {
        "cxrdist": (lambda: len(equalise(levels, counts))) if images.is_cuda else one_by_one,
        "kornia equalize_clahe": lambda: len(equalize_clahe(unit, 2.5, (8, 8))),
        "kornia equalize_clahe, 3 channels": lambda: len(equalize_clahe(rgb_unit, 2.5, (8, 8))),
    }
    if with_library and not images.is_cuda:
        variants |= _library_clahes(levels[:, 0].byte().numpy())
    return variants


def _library_clahes(grey: NDArray[np.uint8]) -> dict[str, Variant]:
    import cv2
    from albumentations.augmentations.pixel.functional import clahe

    cv2.setNumThreads(0)
    rgb = [np.repeat(image[..., None], 3, 2) for image in grey]
    return {
        "albumentations, RGB": lambda: len([clahe(image, 2.5, (8, 8)) for image in rgb]),
        "OpenCV, grey (not as published)": lambda: len([cv2.createCLAHE(2.5, (8, 8)).apply(image) for image in grey]),
    }
