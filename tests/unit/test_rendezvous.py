"""Rendezvous of ranks, each in a thread: every fault is one line, on all ranks that are there."""

import datetime
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch._C._distributed_c10d import TCPStore

from avcil_dist.errors import AvcilError, RankError, WorldError
from avcil_dist.training import rendezvous as module
from avcil_dist.training.failure_sync import KEY, propagate_failures
from avcil_dist.training.rendezvous import check_interfaces, interfaces, missing_ranks_line, rendezvous, shared_gpu
from avcil_dist.world import World
from launch.local_worlds import local_worlds, reserved_port

SECONDS = datetime.timedelta(seconds=20)
MINUTES = 0.5
Local = Callable[[int], tuple[World, ...]]


@pytest.fixture
def local() -> Iterator[Local]:
    """Worlds of ranks on this machine, by their number; their port is reserved until the end of the test."""
    with ExitStack() as stack:
        yield lambda count: stack.enter_context(local_worlds(count))


@pytest.fixture
def port() -> Iterator[int]:
    """A port that is reserved until the end of the test."""
    with reserved_port() as reserved:
        yield reserved


def met(world: World, minutes: float = MINUTES) -> TCPStore | AvcilError:
    """The store of a rank, or its error."""
    try:
        return rendezvous(world, minutes=minutes, timeout=SECONDS)
    except AvcilError as error:
        return error


def all_met(worlds: tuple[World, ...], minutes: float = MINUTES) -> list[TCPStore | AvcilError]:
    with ThreadPoolExecutor(len(worlds)) as pool:
        return list(pool.map(lambda world: met(world, minutes), worlds))


@contextmanager
def busy_port(host: str = "127.0.0.1") -> Iterator[int]:
    """A port at which another program listens and never answers."""
    with closing(socket.socket()) as listener:
        listener.bind((host, 0))
        listener.listen()
        yield listener.getsockname()[1]


def far_worlds(address: str, port: int, size: int = 2) -> tuple[World, ...]:
    """Worlds of ranks that are each on a machine of their own."""
    return tuple(World(rank, size, 0, 1, address, port, "slurm") for rank in range(size))


def test_ranks_that_all_come_share_a_store(local: Local) -> None:
    stores = all_met(local(3))
    assert isinstance(stores[0], TCPStore)
    stores[0].set("key", "value")
    assert [store.get("key") for store in stores if isinstance(store, TCPStore)] == [b"value"] * 3


def listening(port: int) -> set[str]:
    """The addresses at which this machine listens on a port, in hexadecimal as the kernel lists them."""
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path("/proc/net", name).read_text().splitlines()[1:]]
    local = [fields[1].rsplit(":", 1) for fields in lines if fields[3] == "0A"]
    return {address for address, number in local if int(number, 16) == port}


@pytest.mark.parametrize("count", [2, 1])
def test_ranks_of_one_machine_listen_on_the_loopback_interface_alone(local: Local, count: int) -> None:
    stores = all_met(local(count))
    assert isinstance(stores[0], TCPStore)
    assert listening(stores[0].port) == {"0100007F"}


def test_a_launcher_on_one_machine_is_met_on_the_loopback_interface_by_any_name(port: int) -> None:
    stores = all_met(tuple(World(rank, 2, rank, 2, "no-such-host.invalid", port, "slurm") for rank in range(2)))
    assert all(isinstance(store, TCPStore) for store in stores)
    assert listening(port) == {"0100007F"}


def has_ipv6() -> bool:
    """Whether this machine has a loopback address of IPv6."""
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_machines_meet_at_an_address_of_ipv6(port: int) -> None:
    stores = all_met(far_worlds("::1", port))
    assert all(isinstance(store, TCPStore) for store in stores), stores


