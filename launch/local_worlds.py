"""Worlds of processes on this machine, which meet at a free port."""

import os
import socket
from dataclasses import replace

from avcil_dist.world import World, world_from_environment


def local_worlds(processes: int) -> tuple[World, ...]:
    """Return the worlds of `processes` ranks on this machine, with a master port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return tuple(
        World(rank, processes, rank, processes, "127.0.0.1", port, launcher="local") for rank in range(processes)
    )


def current_world() -> World:
    """Return the world of the launcher around this process, or a world of this process alone."""
    world = world_from_environment(os.environ)
    return world if world.launcher != "none" else replace(local_worlds(1)[0], launcher="none")
