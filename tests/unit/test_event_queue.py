"""Event queue and sender with a writer in memory: damaged lines, cursors, what counts as sent."""

import logging
import resource
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from avcil_dist.errors import StorageError
from avcil_dist.tracking.event_queue import DeliveryCursor, Event, EventQueue
from avcil_dist.tracking.outcomes import RefusedError, RejectedError, RunDeletedError, UnavailableError
from avcil_dist.tracking.sender import Sender
from tests.helpers.stream_folder import wait_for_outage

SERVER = "http://server"
WRONG = [
    b'{"kind": "begin", "step": "../x"}\n',
    b'{"kind": "begin", "step": -1}\n',
    b'{"kind": "metrics", "run": "0", "position": 0}\n',
    b'{"kind": "metrics", "run": "0", "position": 0, "values": {"loss": []}}\n',
    b'{"kind": "open", "name": 3}\n',
    b'{"kind": "run"}\n',
    b"[" * 100_000 + b"\n",
]


class MemoryWriter:
    """A server in memory that takes every event."""

    def __init__(self, runs: dict[str, str]) -> None:
        self.runs = runs
        self.experiment: str | None = None
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


@pytest.mark.parametrize("damage", [b'{"kind": "metr\n', b"\0\0\0\n", b"\xff\xfe\n", b"\n", b"17\n", b"{}\n", *WRONG])
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
    for damaged in (
        "{",
        '{"offset": "x"}',
        '{"offset": 99999999999999999}',
        '{"offset": -1}',
        '{"runs": 3}',
        "[" * 100_000,
    ):
        path.write_text(damaged)
        assert not queue.is_sent("http://a")


def test_a_cursor_of_an_earlier_version_has_its_experiment_among_the_runs(tmp_path: Path) -> None:
    queue = EventQueue(tmp_path)
    queue.save_cursor(SERVER, DeliveryCursor(runs={"stream": "a"}, experiment="7"))
    [path] = tmp_path.glob("cursor-*.json")
    for written in (path.read_text(), '{"offset": 0, "runs": {"stream": "a", "experiment": "7"}}'):
        path.write_text(written)
        assert queue.cursor(SERVER) == DeliveryCursor(runs={"stream": "a"}, experiment="7")


def test_a_queue_that_cannot_be_written_does_not_stop_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    EventQueue(tmp_path / "file").append("begin", step=0)
    assert "events are kept in memory" in caplog.text
    assert (tmp_path / "file").read_text() == "in the way"


def test_half_a_line_gives_no_event_and_the_finished_line_the_whole_one(tmp_path: Path) -> None:
    queue = EventQueue(tmp_path)
    queue.append("begin", step=0)
    end = queue.size()
    append_damaged_line(queue, b'{"kind": "begin",')
    assert [event["step"] for event in queue.events("begin")] == [0]
    assert list(queue.read(end, limit=5)) == []
    append_damaged_line(queue, b' "step": 1}')  # complete but for its newline
    assert list(queue.read(end, limit=5)) == []
    append_damaged_line(queue, b"\n")
    assert list(queue.read(end, limit=5)) == [({"kind": "begin", "step": 1}, queue.size())]


def test_an_event_is_synced_to_disk_before_append_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queue, synced = EventQueue(tmp_path), []

    def fsync(descriptor: int) -> None:
        synced.append(queue.path.read_bytes())  # what a reader sees at this moment

    monkeypatch.setattr("os.fsync", fsync)
    queue.append("begin", step=0)
    queue.append("begin", step=1)
    assert [data.count(b"\n") for data in synced] == [1, 2]
    assert synced[-1] == queue.path.read_bytes()


def test_every_event_has_its_own_offset_and_a_read_continues_from_it(tmp_path: Path) -> None:
    queue = EventQueue(tmp_path)
    for step in range(5):
        queue.append("begin", step=step)
    read = list(queue.read(0, limit=3))
    assert [event["step"] for event, _ in read] == [0, 1, 2]
    assert [event["step"] for event, _ in queue.read(read[1][1], limit=9)] == [2, 3, 4]
    assert list(queue.read(0, limit=9))[-1][1] == queue.size()


class FlakyWriter(MemoryWriter):
    """A server that is unavailable for the first calls, and rejects one event for good."""

    def __init__(self, runs: dict[str, str], failures: list[Exception], rejected: int) -> None:
        super().__init__(runs)
        self.failures, self.rejected = failures, rejected

    def write(self, events: Sequence[Event]) -> None:
        if self.failures:
            raise self.failures.pop()
        if any(event.get("position") == self.rejected for event in events):
            raise RejectedError("no such metric")
        super().write(events)


def test_a_rejected_metric_is_skipped_alone_and_the_others_of_its_batch_are_sent(tmp_path: Path) -> None:
    queue = EventQueue(tmp_path)
    for position in range(5):
        queue.append("metrics", run="0", position=position, values={})
    writer = FlakyWriter({}, [UnavailableError("busy")], rejected=2)
    sender = Sender(queue, SERVER, lambda runs: writer, shown=SERVER)
    sender.start()
    assert sender.close(30.0)
    assert [event["position"] for event in writer.events] == [0, 1, 3, 4]


def test_events_that_follow_each_other_go_in_few_calls(tmp_path: Path) -> None:
    queue, calls = EventQueue(tmp_path), []

    class CountingWriter(MemoryWriter):
        def write(self, events: Sequence[Event]) -> None:
            calls.append(len(events))

    sender = Sender(queue, SERVER, CountingWriter, shown=SERVER)
    sender.start()
    for position in range(100):
        queue.append("metrics", is_synced=False, run="0", position=position, values={})
        time.sleep(0.005)  # as from iterations
    assert sender.close(30.0)
    assert sum(calls) == 100
    assert len(calls) <= 10


