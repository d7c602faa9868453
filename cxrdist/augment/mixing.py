"""MixUp and CutMix: kornia's for the images, the targets mixed here, a cell that is masked in either image masked.

Partners come from groups of G consecutive images of the global batch, so what is mixed depends on the order of the
epoch and not on ranks or device batches. All draws of a group are a pure function of (seed, epoch, its first key).
"""

from collections.abc import Sequence

import numpy as np
import torch
from kornia.geometry.bbox import infer_bbox_shape
from torch import Tensor

from cxrdist.augment.draws import Ints, seeded_on_host, uniforms
from cxrdist.augment.pipeline import MIXES, build
from cxrdist.errors import UserError
from cxrdist.recipes import Step


class Mixing:
    """Mixes the images of one device batch, which holds complete groups, and their targets.

    step: named RandomMixUpV2 or RandomCutMixV2; its `p` is the share of groups that are mixed. UserError if not valid.
    """

    def __init__(self, step: Step, group: int, image_size: int, seed: int) -> None:
        self.module = build(step, image_size)
        self.name, self.p, self.group, self.size, self.seed = step.name, step.p, group, image_size, seed
        if dict(step.args).get("num_mix", 1) != 1:
            raise UserError(f"--augment {step.name}: num_mix is 1 here: an image has one partner")

    def draw(self, keys: Ints, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """For images `keys` (B,), on the host: partners (B,) int64, shares (B,) float32, boxes (B, 4, 2).

        share: how much of an image, and of its targets, is the partner's; 0 in a group that is not mixed.
        """
        num = len(keys)
        partners, shares, boxes = torch.arange(num), torch.zeros(num), torch.zeros(num, 4, 2)
        first = np.arange(0, num, self.group)
        values = uniforms(self.seed, epoch, np.asarray(keys)[first], 2, stream=self.name)
        for start, (happens, value) in zip(first.tolist(), values.tolist(), strict=True):
            size = min(self.group, num - start)
            if happens >= self.p or size == 1:
                continue
            with seeded_on_host(value):
                params = self.module.generate_parameters(torch.Size((size, 1, self.size, self.size)))  # type: ignore[operator]
            rows = slice(start, start + size)
            if "mixup_pairs" in params:
                partners[rows] = params["mixup_pairs"] + start
                shares[rows] = params["mixup_lambdas"].float()
            else:
                partners[rows] = params["mix_pairs"][0] + start
                boxes[rows] = params["crop_src"][0].float()
                width, height = infer_bbox_shape(boxes[rows])
                shares[rows] = (width * height / self.size**2).float()
        return partners, shares, boxes

    def __call__(self, images: Tensor, targets: Tensor, keys: Ints, epoch: int) -> tuple[Tensor, Tensor]:
        """Images (B, C, S, S) and targets (B, K), float32 on one device, nan where masked; `keys` (B,) on the host."""
        partners, shares, boxes = (_on(each, images.device) for each in self.draw(keys, epoch))
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            params = {
                "mixup_pairs": partners,
                "mixup_lambdas": shares,
                "mix_pairs": partners[None],
                "crop_src": boxes[None],
            }
            images = self.module.apply_transform(images, params, {})  # type: ignore[operator]
            share = shares.unsqueeze(1)
            return images, targets * (1.0 - share) + targets.index_select(0, partners) * share

    def partners(self, keys: Ints, epoch: int) -> Ints:
        """(B,) the place of each image's partner among `keys` (B,); its own where it has none."""
        return self.draw(keys, epoch)[0].numpy()


def mixing_of(steps: Sequence[Step], group: int, image_size: int, seed: int) -> Mixing | None:
    """The mixing that a recipe's last step asks for; None without one."""
    return Mixing(steps[-1], group, image_size, seed) if steps and steps[-1].name in MIXES else None


def _on(values: Tensor, device: torch.device) -> Tensor:
    return values if device.type == "cpu" else values.pin_memory().to(device, non_blocking=True)
