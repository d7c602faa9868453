"""Evaluation input: the six published test-time views of decoded images, against the published way of making them.

The published run made each view in a pass of its own (its six JPEG decodes are not counted here), two of them equal.
albumentations is named as skipped where it is not installed (`pip install '.[bench]'`).
"""

import argparse
import importlib.util
import time
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from cxrdist.augment.views import IMAGENET_MEAN, IMAGENET_STD, VIEWS, make_views, resize
from cxrdist.bench.augment import Variant, add_arguments, soft_images, until_done
from cxrdist.bench.timing import Row, interleaved, rows_of

__all__ = ["add_arguments", "run"]  # the same flags as bench augment
PUBLISHED = "albumentations on RGB, a view a pass"


def run(args: argparse.Namespace) -> list[Row]:
    torch.set_num_threads(1)
    device = torch.device(args.device)
    images, size = soft_images(args.num_images).to(device), args.image_size
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    rows: list[Row] = []
    with_library = bool(importlib.util.find_spec("albumentations"))
    for stage, views in (("six views", VIEWS), ("plain view", VIEWS[:1])):
        variants: dict[str, Variant] = {
            "cxrdist": _ours(images, views, size),
            "cxrdist, 3 channels": _ours(images.repeat(1, 3, 1, 1), views, size),
        }
        if views == VIEWS[:1]:
            variants["float resize only"] = lambda: len(interpolate(images.float(), (size, size), mode="bilinear"))
            variants["cxrdist resize only"] = lambda: len(resize(images, size))
        if with_library:
            variants[PUBLISHED] = _published(images.cpu(), views, size)
        waited = {name: until_done(variant, device) for name, variant in variants.items()}
        speeds = interleaved(waited, rounds=args.rounds, clock=clock)
        rows += rows_of(stage, speeds, baseline=PUBLISHED if with_library else None)
    if not with_library:
        rows.append(Row("six views", PUBLISHED, None, note="skipped: albumentations is not installed"))
    return rows


def _ours(images: Tensor, views: tuple[str, ...], size: int) -> Variant:
    def run_it() -> int:
        for _ in make_views(images, views, size):
            pass
        return len(images)

    return run_it


def _published(images: Tensor, views: tuple[str, ...], size: int) -> Variant:
    import albumentations as A
    import cv2
    from albumentations.pytorch import ToTensorV2

    cv2.setNumThreads(0)
    rgb = [np.repeat(image[0][..., None], 3, 2) for image in images.numpy()]
    to_input = A.Compose([A.Normalize(mean=IMAGENET_MEAN, std=IMAGENET_STD), ToTensorV2()])

    def one(image: NDArray[np.uint8], view: str) -> Tensor:
        if view == "hflip":
            image = cv2.flip(image, 1)
        zoomed = int(size * float(view[6:])) if view.startswith("center") else size
        image = cv2.resize(image, (zoomed, zoomed), interpolation=cv2.INTER_LINEAR)
        edge = (zoomed - size) // 2
        image = image[edge : edge + size, edge : edge + size]
        if view.startswith("bright"):
            table = np.clip(np.arange(256) * float(view[6:]), 0, 255).astype(np.uint8)
            image = cv2.LUT(image, table)
        return cast(Tensor, to_input(image=image)["image"])

    def run_it() -> int:
        for view in views:
            torch.stack([one(image, view) for image in rgb])
        return len(rgb)

    return run_it
