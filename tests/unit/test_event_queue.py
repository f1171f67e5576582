"""Event queue and sender with a writer in memory: damaged lines, cursors, what counts as sent."""

import logging
from collections.abc import Sequence
from pathlib import Path

import pytest

from avcil_dist.tracking.event_queue import DeliveryCursor, Event, EventQueue
from avcil_dist.tracking.sender import Sender

SERVER = "http://server"


class MemoryWriter:
    """A server in memory that takes every event."""

    def __init__(self, runs: dict[str, str]) -> None:
        self.runs = runs
        self.is_uploading = False
        self.events: list[Event] = []

    def write(self, events: Sequence[Event]) -> None:
        self.events += events


def send(queue: EventQueue) -> tuple[bool, list[Event]]:
    """Send what the server lacks; whether the sender reports that everything is sent, and the events."""
    writer = MemoryWriter({})
    sender = Sender(queue, SERVER, lambda runs: writer, shown=SERVER)
    sender.start()
    return sender.close(30.0), writer.events


def append_damaged_line(queue: EventQueue, data: bytes = b'{"kind": "metr\n') -> None:
    with queue.path.open("ab") as file:
        file.write(data)


def test_a_damaged_line_is_skipped_and_the_next_one_is_whole(tmp_path: Path) -> None:
    queue = EventQueue(tmp_path)
    queue.append("metrics", run="0", position=0, values={"loss": 1.0})
    append_damaged_line(queue, b'{"kind": "metrics", "run"')  # killed here
    queue.append("metrics", run="0", position=1, values={"loss": float("nan")})
    assert [event["position"] for event in queue.events("metrics")] == [0, 1]
    assert len(list(queue.read(0, limit=1))) == 1


@pytest.mark.parametrize("damage", [b'{"kind": "metr\n', b"\0\0\0\n", b"\xff\xfe\n", b"\n", b"17\n", b"{}\n"])
def test_events_behind_a_damaged_line_are_not_sent_yet_and_are_sent(tmp_path: Path, damage: bytes) -> None:
    queue = EventQueue(tmp_path)
    queue.append("begin", step=0)
    assert send(queue)[0]
    for _ in range(3):
        append_damaged_line(queue, damage)
    queue.append("begin", step=1)
    assert not queue.is_sent(SERVER)
    is_sent, events = send(queue)
    assert is_sent
    assert [event["step"] for event in events] == [1]
    assert queue.is_sent(SERVER)


def test_more_damaged_lines_than_a_batch_do_not_hide_the_events_behind_them(tmp_path: Path) -> None:
    queue = EventQueue(tmp_path)
    queue.append("begin", step=0)
    append_damaged_line(queue, b"\n" * 1000)
    queue.append("begin", step=1)
    assert [event["step"] for event in send(queue)[1]] == [0, 1]


def test_damaged_lines_alone_leave_nothing_to_send_and_are_reported_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    queue = EventQueue(tmp_path)
    queue.append("begin", step=0)
    append_damaged_line(queue)
    with caplog.at_level(logging.WARNING):
        assert send(queue)[0]
        assert queue.is_sent(SERVER)
        assert len(queue.events("begin")) == 1
    assert caplog.text.count("a damaged line is skipped") == 1


def test_an_unreadable_cursor_starts_at_the_first_event(tmp_path: Path) -> None:
    queue = EventQueue(tmp_path)
    queue.append("begin", step=0)
    queue.save_cursor("http://a", DeliveryCursor(offset=queue.size()))
    assert queue.is_sent("http://a")
    assert not queue.is_sent("http://b")
    [path] = tmp_path.glob("cursor-*.json")
    path.write_text("{")
    assert not queue.is_sent("http://a")


def test_a_queue_that_cannot_be_written_does_not_stop_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    EventQueue(tmp_path / "file").append("begin", step=0)
    assert "will not reach a tracking server" in caplog.text
    assert (tmp_path / "file").read_text() == "in the way"
