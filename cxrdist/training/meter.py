"""What a run tells while it trains: metrics rows, speeds and the progress line, from sums kept on the device."""

import datetime
import re
import resource
import sys
import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from cxrdist.data.loader import Batch, Loader
from cxrdist.distributed.ranks import Ranks
from cxrdist.errors import UserError
from cxrdist.models.architecture import listed
from cxrdist.training.optim import GuardedAdamW
from cxrdist.training.tracking import Tracker
from cxrdist.training.validate import Validation

Rows = NDArray[np.int64]


class LoopState:
    """Where the run is and what has been summed since the last row; all that resume needs beside the weights.

    window, epoch_sums: (P + 1,) float64 on the device, this rank's share of each of the P `parts` of the loss and,
    last, the number of steps taken.
    """

    def __init__(self, parts: tuple[str, ...], device: torch.device) -> None:
        self.parts = parts
        self.epoch = 0
        self.step = 0  # optimizer steps done in this epoch
        self.global_step = 0  # since the start, skipped ones included
        self.window = torch.zeros(len(parts) + 1, dtype=torch.float64, device=device)
        self.epoch_sums = torch.zeros(len(parts) + 1, dtype=torch.float64, device=device)

    def load_sums(self, name: str, by_rank: Tensor, ranks: Ranks) -> None:
        """Take this rank's share of stored sums (R, P + 1) of R ranks, which may be another number than today's."""
        if len(by_rank) == ranks.world_size:
            own = by_rank[ranks.rank]
        else:
            # sums over ranks are what counts; the last entry counts steps and is the same on every rank
            own = by_rank.sum(dim=0) if ranks.rank == 0 else torch.zeros_like(by_rank[0])
            own[-1] = by_rank[0, -1]
        setattr(self, name, own.to(ranks.device))


