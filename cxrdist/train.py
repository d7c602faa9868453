"""Train one recipe on one shard set: `accelerate launch -m cxrdist.train --task b [--model chexfound]`.

Shards in, a run folder out (see `cxrdist.runs`). What is learned depends on the recipe alone: global batches,
augmentation and validation are the same on any number of processes, and a run that is killed and resumed continues bit
for bit on the CPU. accelerate provides the process group, the device and DDP; order, loading, precision and the
optimizer step are the project's own.
"""

import contextlib
import dataclasses
import functools
from argparse import Namespace
from pathlib import Path

import torch

from cxrdist import recipes
from cxrdist.augment.mixing import mixing_of
from cxrdist.augment.pipeline import TrainingAugment
from cxrdist.cli import run_entry
from cxrdist.data import folds, order, selection
from cxrdist.data.loader import Loader
from cxrdist.distributed import environment
from cxrdist.distributed.control import Control
from cxrdist.distributed.group import check_gpus_seen, out_of_memory_named, process_group
from cxrdist.distributed.precision import DTYPES, autocast, hardware_of, resolve_precision
from cxrdist.distributed.ranks import Ranks
from cxrdist.errors import UserError
from cxrdist.estimate.count import MAX_DEVICE_BATCH_SIZE, fitting_batch
from cxrdist.estimate.report import dry_run
from cxrdist.files import folder_lock
from cxrdist.flags.train import NO_FOLD, NUM_FOLDS, parser, refuse_unused_folds
from cxrdist.models import architecture_of, recipe_for
from cxrdist.models.compiled import graphs_told
from cxrdist.models.weights import fit, layouts
from cxrdist.recipes import Recipe
from cxrdist.runs import checkpoint, member, start
from cxrdist.runs.checkpoint import RunFolder, run_id
from cxrdist.runs.documents import Environment, EpochMeta, Facts, StepState, StoredImages
from cxrdist.shard_sets import ShardSet, find_shards, training_streams
from cxrdist.shards.index import ShardIndex, read_meta, task_of
from cxrdist.task import Task
from cxrdist.training import summary
from cxrdist.training.batch_norm import BatchNorms
from cxrdist.training.ema import Ema
from cxrdist.training.learner import Learner, LoopState
from cxrdist.training.losses import label_sums, make_criterion, part_names
from cxrdist.training.meter import Meter
from cxrdist.training.optim import INITIAL_LOSS_SCALE, GuardedAdamW, groups_of, lr_factors, rates_table
from cxrdist.training.tracking import Tracker, cut_metrics, show_samples
from cxrdist.training.validate import validate

AGAIN = "run the same command with --resume"


def main(argv: list[str] | None = None) -> None:
    """Check, build, restore, train. Every mistake that can be seen beforehand is named before anything is written."""
    args = parser().parse_args(argv)
    environment.check_processes(args.expect_processes)
    at = find_shards(args)
    if not args.dry_run:
        check_gpus_seen()
    at.fetch("train", args.task)  # before the process group, whose timeout is shorter than a download
    shards, task = at.folder, args.task or task_of(at.folder)
    refuse_unused_folds(args, task)
    if selection.validates_on_split(args.validate_fold, task):
        at.fetch("valid", task, optional=True)
    num_images = read_meta(shards, "train", task).counts.images if (shards / "train.json").is_file() else None
    published, recipe = asked_for(args, task.name, num_images)
    architecture = architecture_of(recipe.model)  # an unknown name ends here
    run = args.out or Path("runs") / f"{recipe.name}_{task.name}"
    if args.dry_run:
        if environment.rank() == 0:
            names = ("device_batch_size", "precision", "grad_checkpointing")
            dry_run(recipe, task, shards, run, **{name: getattr(args, name) for name in names})
        return
    resumes = args.resume and (run / "recipe.json").exists()
    if not resumes and args.init not in ("random", "timm"):  # before a model is made: weights that are not there
        fit.init_files(architecture, None if args.init is None else Path(args.init))
    with process_group(args.timeout_s, then=AGAIN) as ranks, contextlib.ExitStack() as stack:
        if published.global_batch_size != recipe.global_batch_size:
            changed = "; ".join(recipes.differences(published, recipe))
            ranks.say(f"another global batch than the recipe's (learning rates: --scale-lr {args.scale_lr}): {changed}")
        train(args, recipe, task, at, run, ranks, stack)


