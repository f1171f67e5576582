"""Sandbox: its line of the hosts file, and its ports."""

import socket
import threading
from pathlib import Path

import pytest

from launch.sandbox import cluster
from launch.sandbox.cluster import CONNECTION_PORTS, Sandbox, free_ports, hosts_of


def test_the_hosts_file_has_a_line_for_each_sandbox_that_is_there(tmp_path: Path) -> None:
    first, second, deleted = (tmp_path / name for name in ("a b", "b", "c"))
    first.mkdir()
    second.mkdir()
    text = "127.0.0.1 localhost\n# a comment\n"
    for folder in (deleted, first, second, second):
        text = hosts_of(text, folder, ("node1", "node2"))
    lines = [f"127.0.0.1 node1 node2 # avcil sandbox {folder}" for folder in (first, second)]
    assert text.splitlines() == ["127.0.0.1 localhost", "# a comment", *lines]
    assert hosts_of(text, first, ()).splitlines() == ["127.0.0.1 localhost", "# a comment", lines[1]]


def test_the_other_lines_of_the_hosts_file_can_be_read_while_a_sandbox_changes_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts, others = tmp_path / "hosts", "127.0.0.1 localhost\n# a comment\n"
    hosts.write_text(others)
    monkeypatch.setattr(cluster, "HOSTS", hosts)
    sandboxes = [Sandbox(tmp_path / name) for name in ("first", "second")]
    for sandbox in sandboxes:
        sandbox.folder.mkdir()
    seen, has_ended = set[str](), threading.Event()

    def read() -> None:
        while not has_ended.is_set():
            seen.add(hosts.read_text()[: len(others)])

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    for _ in range(200):
        for names in (("node1", "node2"), ()):
            for sandbox in sandboxes:
                sandbox._write_hosts(names)
    has_ended.set()
    reader.join()
    assert seen == {others}
    assert hosts.read_text() == others


def test_no_connection_gets_the_port_of_a_daemon() -> None:
    first, last = map(int, CONNECTION_PORTS.read_text().split())
    ports = free_ports(200)
    assert len(set(ports)) == 200
    assert not [port for port in ports if first <= port <= last]


def test_a_port_at_which_somebody_listens_is_not_given_to_a_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = server.getsockname()[1]
        monkeypatch.setattr(cluster, "USER_PORTS", range(taken, taken + 1))
        assert free_ports(1) == []
