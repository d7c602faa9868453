"""Train one recipe on one shard set: `cxrdist train --task b [--model chexfound]`, on all GPUs of this machine.

  cxrdist train --shards shards/tb --out runs/first                    your own data, as `cxrdist preprocess` made it
  cxrdist train --shards shards/tb --model demo_eva_x --init random    to see every step work without weights or GPU

Shards in, a run folder out. What is learned depends on the recipe alone: global batches, augmentation and validation
are the same on any number of processes, and a run that was killed resumes with --resume, on any number of them.
`accelerate launch -m cxrdist.train` takes the same flags where you choose the processes yourself.
"""

import argparse
import importlib.util
import re

from cxrdist.cli import STREAMING, Parser, add_flags, at_least, flag, recipe_type
from cxrdist.errors import UserError
from cxrdist.recipes import RECIPES
from cxrdist.task import LAYOUTS, Task

NO_FOLD = -1
NUM_FOLDS = 5
SWITCH = {"action": "store_true"}
SCALED = "scale the learning rates with a global batch that --set changes (the EMA decay is always scaled)"
INIT = "continue after the epoch of --init's file, a published modelN.pth, with its EMA, too"
OWN = "a recipe of your own: a function of the task's name in a Python file, which is copied into the run folder"
MODEL = f"a recipe: {', '.join(RECIPES)}; or timm:NAME, glori:NAME"
LR = "largest learning rate; the recipe's others keep their ratio to it (default: the recipe's; not with --scale-lr)"
EPOCHS = "as --set epochs=N: the epochs that inference averages move along (default: the recipe's)"
FOLDS = f"patient-grouped folds, of which --validate-fold holds one out (default {NUM_FOLDS})"
DEVICE_BATCH = (
    "images per device and forward pass, for speed and memory; rounding and dropout masks change "
    "(default: a share of the global batch, at most 32, that fits the GPU)"
)
COMPILED = "torch.compile the model, for small steps on a GPU; rounding and dropout masks change"
BAD = "an unreadable image ends the training (error), or is left out (skip)"
VALIDATE = "hold out fold K (from 0) and validate on it (default: split valid, else fold 0; none for tasks a and b)"
TRACKER = "library of the dashboard; trackio keeps all of it on this machine (pip install 'cxrdist[trackio]')"


def fold_argument(text: str) -> int:
    """The fold of --validate-fold; NO_FOLD for none."""
    return NO_FOLD if text == "none" else int(at_least(0)(text))


def trained_part(text: str) -> str:
    """What --train says, as `Recipe.train` has it."""
    if re.fullmatch(r"all|head|last:[1-9]\d{0,3}", text) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is none of all, head and last:N, e.g. last:3")
    return text


OWN_FLAGS = {
    "--epochs": flag(at_least(1), "N", EPOCHS),
    "--lr": flag(at_least(0, float), "X", LR),
    "--folds": flag(at_least(2), "N", FOLDS),
    "--validate-fold": flag(fold_argument, "K|none", VALIDATE),
    "--log-every": flag(at_least(1), "N", "optimizer steps between logged rows", default=50),
    "--keep-steps": flag(at_least(1), "K", "step checkpoints that are kept", default=2),
    "--threads": flag(at_least(0), "N", "decode threads per process (default: its share of cores)"),
    "--max-skips": flag(at_least(1), "N", "stop after N skipped steps in a row", default=20),
    "--max-steps": flag(at_least(1), "N", "checkpoint and stop after N steps, to try things out"),
    "--continue-init": SWITCH | {"help": INIT},
    "--train": flag(trained_part, "all|head|last:N", "train all of the model, its head, or that and its last N layers"),
    "--grad-checkpointing": SWITCH | {"help": "less memory, about a third more compute"},
    "--tracker": {"choices": ("wandb", "trackio", "none"), "default": "wandb", "help": TRACKER},
    "--wandb": {
        "choices": ("auto", "online", "offline", "off"),
        "default": "auto",
        "help": "auto: online where you are logged in, else off",
    },
    "--wandb-images": SWITCH | {"help": "also send four augmented images, with their names, to the dashboard"},
    "--group": flag(str, "NAME", "of runs that the dashboard shows together (default: the run's name)"),
    "--on-bad": {"choices": ("error", "skip"), "default": "error", "help": BAD},
    "--scale-lr": {"choices": ("none", "sqrt", "linear"), "default": "none", "help": SCALED},
}