def asked_for(args: Namespace, task: str, num_images: int | None) -> tuple[Recipe, Recipe]:
    """The recipe that the flags name, and what they make of it. UserError for a flag that no recipe can follow."""
    own = args.recipe and args.recipe.build(task)  # not fitted to the set: its numbers are its author's
    published: Recipe = own or recipe_for(args.model, task, num_images)
    edits = [f"augment={edit}" for edit in args.augment]
    edits += [f"{name}={value}" for name in ("train", "epochs") if (value := getattr(args, name)) is not None]
    recipe = recipes.with_overrides(published, args.overrides + edits)
    if args.lr is not None:
        return published, recipes.with_largest_lr(recipe, args.lr)
    ratio = recipe.global_batch_size / published.global_batch_size
    return published, recipes.with_scaled_lrs(recipe, ratio, args.scale_lr)


def train(
    args: Namespace, recipe: Recipe, task: Task, at: ShardSet, run: Path, ranks: Ranks, stack: contextlib.ExitStack
) -> None:
    """Build what learns, restore it where the run stood, and train to the last epoch, a signal or a time limit."""
    # What is trained on, and where it begins
    found = ranks.gather(hardware_of(ranks.device))
    with ranks.agree():
        precision, why = resolve_precision(args.precision, found)
    index = at.open_together(ranks, "train", task)
    has_valid = ranks.on_main(selection.validates_on_split, args.validate_fold, task, at.folder)
    valid = at.open_together(ranks, "valid", task) if has_valid else None
    facts, rows = ranks.on_main(choose_data, index, valid, recipe, run, args)
    ranks.say("\n".join(ranks.on_main(selection.describe_data, index, rows, valid)))
    sums = ranks.on_main(label_sums, selection.targets_in_pieces(index, rows.train))
    holder = ""
    with ranks.agree():
        if ranks.rank == 0:
            start.check_folder(run, at.folder)
            holder = stack.enter_context(folder_lock(run))
    begin = ranks.on_main(start.find_start, run, recipe, facts, resume=args.resume, say=ranks.say, own=args.recipe)
    if begin.finished:
        ranks.say(f"{run} is finished: all {recipe.epochs} epochs are trained; nothing to do")
        return
    device_batch_size = args.device_batch_size or default_device_batch(recipe, task, precision, ranks, args)

    streams = training_streams(at, index, valid, rows, recipe, device_batch_size, ranks, stack)

    # What learns
    torch.manual_seed(recipe.seed)
    architecture = architecture_of(recipe.model)
    with ranks.agree():
        model, frozen, report = start.build(recipe, task, args.init, run, begin, args.backbone)
        groups = groups_of(architecture, model, recipe)
        norms = BatchNorms(model, recipe.sync_bn, (ranks.rank, ranks.world_size), ranks.sum_with_gradient)
        augmented = functools.partial(TrainingAugment, recipe.image_size, seed=recipe.seed, stats=architecture.stats)
        augment = augmented(recipe.augment, colour=index.num_channels == 3)
        mixing = mixing_of(recipe.augment, recipe.mix_group, recipe.image_size, recipe.seed)
        masked = index.masked or (valid is not None and valid.masked)
        criterion = make_criterion(recipe, sums, ranks.device, masked=index.masked, smooth=True)
        criterion_on_cpu = make_criterion(recipe, sums, torch.device("cpu"), masked=masked)
        parts = part_names(criterion_on_cpu, task.num_labels)
        if args.grad_checkpointing:
            architecture.set_grad_checkpointing(model)
        if args.compile and recipe.sync_bn:
            raise UserError("--compile: sync_bn speaks to the other processes in each layer; leave one of them out")
    accum_steps = order.accum_steps(recipe.global_batch_size, device_batch_size, ranks.world_size)
    ranks.say(f"{report}\n{recipes.summary(recipe)} (all of it: {run / 'recipe.json'})")
    ranks.say(
        f"{ranks.world_size} processes on {ranks.device.type}, {precision} ({why}); {len(rows.train):,} images, "
        f"{recipe.global_batch_size} a step = {ranks.world_size} x {accum_steps} x up to {device_batch_size}"
    )
    counts = f"parameters: {architecture.count_parameters(model)}"
    ranks.say("\n".join([counts, rates_table(groups), *norms.notes(device_batch_size)]))
    if args.compile:
        model.compile()
        stack.enter_context(graphs_told(ranks.say))
    remedy = "(the same images a step) or --grad-checkpointing"
    stack.enter_context(out_of_memory_named(ranks.device, device_batch_size, remedy))
    parallel = ranks.prepare(model.to(ranks.device))  # NCCL connects here
    num_steps = order.num_steps(len(rows.train), recipe.global_batch_size)
    if warning := recipes.ema_warning(recipe, num_steps * recipe.epochs):
        ranks.say(f"warning: {warning}")
    factors = lr_factors(recipe.lr_schedule, num_steps * recipe.epochs, recipe.warmup_steps)
    scale = INITIAL_LOSS_SCALE if precision == "fp16" else None
    optimizer = GuardedAdamW(
        groups, betas=recipe.betas, factors=factors, clip_grad_norm=recipe.clip_grad_norm, loss_scale=scale
    )
    fixed = {*architecture.frozen_names(model), *(() if recipe.sync_bn else norms.buffers)}
    ema = Ema(model, recipe.ema_decay, recipe.ema_ramp, fixed)
    state = LoopState(parts, ranks.device)
    learner = Learner(architecture, model, optimizer, ema, norms, state)
    with ranks.agree():
        restore(learner, begin, args, recipe, num_steps, ranks)

    # Where it goes
    ranks.on_main(start.write_id, run, facts, args.recipe, args.init)
    if frozen is None and architecture.frozen_names(model):
        frozen = ranks.on_main(member.write_frozen, architecture, model, run)
    architecture.hold_frozen(model, DTYPES[precision])
    session = start.describe_session(ranks.device, ranks.world_size, device_batch_size, precision)
    ranks.on_main(write_start, run, recipe, task, rows, index, session)
    tracker: Tracker | None = None
    with ranks.agree("opening the log"):
        if ranks.rank == 0:
            if lost := cut_metrics(run, 0 if begin.state is None else begin.state.metrics_bytes):
                ranks.say(f"warning: {lost}")
            config = {"recipe": dataclasses.asdict(recipe)} | dataclasses.asdict(session)
            wanted = {"library": args.tracker, "wandb_mode": args.wandb, "images": args.wandb_images}
            tracker = stack.enter_context(Tracker(run, **wanted, group=args.group, config=config))
    tell_disk(learner, begin, args, recipe, run, ranks)
    threads = environment.decode_threads() if args.threads is None else args.threads
    read = functools.partial(Loader, device=ranks.device, num_threads=threads, on_bad=args.on_bad)
    streams.start(state.epoch, state.step * recipe.global_batch_size, ranks)
    most_bad, held_out = args.max_unreadable.of, index if valid is None else valid
    loader = valid_loader = stack.enter_context(read(index, max_bad=most_bad(len(index)), stream=streams.train))
    if valid is not None or streams.valid is not None:
        valid_loader = stack.enter_context(read(held_out, max_bad=most_bad(len(held_out)), stream=streams.valid))
    hardware = {name: getattr(session, name) for name in ("world_size", "device_batch_size", "precision")}
    step_state = StepState(data=facts, frozen=frozen, parts=parts, **hardware)
    meta = EpochMeta(data=facts, frozen=frozen, recipe=recipe.name, model=recipe.model, task=task)
    saved = {"id": ranks.on_main(run_id, run), "holder": holder, "keep_steps": args.keep_steps}
    folder = RunFolder(path=run, state=step_state, meta=meta, **saved)
    meter = Meter(
        ranks=ranks,
        learner=learner,
        loader=loader,
        tracker=tracker,
        total_steps=num_steps * recipe.epochs,
        epochs=recipe.epochs,
        global_batch_size=recipe.global_batch_size,
        max_skips=args.max_skips,
    )
    max_s = None if args.max_hours is None else args.max_hours * 3600.0
    control = Control(ranks, args.checkpoint_minutes * 60.0, max_s, args.max_steps)

    # The loop
    epoch_batches = functools.partial(
        order.train_batches,
        rows.train,
        seed=recipe.seed,
        global_batch_size=recipe.global_batch_size,
        device_batch_size=device_batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        group=1 if mixing is None else mixing.group,
        count_cells=selection.cell_counter(index, None if mixing is None else mixing.partners),
        shards=index.shard_ids,
        window=recipe.shuffle_window,
    )
    with ranks.agree("showing samples"):
        if tracker is not None and tracker.dashboard is not None and state.epoch < recipe.epochs:
            coming = epoch_batches(epoch=state.epoch, start_step=state.step)
            levels = functools.partial(augment.levels, epoch=state.epoch)
            show_samples(tracker, loader, coming, levels, state.global_step)
    validation = None
    with control.signals(), meter.bar as bar:
        for epoch in range(state.epoch, recipe.epochs):
            norms.train(model)
            first_in_step = True
            for batch in loader.batches(epoch_batches(epoch=epoch, start_step=state.step)):
                if first_in_step:
                    # Dropout is a function of (seed, step, rank): a cursor is all that resume needs.
                    torch.manual_seed(order.step_seed(recipe.seed, state.global_step, ranks.rank))
                with ranks.accumulating(parallel, sync=batch.last):
                    assert batch.targets is not None
                    images, cells = augment(batch.images, batch.keys, batch.epoch), batch.targets
                    if mixing is not None:
                        images, cells = mixing(images, cells, batch.keys, batch.epoch)
                    norms.begin(first=first_in_step, counted=batch.weight > 0)
                    with autocast(precision, ranks.device):
                        logits = parallel(images)
                    norms.end()
                    loss = criterion(logits, cells)
                    optimizer.backward(loss["total"], batch.weight)
                state.add(loss, batch.weight / ranks.world_size)
                meter.saw(batch, logits)
                first_in_step = batch.last
                if not batch.last:
                    continue
                learner.close_step()
                state.step, state.global_step = batch.step + 1, state.global_step + 1
                if state.global_step % args.log_every == 0 or state.step == num_steps:
                    meter.log()  # the only place where the host waits for the device
                bar.update()
                decision = control.after_step()
                if decision.stop or (decision.save and state.step < num_steps):
                    save_step(folder, learner, tracker, ranks)
                if decision.stop:
                    with ranks.agree("writing the log"):
                        if tracker is not None:
                            tracker.stopped(state.global_step, decision.stop)
                    ranks.say(f"stopped after step {state.global_step} ({decision.stop}); to continue, {AGAIN}")
                    return
            loader.next_pass()
            save_step(folder, learner, tracker, ranks)
            if rows.validation is not None:
                resize = functools.partial(augmented(()), epoch=0)
                with ema.applied(), ranks.working("validation"):
                    validation = validate(
                        *(model, valid_loader, rows.validation, resize, criterion_on_cpu, ranks),
                        *(device_batch_size, precision),
                    )
                valid_loader.next_pass()
            meter.log_epoch(validation)
            scores = None if validation is None else validation.summary()
            place = {"epoch": epoch + 1, "global_step": state.global_step}
            ranks.on_main(folder.save_epoch, learner.weights(), **place, validation=scores)
            state.epoch, state.step = epoch + 1, 0
            state.epoch_sums.zero_()
    if validation is not None:
        ranks.say(ranks.on_main(summary.tables, run, validation, valid_loader))
    ranks.say(f"finished: {recipe.epochs} epochs, checkpoints in {run / 'checkpoints'}")


