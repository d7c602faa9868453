"""Train one recipe on one division: `accelerate launch -m cxrdist.train --div b [--model chexfound]`.

Shards in, a run folder out (see `cxrdist.runs.checkpoint`). What is learned depends on the recipe alone: global
batches, augmentation and validation are the same on any number of processes, and a run that is killed and resumed
continues bit for bit on the CPU. accelerate provides the process group, the device and DDP; order, loading, precision
and the optimizer step are the project's own.
"""

import contextlib
import dataclasses
import datetime
import functools
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from numpy.typing import NDArray
from torch import Tensor, nn

import cxrdist
from cxrdist import models, recipes
from cxrdist.augment.training import TrainingAugment
from cxrdist.cli import Parser, add_flags, at_least
from cxrdist.data import folds as split
from cxrdist.data import order
from cxrdist.data.fetch import fetch_shards
from cxrdist.data.loader import Loader
from cxrdist.distributed.precision import autocast, resolve_precision
from cxrdist.distributed.ranks import Control, Ranks, check_gpus_seen, check_processes, require_one_group, use_cpu
from cxrdist.errors import UserError, run_entry
from cxrdist.estimate import report as estimate
from cxrdist.files import folder_lock, write_atomically
from cxrdist.labels import LABELS
from cxrdist.models import weights as weight_files
from cxrdist.recipes import Recipe
from cxrdist.runs import checkpoint
from cxrdist.runs.checkpoint import FrozenBackbone
from cxrdist.scoring import metrics
from cxrdist.shards.index import ShardIndex, open_index
from cxrdist.shards.verify import verify
from cxrdist.training.ema import Ema
from cxrdist.training.losses import Loss, effective_pos_weight, focal_bce
from cxrdist.training.meter import LoopState, Meter
from cxrdist.training.optim import INITIAL_LOSS_SCALE, GuardedAdamW, lr_factors, param_groups
from cxrdist.training.tracking import Tracker, cut_metrics

T = TypeVar("T")
Rows = NDArray[np.int64]

MAX_DEVICE_BATCH_SIZE = 32  # of the default: what the published runs put through one 16 GB GPU
GROUP_ERRORS = re.compile(r"gloo|NCCL|[Cc]onnection (was )?(closed|reset|refused)|[Tt]imed out|[Ss]ocket|process group")


def parser() -> Parser:
    """The command line of `cxrdist.train`."""
    flags = Parser(prog="cxrdist.train", description=__doc__)
    flags.add_argument("--model", default="eva_x", help="eva_x, chexfound, eva_x_small, eva_x_tiny or a named recipe")
    shared = (
        "--div",
        "--shards",
        "--shards-url",
        "--out",
        "--init",
        "--resume",
        "--set",
        "--device-batch-size",
        "--precision",
    )
    add_flags(flags, *shared, "--expect-processes", "--max-hours")
    flags.add_argument(
        "--continue-init",
        action="store_true",
        help="go on after the epoch of --init's file (a published modelN.pth): its EMA and optimizer state too",
    )
    flags.add_argument(
        "--folds", type=at_least(2), default=5, metavar="N", help="patient-grouped folds (with --validate-fold)"
    )
    flags.add_argument(
        "--validate-fold", type=at_least(0), metavar="K", help="hold out fold K (from 0) and validate on it"
    )
    flags.add_argument(
        "--log-every", type=at_least(1), default=50, metavar="N", help="optimizer steps between logged rows"
    )
    flags.add_argument(
        "--checkpoint-minutes",
        type=at_least(0, float),
        default=15.0,
        metavar="M",
        help="minutes between step checkpoints; 0: each step",
    )
    flags.add_argument("--keep-steps", type=at_least(1), default=2, metavar="K", help="step checkpoints that are kept")
    flags.add_argument(
        "--timeout-s", type=at_least(1, float), default=600.0, metavar="S", help="a process silent for so long is lost"
    )
    flags.add_argument(
        "--wandb", choices=("auto", "online", "offline", "off"), default="auto", help="auto: if logged in"
    )
    flags.add_argument(
        "--threads", type=at_least(0), metavar="N", help="decode threads per process (default: its share of cores)"
    )
    flags.add_argument("--grad-checkpointing", action="store_true", help="less memory, about a third more compute")
    flags.add_argument("--compile", action="store_true", help="torch.compile the model")
    flags.add_argument(
        "--max-skips", type=at_least(1), default=20, metavar="N", help="stop after N skipped steps in a row"
    )
    flags.add_argument(
        "--max-steps", type=at_least(1), metavar="N", help="checkpoint and stop after N steps, to try things out"
    )
    flags.add_argument(
        "--scale-lr",
        choices=("none", "sqrt", "linear"),
        default="none",
        help="scale the learning rates with a global batch that --set changes (the EMA decay is always scaled)",
    )
    flags.add_argument("--dry-run", action="store_true", help="say what the run needs (memory, hours, disk) and stop")
    flags.add_argument("--on-bad", choices=("error", "skip"), default="error", help="what an undecodable image does")
    flags.add_argument(
        "--max-unreadable",
        type=at_least(0),
        default=100,
        metavar="N",
        help="with --on-bad skip: stop when a process meets more undecodable images than this (default 100)",
    )
    return flags


