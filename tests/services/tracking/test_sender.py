"""Event queue under faults: a killed writer or sender, a server that hangs, two senders."""

import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

from avcil_dist.tracking.client import find_stream
from avcil_dist.tracking.events import STREAM, StepTracker
from tests.helpers.sent_events import histories
from tests.helpers.stream_folder import StreamFolder

PROJECT = Path(__file__).parents[3]


KILLED = """
import os, signal, sys
from pathlib import Path
from avcil_dist.tracking.event_queue import EventQueue
from tests.helpers.stream_folder import StreamFolder
offsets, save = [], EventQueue.save_cursor
def save_or_die(self, uri, cursor):  # the server has the events, the cursor does not move
    offsets.append(cursor.offset)
    if len(offsets) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, uri, cursor)
EventQueue.save_cursor = save_or_die
StreamFolder(Path(sys.argv[1]), sys.argv[2]).send()
"""


def test_a_sender_killed_before_its_cursor_is_saved_duplicates_nothing(tmp_path: Path) -> None:
    stream = StreamFolder(tmp_path / "stream", str(tmp_path))
    stream.open(seed=0)
    for step in range(2):
        with StepTracker(stream.queue, step) as tracker:
            for epoch in range(5):
                tracker.metrics({"loss": epoch + step / 2, "lr": 0.1}, epoch)
    for kill_at in (1, 2, 2):  # at the run, at the begin of a step, at its numbers
        command = [sys.executable, "-c", KILLED, stream.folder, stream.output, str(kill_at)]
        assert subprocess.run(command, cwd=PROJECT, check=False).returncode == -signal.SIGKILL
    runs = stream.send_all()
    tracked = find_stream(stream.uri, runs[STREAM])
    experiment = tracked.run.info.experiment_id
    assert len(tracked.client.search_runs([experiment])) == 3
    for step in range(2):
        expected = {"loss": [(e, e + step / 2) for e in range(5)], "lr": [(e, 0.1) for e in range(5)]}
        assert histories(tracked.client, runs[str(step)]) == expected


def test_a_server_that_hangs_costs_the_training_nothing_and_its_end_a_bounded_wait(tmp_path: Path) -> None:
    def cost(stream: StreamFolder) -> float:
        seconds = []
        with StepTracker(stream.queue, 0) as tracker:
            for epoch in range(50):
                begun = time.perf_counter()
                tracker.metrics({"loss": 1.0, "lr": 0.1}, epoch)
                seconds.append(time.perf_counter() - begun)
        return statistics.median(seconds)

    with socket.socket() as hanging:  # takes connections, answers nothing
        hanging.bind(("127.0.0.1", 0))
        hanging.listen()
        stream = StreamFolder(tmp_path / "hung", str(tmp_path), uri=f"http://127.0.0.1:{hanging.getsockname()[1]}")
        alone = cost(StreamFolder(tmp_path / "alone", str(tmp_path)))
        stream.open()
        sender = stream.sender()
        sender.start()
        beside = cost(stream)
        begun = time.perf_counter()
        assert not sender.close(patience=1.0)
        assert time.perf_counter() - begun < 10
    assert beside < 5 * alone + 0.01
    assert len(stream.queue.events("metrics")) == 50


def test_one_process_sends_at_a_time_and_another_sees_that_everything_is_sent(tmp_path: Path) -> None:
    stream = StreamFolder(tmp_path / "stream", str(tmp_path))
    stream.open()
    first, second = stream.sender(), stream.sender()
    first.start()
    second.start()
    with StepTracker(stream.queue, 0) as tracker:
        for epoch in range(20):
            tracker.metrics({"loss": 1.0 * epoch}, epoch)
    assert second.close(60.0)
    assert first.close(60.0)
    runs = stream.queue.cursor(stream.uri).runs
    tracked = find_stream(stream.uri, runs[STREAM])
    assert histories(tracked.client, runs["0"]) == {"loss": [(epoch, 1.0 * epoch) for epoch in range(20)]}