def choose_data(
    index: ShardIndex, valid: ShardIndex | None, recipe: Recipe, run: Path, args: Namespace
) -> tuple[Facts, selection.Selection]:
    """What resume compares, and the rows to train and to validate on. A run is continued with the split it has."""
    fold, by_split = args.validate_fold, selection.validates_on_split(args.validate_fold, index.task)
    num_folds = args.folds or NUM_FOLDS
    if valid is None and by_split and index.patients.has_distinct(num_folds):
        fold = 0
    fold = None if fold == NO_FOLD else fold
    if fold is None:
        few = "there are fewer patients"
        refuse_unused_folds(args, index.task, few if valid is None else "split valid is validated on")
    facts = Facts(
        task=index.task.name,
        split=index.split,
        shards=index.fingerprint,
        images=len(index),
        positives=selection.positives_of(index),
        folds=None if fold is None else num_folds,
        validate_fold=fold,
        valid_shards="" if valid is None else valid.fingerprint,
        stored=StoredImages(**dataclasses.asdict(index.meta.pixels), jpeg=index.meta.as_jpeg),
    )
    before = start.facts_before(run) if args.resume and fold is not None else None
    recorded = folds.read_split(run / "split.csv", index.task) if before == facts else None
    chosen = selection.select(index, fold, num_folds, recipe.seed, recorded)
    if valid is not None:
        chosen = dataclasses.replace(chosen, validation=range(len(selection.targets_of(valid))))
    return facts, chosen


