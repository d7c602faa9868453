"""What a run tells while it trains: metrics rows, speeds and the progress line, from sums kept on the device."""

import datetime
import math
import re
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from cxrdist.data.loader import Batch, Loader
from cxrdist.data.rows import Rows
from cxrdist.distributed.environment import peak_memory
from cxrdist.distributed.ranks import Ranks
from cxrdist.errors import UserError
from cxrdist.models.architecture import listed
from cxrdist.training.learner import Learner
from cxrdist.training.summary import last_auroc
from cxrdist.training.tracking import Tracker
from cxrdist.training.validate import Validation


@dataclass(eq=False, kw_only=True)
class Meter:
    """Rows, speeds and the progress line. Collects on the device, reads it once per row.

    tracker: on rank 0, None elsewhere. max_skips: so many skips in a row end the run.
    """

    ranks: Ranks
    learner: Learner
    loader: Loader
    tracker: Tracker | None
    total_steps: int
    epochs: int
    global_batch_size: int
    max_skips: int

    def __post_init__(self) -> None:
        self._names = ("loss", *self.learner.state.parts[1:])  # under which the parts are shown
        self._num_bad = self._images = 0
        self._finite: list[tuple[Rows, Tensor]] = []
        self._since, self._waited, self._awaited = time.perf_counter(), self.loader.wait_s, self.loader.shards_wait_s
        self._skipped = float(self.learner.optimizer.num_skipped)
        quiet = self.ranks.rank != 0 or not sys.stderr.isatty()
        # of this run's last validation, shown beside the loss
        self._auroc = None if self.tracker is None else last_auroc(self.tracker.run)
        self.bar = tqdm(total=self.total_steps, initial=self.learner.state.global_step, unit="step", disable=quiet)

    def saw(self, batch: Batch, logits: Tensor) -> None:
        """Remember which images a forward pass saw and whether their logits are finite (on the device, not read)."""
        self._finite.append((batch.rows, torch.isfinite(logits.detach()).all(dim=1)))
        self._images += len(batch.rows) if batch.weight else 0

    def log(self) -> None:
        """Write one row over the steps since the last one. Collective, and the only wait for the device.

        Raises UserError, naming ranks and images, when too many steps in a row were skipped.
        """
        state, optimizer, ranks = self.learner.state, self.learner.optimizer, self.ranks
        scale = optimizer.loss_scale if optimizer.loss_scale is not None else torch.ones((), device=ranks.device)
        counted = [optimizer.num_skipped, optimizer.longest_streak, optimizer.grad_norm, optimizer.lr_factor()]
        flags = [finite.double() for _, finite in self._finite]
        numbers = torch.cat([ranks.sum(state.window), torch.stack([*counted, scale.double()]), *flags]).tolist()
        end = len(state.parts)
        taken, skipped, in_a_row, grad_norm, factor, scale_now = numbers[end : end + 6]
        seen = [int(row) for rows, _ in self._finite for row in rows]
        names = self.loader.index.image_names
        bad = [names[row] for row, good in zip(seen, numbers[end + 6 :], strict=True) if not good]
        row: dict[str, Any] = {"kind": "train", "step": state.global_step, "epoch": state.epoch + 1}
        row |= dict(zip(self._names, self._means(numbers[:end], taken), strict=True))
        row |= {"grad_norm": grad_norm, "skipped": int(skipped), "loss_scale": scale_now}
        for pattern, lr in zip(optimizer.patterns, optimizer.base_lrs, strict=True):
            row["lr/" + (re.sub(r"[^\w.-]", "", pattern).strip(".") or "all")] = lr * factor
        speed = self._speed()
        if self.tracker is not None:
            self.tracker.metrics(row)
            self.tracker.timings({"step": state.global_step, **speed})
        auroc = "" if self._auroc is None else f", AUROC {self._auroc:.4f}"
        speeds = f"{speed['images_per_s']:.1f} images/s, waiting {speed['wait_share']:.0%}"
        facts = f"loss {_text(row['loss'])}{auroc}, {speeds}"
        if speed["shards_wait_share"]:
            facts += f" ({speed['shards_wait_share']:.0%} for shards)"
        if self.bar.disable:
            images_left = (self.total_steps - state.global_step) * self.global_batch_size
            left = datetime.timedelta(seconds=round(images_left / max(speed["images_per_s"], 1e-9)))
            at = f"epoch {row['epoch']} step {state.global_step}/{self.total_steps}"
            ranks.say(f"{at}: {facts}, {left} left")
        else:
            self.bar.set_postfix_str(facts)
        state.window.zero_()
        optimizer.longest_streak.zero_()
        self._finite.clear()
        if skipped - self._skipped:
            self._report_skips(int(skipped - self._skipped), int(in_a_row), bad)
        self._skipped = skipped

    def log_epoch(self, validation: Validation | None) -> None:
        """Write the epoch's mean loss and, where there is one, the validation row. Collective."""
        state = self.learner.state
        *losses, taken = self.ranks.sum(state.epoch_sums).tolist()
        means = self._means(losses, taken)
        place = {"step": state.global_step, "epoch": state.epoch + 1}
        text = f"epoch {state.epoch + 1}/{self.epochs}: train loss {_text(means[0])}"
        if self.tracker is not None:
            names = [f"epoch_{name}" for name in self._names]
            self.tracker.metrics({"kind": "epoch", **place} | dict(zip(names, means, strict=True)))
        if validation is not None:
            text += f", validation loss {_text(validation.losses['total'])}, macro AUROC "
            text += f"{_text(validation.auroc_macro)} over {validation.labels_text} labels"
            self._auroc = validation.auroc_macro if math.isfinite(validation.auroc_macro) else None
            if self.tracker is not None:
                row = {f"validation/{name}": value for name, value in validation.row().items()}
                self.tracker.metrics({"kind": "validation", **place} | row)
                self.tracker.curves(state.global_step, "validation/roc", validation.roc, "false positives")
        self.ranks.say(text)
        self._since = time.perf_counter()  # validation is not training speed

    def _means(self, sums: list[float], taken: float) -> list[float | None]:
        """The mean over the steps taken, which each rank has counted."""
        return [value / (taken / self.ranks.world_size) if taken else None for value in sums]

    def _speed(self) -> dict[str, Any]:
        now, wait_s, awaited_s = time.perf_counter(), self.loader.wait_s, self.loader.shards_wait_s
        seconds = max(now - self._since, 1e-9)
        memory_bytes = peak_memory()
        if self.ranks.device.type == "cuda":
            memory_bytes = torch.cuda.max_memory_allocated(self.ranks.device)
        own = {"images_per_s": self._images / seconds, "wait_share": (wait_s - self._waited) / seconds}
        own["shards_wait_share"] = min(own["wait_share"], (awaited_s - self._awaited) / seconds)
        own["memory_bytes"] = memory_bytes
        new = [f"{item.image_name}: {item.reason}" for item in self.loader.skipped[self._num_bad :]]
        parts, bad = zip(*self.ranks.gather((own, new)), strict=True)
        self._num_bad += len(new)
        for rank, reasons in enumerate(bad):
            for reason in reasons:
                self.ranks.say(f"warning: rank {rank} leaves out {reason}")
        self._since, self._waited, self._awaited, self._images = now, wait_s, awaited_s, 0
        return {
            "images_per_s": sum(part["images_per_s"] for part in parts),
            "wait_share": max(part["wait_share"] for part in parts),
            "shards_wait_share": max(part["shards_wait_share"] for part in parts),
            **{f"rank{rank}/{name}": value for rank, part in enumerate(parts) for name, value in part.items()},
        }

    def _report_skips(self, new_skips: int, in_a_row: int, bad: list[str]) -> None:
        """Collective: every rank has seen the same counts."""
        where = [f"rank {rank}: {listed(names, 5)}" for rank, names in enumerate(self.ranks.gather(bad)) if names]
        cause = f"non-finite logits on {'; '.join(where)}" if where else "non-finite gradient of finite logits"
        step = self.learner.state.global_step
        self.ranks.say(f"warning: {new_skips} steps skipped on all ranks up to {step}: {cause}")
        if in_a_row >= self.max_skips:
            remedy = "look at these images, lower the learning rate, or use --precision bf16 or fp32; then --resume"
            raise UserError(f"{in_a_row} steps in a row were skipped, up to step {step}: {cause}; {remedy}")


def _text(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"