def main(argv: list[str] | None = None) -> None:
    """Check, build, restore, train. Every mistake that can be seen beforehand is named before anything is written."""
    args = parser().parse_args(argv)
    check_processes(args.expect_processes)
    published = recipes.recipe_for(args.model, args.div)
    recipe = recipes.with_overrides(published, args.overrides)
    recipe = recipes.with_scaled_lrs(recipe, recipe.global_batch_size / published.global_batch_size, args.scale_lr)
    shards = args.shards or Path("shards") / f"div_{args.div}"
    run = args.out or Path("runs") / f"{recipe.name}_{args.div}"
    if args.dry_run:
        sizes = {"device_batch_size": args.device_batch_size, "precision": args.precision}
        if os.environ.get("RANK", "0") == "0":
            print(estimate.dry_run(recipe, shards, run, **sizes))
        return
    check_gpus_seen()
    if args.shards_url:  # before the process group, whose timeout is shorter than a download
        fetch_shards(args.shards_url, shards, "train", args.div)

    with contextlib.ExitStack() as stack:
        ranks = stack.enter_context(_process_group(args.timeout_s))
        precision, why = ranks.together(lambda: resolve_precision(args.precision, ranks.device))
        index = ranks.together(lambda: open_index(shards, "train", args.div))
        ranks.first(lambda: verify(shards, "train", args.div).num_images)  # every tar header, by one reader
        facts, train_rows, validation_rows, folds = ranks.together(lambda: _choose_rows(index, recipe, run, args))
        ranks.together(lambda: stack.enter_context(folder_lock(run)) if ranks.rank == 0 else None)
        restored = ranks.first(lambda: _find_start(run, recipe, facts, resume=args.resume, say=ranks.say))
        if restored.finished:
            ranks.say(f"{run} is finished: all {recipe.epochs} epochs are trained; nothing to do")
            return

        device_batch_size = args.device_batch_size or _default_device_batch(recipe, precision, ranks)
        accum_steps = order.accum_steps(recipe.global_batch_size, device_batch_size, ranks.world_size)
        torch.manual_seed(recipe.seed)
        model, frozen = ranks.together(lambda: _build(recipe, args.init, run, restored))
        groups = ranks.together(lambda: param_groups(model, recipe.groups))
        ranks.say(recipes.to_json(recipe))
        if recipe.global_batch_size != published.global_batch_size:
            changed = "; ".join(recipes.differences(published, recipe))
            ranks.say(f"another global batch than the recipe's (learning rates: --scale-lr {args.scale_lr}): {changed}")
        ranks.say(
            f"{ranks.world_size} processes on {ranks.device.type}, {precision} ({why}); {len(train_rows):,} images, "
            f"{recipe.global_batch_size} a step = {ranks.world_size} x {accum_steps} x up to {device_batch_size}"
        )
        ranks.say(f"parameters: {models.count_parameters(model, recipe.groups)}")
        if args.grad_checkpointing:
            ranks.together(lambda: _checkpoint_gradients(model))
        if args.compile:
            model.compile()
        stack.enter_context(_named_failures(device_batch_size, ranks))  # NCCL connects in `prepare`
        parallel = ranks.prepare(model.to(ranks.device))
        num_steps = order.num_steps(len(train_rows), recipe.global_batch_size)
        optimizer = GuardedAdamW(
            groups,
            betas=recipe.betas,
            factors=lr_factors(recipe.lr_schedule, num_steps * recipe.epochs, recipe.warmup_steps),
            clip_grad_norm=recipe.clip_grad_norm,
            loss_scale=INITIAL_LOSS_SCALE if precision == "fp16" else None,
        )
        ema = Ema(model, recipe.ema_decay, recipe.ema_ramp, frozenset(models.frozen_names(model)))
        state = LoopState(ranks.device)
        if args.continue_init and restored.folder is None:
            ranks.together(functools.partial(_continue_init, args.init, recipe, optimizer, ema, state, num_steps))
            ranks.say(f"going on after epoch {state.epoch} of --init, with its EMA and optimizer state")
        if restored.folder is not None:
            ranks.together(functools.partial(_restore, restored.folder, model, optimizer, ema, state, ranks))
        if frozen is None and models.frozen_names(model):
            frozen = ranks.first(lambda: checkpoint.write_frozen(model, run))
        ranks.first(
            lambda: _write_start(run, recipe, facts, index, folds, _environment(ranks, precision, device_batch_size))
        )
        tracker: Tracker | None = None
        if ranks.rank == 0:
            config = {"recipe": dataclasses.asdict(recipe)} | _environment(ranks, precision, device_batch_size)
            lost = cut_metrics(run, restored.metrics_bytes)
            if lost is not None:
                ranks.say(f"warning: {lost}")
            tracker = stack.enter_context(Tracker(run, wandb_mode=args.wandb, config=config))
        loader = stack.enter_context(
            Loader(index, ranks.device, num_threads=args.threads, on_bad=args.on_bad, max_bad=args.max_unreadable)
        )
        training = Training(
            recipe=recipe,
            run=run,
            index=index,
            train_rows=train_rows,
            validation_rows=validation_rows,
            ranks=ranks,
            model=model,
            parallel=parallel,
            optimizer=optimizer,
            ema=ema,
            state=state,
            loader=loader,
            tracker=tracker,
            precision=precision,
            device_batch_size=device_batch_size,
            frozen=frozen,
            facts=facts,
            log_every=args.log_every,
            checkpoint_s=args.checkpoint_minutes * 60.0,
            keep_steps=args.keep_steps,
            max_s=None if args.max_hours is None else args.max_hours * 3600.0,
            max_steps=args.max_steps,
            max_skips=args.max_skips,
        )
        training.run_epochs()


