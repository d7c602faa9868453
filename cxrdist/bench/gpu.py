"""What one runs first on a rented machine (`./launch.sh gpu-check`): under ten minutes, without data.

The tests that need a GPU; memory against the estimate; images/s eager and compiled at two batch sizes, and beside busy
decode threads; all-reduce bandwidth where there are several GPUs; a kill and a resume. Ends with the flags to use. On a
CPU it runs what a CPU can, on the demo's models, and says what it skipped.
"""

import argparse
import contextlib
import functools
import gc
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from cxrdist import recipes
from cxrdist.bench.step import TASK, learning, write_shards
from cxrdist.bench.timing import FAILED, Row
from cxrdist.data.loader import Loader
from cxrdist.data.order import eval_batches
from cxrdist.distributed.bandwidth import all_reduce_bandwidth
from cxrdist.distributed.plan import PROJECT, visible_gpus
from cxrdist.distributed.precision import DTYPES, autocast, hardware_of, resolve_precision
from cxrdist.errors import UserError
from cxrdist.estimate.count import GB, allocated_bytes, count_cost, fitting_batch
from cxrdist.models import architecture_of
from cxrdist.recipes import Recipe
from cxrdist.runs.member import build_model
from cxrdist.shards.index import ShardIndex
from cxrdist.training.losses import label_sums, make_criterion

