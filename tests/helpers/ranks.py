"""Run of a function on several ranks, in real processes with a real process group."""

import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing.spawn import start_processes

from avcil_dist.config.schema import EngineConfig
from avcil_dist.system.accelerator import name_accelerator
from avcil_dist.training.collectives import process_group
from avcil_dist.world import World
from launch.fork_server import PRELOADED
from launch.local_worlds import local_worlds

CPU = torch.device("cpu")


def run_ranks(function: Callable[..., Any], count: int, *arguments: Any) -> list[Any]:
    """Run `function(world, *arguments)` on each rank. Returns the results by rank. It must be importable by name."""
    name_accelerator("cpu")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    results = context.Manager().Queue()
    with local_worlds(count) as worlds:
        task = (function, worlds, results, arguments, dict(os.environ))
        start_processes(_rank, task, count, start_method="forkserver")
    answers = dict(results.get() for _ in range(count))
    return [answers[rank] for rank in range(count)]


def _rank(
    index: int,
    function: Callable[..., Any],
    worlds: tuple[World, ...],
    results: Any,
    arguments: tuple[Any, ...],
    environment: dict[str, str],
) -> None:
    os.environ.update(environment)  # the server they are forked from has that of the first test which used it
    torch.set_num_threads(1)
    with process_group(worlds[index], CPU, EngineConfig(timeout_minutes=1)):
        results.put((index, function(worlds[index], *arguments)))
