"""Worlds of processes on this machine, which meet at a free port."""

import itertools
import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import replace

from avcil_dist.errors import WorldError
from avcil_dist.world import World, world_from_environment


def local_worlds(processes: int) -> tuple[World, ...]:
    """Return the worlds of `processes` ranks on this machine, with a master port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return tuple(
        World(rank, processes, rank, processes, "127.0.0.1", port, launcher="local") for rank in range(processes)
    )


def launcher_world(environment: Mapping[str, str], processes: int | None) -> World:
    """Return the world of the launcher around this process; one without launcher where it starts its own ranks.

    `processes`: the number of ranks that was requested, None for none. Raises WorldError when a launcher
    started another number of ranks.
    """
    outer = world_from_environment(environment)
    if outer.launcher == "none" or processes in (None, outer.size):
        return outer
    if outer.size == 1:
        return World()
    raise WorldError(
        f"--processes {processes}: {outer.launcher} started {outer.size} ranks, and this is rank {outer.rank} of them; "
        "leave --processes out, or start one process"
    )


def num_ranks(environment: Mapping[str, str], processes: int | None) -> int:
    """Return the number of ranks of a stream: those of the launcher, else `processes`, else 1."""
    outer = launcher_world(environment, processes)
    return outer.size if outer.launcher != "none" else processes or 1


def meetings() -> Iterator[World]:
    """Yield the world of each process group that this process joins, one after the other: none meets at another's port.

    Under a launcher the number of ranks is that of the launcher, else it is 1.
    """
    for number in itertools.count():
        world = current_world()
        yield world.at_meeting(number) if number and world.launcher != "none" else world


def current_world() -> World:
    """Return the world of the launcher around this process, or a world of this process alone."""
    world = world_from_environment(os.environ)
    return world if world.launcher != "none" else replace(local_worlds(1)[0], launcher="none")