def test_an_outage_is_recorded_in_the_cursor_and_cleared_after_it(tmp_path: Path) -> None:
    queue = EventQueue(tmp_path)
    queue.append("begin", step=0)
    closed = Sender(queue, SERVER, lambda runs: FlakyWriter(runs, [UnavailableError("away")] * 99, -1), shown=SERVER)
    closed.start()
    wait_for_outage(closed)
    assert not closed.close(0.1)
    cursor = queue.cursor(SERVER)
    assert (cursor.offset, cursor.reason) == (0, "away")
    assert cursor.unavailable_since is not None
    assert send(queue)[0]
    cursor = queue.cursor(SERVER)
    assert (cursor.offset, cursor.reason, cursor.unavailable_since) == (queue.size(), "", None)


def test_a_deleted_run_is_sent_again_from_the_first_event(tmp_path: Path) -> None:
    queue, writers = EventQueue(tmp_path), []
    queue.append("begin", step=0)
    queue.save_cursor(SERVER, DeliveryCursor(queue.size(), {"stream": "old"}))
    queue.append("begin", step=1)

    def connect(runs: dict[str, str]) -> FlakyWriter:
        writers.append(FlakyWriter(runs, [] if writers else [RunDeletedError()], -1))
        return writers[-1]

    sender = Sender(queue, SERVER, connect, shown=SERVER)
    sender.start()
    assert sender.close(30.0)
    assert [writer.runs for writer in writers] == [{"stream": "old"}, {}]
    assert [event["step"] for event in writers[-1].events] == [0, 1]


@contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """No file of this process can grow beyond `size` bytes: a write fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_events_of_a_full_disk_are_written_once_and_in_order_when_there_is_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    queue = EventQueue(tmp_path)
    queue.append("begin", step=0)
    with files_end_at(queue.size() + 20):  # room for a part of a line
        for step in range(1, 4):
            queue.append("begin", step=step, text="x" * 100)
        assert queue.flush() == 3
        assert [event["step"] for event in queue.events("begin")] == [0]
    queue.append("begin", step=4)
    assert queue.flush() == 0
    assert [event["step"] for event in queue.events("begin")] == [0, 1, 2, 3, 4]
    assert caplog.text.count("cannot be written") == 1
    assert "damaged" not in caplog.text
    assert [event["step"] for event in send(queue)[1]] == [0, 1, 2, 3, 4]


def test_a_cursor_that_a_full_disk_does_not_take_ends_nothing(tmp_path: Path) -> None:
    queue = EventQueue(tmp_path)
    queue.append("begin", step=0)
    writer = MemoryWriter({})
    sender = Sender(queue, SERVER, lambda runs: writer, shown=SERVER)
    with files_end_at(0):
        sender.start()
        assert not sender.close(1.0)
    is_sent, events = send(queue)
    assert is_sent
    assert [event["step"] for event in events] == [0]


def test_a_refusal_ends_the_thread_at_once_and_the_next_sender_tries_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    queue = EventQueue(tmp_path)
    queue.append("begin", step=0)

    def refuse(runs: dict[str, str]) -> MemoryWriter:
        raise RefusedError("permission denied; set MLFLOW_TRACKING_TOKEN")

    begun = time.monotonic()
    for _ in range(3):
        sender = Sender(queue, SERVER, refuse, shown=SERVER)
        sender.start()
        assert not sender.close(60.0)
        assert sender.refusal == queue.cursor(SERVER).reason == "permission denied; set MLFLOW_TRACKING_TOKEN"
    assert time.monotonic() - begun < 10
    assert caplog.text.count("takes nothing of this stream") == 1
    assert send(queue)[0]
    assert queue.cursor(SERVER).reason == ""


def test_a_bug_of_the_sender_is_loud_and_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queue, bugs = EventQueue(tmp_path), []
    monkeypatch.setattr(threading, "excepthook", lambda bug: bugs.append(bug.exc_type))
    queue.append("begin", step=0)
    sender = Sender(queue, SERVER, lambda runs: runs["nothing"], shown=SERVER)  # type: ignore[arg-type, return-value]
    begun = time.monotonic()
    sender.start()
    assert not sender.close(60.0)
    assert time.monotonic() - begun < 10
    assert sender.refusal is not None
    assert bugs == [KeyError]


@pytest.mark.parametrize("hours", [-10, 10])
def test_a_clock_that_jumps_does_not_lengthen_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    queue, clock = EventQueue(tmp_path), time.time
    queue.append("begin", step=0)
    away = Sender(queue, SERVER, lambda runs: FlakyWriter(runs, [UnavailableError("away")] * 99, -1), shown=SERVER)
    away.start()
    wait_for_outage(away)
    monkeypatch.setattr(time, "time", lambda: clock() + 3600 * hours)
    begun = time.monotonic()
    assert not away.close(0.5)
    assert time.monotonic() - begun < 5
    queue.append("begin", step=1)
    assert [event["step"] for event in send(queue)[1]] == [0, 1]


def test_a_cursor_that_a_full_disk_does_not_take_is_one_warning_until_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    queue = EventQueue(tmp_path)
    sender = Sender(queue, "http://h", lambda runs: pytest.fail("no connection"), shown="h")

    def fail(*_: object) -> None:
        raise StorageError("cursor.json: cannot be written (No space left on device)")

    for _ in range(2):
        with monkeypatch.context() as full:
            full.setattr(queue, "save_cursor", fail)
            for _ in range(3):
                sender._save(DeliveryCursor())
        sender._save(DeliveryCursor())
    assert [record.getMessage() for record in caplog.records] == [
        "cursor.json: cannot be written (No space left on device)"
    ] * 2