def _default_device_batch(recipe: Recipe, precision: str, ranks: Ranks) -> int:
    """A rank's share of the global batch, at most 32, in equal parts that fit the GPU with the least free memory."""
    most = min(MAX_DEVICE_BATCH_SIZE, -(-recipe.global_batch_size // ranks.world_size))
    if ranks.device.type != "cuda":
        return most
    free_bytes = min(ranks.gather(torch.cuda.mem_get_info(ranks.device)[0]))
    fits = ranks.together(lambda: estimate.fitting_batch(recipe, precision, free_bytes, ranks.world_size))
    return min(most, fits)


@dataclass(frozen=True)
class Start:
    """What a run folder offers to begin with."""

    folder: Path | None = None  # the step checkpoint to restore
    metrics_bytes: int = 0
    frozen: FrozenBackbone | None = None
    finished: bool = False


@dataclass(frozen=True, kw_only=True)
class Training:
    """Everything the loop uses; `run_epochs` is the loop."""

    recipe: Recipe
    run: Path
    index: ShardIndex
    train_rows: Rows
    validation_rows: Rows | None
    ranks: Ranks
    model: nn.Module
    parallel: nn.Module  # the same model, its gradients averaged over the ranks
    optimizer: GuardedAdamW
    ema: Ema
    state: LoopState
    loader: Loader
    tracker: Tracker | None  # on rank 0
    precision: str
    device_batch_size: int
    frozen: FrozenBackbone | None
    facts: dict[str, Any]
    log_every: int
    checkpoint_s: float
    keep_steps: int
    max_s: float | None
    max_steps: int | None
    max_skips: int

    def run_epochs(self) -> None:
        """Train from where `state` stands to the last epoch, or until a signal or the time limit ends it early."""
        recipe, ranks, state, optimizer = self.recipe, self.ranks, self.state, self.optimizer
        augment = TrainingAugment(recipe.image_size, recipe.augment, recipe.seed, holes=recipe.holes)
        criterion = self._criterion()
        num_steps = order.num_steps(len(self.train_rows), recipe.global_batch_size)
        meter = Meter(
            recipe, ranks, optimizer, state, self.loader, self.tracker, num_steps=num_steps, max_skips=self.max_skips
        )
        control = Control(ranks, self.checkpoint_s, self.max_s, self.max_steps)
        sums = torch.zeros(3, dtype=torch.float64, device=ranks.device)  # of the step in work
        self._show_samples(augment)
        with control.signals(), meter:
            for epoch in range(state.epoch, recipe.epochs):
                self.model.train()
                first_in_step = True
                for batch in self.loader.batches(self._plan(epoch)):
                    if first_in_step:
                        # Dropout is a function of (seed, step, rank): a cursor is all that resuming needs.
                        torch.manual_seed(_step_seed(recipe.seed, state.global_step, ranks.rank))
                    with ranks.accumulating(self.parallel, sync=batch.last):
                        images = augment(batch.images, batch.keys, batch.epoch)
                        with autocast(self.precision, ranks.device):
                            logits = self.parallel(images)
                        loss = criterion(logits, batch.targets)
                        optimizer.backward(loss.total, batch.weight)
                    sums += torch.stack(loss).detach() * (batch.weight / ranks.world_size)
                    meter.saw(batch, logits)
                    first_in_step = batch.last
                    if not batch.last:
                        continue
                    skipped = optimizer.step()
                    self.ema.update(skipped)
                    taken = torch.where(skipped.bool(), 0.0, torch.cat([sums, torch.ones_like(sums[:1])]))
                    state.window += taken
                    state.epoch_sums += taken
                    sums.zero_()
                    state.step, state.global_step = batch.step + 1, state.global_step + 1
                    if state.global_step % self.log_every == 0 or state.step == num_steps:
                        meter.log()  # the only place where the host waits for the device
                    meter.advance()
                    decision = control.after_step(state.global_step)
                    if decision.save and state.step < num_steps:
                        self.save_step()
                    if decision.stop:
                        if not decision.save or state.step == num_steps:
                            self.save_step()
                        again = "the same command with --resume goes on"
                        ranks.say(f"stopped after step {state.global_step} ({decision.stop}); {again}")
                        return
                self.save_step()
                validation = self.validate()
                meter.log_epoch(validation)
                self.save_epoch(validation)
                state.epoch, state.step = epoch + 1, 0
                state.epoch_sums.zero_()
        ranks.say(f"finished: {recipe.epochs} epochs, checkpoints in {self.run / 'checkpoints'}")

    def validate(self) -> dict[str, Any] | None:
        """Loss and AUROC of the EMA weights on the held-out fold, each image once; a row for metrics.jsonl, or None.

        Batches do not depend on the number of ranks; scores are merged once, by row.
        """
        rows, ranks, recipe = self.validation_rows, self.ranks, self.recipe
        if rows is None or self.index.targets is None:
            return None
        resize = TrainingAugment(recipe.image_size, "none", recipe.seed)
        own_rows, own_logits = [], []
        self.model.eval()
        with self.ema.applied(), torch.inference_mode():
            for batch in self.loader.batches(
                order.eval_batches(rows, self.device_batch_size, ranks.rank, ranks.world_size)
            ):
                with autocast(self.precision, ranks.device):
                    logits = self.model(resize(batch.images, batch.keys, 0))
                own_rows.append(batch.rows)
                own_logits.append(logits.float())
        mine = torch.cat(own_logits).cpu().numpy() if own_logits else np.empty((0, len(LABELS)), np.float32)
        parts = ranks.gather((np.concatenate([np.empty(0, np.int64), *own_rows]), mine))
        seen = np.concatenate([part[0] for part in parts])
        by_row = np.argsort(seen, kind="stable")
        seen, logits_table = seen[by_row], np.concatenate([part[1] for part in parts])[by_row]
        if self.loader.skipped == [] and not np.array_equal(seen, np.sort(rows)):
            raise AssertionError("validation did not see each image exactly once")
        targets = self.index.targets[seen]
        loss = self._criterion(torch.device("cpu"))(torch.from_numpy(logits_table), torch.from_numpy(targets))
        probs = 1.0 / (1.0 + np.exp(-logits_table.astype(np.float64)))
        per_label = metrics.auroc_per_label(targets, probs)
        macro, num_defined = metrics.macro(per_label)
        if self.tracker is not None and self.tracker.has_dashboard:
            self.tracker.curves(
                self.state.global_step, "validation/roc", _roc_curves(targets, probs), "false positives"
            )
        return {
            "images": len(seen),
            "loss": float(loss.total),
            "focal": float(loss.focal),
            "bce": float(loss.bce),
            "auroc_macro": macro,
            "auroc_labels": f"{num_defined} of {len(LABELS)}",
            **{f"auroc/{label}": float(value) for label, value in zip(LABELS, per_label, strict=True)},
        }

    def save_step(self) -> None:
        """Write all that resuming needs as `step_<N>`. Collective: every rank calls, rank 0 writes."""
        state, ranks = self.state, self.ranks
        sums = ranks.gather((state.window.cpu(), state.epoch_sums.cpu()))

        def write() -> None:
            tensors = {
                "model": models.trained_state_dict(self.model),
                "ema": self.ema.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "loop": {
                    "window": torch.stack([own[0] for own in sums]),
                    "epoch_sums": torch.stack([own[1] for own in sums]),
                    "ema_num_updates": self.ema.num_updates,
                },
            }
            document = {
                "format_version": checkpoint.FORMAT_VERSION,
                "epoch": state.epoch,
                "step": state.step,
                "global_step": state.global_step,
                "metrics_bytes": self.tracker.metrics_bytes() if self.tracker else 0,
                "world_size": ranks.world_size,
                "device_batch_size": self.device_batch_size,
                "precision": self.precision,
                "data": self.facts,
                "frozen": None if self.frozen is None else dataclasses.asdict(self.frozen),
            }
            folder = self.run / "checkpoints" / f"step_{state.global_step}"
            checkpoint.write_checkpoint(folder, tensors, {"state": document})
            checkpoint.keep_newest_steps(self.run, self.keep_steps)

        ranks.first(write)

    def save_epoch(self, validation: dict[str, Any] | None) -> None:
        """Write `epoch_<EE>`, what inference reads. Collective: every rank calls, rank 0 writes."""

        def write() -> None:
            weights = models.trained_state_dict(self.model)
            meta = {
                "format_version": checkpoint.FORMAT_VERSION,
                "epoch": self.state.epoch + 1,
                "global_step": self.state.global_step,
                "recipe": self.recipe.name,
                "model": self.recipe.model,
                "div": self.recipe.div,
                "labels": LABELS,
                "data": self.facts,
                "validation": validation
                and {name: validation[name] for name in ("loss", "auroc_macro", "auroc_labels")},
                "frozen": None if self.frozen is None else dataclasses.asdict(self.frozen),
            }
            folder = self.run / "checkpoints" / f"epoch_{self.state.epoch + 1:02d}"
            tensors = {"model": weights, "ema": weights | self.ema.state_dict()}
            checkpoint.write_checkpoint(folder, tensors, {"meta": meta})

        self.ranks.first(write)

    def _show_samples(self, augment: TrainingAugment) -> None:
        """What the model is about to see, on the dashboard: four images of the first global batch, rank 0 only."""
        if self.tracker is None or not self.tracker.has_dashboard:
            return
        epoch = min(self.state.epoch, self.recipe.epochs - 1)
        rows = order.epoch_order(self.train_rows, self.recipe.seed, epoch)[:4]
        for batch in self.loader.batches([rows]):
            levels = augment.levels(batch.images, batch.keys, epoch)
            pictures = levels.permute(0, 2, 3, 1).squeeze(-1).to(torch.uint8).cpu().numpy()
            names = [str(self.index.image_names[row]) for row in batch.rows]
            self.tracker.images(self.state.global_step, "augmented samples", pictures, names)

    def _plan(self, epoch: int) -> Iterator[order.MicroBatch]:
        return order.train_batches(
            self.train_rows,
            seed=self.recipe.seed,
            epoch=epoch,
            global_batch_size=self.recipe.global_batch_size,
            device_batch_size=self.device_batch_size,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            start_step=self.state.step,
        )

    def _criterion(self, device: torch.device | None = None) -> Callable[[Tensor, Tensor | None], Loss]:
        recipe = self.recipe
        if self.index.targets is None:
            raise UserError(f"{self.index.folder}: split {self.index.split!r} has no labels to train on")
        positives = torch.from_numpy(self.index.targets[self.train_rows].sum(axis=0))
        pos_weight = effective_pos_weight(
            positives, len(self.train_rows), recipe.pos_weight_beta, recipe.pos_weight_cap
        ).to(device or self.ranks.device)
        return functools.partial(
            focal_bce,
            pos_weight=pos_weight,
            focal_weight=recipe.focal_weight,
            focal_alpha=recipe.focal_alpha,
            focal_gamma=recipe.focal_gamma,
            bce_weight=recipe.bce_weight,
        )


@contextlib.contextmanager
def _process_group(timeout_s: float) -> Iterator[Ranks]:
    timeout = datetime.timedelta(seconds=timeout_s)
    # DDP rebuilds its buckets after a session's first step, and with three ranks or more a ring's sum depends on the
    # place in the bucket: a resumed run would differ in the last bit. Looking for unused parameters keeps the buckets.
    keep_buckets = use_cpu() and int(os.environ.get("WORLD_SIZE", "1")) > 2
    handlers = [
        # the gloo group of Ranks shall notice first: NCCL's watchdog ends the process without a word of ours
        InitProcessGroupKwargs(timeout=timeout if use_cpu() else timeout + datetime.timedelta(minutes=5)),
        DistributedDataParallelKwargs(
            broadcast_buffers=False, gradient_as_bucket_view=True, find_unused_parameters=keep_buckets
        ),
    ]
    # precision is resolved and applied here, so accelerate is told to leave it alone
    with _named_group_failures():
        accelerator = Accelerator(cpu=use_cpu(), mixed_precision="no", kwargs_handlers=handlers)
        ranks = Ranks(accelerator, timeout)
    require_one_group(ranks.world_size)
    try:
        yield ranks
    finally:
        if sys.exc_info()[0] is None:
            accelerator.end_training()


@contextlib.contextmanager
def _named_failures(device_batch_size: int, ranks: Ranks) -> Iterator[None]:
    """Turn what the device and the process group throw into a line that says what to do."""
    try:
        with _named_group_failures():
            yield
    except torch.OutOfMemoryError as error:
        smaller = max(1, device_batch_size // 2)
        raise UserError(
            f"out of memory on {ranks.device} with {device_batch_size} images at once; use --device-batch-size "
            f"{smaller} (the same images a step) or --grad-checkpointing ({str(error).splitlines()[0]})"
        ) from error


@contextlib.contextmanager
def _named_group_failures() -> Iterator[None]:
    """Turn a lost, hung or unreachable process into a line that names the network settings and the next step."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        if not isinstance(error, dist.DistError) and not GROUP_ERRORS.search(str(error)):
            raise
        interfaces = {
            name: os.environ.get(name, "not set")
            for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "MASTER_ADDR")
        }
        shown = ", ".join(f"{name} {value}" for name, value in interfaces.items())
        raise UserError(
            f"another process ended or stopped answering ({str(error).splitlines()[0][:200]}); the first error of any "
            f"rank is the cause; between machines check the network ({shown}); then run the same command with --resume"
        ) from error


def _choose_rows(
    index: ShardIndex, recipe: Recipe, run: Path, args: Any
) -> tuple[dict[str, Any], Rows, Rows | None, NDArray[np.int64] | None]:
    """What the run is trained on: facts to compare at resume, training rows, validation rows, every image's fold."""
    if index.targets is None:
        raise UserError(f"{index.folder}: split {index.split!r} has no labels to train on")
    facts: dict[str, Any] = {
        "div": index.div,
        "split": index.split,
        "shards": index.fingerprint,
        "images": len(index),
        "positives": {label: int(count) for label, count in zip(LABELS, index.targets.sum(axis=0), strict=True)},
        "folds": None,
        "validate_fold": None,
    }
    everything = np.arange(len(index), dtype=np.int64)
    if args.validate_fold is None:
        return facts, everything, None, None
    if not 0 <= args.validate_fold < args.folds:
        raise UserError(f"--validate-fold {args.validate_fold} is not possible: folds run from 0 to {args.folds - 1}")
    facts |= {"folds": args.folds, "validate_fold": args.validate_fold}
    recorded = None
    with contextlib.suppress(OSError, ValueError):
        recorded = json.loads((run / "data.json").read_text(encoding="utf-8"))
    if args.resume and recorded == facts:  # a run goes on with the split it has, not with what would be drawn today
        fold_of = split.read_split(run / "split.csv")
        return facts, *split.rows_of_fold(index.patients, fold_of, args.validate_fold), None
    folds = split.assign_folds(index.patients, index.targets, args.folds, recipe.seed)
    held_out = folds == args.validate_fold
    return facts, everything[~held_out], everything[held_out], folds


def _find_start(run: Path, recipe: Recipe, facts: dict[str, Any], *, resume: bool, say: Callable[[str], None]) -> Start:
    """What to begin with. Raises UserError when the folder is taken, or holds a run that differs in any way."""
    if not (run / "recipe.json").exists():
        if any((run / "checkpoints").glob("*")):
            raise UserError(f"{run} has checkpoints but no recipe.json: not a whole run folder; give another --out")
        return Start()
    finished_folder = run / "checkpoints" / f"epoch_{recipe.epochs:02d}"
    if not resume:
        state = (
            "holds a finished run" if finished_folder.exists() else "holds an unfinished run: --resume goes on with it"
        )
        raise UserError(f"{run} {state}; give another --out for a new one")
    changed = recipes.differences(checkpoint.read_recipe(run), recipe)
    if changed:
        raise UserError(
            f"{run} was started with another recipe: {'; '.join(changed)}; undo that, or give another --out"
        )
    try:
        before = json.loads((run / "data.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{run / 'data.json'} cannot be read ({error}): not a whole run folder; give another --out"
        ) from None
    _compare_facts(run, before, facts)
    if _is_whole(finished_folder):
        return Start(finished=True)
    folder, warnings = checkpoint.newest_step(run)
    for warning in warnings:
        say(f"warning: {warning}")
    if folder is None:
        say(f"{run} has no whole checkpoint yet: starting from the beginning")
        return Start()
    document = checkpoint.read_document(folder, "state")
    frozen = None if document["frozen"] is None else FrozenBackbone(**document["frozen"])
    say(f"resuming from {folder}")
    return Start(folder, document["metrics_bytes"], frozen)


def _compare_facts(run: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    for name, shown in (
        ("div", "division"),
        ("split", "split"),
        ("folds", "--folds"),
        ("validate_fold", "--validate-fold"),
    ):
        if before[name] != now[name]:
            raise UserError(
                f"{run} was started with {shown} {before[name]}, not {now[name]}; give another --out for that"
            )
    if before["shards"] != now["shards"]:
        labels = [
            f"{label} {before['positives'][label]} -> {now['positives'][label]}"
            for label in LABELS
            if before["positives"][label] != now["positives"][label]
        ]
        differs = f"positives differ: {', '.join(labels)}" if labels else "same counts, other images or labels"
        raise UserError(
            f"{run} was started on another shard set ({before['images']:,} -> {now['images']:,} images; {differs}); "
            "give the same shards, or another --out"
        )


def _is_whole(folder: Path) -> bool:
    try:
        checkpoint.check(folder)
    except UserError:
        return False
    return True


def _build(recipe: Recipe, init: str | None, run: Path, start: Start) -> tuple[nn.Module, FrozenBackbone | None]:
    """The model with its starting weights, and the file its frozen backbone was read from (None if it was not)."""
    model = checkpoint.recipe_model(recipe)
    if start.folder is not None:
        if start.frozen is not None:
            checkpoint.load_frozen(model, run, start.frozen)
        return model, start.frozen
    if init == "random":
        return model, None
    path = Path(init) if init is not None else weight_files.default_init_path(recipe.model)
    report = weight_files.load_init(model, path)
    if os.environ.get("RANK", "0") == "0":
        print(report, flush=True)
    if not models.frozen_names(model):
        return model, None
    for file in weight_files.init_files(recipe.model, path):
        if any(name.startswith("backbone.") for name in weight_files.read_weights(file).tensors):
            return model, FrozenBackbone(str(file.resolve()), weight_files.file_sha256(file))
    raise UserError(f"--init {path}: holds no backbone for {recipe.model}; give the official backbone's file as well")


def _continue_init(
    init: str | None, recipe: Recipe, optimizer: GuardedAdamW, ema: Ema, state: LoopState, num_steps: int
) -> None:
    """EMA, optimizer state and epoch of a published training file; the weights are those already loaded from it."""
    if init in (None, "random"):
        raise UserError("--continue-init goes with --init FILE, the file to go on from")
    found = weight_files.read_weights(*weight_files.init_files(recipe.model, Path(str(init))))
    parts = {"EMA": found.ema, "optimizer state": found.optimizer, "epoch": found.epoch}
    missing = [name for name, part in parts.items() if part is None]
    if found.ema is None or found.optimizer is None or found.epoch is None:
        raise UserError(
            f"--continue-init: {init} holds no {' and no '.join(missing)}; leave the flag out to start from it"
        )
    if found.epoch >= recipe.epochs:
        raise UserError(
            f"--continue-init: {init} is of epoch {found.epoch} of {recipe.epochs}: --set epochs=N for more"
        )
    num_updates = float(found.epoch * num_steps)
    counters = dict.fromkeys(("num_applied", "num_skipped", "skipped_in_a_row", "grad_norm", "_good_steps"), 0.0)
    moments = {f"{kind}/{name}": value for name, kinds in found.optimizer.items() for kind, value in kinds.items()}
    try:
        ema.load_state_dict({name: found.ema[name] for name in ema.state_dict()}, num_updates)
        optimizer.load_state_dict(
            moments
            | {f"counter/{name}": torch.tensor(value, dtype=torch.float64) for name, value in counters.items()}
            | {"counter/num_applied": torch.tensor(num_updates, dtype=torch.float64)}
        )
    except (KeyError, RuntimeError) as error:
        raise UserError(f"--continue-init: {init} does not fit this recipe ({error}); leave the flag out") from None
    state.epoch, state.global_step = found.epoch, found.epoch * num_steps


def _checkpoint_gradients(model: nn.Module) -> None:
    if not hasattr(model, "set_grad_checkpointing"):
        raise UserError("--grad-checkpointing: this model's backbone is frozen and keeps no activations; leave it out")
    model.set_grad_checkpointing(True)  # type: ignore[operator]


def _restore(folder: Path, model: nn.Module, optimizer: GuardedAdamW, ema: Ema, state: LoopState, ranks: Ranks) -> None:
    """Everything from a step checkpoint that was found whole, or a UserError."""
    document = checkpoint.read_document(folder, "state")
    loop = checkpoint.read_tensors(folder, "loop")
    try:
        models.load_trained_state_dict(model, checkpoint.read_tensors(folder, "model"), str(folder))
        optimizer.load_state_dict(checkpoint.read_tensors(folder, "optimizer"))
        ema.load_state_dict(checkpoint.read_tensors(folder, "ema"), float(loop["ema_num_updates"]))
    except KeyError as error:
        raise UserError(f"{folder} does not fit this recipe and model ({error}); it is of another version") from None
    state.epoch, state.step, state.global_step = document["epoch"], document["step"], document["global_step"]
    for name in ("window", "epoch_sums"):
        sums = loop[name]
        if len(sums) == ranks.world_size:
            own = sums[ranks.rank]
        else:
            # sums over ranks are what counts; the last entry counts steps and is the same on every rank
            own = sums.sum(dim=0) if ranks.rank == 0 else torch.zeros_like(sums[0])
            own[3] = sums[0, 3]
        setattr(state, name, own.to(ranks.device))


def _write_start(
    run: Path,
    recipe: Recipe,
    facts: dict[str, Any],
    index: ShardIndex,
    folds: NDArray[np.int64] | None,
    environment: dict[str, Any],
) -> None:
    """What the run is and where it runs; a resumed run adds its environment to the list. recipe.json comes last."""
    checkpoint.remove_unfinished(run)
    path = run / "environment.json"
    sessions = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    write_atomically(path, json.dumps([*sessions, environment], indent=1))
    if (run / "recipe.json").exists():
        return
    if folds is not None:
        split.write_split(run / "split.csv", index.patients, folds)
    write_atomically(run / "data.json", json.dumps(facts, indent=1))
    write_atomically(run / "recipe.json", recipes.to_json(recipe))


def _roc_curves(targets: NDArray[np.float32], probs: NDArray[np.float64]) -> dict[str, tuple[list[float], list[float]]]:
    """At most 200 points of each label's ROC, for labels that have one."""
    curves = {}
    for column, label in enumerate(LABELS):
        if 0 < targets[:, column].sum() < len(targets):
            false_positives, true_positives = metrics.roc_curve(targets[:, column], probs[:, column])
            chosen = np.unique(np.linspace(0, len(false_positives) - 1, 200).astype(int))
            curves[label] = (false_positives[chosen].tolist(), true_positives[chosen].tolist())
    return curves


def _step_seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _environment(ranks: Ranks, precision: str, device_batch_size: int) -> dict[str, Any]:
    packages = ("torch", "timm", "accelerate", "kornia", "numpy", "safetensors", "simplejpeg")
    commit = ""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    cuda = ranks.device.type == "cuda"
    return {
        "cxrdist": cxrdist.__version__,
        "commit": commit,
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
        "device": torch.cuda.get_device_name(ranks.device) if cuda else f"CPU, {platform.machine()}",
        "world_size": ranks.world_size,
        "device_batch_size": device_batch_size,
        "precision": precision,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


if __name__ == "__main__":
    raise SystemExit(run_entry(main))
