"""Worlds of processes on this machine, which meet at a port of their own."""

import itertools
import os
import secrets
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from avcil_dist.errors import WorldError
from avcil_dist.world import LOOPBACK, World, world_from_environment


@contextmanager
def local_worlds(processes: int) -> Iterator[tuple[World, ...]]:
    """Yield the worlds of `processes` ranks on this machine. Their port is reserved while the block runs."""
    with reserved_port() as port:
        start = secrets.token_hex(8)
        yield tuple(
            World(rank, processes, rank, processes, LOOPBACK, port, launcher="local", start_id=start)
            for rank in range(processes)
        )


@contextmanager
def reserved_port() -> Iterator[int]:
    """Yield a port of the loopback interface at which a rank can listen, and which the system gives to nobody else.

    A port that is only found free would be given to the ranks of other streams as well, before rank 0 listens there.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # rank 0 sets it too, so both can have the port
        holder.bind((LOOPBACK, 0))
        yield holder.getsockname()[1]


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
    return world_from_environment(os.environ)
