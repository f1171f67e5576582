"""Ports for servers of the tests."""

from contextlib import ExitStack

from launch.local_worlds import reserved_port

_reservations = ExitStack()


def reserve_port() -> int:
    """Return a port that the system gives to nobody else while this process runs, also where its server restarts.

    A server can listen there when it sets SO_REUSEADDR, as all servers of the tests do. Until then it is closed.
    """
    return _reservations.enter_context(reserved_port())
