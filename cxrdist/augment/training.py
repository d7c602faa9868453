"""Training input: stored uint8 images to augmented, normalised ones, on the device the images are on."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from cxrdist.augment.composed import composed
from cxrdist.augment.draws import HoleMode, Ints, draw
from cxrdist.augment.reference import stepwise
from cxrdist.augment.views import empty_batch, keep_freed_blocks, normalise, resize
from cxrdist.errors import UserError

AugmentMode = Literal["published", "crop_flip", "none"]


@dataclass(frozen=True)
class TrainingAugment:
    """The random augmentation of one run; what happens to an image is a pure function of (seed, epoch, key).

    Raises UserError for an unknown mode.
    """

    image_size: int  # S, the model's, px
    mode: AugmentMode  # "crop_flip": the published random crop, flip and normalisation only; "none": evaluation resize
    seed: int
    reference: bool = False  # the published steps one by one, each rounded to grey levels, instead of one composed warp
    holes: HoleMode = "as_run"  # 1-2 holes of 10-20 % of the side; "as_asked": one of at most 20 px

    def __post_init__(self) -> None:
        if self.mode not in get_args(AugmentMode):
            raise UserError(f"augment={self.mode!r} is unknown; one of {', '.join(get_args(AugmentMode))}")
        keep_freed_blocks()

    def levels(self, images: Tensor, keys: Ints, epoch: int) -> Tensor:
        """The augmented batch before normalisation: (B, C, S, S) float32 integer grey levels in [0, 255]."""
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            return torch.cat([levels for _, levels in self._parts(images, keys, epoch)])

    def _parts(self, images: Tensor, keys: Ints, epoch: int) -> Iterable[tuple[slice, Tensor]]:
        """Rows of the batch and their levels."""
        (height, width), size, less = images.shape[2:], self.image_size, self.mode == "crop_flip"
        if self.mode == "none":
            return [(slice(None), resize(images, size))]
        draws = draw(keys, self.seed, epoch, (height, width), size, crop_flip_only=less, holes=self.holes)
        return [(slice(None), stepwise(images, draws, size))] if self.reference else composed(images, draws, size)

    def __call__(self, images: Tensor, keys: Ints, epoch: int) -> Tensor:
        """Augment and normalise `images`, (B, 1 or 3, H, W) uint8 on any device, whose `keys`, (B,), are on the host.

        Returns: (B, 3, S, S) float32, normalised by ImageNet's mean and deviation, on the images' device.
        """
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            out = empty_batch((len(images), 3, self.image_size, self.image_size), images.device)
            for rows, levels in self._parts(images, keys, epoch):
                normalise(levels, out=out[rows])
        return out