CHANGED = {
    "out": {"help": "folder of the run (default: runs/<recipe>_<task>)"},
    "backbone": {"help": "with --resume: where to look first for the frozen backbone that the run began with"},
    "device_batch_size": {"help": DEVICE_BATCH},
    "compile": {"help": COMPILED},
    "max_unreadable": {"help": "with --on-bad skip: stop when more images are unreadable (default 1%%)"},
}
MODELS = "model and recipe"
GROUPS = {  # in the order of the help
    "data": ("--task", "--shards", *STREAMING, "--validate-fold", "--folds"),
    MODELS: ("--init", "--continue-init", "--train", "--epochs", "--lr", "--scale-lr", "--augment", "--set"),
    "where it goes, and how it goes on": (
        *("--out", "--resume", "--backbone", "--checkpoint-minutes", "--keep-steps"),
        *("--max-hours", "--max-steps", "--dry-run"),
    ),
    "speed and memory": (
        *("--device-batch-size", "--precision", "--grad-checkpointing", "--compile", "--threads"),
        "--expect-processes",
    ),
    "log and dashboard": ("--log-every", "--tracker", "--wandb", "--wandb-images", "--group"),
    "faults": ("--on-bad", "--max-unreadable", "--max-skips", "--timeout-s"),
}


def parser() -> Parser:
    flags = Parser(prog="cxrdist train", description=__doc__, check=check)
    for title, names in GROUPS.items():
        group = flags.add_argument_group(title)
        if title == MODELS:
            which = group.add_mutually_exclusive_group()
            which.add_argument("--recipe", **flag(recipe_type, "FILE.py:NAME", OWN))
            which.add_argument("--model", **flag(str, "NAME", MODEL, default="eva_x"))
        for name in names:
            if name in OWN_FLAGS:
                group.add_argument(name, **OWN_FLAGS[name])
            else:
                add_flags(group, name, **CHANGED)
    return flags


def check(args: argparse.Namespace) -> None:
    """UserError for flags that contradict each other, a dashboard that is not installed, or folds that say nothing."""
    if args.tracker != "wandb" and args.wandb in ("online", "offline"):
        raise UserError(f"--wandb {args.wandb} is for --tracker wandb, not {args.tracker}: leave one of them out")
    if args.tracker == "trackio" and importlib.util.find_spec("trackio") is None:
        raise UserError("--tracker trackio needs: pip install 'cxrdist[trackio]'")
    if args.lr is not None and args.scale_lr != "none":
        raise UserError("--lr says the learning rate itself, --scale-lr changes the recipe's: give one of them")
    if args.epochs is not None and any(text.startswith("epochs=") for text in args.overrides):
        raise UserError("--epochs N is --set epochs=N: give one of them")
    refuse_unused_folds(args, args.task)


def refuse_unused_folds(args: argparse.Namespace, task: Task | None, why: str = "") -> None:
    """UserError for --folds in a run that holds no fold out: by its flags and its task, or because `why`."""
    if args.validate_fold == NO_FOLD:
        why = "--validate-fold none holds no fold out"
    elif args.validate_fold is None and task is not None and task.name in LAYOUTS:
        why = f"task {task.name} is trained on all its images"
    if args.folds is not None and why:
        remedy = "for all folds use `cxrdist folds`, for one add --validate-fold K, else leave --folds out"
        raise UserError(f"--folds {args.folds} would change nothing, as {why}: {remedy}")
