"""Start training or inference on this machine, in as many processes as it has GPUs, so that a mistake is one line.

accelerate's own launcher follows a rank's error with a traceback of itself, and ends with 1 whatever a rank ended with.
"""

import logging
import os
import runpy
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cxrdist.distributed.environment import LAUNCHER
from cxrdist.distributed.group import check_gpus_seen
from cxrdist.distributed.plan import CONFIG, LaunchPlan, plan_launch
from cxrdist.errors import UserError


def launch(module: str, words: Sequence[str], *, again: str) -> int:
    """Run a module with its flags as `plan_launch` says; returns the exit code of the first rank that failed, else 0.

    again: what a user does when a rank was killed, which cannot say so itself. Raises UserError where a GPU of this
    machine is not seen, or the configuration is missing.
    """
    if CONFIG not in os.environ:
        check_gpus_seen()
    plan = plan_launch()
    if not Path(plan.config).is_file():
        raise UserError(f"{CONFIG}={plan.config}: no such file; give a file like those in accel_configs/, or unset it")
    os.environ.update(plan.environment)
    os.environ[LAUNCHER] = "cxrdist"
    if plan.num_processes == 1:
        return run_here(module, plan.config)
    return run_ranks(module, words, plan, again)


def run_here(module: str, config: str) -> int:
    """One process needs no launcher: signals and the exit code are its own."""
    from accelerate.commands.config.config_args import load_config_from_file

    os.environ["ACCELERATE_MIXED_PRECISION"] = str(load_config_from_file(config).mixed_precision or "no")
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    return 0


def told(failures: Mapping[int, Any], again: str) -> int:
    """Say what no rank has said yet, and return the exit code of the rank that failed first."""
    texts = {rank: failure.error_file_data["message"] for rank, failure in failures.items()}
    for rank, text in texts.items():
        if rank and isinstance(text, str) and text.startswith("error: ") and text != texts.get(0):
            print(f"error [rank {rank}]: {text.removeprefix('error: ')}", file=sys.stderr)
    rank, first = min(failures.items(), key=lambda failure: failure[1].timestamp)
    if first.exitcode >= 0:
        return int(first.exitcode)
    if (text := texts[rank]) and isinstance(text, str) and text.startswith("error: "):
        return 2  # it had said why, and was ended with the others
    name = signal.Signals(-first.exitcode).name
    print(f"error: the process of rank {rank} was ended by {name}; then {again}", file=sys.stderr)
    return 1


def run_ranks(module: str, words: Sequence[str], plan: LaunchPlan, again: str) -> int:
    """A process for each rank under accelerate's launcher; what it says besides is left out, the ranks say it.

    Rank 0 prints its error at once, the others write theirs into torch's error files: most often it is the same.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.agent.server import api as agent
    from torch.distributed.elastic.multiprocessing import api as multiprocessing
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for speaker in (agent, multiprocessing):  # each has a level of its own
        logging.getLogger(speaker.__name__).setLevel(logging.CRITICAL)
    processes = str(plan.num_processes)
    where = ("--config_file", plan.config, "--num_processes", processes, "--main_process_port", "0")
    args = launch_command_parser().parse_args([*where, "-m", module, *words, "--expect-processes", processes])
    try:
        launch_command(args)
    except ChildFailedError as error:
        return told(error.failures, again)
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0