class Meter:
    """Rows, speeds and the progress line. Collects on the device, reads it once per row."""

    def __init__(
        self,
        ranks: Ranks,
        optimizer: GuardedAdamW,
        state: LoopState,
        loader: Loader,
        tracker: Tracker | None,
        *,
        num_steps: int,
        epochs: int,
        global_batch_size: int,
        max_skips: int,
    ) -> None:
        """tracker: on rank 0, None elsewhere. num_steps: of an epoch. max_skips: so many skips in a row end the run."""
        self._ranks, self._optimizer, self._state, self._loader = ranks, optimizer, state, loader
        self._tracker, self._epochs, self._max_skips = tracker, epochs, max_skips
        self._global_batch_size, self._total_steps = global_batch_size, num_steps * epochs
        self._num_bad = 0
        self._finite: list[tuple[Rows, Tensor]] = []
        self._images = 0
        self._since = time.perf_counter()
        self._waited = loader.wait_s
        self._skipped = float(optimizer.num_skipped)
        quiet = ranks.rank != 0 or not sys.stderr.isatty()
        self._bar = tqdm(total=self._total_steps, initial=state.global_step, unit="step", disable=quiet)

    def __enter__(self) -> "Meter":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def saw(self, batch: Batch, logits: Tensor) -> None:
        """Remember which images a forward pass saw and whether their logits are finite (on the device, not read)."""
        self._finite.append((batch.rows, torch.isfinite(logits.detach()).all(dim=1)))
        self._images += len(batch.rows) if batch.weight else 0

    def advance(self) -> None:
        """Move the progress bar by one step."""
        self._bar.update()

    def log(self) -> None:
        """Write one row over the steps since the last one. Collective, and the only wait for the device.

        Raises UserError, naming ranks and images, when too many steps in a row were skipped.
        """
        state, optimizer, ranks = self._state, self._optimizer, self._ranks
        scale = optimizer.loss_scale if optimizer.loss_scale is not None else torch.ones((), device=ranks.device)
        counted = [
            optimizer.num_skipped,
            optimizer.longest_streak,
            optimizer.grad_norm,
            optimizer.lr_factor(),
            scale.double(),
        ]
        flags = [finite.double() for _, finite in self._finite]
        numbers = torch.cat([ranks.sum(state.window), torch.stack(counted), *flags]).tolist()
        num_parts = len(state.parts)
        losses, finite = numbers[:num_parts], numbers[num_parts + 6 :]
        taken, skipped, in_a_row, grad_norm, factor, scale_now = numbers[num_parts : num_parts + 6]
        steps_taken = taken / ranks.world_size
        seen = [int(row) for rows, _ in self._finite for row in rows]
        bad = [self._loader.index.image_names[row] for row, good in zip(seen, finite, strict=True) if not good]
        row: dict[str, Any] = {"kind": "train", "step": state.global_step, "epoch": state.epoch + 1}
        for name, value in zip(state.parts, losses, strict=True):
            row[_shown_part(name)] = value / steps_taken if steps_taken else None
        row |= {"grad_norm": grad_norm, "skipped": int(skipped), "loss_scale": scale_now}
        for pattern, lr in zip(optimizer.patterns, optimizer.base_lrs, strict=True):
            shown = re.sub(r"[^\w.-]", "", pattern).strip(".") or "all"
            row[f"lr/{shown}"] = lr * factor
        new_skips, self._skipped = skipped - self._skipped, skipped
        speed = self._speed()
        if self._tracker is not None:
            self._tracker.metrics(row)
            self._tracker.timings({"step": state.global_step, **speed})
        self._print(row, speed)
        state.window.zero_()
        optimizer.longest_streak.zero_()
        self._finite.clear()
        if new_skips:
            self._report_skips(int(new_skips), int(in_a_row), bad)

    def log_epoch(self, validation: Validation | None) -> None:
        """Write the epoch's mean loss and, where there is one, the validation row. Collective."""
        state = self._state
        *losses, taken = self._ranks.sum(state.epoch_sums).tolist()
        taken /= self._ranks.world_size
        means = [value / taken if taken else None for value in losses]
        place = {"step": state.global_step, "epoch": state.epoch + 1}
        if self._tracker is not None:
            names = [f"epoch_{_shown_part(name)}" for name in state.parts]
            self._tracker.metrics({"kind": "epoch", **place} | dict(zip(names, means, strict=True)))
            if validation is not None:
                row = {f"validation/{name}": value for name, value in validation.row().items()}
                self._tracker.metrics({"kind": "validation", **place} | row)
                self._tracker.curves(state.global_step, "validation/roc", validation.roc, "false positives")
        text = f"epoch {state.epoch + 1}/{self._epochs}: train loss {_text(means[0])}"
        if validation is not None:
            text += f", validation loss {_text(validation.losses['total'])}, macro AUROC "
            text += f"{_text(validation.auroc_macro)} over {validation.labels_text} labels"
        self._ranks.say(text)
        self._since = time.perf_counter()  # validation is not training speed

    def _speed(self) -> dict[str, Any]:
        now, wait_s = time.perf_counter(), self._loader.wait_s
        seconds = max(now - self._since, 1e-9)
        own = {
            "images_per_s": self._images / seconds,
            "wait_share": (wait_s - self._waited) / seconds,
            "memory_bytes": _memory_bytes(self._ranks.device),
        }
        new = [f"{item.image_name}: {item.reason}" for item in self._loader.skipped[self._num_bad :]]
        parts, bad = zip(*self._ranks.gather((own, new)), strict=True)
        self._num_bad += len(new)
        for rank, reasons in enumerate(bad):
            for reason in reasons:
                self._ranks.say(f"warning: rank {rank} leaves out {reason}")
        self._since, self._waited, self._images = now, wait_s, 0
        return {
            "images_per_s": sum(part["images_per_s"] for part in parts),
            "wait_share": max(part["wait_share"] for part in parts),
            **{f"rank{rank}/{name}": value for rank, part in enumerate(parts) for name, value in part.items()},
        }

    def _print(self, row: dict[str, Any], speed: dict[str, Any]) -> None:
        step, total = self._state.global_step, self._total_steps
        facts = f"loss {_text(row['loss'])}, {speed['images_per_s']:.1f} images/s, waiting {speed['wait_share']:.0%}"
        if self._bar.disable:
            left = (total - step) * self._global_batch_size / max(speed["images_per_s"], 1e-9)
            text = f"{facts}, {datetime.timedelta(seconds=round(left))} left"
            self._ranks.say(f"epoch {row['epoch']} step {step}/{total}: {text}")
        else:
            self._bar.set_postfix_str(facts)

    def _report_skips(self, new_skips: int, in_a_row: int, bad: list[str]) -> None:
        """Collective: every rank has seen the same counts."""
        where = [f"rank {rank}: {listed(names, 5)}" for rank, names in enumerate(self._ranks.gather(bad)) if names]
        cause = f"non-finite logits on {'; '.join(where)}" if where else "non-finite gradient of finite logits"
        self._ranks.say(f"warning: {new_skips} steps skipped on all ranks up to {self._state.global_step}: {cause}")
        if in_a_row >= self._max_skips:
            raise UserError(
                f"{in_a_row} steps in a row were skipped, up to step {self._state.global_step}: {cause}; look at "
                "these images, lower the learning rate, or use --precision bf16 or fp32; then --resume"
            )


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _shown_part(name: str) -> str:
    return "loss" if name == "total" else name


def _text(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"
