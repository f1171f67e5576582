"""Fork server of the ranks: it imports once what the ranks of all steps need, while the command is still starting.

The imports take seconds. A rank on a GPU is a fresh process instead: one that is forked cannot use a GPU that its
parent has initialised.
"""

import atexit
import functools
import multiprocessing
import os
import signal
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from pathlib import Path

from avcil_dist.system.accelerator import name_accelerator
from avcil_dist.system.process_start import starting_process
from avcil_dist.system.signals import shielding

# `avcil_dist.tracking` sets what MLflow reads when DeepSpeed imports it. Optimizers need `torch._dynamo`, and the
# sender of rank 0 the store of a sqlite database.
PRELOADED = [
    "avcil_dist.tracking",
    "torch",
    "torch._dynamo",
    "deepspeed",
    "avcil_dist.training.step",
    "avcil_dist.tracking.mlflow_writer",
    "mlflow.store.tracking.sqlalchemy_store",
]


def rank_processes(device_type: str) -> BaseContext:
    """Return the context that starts the ranks on `cuda` or `cpu`. Raises WorldError where the server cannot start."""
    name_accelerator(device_type)
    if device_type == "cuda":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with starting_process("the processes of the steps"), shielding(signal.SIGINT):
        forkserver.ensure_running()
    _end_with(os.getpid())
    return context


def start_early() -> None:
    """Start the server before the device is known, on a machine without a GPU. Raises as `rank_processes` does."""
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        rank_processes("cpu")


def await_server() -> None:
    """Wait until the server has made its imports. An interrupt ends the wait."""
    process = multiprocessing.get_context("forkserver").Process()
    process.start()
    process.join()


@functools.cache
def _end_with(owner: int) -> None:
    """End the server with this process: by itself it would first finish its imports, and hold the standard output."""

    def end() -> None:
        server: int | None = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
        if server is not None and os.getpid() == owner:
            os.kill(server, signal.SIGKILL)

    atexit.register(end)
