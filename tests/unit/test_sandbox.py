"""Sandbox: its line of the hosts file."""

from pathlib import Path

from launch.sandbox.cluster import hosts_of


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