MEASURED_S = 5.0  # for each speed
COMPILE_GAIN = 1.1  # from here on --compile is advised: below, its minutes of compiling do not pay
KILL_S = 300.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `cxrdist bench gpu`."""
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes minutes")


def run(args: argparse.Namespace) -> list[Row]:
    """Rows of all parts; what was skipped and what to use are rows too."""
    gpus = visible_gpus()
    device = gpus[0] if gpus else torch.device("cpu")
    precision, why = resolve_precision("auto", [hardware_of(each) for each in gpus or [device]])
    rows = [Row("machine", hardware_of(device).name, None, note=f"{len(gpus)} GPUs; {precision} ({why})")]
    rows += gpu_tests() if gpus else [Row("skipped", "tests that need a GPU, memory", None, note="no GPU here")]
    if len(gpus) > 1:
        rows.append(all_reduce_row(len(gpus)))
    else:
        rows.append(Row("skipped", "all-reduce", None, note="fewer than two GPUs here"))
    models = (recipes.eva_x, recipes.chexfound) if gpus else (recipes.demo_eva_x, recipes.demo_chexfound)
    with tempfile.TemporaryDirectory() as folder:
        index = write_shards(Path(folder))
        for make in models:
            rows += model_rows(make(TASK.name), index, device, precision, compiled=not args.no_compile)
        rows.append(kill_and_resume(Path(folder), index))
    return rows


def gpu_tests() -> list[Row]:
    """The result of `pytest -m gpu`, which a checkout has and an installed package has not."""
    if not (PROJECT / "tests").is_dir():
        return [Row("skipped", "tests that need a GPU", None, note="run from a checkout of the project")]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(PROJECT / "tests")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT, check=False)
    if done.returncode:
        print(done.stdout[-4000:])
    last = (done.stdout.strip().splitlines() or [done.stderr[-200:]])[-1]
    return [Row(FAILED if done.returncode else "tests", "tests that need a GPU", None, note=last)]


def all_reduce_row(num_gpus: int) -> Row:
    """The bandwidth between the GPUs; what fails there leaves the rest of the check to be run."""
    try:
        return Row("all-reduce", f"{num_gpus} GPUs", None, note=f"{all_reduce_bandwidth(num_gpus) / GB:.3g} GB/s")
    except Exception as error:  # NCCL's, or a process's of its own
        last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        return Row(FAILED, f"all-reduce over {num_gpus} GPUs", None, note=f"{last}: see its lines above")


def model_rows(recipe: Recipe, index: ShardIndex, device: torch.device, precision: str, *, compiled: bool) -> list[Row]:
    """Speeds and memory of one model's training steps, and the flags that follow."""
    rows, on_gpu = [], device.type == "cuda"
    release()
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else 0
    most = fitting_batch(recipe, TASK.num_labels, precision, free, 1) if on_gpu else 4
    cost = count_cost(recipe, TASK.num_labels, precision)
    gain = 0.0
    for batch in dict.fromkeys((max(most // 4, 1), most)):
        step = training_step(recipe, device, precision, batch, compiled=False)
        eager = images_per_s(step, batch, device)
        peak = torch.cuda.max_memory_allocated(device) / GB if on_gpu else 0.0
        told = allocated_bytes(cost, batch, 1) / GB
        memory = f"; {peak:.2f} GB allocated, {told:.2f} estimated ({told / peak - 1:+.0%})" if on_gpu else ""
        rows.append(Row(recipe.name, f"{batch} images", eager, 1.0, note=precision + memory))
        with decoding(index):
            beside = images_per_s(step, batch, device)
        rows.append(Row(recipe.name, f"{batch} images, decode threads busy", beside, beside / eager))
        if compiled:
            del step
            step = training_step(recipe, device, precision, batch, compiled=True)
            fast = images_per_s(step, batch, device)
            rows.append(Row(recipe.name, f"{batch} images, compiled", fast, fast / eager))
            gain = fast / eager
        del step
    flags = f"--model {recipe.name} --device-batch-size {most} --precision {precision}"
    advised = " --compile" if gain >= COMPILE_GAIN else ""
    return [*rows, Row("use", recipe.name, None, note=flags + advised)]


def training_step(
    recipe: Recipe, device: torch.device, precision: str, batch: int, *, compiled: bool
) -> Callable[[], None]:
    """One optimizer step on random images; its parts are the loop's of `cxrdist.train`."""
    release()
    torch.manual_seed(0)
    model = build_model(recipe, TASK)
    model.to(device).train()
    if compiled:
        model.compile()
    targets = torch.rand(batch, TASK.num_labels, device=device).round()
    criterion = make_criterion(recipe, label_sums([np.zeros((9, TASK.num_labels), np.float32)]), device)
    optimizer, ema = learning(recipe, model, precision)
    architecture_of(recipe.model).hold_frozen(model, DTYPES[precision])
    images = torch.randn(batch, 3, recipe.image_size, recipe.image_size, device=device)

    def step() -> None:
        with autocast(precision, device):
            logits = model(images)
        optimizer.backward(criterion(logits, targets)["total"], 1.0)
        ema.update(optimizer.step())

    return step


def release() -> None:
    """Give back what models before held: one that was compiled is in a cycle, and its memory would count as taken."""
    gc.collect()
    torch.cuda.empty_cache()


def images_per_s(step: Callable[[], None], batch: int, device: torch.device) -> float:
    """The speed over some seconds, after two steps that allocate and compile."""
    wait = torch.get_device_module(device).synchronize
    for _ in range(2):
        step()
    wait()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    begun, count = time.perf_counter(), 0
    while count < 2 or time.perf_counter() - begun < MEASURED_S:
        for _ in range(2):  # the host runs ahead, as it does in training
            step()
        wait()
        count += 2
    return batch * count / (time.perf_counter() - begun)


@contextlib.contextmanager
def decoding(index: ShardIndex) -> Iterator[None]:
    """Inside, a loader decodes the set again and again, as fast as its threads can."""
    stop = threading.Event()

    def decode() -> None:
        with Loader(index, torch.device("cpu")) as loader:
            while not stop.is_set():
                for _ in loader.batches(list(eval_batches(np.arange(len(index)), 8, 0, 1))):
                    if stop.is_set():
                        break

    worker = threading.Thread(target=decode)
    worker.start()
    try:
        yield
    finally:
        stop.set()
        worker.join()


def kill_and_resume(folder: Path, index: ShardIndex) -> Row:
    """Train the demo's model through the shipped configuration's entry, kill it at its first checkpoint, resume."""
    run = folder / "run"
    words = ["-m", "cxrdist.train", "--task", TASK.name, "--shards", str(index.folder), "--out", str(run)]
    words += ["--model", "demo_eva_x", "--init", "random", "--set", "epochs=2", "--set", "global_batch_size=4"]
    words += ["--wandb", "off", "--validate-fold", "none", "--checkpoint-minutes", "0.001", "--threads", "1"]
    start = functools.partial(subprocess.Popen, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    process = start([sys.executable, *words], env=os.environ | {"PYTHONUNBUFFERED": "1"})
    begun = time.monotonic()
    while not (saved := list((run / "checkpoints").glob("step_*"))):
        if process.poll() is not None or time.monotonic() - begun > KILL_S:
            process.kill()
            raise UserError(f"training ended before its first checkpoint:\n{process.communicate()[0][-2000:]}")
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    resumed = start([sys.executable, *words, "--resume"])
    text, _ = resumed.communicate(timeout=KILL_S)
    if resumed.returncode:
        raise UserError(f"the resumed training failed:\n{text[-2000:]}")
    return Row("resume", "killed, then resumed to the end", None, note=f"killed after {saved[0].name}; ended well")
