"""Servers that refuse, lose answers, stall or lie: nothing is lost, nothing comes twice, and every wait ends."""

import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from mlflow import MlflowClient

from avcil_dist.errors import TrackingError
from avcil_dist.streams.identity import new_identity, write_identity
from avcil_dist.streams.metrics import StreamMetrics
from avcil_dist.tracking import environment
from avcil_dist.tracking.client import find_stream
from avcil_dist.tracking.events import STREAM, StepTracker
from avcil_dist.tracking.tags import STEP_TAG, STREAM_TAG
from tests.helpers.faulty_proxy import FaultyProxy
from tests.helpers.mlflow_server import TrackingServer
from tests.helpers.sent_events import check_sent, histories
from tests.helpers.stream_folder import TRACKING, StreamFolder, wait_for_outage

EPOCHS = 6
PROJECT = Path(__file__).parents[3]
KILLED_AFTER = """
import os, signal, sys
from pathlib import Path
from avcil_dist.tracking.event_queue import EventQueue
from tests.helpers.stream_folder import StreamFolder
saves, save = [], EventQueue.save_cursor
def save_and_die(self, uri, cursor):
    save(self, uri, cursor)
    saves.append(cursor.offset)
    if len(saves) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
EventQueue.save_cursor = save_and_die
stream = StreamFolder(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
stream.id = sys.argv[4]
stream.send()
"""


def filled(folder: Path, uri: str) -> StreamFolder:
    """A stream with one step of a few epochs, committed."""
    stream = StreamFolder(folder, str(folder), uri=uri)
    identity = new_identity()
    write_identity(stream.folder, identity)
    stream.id = identity.id
    stream.open(seed=0, classes="dog, cat")
    with StepTracker(stream.queue, 0) as tracker:
        for epoch in range(EPOCHS):
            tracker.metrics({"loss/total": epoch / 4, "lr": 0.5}, epoch)
        stream.commit(StreamMetrics(0, ((0.9,),), (0.9,), {"dog": 0.5, "cat": 0.7}, 5, 1, None), extra=bytes(5000))
        tracker.publish(stream.folder)
    return stream


