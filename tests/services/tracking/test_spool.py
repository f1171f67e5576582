"""The spool when things go wrong: a writer or sender that is killed, a server that hangs, two senders."""

import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from avcil_dist.tracking.client import find_stream
from avcil_dist.tracking.event_queue import DeliveryCursor, EventQueue
from avcil_dist.tracking.events import STREAM, StepTracker
from tests.helpers.sent_events import histories
from tests.unit.test_tracking import Stream

PROJECT = Path(__file__).parents[3]


def test_a_line_that_was_cut_is_passed_over_and_the_next_is_whole(tmp_path: Path) -> None:
    spool = EventQueue(tmp_path)
    spool.append("metrics", run="0", position=0, values={"loss": 1.0})
    with spool.path.open("ab") as file:
        file.write(b'{"kind": "metrics", "run"')  # killed here
    spool.append("metrics", run="0", position=1, values={"loss": float("nan")})
    assert [record["position"] for record in spool.records("metrics")] == [0, 1]
    assert len(list(spool.read(0, limit=1))) == 1


def test_a_note_that_cannot_be_read_begins_anew(tmp_path: Path) -> None:
    spool = EventQueue(tmp_path)
    spool.append("begin", step=0)
    spool.save_note("http://a", DeliveryCursor(offset=spool.size()))
    assert spool.is_sent("http://a")
    assert not spool.is_sent("http://b")
    [path] = tmp_path.glob("sent-*.json")
    path.write_text("{")
    assert not spool.is_sent("http://a")


KILLED = """
import os, signal, sys
from pathlib import Path
from avcil_dist.tracking.event_queue import EventQueue
from tests.unit.test_tracking import Stream
notes, save = [], EventQueue.save_note
def save_or_die(self, uri, note):  # what was told is there, that it was told is not
    notes.append(note.offset)
    if len(notes) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, uri, note)
EventQueue.save_note = save_or_die
Stream(Path(sys.argv[1]), sys.argv[2]).send()
"""


def test_a_sender_killed_between_telling_and_noting_doubles_nothing(tmp_path: Path) -> None:
    stream = Stream(tmp_path / "stream", str(tmp_path))
    stream.open(seed=0)
    for step in range(2):
        with StepTracker(stream.spool, step) as tracker:
            for epoch in range(5):
                tracker.metrics({"loss": epoch + step / 2, "lr": 0.1}, epoch)
    for kill_at in (1, 2, 2):  # at the run, at the begin of a step, at its numbers
        words = [sys.executable, "-c", KILLED, stream.folder, stream.output, str(kill_at)]
        assert subprocess.run(words, cwd=PROJECT, check=False).returncode == -signal.SIGKILL
    runs = stream.tell()
    found = find_stream(stream.uri, runs[STREAM])
    experiment = found.run.info.experiment_id
    assert len(found.client.search_runs([experiment])) == 3
    for step in range(2):
        expected = {"loss": [(e, e + step / 2) for e in range(5)], "lr": [(e, 0.1) for e in range(5)]}
        assert histories(found.client, runs[str(step)]) == expected


def test_a_server_that_hangs_costs_the_training_nothing_and_its_end_a_bounded_wait(tmp_path: Path) -> None:
    def cost(stream: Stream) -> float:
        seconds = []
        with StepTracker(stream.spool, 0) as tracker:
            for epoch in range(50):
                begun = time.perf_counter()
                tracker.metrics({"loss": 1.0, "lr": 0.1}, epoch)
                seconds.append(time.perf_counter() - begun)
        return statistics.median(seconds)

    with socket.socket() as hanging:  # takes connections, answers nothing
        hanging.bind(("127.0.0.1", 0))
        hanging.listen()
        stream = Stream(tmp_path / "hung", str(tmp_path), uri=f"http://127.0.0.1:{hanging.getsockname()[1]}")
        alone = cost(Stream(tmp_path / "alone", str(tmp_path)))
        stream.open()
        sender = stream.sender()
        sender.start()
        beside = cost(stream)
        begun = time.perf_counter()
        assert not sender.close(patience=1.0)
        assert time.perf_counter() - begun < 10
    assert beside < 5 * alone + 0.01
    assert len(stream.spool.records("metrics")) == 50


def test_one_sender_at_a_time_and_the_other_sees_that_all_is_told(tmp_path: Path) -> None:
    stream = Stream(tmp_path / "stream", str(tmp_path))
    stream.open()
    first, second = stream.sender(), stream.sender()
    first.start()
    second.start()
    with StepTracker(stream.spool, 0) as tracker:
        for epoch in range(20):
            tracker.metrics({"loss": 1.0 * epoch}, epoch)
    assert second.close(60.0)
    assert first.close(60.0)
    runs = stream.spool.note(stream.uri).runs
    found = find_stream(stream.uri, runs[STREAM])
    assert histories(found.client, runs["0"]) == {"loss": [(epoch, 1.0 * epoch) for epoch in range(20)]}


def test_a_spool_that_cannot_be_written_ends_no_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    EventQueue(tmp_path / "file").append("begin", step=0)
    assert "will not be told" in caplog.text
    assert (tmp_path / "file").read_text() == "in the way"
