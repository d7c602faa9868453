"""Training input: stored uint8 images to augmented, normalised ones, on the device the images are on."""

from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from cxrdist.augment.composed import composed
from cxrdist.augment.draws import Draws, HoleMode, Ints, draw
from cxrdist.augment.memory import empty_batch, keep_freed_blocks
from cxrdist.augment.reference import stepwise
from cxrdist.augment.views import normalise, resize
from cxrdist.errors import UserError

AugmentMode = Literal["published", "crop_flip", "none"]


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

    def __init__(
        self,
        image_size: int,
        mode: AugmentMode,
        seed: int,
        reference: bool = False,
        holes: HoleMode = "as_run",
    ) -> None:
        if mode not in get_args(AugmentMode):
            raise UserError(f"augment={mode!r} is unknown; one of {', '.join(get_args(AugmentMode))}")
        keep_freed_blocks()
        self.image_size = image_size
        self.mode = mode
        self.seed = seed
        self.reference = reference
        self.holes: HoleMode = holes

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
            if self.mode == "none":
                return resize(images, self.image_size)
            draws = self.draws(keys, epoch, (images.shape[2], images.shape[3]))
            if self.reference:
                return stepwise(images, draws, self.image_size)
            return torch.cat([levels for _, levels in composed(images, draws, self.image_size)])

    def __call__(self, images: Tensor, keys: Ints, epoch: int) -> Tensor:
        """Augment and normalise a batch.

        Args:
            images: (B, 1 or 3, H, W) uint8 on any device.
            keys: (B,) the images' keys, on the host.
            epoch: a new one draws new parameters.
        Returns: (B, 3, S, S) float32, normalised by ImageNet's mean and deviation, on the images' device.
        """
        if self.mode == "none" or self.reference:
            return normalise(self.levels(images, keys, epoch))
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            draws = self.draws(keys, epoch, (images.shape[2], images.shape[3]))
            out = empty_batch((len(images), 3, self.image_size, self.image_size), images.device)
            for rows, levels in composed(images, draws, self.image_size):
                normalise(levels, out=out[rows])
        return out
