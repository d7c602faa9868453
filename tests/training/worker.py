"""Runs `cxrdist.train` in tests: two small recipes, and faults at chosen places (see FAULT below).

`python worker.py ARGS` in one process, or under torch.distributed.run. FAULT is a JSON object in the environment:
  kill: {"rank", "at", "count"}: SIGKILL when `at` (a key of `inject`) happens for the count-th time
  nan: {"rank", "keys", "from"}: pixels of these keys become NaN on that rank from the from-th global step on
  loss_scale: start of the loss scale, used with bf16 in place of fp16's
  slow_s: seconds to sleep after each step
  slow: {"rank", "module", "name", "seconds"[, "count"]}: that function sleeps on that rank (the first `count` times)
  stop: {"rank", "module", "name"}: SIGSTOP where that rank calls that function
  fail: {"rank", "module", "name", "kind", "text"}: that function raises it on that rank
  set: {module: {name: value}}: constants that are other ones
PROGRAM is the entry: train (default) or infer. `module` is below cxrdist, e.g. "train"; `name` may be Class.method.
"""

import dataclasses
import errno
import functools
import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from cxrdist import infer, recipes, train
from cxrdist.cli import run_entry
from cxrdist.distributed.ranks import Ranks
from cxrdist.recipes import Group, Inference, Recipe
from cxrdist.runs import checkpoint
from cxrdist.training import optim

TINY = (("depth", 12), ("embed_dim", 24), ("num_heads", 2))
TINY_CHEXFOUND = (("decoder_dim", 16), ("depth", 4), ("embed_dim", 32), ("init_values", 1.0), ("num_heads", 2))


def tiny_eva_x(task: str) -> Recipe:
    """EVA-X with the published layer-wise rows at 300 times their rates, constant, no clipping."""
    base = recipes.eva_x(task)
    groups = tuple(Group(pattern=g.pattern, lr=g.lr and g.lr * 300, weight_decay=g.weight_decay) for g in base.groups)
    return dataclasses.replace(
        base,
        name="tiny_eva_x",
        image_size=32,
        epochs=4,
        inference=Inference(member_epochs=(3, 4)),
        global_batch_size=10,
        groups=groups,
        ema_decay=0.9,
        model_kwargs=TINY,
    )


def tiny_chexfound(task: str) -> Recipe:
    """CheXFound with warm-up, cosine, clipping and an EMA that ramps."""
    base = recipes.chexfound(task)
    return dataclasses.replace(
        base,
        name="tiny_chexfound",
        image_size=32,
        epochs=4,
        inference=Inference(member_epochs=(3, 4)),
        global_batch_size=10,
        groups=(Group(pattern=r"^backbone\.", lr=None), Group(pattern=r"^glori\.", lr=1e-2, weight_decay=0.1)),
        ema_decay=0.9,
        ema_ramp=True,
        lr_schedule="cosine",
        warmup_steps=3,
        clip_grad_norm=0.05,
        model_kwargs=TINY_CHEXFOUND,
    )


recipes.RECIPES |= {"tiny_eva_x": tiny_eva_x, "tiny_chexfound": tiny_chexfound}


KINDS: dict[str, Any] = {
    "MemoryError": MemoryError,
    "RuntimeError": RuntimeError,
    "ValueError": ValueError,
    "EMFILE": lambda text: OSError(errno.EMFILE, "Too many open files", text),
    "EACCES": lambda text: PermissionError(errno.EACCES, "Permission denied", text),
    "EIO": lambda text: OSError(errno.EIO, "Input/output error", text),
    "ConnectionResetError": lambda text: ConnectionResetError(errno.ECONNRESET, text),
    "DistNetworkError": torch.distributed.DistNetworkError,
    "DistStoreError": torch.distributed.DistStoreError,
    "DistBackendError": torch.distributed.DistBackendError,
    "OutOfMemoryError": torch.OutOfMemoryError,
}


def before(place: dict[str, Any], act: Any) -> None:
    """Call `act` whenever the function at `place` is called on its rank, at most `count` times."""
    if place["rank"] != int(os.environ.get("RANK", "0")):
        return
    owner: Any = importlib.import_module(f"cxrdist.{place['module']}")
    *outer, name = place["name"].split(".")
    for part in outer:
        owner = getattr(owner, part)
    original, left = getattr(owner, name), [place.get("count", -1)]

    @functools.wraps(original)
    def changed(*args: Any, **kwargs: Any) -> Any:
        if left[0]:
            left[0] -= 1
            act()
        return original(*args, **kwargs)

    setattr(owner, name, changed)


def raise_error(fail: dict[str, Any]) -> None:
    raise KINDS[fail["kind"]](fail["text"])


def inject(fault: dict[str, Any]) -> None:
    rank = int(os.environ.get("RANK", "0"))
    if "slow" in fault:
        before(fault["slow"], functools.partial(time.sleep, fault["slow"]["seconds"]))
    if "stop" in fault:
        before(fault["stop"], functools.partial(os.kill, os.getpid(), signal.SIGSTOP))
    if "fail" in fault:
        before(fault["fail"], functools.partial(raise_error, fault["fail"]))
    for module, values in fault.get("set", {}).items():
        for name, value in values.items():
            setattr(importlib.import_module(f"cxrdist.{module}"), name, value)
    kill = fault.get("kill")
    if kill is not None and kill["rank"] == rank:
        left = [kill["count"]]

        def happened(*_: object) -> None:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        owner, name = {
            "step": (train.Control, "after_step"),
            "save_epoch": (Ranks, "on_main"),  # which all ranks call
            "validate": (train, "validate"),
            "file": (checkpoint, "write_safetensors"),
            "document": (checkpoint, "write_atomically"),  # state.json, meta.json, manifest.json
        }[kill["at"]]
        original = getattr(owner, name)

        def then_die(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if name != "on_main" or args[1].__name__ == kill["at"]:
                happened()
            return result

        setattr(owner, name, then_die)
    nan = fault.get("nan")
    if nan is not None and nan["rank"] == rank:
        augment = train.TrainingAugment.__call__

        def poisoned(self: Any, images: torch.Tensor, keys: Any, epoch: int) -> torch.Tensor:
            result = augment(self, images, keys, epoch)
            for place, key in enumerate(keys.tolist()):
                if key in nan["keys"] and self.stages:  # validation has none
                    result[place] = float("nan")
            return result

        train.TrainingAugment.__call__ = poisoned  # type: ignore[method-assign]
    if "loss_scale" in fault:
        build = train.GuardedAdamW
        optim.LARGEST_LOSS_SCALE = fault["loss_scale"]  # float32 does not overflow below the real bound

        def scaled(*args: Any, **kwargs: Any) -> Any:
            return build(*args, **kwargs | {"loss_scale": fault["loss_scale"]})

        train.GuardedAdamW = scaled  # type: ignore[misc, assignment]
    if "slow_s" in fault:
        after_step = train.Control.after_step

        def slowly(self: Any) -> Any:
            time.sleep(fault["slow_s"])
            return after_step(self)

        train.Control.after_step = slowly  # type: ignore[method-assign]


if __name__ == "__main__":
    torch.set_num_threads(1)
    inject(json.loads(os.environ.get("FAULT", "{}")))
    marker = os.environ.get("STARTED_FILE")
    if marker and os.environ.get("RANK", "0") == "0":
        Path(marker).touch()
    program: Any = infer if os.environ.get("PROGRAM") == "infer" else train
    raise SystemExit(run_entry(lambda: program.main(sys.argv[1:]), again=program.AGAIN))
