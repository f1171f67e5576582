"""Fork server of the ranks: it imports once what the ranks of all steps need, while the command is still starting.

The imports take seconds. A rank on a GPU is a fresh process instead: one that is forked cannot use a GPU that its
parent has initialised.
"""

import multiprocessing
from multiprocessing.context import BaseContext
from pathlib import Path

from avcil_dist.system.accelerator import name_accelerator
from avcil_dist.system.process_start import fork_server

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
    return fork_server(PRELOADED, "the processes of the steps")


def start_early() -> None:
    """Start the server before the device is known, on a machine without a GPU. Raises as `rank_processes` does."""
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        rank_processes("cpu")
