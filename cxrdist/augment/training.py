"""Training input: stored uint8 images to augmented, normalised ones, on the device the images are on."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from cxrdist.augment.composed import composed
from cxrdist.augment.draws import Draws, HoleMode, Ints, draw
from cxrdist.augment.reference import stepwise
from cxrdist.augment.views import empty_batch, keep_freed_blocks, normalise, resize
from cxrdist.errors import UserError

AugmentMode = Literal["published", "crop_flip", "none"]


@dataclass(frozen=True)
class TrainingAugment:
    """The random augmentation of one run.

    Args:
        image_size: S, the model's, px.
        mode: "published"; "crop_flip": its random crop, flip and normalisation only; "none": the evaluation resize.
        seed: the run's. What happens to an image is a pure function of (seed, epoch, key).
        reference: the published steps one after the other, each rounded to grey levels, instead of one composed warp.
        holes: "as_run" cuts 1-2 holes of 10-20 % of the side, "as_asked" one of at most 20 px.
    Raises UserError for an unknown mode.
    """

    image_size: int
    mode: AugmentMode
    seed: int
    reference: bool = False
    holes: HoleMode = "as_run"

    def __post_init__(self) -> None:
        if self.mode not in get_args(AugmentMode):
            raise UserError(f"augment={self.mode!r} is unknown; one of {', '.join(get_args(AugmentMode))}")
        keep_freed_blocks()

    def draws(self, keys: Ints, epoch: int, source_size: tuple[int, int]) -> Draws:
        """The parameters that `keys` (B,) get in `epoch`; `source_size` is (height, width) of the stored images."""
        return draw(
            np.asarray(keys, np.int64),
            seed=self.seed,
            epoch=epoch,
            source_size=source_size,
            image_size=self.image_size,
            crop_flip_only=self.mode == "crop_flip",
            holes=self.holes,
        )

    def levels(self, images: Tensor, keys: Ints, epoch: int) -> Tensor:
        """The augmented batch before normalisation: (B, C, S, S) float32 integer grey levels in [0, 255]."""
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            return torch.cat([levels for _, levels in self._parts(images, keys, epoch)])

    def _parts(self, images: Tensor, keys: Ints, epoch: int) -> Iterable[tuple[slice, Tensor]]:
        """Rows of the batch and their levels."""
        if self.mode == "none":
            return [(slice(None), resize(images, self.image_size))]
        draws = self.draws(keys, epoch, (images.shape[2], images.shape[3]))
        if self.reference:
            return [(slice(None), stepwise(images, draws, self.image_size))]
        return composed(images, draws, self.image_size)

    def __call__(self, images: Tensor, keys: Ints, epoch: int) -> Tensor:
        """Augment and normalise `images`, (B, 1 or 3, H, W) uint8 on any device, whose `keys`, (B,), are on the host.

        Returns: (B, 3, S, S) float32, normalised by ImageNet's mean and deviation, on the images' device.
        """
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            out = empty_batch((len(images), 3, self.image_size, self.image_size), images.device)
            for rows, levels in self._parts(images, keys, epoch):
                normalise(levels, out=out[rows])
        return out