def test_a_name_that_stands_for_a_loopback_address_serves_other_machines_too(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_resolve", lambda host, port: (socket.AF_INET, "127.0.1.1"))
    worlds = far_worlds("node-a", port)
    stores = all_met(worlds)
    assert all(isinstance(store, TCPStore) for store in stores), stores
    assert listening(worlds[0].master_port) == {"00000000"}


def test_an_address_in_front_of_the_machine_serves_too(port: int) -> None:
    worlds = far_worlds("192.0.2.1", port)  # an address of nobody: rank 0 listens on its own ones
    first = ThreadPoolExecutor(1).submit(met, worlds[0], 0.05)
    other = worlds[1].__class__(1, 2, 0, 1, "127.0.0.1", worlds[1].master_port, "slurm")
    assert isinstance(met(other), TCPStore)
    assert isinstance(first.result(), TCPStore)


def test_ranks_of_another_start_at_the_same_port_are_refused_and_the_ranks_it_belongs_to_meet(local: Local) -> None:
    worlds = local(2)
    stranger = replace(worlds[1], start_id="another")
    with ThreadPoolExecutor(3) as pool:
        own = pool.submit(met, worlds[0])
        fault = met(stranger)
        assert isinstance(fault, RankError)
        assert str(fault).startswith(f"ranks of another start meet at 127.0.0.1:{worlds[0].master_port}; end them, or")
        assert not own.done()
        assert isinstance(met(worlds[1]), TCPStore)
        assert isinstance(own.result(), TCPStore)


def test_a_reserved_port_is_given_to_nobody_but_the_ranks(local: Local) -> None:
    worlds = local(2)
    port = worlds[0].master_port
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port))
    assert isinstance(all_met(worlds)[0], TCPStore)
    assert len({local(1)[0].master_port for _ in range(200)} | {port}) == 201


def test_ranks_that_do_not_come_are_named_on_all_that_did(local: Local) -> None:
    worlds = local(5)
    started = time.monotonic()
    faults = all_met((worlds[0], worlds[3]), minutes=0.02)
    assert [type(fault) for fault in faults] == [RankError, RankError]
    assert {str(fault) for fault in faults} == {
        "3 of 5 ranks did not come within 0.02 minutes: 1, 2, 4; see their logs, or raise engine.meeting_minutes"
    }
    assert time.monotonic() - started < 10


def test_many_missing_ranks_are_one_short_line_and_a_shell_of_srun_is_explained() -> None:
    line = missing_ranks_line(range(1, 64), 64, 10.0, {"SLURM_PTY_PORT": "1"})
    assert line.startswith("63 of 64 ranks did not come within 10 minutes: 1, 2, 3, 4, 5, 6, 7, 8, …; a shell of srun")


def test_ranks_that_are_missing_for_a_while_are_printed(
    local: Local, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "NOTICE_SECONDS", 0.2)
    met(local(3)[0], minutes=0.02)
    assert caplog.messages == ["avcil: rank 0 waits for 2 of 3 ranks: 1, 2"]


def test_without_rank_0_the_others_end_in_the_stated_time(local: Local) -> None:
    world = local(2)[1]
    fault = met(world, minutes=0.01)
    assert isinstance(fault, RankError)
    assert str(fault).startswith(f"rank 0 did not come to 127.0.0.1:{world.master_port} within 0.01 minutes (")


def test_a_port_in_use_is_named_on_rank_0_and_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ANSWER_SECONDS", 1.0)
    with busy_port() as port:
        faults = all_met(tuple(World(rank, 2, rank, 2, "127.0.0.1", port, "torchrun") for rank in range(2)))
    assert [type(fault) for fault in faults] == [RankError, RankError]
    assert str(faults[0]).startswith(f"port {port} is in use on {socket.gethostname()}; ")
    assert "--master-port" in str(faults[0])
    assert str(faults[1]).startswith(f"127.0.0.1:{port} does not answer as rank 0; does another program listen there?")


class _OwnPort(socket.socket):
    """A socket that the system gave the port it connects to, so that it is connected to itself."""

    def connect(self, address: Any, /) -> None:
        self.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the test has reserved the port
        self.bind(address)
        super().connect(address)


