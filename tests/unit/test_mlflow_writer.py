"""Runs in a real MLflow on sqlite: structure, duplicates, artifacts, statuses, many processes."""

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from avcil_dist import storage
from avcil_dist.compose import load_config
from avcil_dist.config.schema import TrackingConfig
from avcil_dist.errors import ConfigError, StepStopped, TrackingError
from avcil_dist.streams.metrics import StreamMetrics
from avcil_dist.tracking.artifacts import download_step
from avcil_dist.tracking.client import connect, find_by_stream_id, find_stream
from avcil_dist.tracking.delivery import sync_stream, unsent
from avcil_dist.tracking.event_queue import EventQueue, queue_folder
from avcil_dist.tracking.events import STREAM, StepDescription, StepTracker, unfinished_steps
from avcil_dist.tracking.session import close_run, open_run, publish_stream, track_step
from avcil_dist.tracking.uris import tracking_uri
from tests.helpers.stream_folder import TRACKING, StreamFolder

METRICS = StreamMetrics(
    step=1,
    accuracy=((0.9,), (0.5, 0.8)),
    seen_accuracy=(0.9, 0.6),
    per_class={"dog": 0.6},
    num_test_clips=10,
    epoch=3,
    val_accuracy=None,
)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One database for the module: making it takes seconds. Every test has a stream of its own."""
    return str(tmp_path_factory.mktemp("runs of today"))


@pytest.fixture(scope="module")
def client(output: str) -> MlflowClient:
    return MlflowClient(tracking_uri=tracking_uri(TRACKING, output))


@pytest.fixture
def stream(tmp_path: Path, output: str) -> StreamFolder:
    stream = StreamFolder(tmp_path, output)
    stream.open(seed=0)
    return stream


def history(client: MlflowClient, run_id: str, key: str) -> list[tuple[int, float]]:
    return sorted((metric.step, metric.value) for metric in client.get_metric_history(run_id, key))


def test_without_a_uri_runs_go_to_sqlite_in_the_output_folder(output: str) -> None:
    assert tracking_uri(TRACKING, output) == f"sqlite:///{output}/mlflow.db"
    assert tracking_uri(TrackingConfig(uri="http://server"), "s3://bucket/runs") == "http://server"


def test_a_database_on_object_storage_and_an_unknown_uri_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"s3://bucket.*tracking\.uri"):
        tracking_uri(TRACKING, "s3://bucket/runs")
    with pytest.raises(ConfigError, match=r"file:runs: neither a server .* nor a database"):
        tracking_uri(TrackingConfig(uri="file:runs"), "runs")


def test_a_step_run_is_the_child_of_its_stream_run(stream: StreamFolder, client: MlflowClient) -> None:
    with StepTracker(stream.queue, 3):
        running = client.get_run(stream.send_all()["3"])
    runs = stream.send_all()
    step = client.get_run(runs["3"])
    assert running.info.status == "RUNNING"
    assert step.data.tags["mlflow.parentRunId"] == runs[STREAM]
    assert step.data.tags["avcil.step"] == "3"
    assert (step.info.run_name, step.info.status) == (f"{Path(stream.folder).name}-step003", "FINISHED")
    assert client.get_run(runs[STREAM]).data.tags["version"] == "1"
    assert client.get_run(runs[STREAM]).info.run_name == "tiny-avcil-seed0"


def test_parameters_are_logged_once_and_truncated(stream: StreamFolder, client: MlflowClient) -> None:
    many = {f"part.key{i}": i for i in range(150)}
    stream.open(**many, classes="x" * 10_000)
    stream.queue.append("end", run=STREAM, status="FAILED")
    first = stream.send_all()[STREAM]
    assert client.get_run(first).info.status == "FAILED"
    stream.open(**{**many, "part.key7": "changed"}, late=1)
    assert stream.send_all()[STREAM] == first
    run = client.get_run(first)
    assert run.info.status == "RUNNING"
    assert len(run.data.params) == 153
    assert run.data.params["part.key7"] == "7"
    assert run.data.params["late"] == "1"
    assert set(run.data.params["classes"]) == {"x"}


def test_a_deleted_run_is_created_again_with_all_its_values(stream: StreamFolder, client: MlflowClient) -> None:
    with StepTracker(stream.queue, 0) as tracker:
        tracker.metrics({"loss": 1.0}, 0)
    before = stream.send_all()
    client.delete_run(before[STREAM])
    with StepTracker(stream.queue, 1) as tracker:
        tracker.metrics({"loss": 2.0}, 0)
    after = stream.send_all()
    assert not {*before.values()} & {*after.values()}
    assert history(client, after["0"], "loss") == [(0, 1.0)]
    assert history(client, after["1"], "loss") == [(0, 2.0)]


def test_a_resumed_step_continues_its_run_without_duplicate_metrics(stream: StreamFolder, client: MlflowClient) -> None:
    first = StepTracker(stream.queue, 0)

    def interrupted() -> None:
        with first:
            for epoch in range(3):
                first.metrics({"loss": 3.0 - epoch}, epoch)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    before = stream.send_all()["0"]
    assert client.get_run(before).info.status == "KILLED"
    with StepTracker(stream.queue, 0) as second:
        for epoch in range(1, 5):
            second.metrics({"loss": 3.0 - epoch, "lr": 0.1}, epoch)
            second.metrics({"loss": 99.0}, epoch)
    assert stream.send_all()["0"] == before
    assert history(client, before, "loss") == [(0, 3.0), (1, 2.0), (2, 1.0), (3, 0.0), (4, -1.0)]
    assert [position for position, _ in history(client, before, "lr")] == [1, 2, 3, 4]


def test_the_stream_run_has_the_streams_metrics_by_step(stream: StreamFolder, client: MlflowClient) -> None:
    first = StreamMetrics(0, ((0.9,),), (0.9,), {}, 5, 1, None)
    for metrics in (first, METRICS, METRICS):  # the last step is done twice, as after a kill before its commit
        stream.commit(metrics)
        with StepTracker(stream.queue, metrics.step) as tracker:
            tracker.publish(stream.folder)
    runs = stream.send_all()
    assert history(client, runs[STREAM], "test/seen_accuracy") == [(0, 0.9), (1, 0.6)]
    assert history(client, runs[STREAM], "test/mean_accuracy") == [(0, 0.9), (1, 0.75)]
    assert history(client, runs[STREAM], "test/forgetting") == [(1, pytest.approx(0.4))]
    assert history(client, runs[STREAM], "test/average_forgetting") == [(1, pytest.approx(0.4))]
    assert history(client, runs[STREAM], "test_task/task_0") == [(0, 0.9), (1, 0.5)]
    assert history(client, runs[STREAM], "test_task/task_1") == [(1, 0.8)]
    assert history(client, runs["1"], "test/seen_accuracy") == [(1, 0.6)]


def test_the_step_run_has_every_class_in_a_table_and_none_as_a_metric(
    stream: StreamFolder, client: MlflowClient, tmp_path: Path
) -> None:
    classes = {"railroad car, train wagon": 0.25, "日本": 1.0} | {f"class {number}": 0.5 for number in range(300)}
    metrics = StreamMetrics.after(
        None,
        step=0,
        row=[0.5],
        seen=0.5,
        per_class=classes,
        num_test_clips=8,
        epoch=0,
        val_accuracy=None,
        confusion={"日本": {"日本": 3, "class 7": 1}},
        source_disjoint=(0.375, 4),
    )
    stream.commit(metrics)
    for _ in range(2):  # sent twice, kept once
        with StepTracker(stream.queue, 0) as tracker:
            tracker.publish(stream.folder, "s3://bucket/mine/manifest.json")
    runs = stream.send_all()
    run = client.get_run(runs["0"])
    assert set(run.data.metrics) == {"test/seen_accuracy", "test/mean_accuracy", "test/source_disjoint_accuracy"}
    table = json.loads(Path(client.download_artifacts(runs["0"], "class_accuracy.json", str(tmp_path))).read_text())
    assert table["columns"] == ["class", "accuracy", "clips"]
    assert table["data"][:2] == [["railroad car, train wagon", 0.25, 0], ["日本", 1.0, 4]]
    assert len(table["data"]) == 302
    confusion = json.loads(Path(client.download_artifacts(runs["0"], "confusion.json", str(tmp_path))).read_text())
    assert confusion["data"] == [["日本", "日本", 3], ["日本", "class 7", 1]]
    tagged = json.loads(run.data.tags["mlflow.loggedArtifacts"])
    assert [entry["path"] for entry in tagged] == ["class_accuracy.json", "confusion.json"]
    for id in runs.values():
        [entry] = client.get_run(id).inputs.dataset_inputs
        assert (entry.dataset.name, entry.dataset.digest) == ("mine", "m")
        assert json.loads(entry.dataset.source) == {"url": "s3://bucket/mine/manifest.json"}
    assert "| 0 | 50.0% | – |" in client.get_run(runs[STREAM]).data.tags["mlflow.note.content"]


def test_a_step_run_has_the_parameters_and_facts_of_its_step_and_the_experiment_opens_as_model_training(
    stream: StreamFolder, client: MlflowClient
) -> None:
    described = StepDescription("mine-step000", {"optim.lr": 0.5}, {"step": "0"}, {"host": "node7"})
    for _ in range(2):
        with StepTracker(stream.queue, 0, described) as tracker:
            tracker.system({"node_0/cpu_percent": 50.0})
    runs = stream.send_all()
    run, parent = client.get_run(runs["0"]), client.get_run(runs[STREAM])
    assert run.info.run_name == "mine-step000"
    assert run.data.params == {"optim.lr": "0.5"}
    assert (run.data.tags["step"], run.data.tags["host"], parent.data.tags["host"]) == ("0", "node7", "node7")
    assert "step" not in parent.data.tags
    assert run.data.metrics == {"system/node_0/cpu_percent": 50.0}
    assert client.get_experiment(run.info.experiment_id).tags["mlflow.experimentKind"] == "custom_model_development"


def test_a_file_of_the_streams_folder_is_an_artifact_of_its_run(
    stream: StreamFolder, client: MlflowClient, tmp_path: Path
) -> None:
    Path(stream.folder, "report.html").write_text("<p>")
    stream.queue.append("file", file="report.html")
    stream.queue.append("file", file="gone.html")
    runs = stream.send_all()
    assert Path(client.download_artifacts(runs[STREAM], "report.html", str(tmp_path))).read_text() == "<p>"
    assert stream.queue.cursor(stream.uri).rejected == 1


def test_of_a_stream_on_object_storage_one_file_at_a_time_is_copied_and_its_upload_is_waited_for(
    stream: StreamFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream.folder = f"memory:/{tmp_path}/remote"
    stream.commit(METRICS, **{"model.safetensors": bytes(1000), "memory.json": b"[]"})
    storage.write_bytes(f"{stream.folder}/report.html", b"<p>")
    with StepTracker(stream.queue, 1) as tracker:
        tracker.publish(stream.folder)
        publish_stream(tracker)
    (copies := tmp_path / "copies").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(copies))
    seen, log = list[tuple[bool, list[str]]](), MlflowClient.log_artifact

    def watched(*arguments: object, **named: object) -> None:
        writer = sender._writer
        seen.append((writer is not None and writer.is_uploading, [path.name for path in copies.rglob("*.*")]))
        log(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(MlflowClient, "log_artifact", watched)
    sender = stream.sender()
    sender.start()
    assert sender.close(60.0)
    files = ["memory.json", "metrics.json", "model.safetensors", "scenario.json", "COMMITTED.json", "report.html"]
    assert seen == [(True, [name]) for name in files]
    assert not list(copies.iterdir())
    storage.remove_tree(stream.folder)


def test_a_downloaded_artifact_equals_the_uploaded_one(stream: StreamFolder, tmp_path: Path) -> None:
    stream.commit(METRICS, **{"model.safetensors": bytes(range(256)), "part.json": b"[1]"})
    with StepTracker(stream.queue, 1) as tracker:
        tracker.publish(stream.folder)
    stream.send_all()
    tracked = find_stream(stream.uri, stream.queue.cursor(stream.uri).runs["1"])
    download_step(tracked.client, stream.uri, tracked.steps[1], 1, f"{tmp_path}/back")
    went, back = Path(stream.folder, "step_001"), tmp_path / "back" / "step_001"
    assert {path.name: path.read_bytes() for path in back.iterdir()} == {
        path.name: path.read_bytes() for path in went.iterdir()
    }
    assert (Path(stream.output) / "mlartifacts").is_dir()


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("bad"), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (SystemExit(143), "KILLED"),
        (StepStopped("to go on later"), "RUNNING"),
    ],
)
def test_the_status_of_the_run_is_how_the_step_ended(
    stream: StreamFolder, client: MlflowClient, error: BaseException, status: str
) -> None:
    with pytest.raises(type(error)), StepTracker(stream.queue, 0):
        raise error
    runs = stream.send_all()
    assert client.get_run(runs["0"]).info.status == status
    assert client.get_run(runs[STREAM]).info.status == status


def test_a_step_whose_process_was_killed_is_unfinished(stream: StreamFolder) -> None:
    with StepTracker(stream.queue, 0):
        assert unfinished_steps(stream.queue) == ["0"]
    StepTracker(stream.queue, 1).__enter__()
    assert unfinished_steps(stream.queue) == ["1"]
    StepTracker(stream.queue, 0).__enter__()  # begun again
    assert unfinished_steps(stream.queue) == ["1", "0"]


def test_the_run_of_a_stream_is_ended_once_after_each_beginning(tmp_path: Path) -> None:
    config = load_config("demo", [f"output={tmp_path}"])
    queue = EventQueue(queue_folder(f"{tmp_path}/{config.stream_name}", open_run(config, is_elsewhere=True)))
    with StepTracker(queue, 0) as tracker:
        publish_stream(tracker)
    close_run(config, None)
    assert [event["run"] for event in queue.events("end")] == [STREAM, "0"]
    open_run(config)
    close_run(config, None)
    StepTracker(queue, 1).__enter__()
    close_run(config, None)
    close_run(config, None)
    assert [event["run"] for event in queue.events("end")] == [STREAM, "0", STREAM, STREAM]


def test_a_metric_that_the_server_refuses_is_left_out_alone_with_one_warning(
    stream: StreamFolder, client: MlflowClient, caplog: pytest.LogCaptureFixture
) -> None:
    values = {f"loss/part {number}": 1.0 * number for number in range(20)}
    with StepTracker(stream.queue, 0) as tracker:
        tracker.metrics({"loss": 1.0}, 0)
        stream.queue.append("metrics", run="0", position=0, values=values | {"is/not {one}": 1.0})
        tracker.metrics({"loss": 2.0}, 1)
    run = stream.send_all()["0"]
    assert history(client, run, "loss") == [(0, 1.0), (1, 2.0)]
    assert client.get_run(run).data.metrics == values | {"loss": 2.0}
    assert caplog.text.count("refuses the metric is/not {one}") == 1
    assert "is skipped" not in caplog.text


def test_a_run_name_of_several_streams_or_of_none_is_an_error(output: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        stream = StreamFolder(tmp_path / name, output)
        stream.queue.append("open", name=f"twin-{tmp_path.name}", parameters={}, tags={})
        stream.send_all()
    with pytest.raises(TrackingError, match=r"several streams are called twin-.*: \w{32}, \w{32}; give the id"):
        find_stream(stream.uri, f"twin-{tmp_path.name}")
    with pytest.raises(TrackingError, match=r"no stream run nobody; --uri names another"):
        find_stream(stream.uri, "nobody")


def run_stream_of(folder: str, output: str) -> None:
    stream = StreamFolder(Path(folder), output)
    stream.queue.append("open", name=Path(folder).name, parameters={"name": folder}, tags={})
    with StepTracker(stream.queue, 0) as tracker:
        tracker.metrics({"loss": 1.0}, 0)
    stream.queue.append("end", run=STREAM, status="FINISHED")
    sys.exit(0 if stream.send(patience=240.0) else 1)  # eight processes on a busy machine wait for each other


def test_jobs_of_other_machines_only_fill_the_queue_of_a_database_and_sync_sends_it(
    tmp_path: Path, output: str, client: MlflowClient
) -> None:
    config = load_config("demo", [f"output={tmp_path}", f"tracking.uri={tracking_uri(TRACKING, output)}"])
    stream = f"{tmp_path}/{config.stream_name}"
    stream_id = open_run(config, is_elsewhere=True)  # at the submission

    def run_job() -> None:
        open_run(config)
        with track_step(config, 0) as tracker:
            tracker.metrics({"loss/total": 0.5}, position=1)
        close_run(config, None)

    run_job()
    assert unsent(stream) == "jobs write to no SQLite database"
    assert find_by_stream_id(client, stream_id) is None
    assert [sync.rejected for sync in sync_stream(stream, uri=None, again=False)] == [0]
    assert unsent(stream) is None
    found = find_stream(tracking_uri(TRACKING, output), stream_id)
    assert history(client, found.steps[0].info.run_id, "loss/total") == [(1, 0.5)]
    open_run(config, is_elsewhere=False)  # at a start on this machine
    run_job()
    assert unsent(stream) is None


@pytest.mark.slow
def test_a_database_whose_creation_was_killed_is_created_again(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    command = [sys.executable, "-c", f"from avcil_dist.tracking.client import connect; connect({uri!r})"]
    without_a_copy = os.environ | {"XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache"))}
    with subprocess.Popen(command, env=without_a_copy) as process:
        new = tmp_path / "mlflow.db.new"
        while not new.exists() or not new.stat().st_size:
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    assert not (tmp_path / "mlflow.db").exists()
    assert connect(uri).search_experiments()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlflow.db", "mlflow.db.lock"]


@pytest.mark.slow
def test_eight_processes_at_once_on_a_new_database_all_send_everything(tmp_path: Path) -> None:
    output = str(tmp_path / "runs")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.unit.test_mlflow_writer"])
    processes = [context.Process(target=run_stream_of, args=(f"{tmp_path}/stream{i}", output)) for i in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    assert [process.exitcode for process in processes] == [0] * 8
    client = MlflowClient(tracking_uri=f"sqlite:///{output}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("streams").experiment_id])
    names = [f"stream{i}{suffix}" for i in range(8) for suffix in ("", "-step000")]
    assert sorted(run.info.run_name for run in runs) == names
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert {len(run.data.metrics) for run in runs if run.info.run_name.endswith("-step000")} == {1}