def default_device_batch(recipe: Recipe, task: Task, precision: str, ranks: Ranks, args: Namespace) -> int:
    """A rank's share of the global batch in equal parts of at most 32, that fit the GPU with the least free memory."""
    if ranks.device.type != "cuda":
        return min(MAX_DEVICE_BATCH_SIZE, -(-recipe.global_batch_size // ranks.world_size))
    free_bytes = min(ranks.gather(torch.cuda.mem_get_info(ranks.device)[0]))
    with ranks.agree():
        checkpointing = {"grad_checkpointing": args.grad_checkpointing}
        return fitting_batch(recipe, task.num_labels, precision, free_bytes, ranks.world_size, **checkpointing)


def restore(
    learner: Learner, begin: start.Start, args: Namespace, recipe: Recipe, num_steps: int, ranks: Ranks
) -> None:
    """Resume this run from its checkpoint, or with --continue-init a published one from its file."""
    state = learner.state
    if begin.folder is not None and begin.state is not None:
        learner.restore(functools.partial(checkpoint.read_tensors, begin.folder), begin.folder, ranks)
        state.epoch, state.step, state.global_step = begin.state.epoch, begin.state.step, begin.state.global_step
    elif args.continue_init:
        if args.init in (None, "random", "timm"):
            raise UserError("--continue-init goes with --init FILE, the file to continue from")
        files = fit.init_files(learner.architecture, Path(args.init))
        found = layouts.read_weights(*files, architecture=learner.architecture)
        learner.continue_from(found, args.init, recipe.epochs, num_steps)
        ranks.say(f"continuing after epoch {state.epoch} of --init, with its EMA and optimizer state")


def tell_disk(learner: Learner, begin: start.Start, args: Namespace, recipe: Recipe, run: Path, ranks: Ranks) -> None:
    """Warn where the disk has no room for the checkpoints that are still to come."""
    num_trained = sum(parameter.numel() for parameter in learner.model.parameters() if parameter.requires_grad)
    counts = num_trained, recipe.epochs - learner.state.epoch, args.keep_steps if begin.state is None else 1
    remedy = "give fewer --epochs, or --out on a larger disk" if begin.state is None else "free some space"
    if warning := ranks.on_main(checkpoint.disk_warning, run, learner.weights(), *counts, remedy):
        ranks.say(f"warning: {warning}")


def write_start(
    run: Path, recipe: Recipe, task: Task, rows: selection.Selection, index: ShardIndex, session: Environment
) -> None:
    """What the run is, its split and where it runs."""
    if rows.fold_of is not None and not (run / "recipe.json").exists():
        folds.write_split(run / "split.csv", index.patients, rows.fold_of)
    start.write_start(run, recipe, task, session)


def save_step(folder: RunFolder, learner: Learner, tracker: Tracker | None, ranks: Ranks) -> None:
    """Write all that resume needs as `step_<N>`. Collective: every rank calls, rank 0 writes."""
    state = learner.state
    place = {"epoch": state.epoch, "step": state.step, "global_step": state.global_step}
    with ranks.agree("writing the log"):
        logged = tracker.metrics_bytes() if tracker else 0
    ranks.on_main(folder.save_step, learner.tensors(ranks), **place, metrics_bytes=logged)


if __name__ == "__main__":
    raise SystemExit(run_entry(main, again=AGAIN))