def test_a_connection_to_itself_is_not_taken_for_rank_0(local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    world = local(2)[1]
    monkeypatch.setattr(module.socket, "socket", _OwnPort)
    fault = met(world, minutes=0.01)
    assert isinstance(fault, RankError)
    assert str(fault).startswith("rank 0 did not come to ")


def test_a_host_name_that_does_not_resolve_is_one_line(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "NAME_SECONDS", 0.2)
    for fault in all_met(far_worlds("no-such-host.invalid", port)):
        assert isinstance(fault, WorldError)
        assert str(fault).startswith("host name 'no-such-host.invalid' of rank 0 does not resolve on ")


def test_with_a_store_of_the_launcher_any_free_port_serves() -> None:
    """torchrun's own port is taken by its store, and the port after it by another program."""
    agent = TCPStore("127.0.0.1", 0, None, True, SECONDS, wait_for_workers=False)
    worlds = tuple(World(rank, 2, rank, 2, "127.0.0.1", agent.port, "torchrun", "avcil/run/0") for rank in range(2))
    for number in range(2):
        stores = all_met(tuple(world.at_meeting(number) for world in worlds))
        assert isinstance(stores[0], TCPStore), stores
        assert int(agent.get(f"avcil/run/0/{number}")) == stores[0].port != agent.port
        assert listening(stores[0].port) == {"0100007F"}


def test_an_interface_that_does_not_exist_is_one_line_with_those_that_do(
    local: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(WorldError, match=r"GLOO_SOCKET_IFNAME=ib0: this machine has lo, eth0; set one of them"):
        check_interfaces({"GLOO_SOCKET_IFNAME": "ib0"}, ["lo", "eth0"])
    with pytest.raises(WorldError, match="GLOO_SOCKET_IFNAME=eth0,ib0: this"):
        check_interfaces({"GLOO_SOCKET_IFNAME": "eth0,ib0"}, ["lo", "eth0"])
    check_interfaces({"GLOO_SOCKET_IFNAME": "eth0,lo"}, ["lo", "eth0"])
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    fault = met(local(1)[0])
    assert isinstance(fault, WorldError)
    assert ", ".join(interfaces()) in str(fault)


def test_two_ranks_cannot_share_a_gpu(local: Local) -> None:
    assert shared_gpu([("a", "0"), ("a", "1"), ("b", "0")]) is None
    assert shared_gpu([("a", ""), ("a", "")]) is None
    fault = shared_gpu([("a", "0"), ("b", "0"), ("a", "0")])
    assert isinstance(fault, WorldError)
    assert str(fault).startswith("ranks 0 and 2 have the same GPU of a;")
    worlds = local(2)
    with ThreadPoolExecutor(2) as pool:
        ranks = [pool.submit(rendezvous, world, minutes=MINUTES, timeout=SECONDS, gpu="GPU-7") for world in worlds]
        for rank in ranks:
            with pytest.raises(WorldError, match="ranks 0 and 1 have the same GPU"):
                rank.result()


@pytest.mark.parametrize("text", ["\x1b[2Jplease pay", '["SystemExit", "please pay"]', "\ufffd" * 10, "[" * 10**5])
def test_a_stranger_that_writes_to_the_store_cannot_choose_type_or_length_of_the_error(local: Local, text: str) -> None:
    worlds = local(2)
    stores = all_met(worlds)
    assert isinstance(stores[0], TCPStore)
    stranger = TCPStore("127.0.0.1", stores[0].port, None, False, SECONDS, wait_for_workers=False)
    stranger.set(KEY, text)
    begun = threading.Barrier(2)

    def run(rank: int) -> Exception:
        fail: Callable[[AvcilError], Any] = pytest.fail
        store = stores[rank]
        assert isinstance(store, TCPStore)
        try:
            with propagate_failures(store, worlds[rank], fail):
                begun.wait()
                raise RuntimeError("the connection is lost")
        except RankError as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        faults = list(pool.map(run, range(2)))
    assert len({str(fault) for fault in faults}) == 1
    assert str(faults[0]).isprintable()
    assert len(str(faults[0])) < 200
