"""Rendezvous of the ranks of a step: rank 0 listens, all ranks connect to its store and check in.

It comes before the first collective. Each of its faults is one line on every rank that is there: a network interface
or host name that does not exist, a port in use, ranks that do not come. Ranks of one machine use the loopback
interface; the store of several machines listens on the address of the first one.
"""

import contextlib
import datetime
import errno
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Collection, Iterator, Mapping

import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from avcil_dist.errors import AvcilError, RankError, WorldError
from avcil_dist.training.error_codec import decode_error, encode_error
from avcil_dist.world import LOOPBACK, World

NAME_SECONDS = 30.0  # for a host name to resolve: a cluster may still announce it
ANSWER_SECONDS = 30.0  # for rank 0's store to answer once its port accepts connections
NOTICE_SECONDS = 20.0  # after which rank 0 prints the ranks it waits for
SEEN_SECONDS = 3.0  # for the other ranks to read that a rank is missing
POLL_SECONDS = 0.05
MAX_NAMED = 8
START, HERE, SEEN, VERDICT = "avcil/start", "avcil/here", "avcil/seen", "avcil/verdict"
COMPLETE = "complete"

_logger = logging.getLogger(__name__)


def rendezvous(world: World, *, minutes: float, timeout: datetime.timedelta, gpu: str = "") -> TCPStore:
    """Return the store of a world's ranks, once all of them are there. Every rank calls it.

    `timeout` is that of the store's operations. `gpu` identifies this rank's GPU: two ranks cannot share one.
    Raises WorldError for an interface or host name that does not exist and for a shared GPU, RankError for what
    another start may not meet: a port in use, ranks of another start there, ranks that do not come within `minutes`.
    """
    check_interfaces(os.environ, interfaces())
    deadline = time.monotonic() + 60 * minutes
    agent = _connect(world.master_addr, world.master_port, deadline, minutes, timeout) if world.agent_key else None
    port = 0 if world.agent_key or world.size == 1 else world.master_port
    if world.is_main:
        store, port = _listen(world.meeting_host, port, timeout)
        if agent:
            agent.set(world.agent_key, str(port))
    else:
        if agent:
            port = _port_of_rank_0(agent, world.agent_key, deadline, minutes)
        store = _connect(world.meeting_host, port, deadline, minutes, timeout)
    if world.size > 1:
        with _as_rank_error("rank 0 ended before all ranks were there; see its log"):
            _check_in(store, world, deadline, minutes, gpu)
    return store


def interfaces() -> list[str]:
    """Return the names of this machine's network interfaces."""
    return [name for _, name in socket.if_nameindex()]


def check_interfaces(environment: Mapping[str, str], existing: Collection[str]) -> None:
    """Raise WorldError when `GLOO_SOCKET_IFNAME` names a network interface that this machine does not have."""
    names = environment.get("GLOO_SOCKET_IFNAME", "")
    for name in filter(None, names.split(",")):
        if name not in existing:
            raise WorldError(
                f"GLOO_SOCKET_IFNAME={names}: this machine has {', '.join(existing)}; set one of them, or unset it"
            )


def missing_ranks_line(missing: Collection[int], size: int, minutes: float, environment: Mapping[str, str]) -> str:
    """Return the line that names the ranks which did not come."""
    named = ", ".join(map(str, sorted(missing)[:MAX_NAMED])) + (", …" if len(missing) > MAX_NAMED else "")
    line = f"{len(missing)} of {size} ranks did not come within {minutes:g} minutes: {named}"
    if "SLURM_PTY_PORT" in environment:
        return f"{line}; a shell of srun --pty is one rank of its step: open it with -n 1, or start the ranks with srun"
    return f"{line}; see their logs, or raise engine.meeting_minutes"