def check(server: TrackingServer, stream: StreamFolder, folder: Path) -> None:
    """The server has everything once, and no run that it should not have."""
    check_sent(server.uri, stream.folder, folder)
    client = MlflowClient(server.uri)
    query = f"tags.`{STREAM_TAG}` = '{stream.id}'"
    experiment = client.get_experiment_by_name(TRACKING.experiment).experiment_id
    [run] = client.search_runs([experiment], query)
    assert run.data.params == {"seed": "0", "classes": "dog, cat"}
    assert len(client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{run.info.run_id}'")) == 1


def test_an_outage_of_batches_loses_nothing_where_asynchronous_logging_is_asked_for(
    server: TrackingServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ENABLE_ASYNC_LOGGING", "true")
    with FaultyProxy(server.port, lambda method, path: "503" if path.endswith("runs/log-batch") else "pass") as proxy:
        stream = filled(tmp_path / "async-503", proxy.uri)
        sender = stream.sender()
        sender.start()
        wait_for_outage(sender)
        assert not sender.close(patience=1.0)
        assert "503" in stream.queue.cursor(proxy.uri).reason
        monkeypatch.setenv("MLFLOW_ENABLE_ASYNC_LOGGING", "true")
        proxy.rule = lambda method, path: "pass"
        assert stream.send()
    check(server, stream, tmp_path / "back")


def test_answers_that_are_lost_lose_and_double_nothing(server: TrackingServer, tmp_path: Path) -> None:
    seen: Counter[str] = Counter()

    def rule(method: str, path: str) -> str:
        kind = path.partition("?")[0].rstrip("0123456789abcdef")
        seen[kind] += 1
        return "lose" if method != "GET" and seen[kind] <= 2 else "pass"  # what changes the server, twice each

    with FaultyProxy(server.port, rule) as proxy:
        stream = filled(tmp_path / "lost-answers", proxy.uri)
        assert stream.send()
        assert proxy.faults >= 8
    check(server, stream, tmp_path / "back")


def test_a_sender_killed_right_after_its_cursor_was_saved_has_lost_nothing(
    server: TrackingServer, tmp_path: Path
) -> None:
    stream = filled(tmp_path / "killed-after", server.uri)
    command = [sys.executable, "-c", KILLED_AFTER, stream.folder, stream.output, server.uri, stream.id]
    assert subprocess.run(command, cwd=PROJECT, check=False).returncode == -9
    assert 0 < stream.queue.cursor(server.uri).offset < stream.queue.size()
    assert stream.send()
    check(server, stream, tmp_path / "back")


def test_a_server_that_answers_byte_by_byte_ends_in_the_stated_time(
    server: TrackingServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "REQUEST_SECONDS", 2.0)
    with FaultyProxy(server.port, lambda method, path: "drip") as proxy:
        begun = time.monotonic()
        with pytest.raises(TrackingError, match=r"no complete answer within 2 s"):
            find_stream(proxy.uri, "anything")
        stream = filled(tmp_path / "drip", proxy.uri)
        assert not stream.send(patience=0.5)
        assert time.monotonic() - begun < 20


def test_an_upload_that_stalls_ends_and_is_repeated(
    server: TrackingServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "REQUEST_SECONDS", 4.0)
    with FaultyProxy(server.port, lambda method, path: "hang" if "mlflow-artifacts" in path else "pass") as proxy:
        stream = filled(tmp_path / "stalled-upload", proxy.uri)
        begun = time.monotonic()
        assert not stream.send(patience=5.0)
        assert time.monotonic() - begun < 40
        assert "no complete answer within 4 s" in stream.queue.cursor(proxy.uri).reason
        proxy.rule = lambda method, path: "pass"
        assert stream.send()
    check(server, stream, tmp_path / "back")


def test_a_refusal_is_one_line_and_is_not_waited_for(
    server: TrackingServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with FaultyProxy(server.port, lambda method, path: "403") as proxy:
        stream = filled(tmp_path / "refused", proxy.uri)
        begun = time.monotonic()
        for _ in range(2):  # the next step tries once more, and does not repeat the line
            sender = stream.sender()
            sender.start()
            assert not sender.close(patience=60.0)
            assert sender.refusal is not None
        assert time.monotonic() - begun < 10
        assert caplog.text.count("takes nothing of this stream (permission denied") == 1
        proxy.rule = lambda method, path: "pass"
        assert stream.send()
    check(server, stream, tmp_path / "back")


def test_a_refused_artifact_costs_itself_and_not_the_events_after_it(
    server: TrackingServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with FaultyProxy(server.port, lambda method, path: "403" if "mlflow-artifacts" in path else "pass") as proxy:
        stream = filled(tmp_path / "no-artifacts", proxy.uri)
        runs = stream.send_all()
        client = MlflowClient(server.uri)
        assert client.get_run(runs["0"]).info.status == "FINISHED"
        assert histories(client, runs["0"])["loss/total"][-1] == (EPOCHS - 1, (EPOCHS - 1) / 4)
        assert caplog.text.count("an event of kind artifact is skipped") == 1
        cursor = stream.queue.cursor(proxy.uri)
        assert cursor.rejected == 1
        proxy.rule = lambda method, path: "pass"
        cursor.offset = cursor.rejected = 0  # as `avcil sync --again`
        stream.queue.save_cursor(proxy.uri, cursor)
        assert stream.send()
    check(server, stream, tmp_path / "back")


def test_a_deleted_experiment_is_one_line_that_states_what_to_do(server: TrackingServer, tmp_path: Path) -> None:
    client = MlflowClient(server.uri)
    experiment = client.get_experiment_by_name(TRACKING.experiment)
    number = experiment.experiment_id if experiment else client.create_experiment(TRACKING.experiment)
    client.delete_experiment(number)
    try:
        stream = filled(tmp_path / "deleted-experiment", server.uri)
        begun = time.monotonic()
        sender = stream.sender()
        sender.start()
        assert not sender.close(patience=60.0)
        assert time.monotonic() - begun < 10
        assert sender.refusal is not None
        assert f"the experiment {TRACKING.experiment} was deleted there; restore it with" in sender.refusal
        assert f"mlflow experiments restore -x {number}" in sender.refusal
        assert "tracking.experiment=" in sender.refusal
    finally:
        client.restore_experiment(number)
    assert stream.send()
    check(server, stream, tmp_path / "back")


@pytest.mark.parametrize(
    ("tag", "value"),
    [(STREAM_TAG, "../../../x"), (STREAM_TAG, "/etc/x"), (STREAM_TAG, "x" * 100), (STEP_TAG, "9" * 4000)],
)
def test_tags_of_a_server_that_lies_are_refused(tag: str, value: str, server: TrackingServer, tmp_path: Path) -> None:
    stream = filled(tmp_path / f"lies-{abs(hash((tag, value)))}", server.uri)
    runs = stream.send_all()
    run = runs[STREAM] if tag == STREAM_TAG else runs["0"]
    MlflowClient(server.uri).set_tag(run, tag, value)
    with pytest.raises(TrackingError, match=rf"run {run}: its tag {tag} is not one that avcil-dist writes"):
        find_stream(server.uri, runs[STREAM])