def _listen(host: str, port: int, timeout: datetime.timedelta) -> tuple[TCPStore, int]:
    """Return a store that listens at host and port, and the port; 0 is any free one."""
    family, address = _resolve(host, port)
    is_loopback = host == LOOPBACK or address == "::1"
    # A machine's own name may stand for 127.0.1.1, which no other machine reaches, or for an address in front of it.
    hosts = [address] if is_loopback or not address.startswith("127.") else []
    hosts += [] if is_loopback else ["::" if family == socket.AF_INET6 else "0.0.0.0"]  # noqa: S104
    for number, candidate in enumerate(hosts, start=1):
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((candidate, port))
            listener.listen(socket.SOMAXCONN)
        except OSError as error:
            listener.close()
            if error.errno == errno.EADDRNOTAVAIL and number < len(hosts):
                continue
            raise RankError(_not_bound(error, host, port)) from None
        port = listener.getsockname()[1]
        return _store(candidate, port, timeout, listener.detach()), port
    raise AssertionError("a host was tried")


def _not_bound(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        advice = "end the program that has it, or choose another one (torchrun --master-port); a job takes another one"
        return f"port {port} is in use on {socket.gethostname()}; {advice} when it starts again"
    return f"{host}:{port}: rank 0 cannot listen there ({error.strerror}); is it another machine than {host}?"


def _connect(host: str, port: int, deadline: float, minutes: float, timeout: datetime.timedelta) -> TCPStore:
    """Return a store connected to the one at host and port, which may not listen yet."""
    name_deadline = min(deadline, time.monotonic() + NAME_SECONDS)
    fault = "nothing listens there"
    while True:
        try:
            family, address = _resolve(host, port)
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.settimeout(max(POLL_SECONDS, min(5.0, deadline - time.monotonic())))
                probe.connect((address, port))
                if probe.getsockname() != probe.getpeername():  # else its own port is this one: it met itself
                    break
        except WorldError:
            if time.monotonic() > name_deadline:
                raise
        except OSError as error:
            fault = error.strerror or str(error)
        if time.monotonic() > deadline:
            raise RankError(f"rank 0 did not come to {host}:{port} within {minutes:g} minutes ({fault}); see its log")
        time.sleep(POLL_SECONDS)
    return _connected_store(address, port, min(ANSWER_SECONDS, max(1.0, deadline - time.monotonic())), timeout)


def _connected_store(host: str, port: int, seconds: float, timeout: datetime.timedelta) -> TCPStore:
    """Return a store of the listening port; RankError where something else listens, which may never answer."""
    made: list[TCPStore] = []

    def make() -> None:
        with contextlib.suppress(dist.DistError):
            made.append(_store(host, port, datetime.timedelta(seconds=seconds)))

    thread = threading.Thread(target=make, name="rendezvous", daemon=True)
    thread.start()
    thread.join(seconds + 1)
    if not made:
        raise RankError(
            f"{host}:{port} does not answer as rank 0; does another program listen there? Choose another port"
        )
    made[0].set_timeout(timeout)
    return made[0]


def _store(host: str, port: int, timeout: datetime.timedelta, listener: int | None = None) -> TCPStore:
    is_server = listener is not None
    return TCPStore(host, port, None, is_server, timeout, wait_for_workers=False, master_listen_fd=listener)


def _resolve(host: str, port: int) -> tuple[socket.AddressFamily, str]:
    """Return family and address of a host, of IPv4 where it has both. Raises WorldError for an unknown name."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise WorldError(
            f"host name {host!r} of rank 0 does not resolve on {socket.gethostname()} ({reason}); set the address "
            "that all machines reach (torchrun --master-addr), or add the name to their hosts files"
        ) from None
    family, _, _, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    return family, str(address[0])


def _port_of_rank_0(agent: TCPStore, key: str, deadline: float, minutes: float) -> int:
    with _as_rank_error("the launcher's store ended before all ranks were there; see the launcher's log"):
        while not agent.check([key]):
            if time.monotonic() > deadline:
                raise RankError(f"rank 0 did not come within {minutes:g} minutes; see its log")
            time.sleep(POLL_SECONDS)
        return int(agent.get(key))


def _check_in(store: TCPStore, world: World, deadline: float, minutes: float, gpu: str) -> None:
    """Announce this rank; return when all ranks are there. All raise rank 0's error when one is missing."""
    entry = json.dumps([socket.gethostname(), gpu])
    if world.is_main:
        store.set(START, world.start_id)
        store.set(f"{HERE}/{world.rank}", entry)
        fault = _fault_of_ranks(store, world, deadline, minutes)
        store.set(VERDICT, encode_error(fault, 0) if fault else COMPLETE)
        if fault:
            others = [f"{SEEN}/{rank}" for rank in range(1, world.size) if store.check([f"{HERE}/{rank}"])]
            end = time.monotonic() + SEEN_SECONDS
            while others and not store.check(others) and time.monotonic() < end:
                time.sleep(POLL_SECONDS)
            raise fault
        return
    _check_start(store, world, deadline, minutes)
    store.set(f"{HERE}/{world.rank}", entry)
    verdict = _answer(store, VERDICT, deadline, minutes)
    if verdict != COMPLETE:
        store.set(f"{SEEN}/{world.rank}", "")
        raise decode_error(verdict)


def _check_start(store: TCPStore, world: World, deadline: float, minutes: float) -> None:
    """Raise RankError where the store is that of another start, whose ranks this rank must not join."""
    start = _answer(store, START, deadline, minutes)
    if start != world.start_id:
        raise RankError(
            f"ranks of another start meet at {store.host}:{store.port}; end them, or choose another port (torchrun "
            "--master-port); a job takes another one when it starts again"
        )


def _answer(store: TCPStore, key: str, deadline: float, minutes: float) -> str:
    """Return what rank 0 writes under a key, once it is there."""
    while not store.check([key]):
        if time.monotonic() > deadline + NAME_SECONDS:  # rank 0 may have begun to wait later
            raise RankError(f"rank 0 did not answer within {minutes:g} minutes; see its log")
        time.sleep(POLL_SECONDS)
    return store.get(key).decode(errors="replace")


def _fault_of_ranks(store: TCPStore, world: World, deadline: float, minutes: float) -> AvcilError | None:
    """Wait for all ranks. Return the error when one is missing, or when two have the same GPU."""
    missing = set(range(1, world.size))
    notice = time.monotonic() + NOTICE_SECONDS
    while missing := {rank for rank in missing if not store.check([f"{HERE}/{rank}"])}:
        now = time.monotonic()
        if now > deadline:
            return RankError(missing_ranks_line(missing, world.size, minutes, os.environ))
        if now > notice:
            named = ", ".join(map(str, sorted(missing)[:MAX_NAMED]))
            _logger.warning("avcil: rank 0 waits for %d of %d ranks: %s", len(missing), world.size, named)
            notice = deadline
        time.sleep(POLL_SECONDS)
    return shared_gpu([_entry(store.get(f"{HERE}/{rank}")) for rank in range(world.size)])


def _entry(data: bytes) -> tuple[str, str]:
    try:
        host, gpu = json.loads(data)
    except (ValueError, TypeError):
        return "", ""
    return str(host), str(gpu)


def shared_gpu(ranks: list[tuple[str, str]]) -> WorldError | None:
    """Return the error for ranks, given as host and GPU, of which two have the same GPU; an empty one is no GPU."""
    first: dict[tuple[str, str], int] = {}
    for rank, (host, gpu) in enumerate(ranks):
        other = first.setdefault((host, gpu), rank)
        if gpu and other != rank:
            return WorldError(
                f"ranks {other} and {rank} have the same GPU of {host}; start no more ranks than GPUs, or give each "
                "rank its own (srun --gpus-per-task=1)"
            )
    return None


@contextlib.contextmanager
def _as_rank_error(line: str) -> Iterator[None]:
    """Raise a lost connection to the store as a RankError."""
    try:
        yield
    except dist.DistError:
        raise RankError(line) from None
