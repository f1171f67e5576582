"""Runs in a real MLflow on sqlite: structure, resume, artifacts, endings, many processes, a server that is away."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from avcil_dist.config import TrackingConfig
from avcil_dist.errors import ArtifactError, ConfigError, TrackingError
from avcil_dist.tracking.mlflow import StepTracker, close_stream, open_stream, tracking_uri
from avcil_dist.training.metrics import StreamMetrics

TRACKING = TrackingConfig(experiment="streams")
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


def start(output: str, run_id: str | None = None, **parameters: object) -> str:
    return open_stream(
        TRACKING, output=output, name="tiny-avcil-seed0", parameters=parameters, tags={"version": "1"}, run_id=run_id
    )


def history(client: MlflowClient, run_id: str, key: str) -> list[tuple[int, float]]:
    return sorted((metric.step, metric.value) for metric in client.get_metric_history(run_id, key))


def test_without_a_uri_runs_go_to_sqlite_in_the_output_folder(output: str) -> None:
    assert tracking_uri(TRACKING, output) == f"sqlite:///{output}/mlflow.db"
    assert tracking_uri(TrackingConfig(uri="http://server"), "s3://bucket/runs") == "http://server"


def test_a_database_on_object_storage_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"s3://bucket.*tracking\.uri"):
        tracking_uri(TRACKING, "s3://bucket/runs")


def test_a_step_run_is_the_child_of_its_stream_run(output: str, client: MlflowClient) -> None:
    stream = start(output, seed=0)
    with StepTracker(TRACKING, output=output, stream_run=stream, step=3) as tracker:
        assert client.get_run(tracker.run_id).info.status == "RUNNING"
    step = client.get_run(tracker.run_id)
    assert step.data.tags["mlflow.parentRunId"] == stream
    assert step.data.tags["avcil.step"] == "3"
    assert (step.info.run_name, step.info.status) == ("step_003", "FINISHED")
    assert client.get_run(stream).data.tags["version"] == "1"
    assert client.get_run(stream).info.run_name == "tiny-avcil-seed0"


def test_parameters_are_logged_once_and_cut_to_the_limit(output: str, client: MlflowClient) -> None:
    many = {f"part.key{i}": i for i in range(150)}
    stream = start(output, **many, classes="x" * 10_000)
    close_stream(TRACKING, output=output, stream_run=stream, status="FAILED")
    assert client.get_run(stream).info.status == "FAILED"
    assert start(output, run_id=stream, **{**many, "part.key7": "changed"}, late=1) == stream
    run = client.get_run(stream)
    assert run.info.status == "RUNNING"
    assert len(run.data.params) == 152
    assert run.data.params["part.key7"] == "7"
    assert run.data.params["late"] == "1"
    assert set(run.data.params["classes"]) == {"x"}


def test_an_unknown_or_deleted_run_gives_a_new_stream(output: str, client: MlflowClient) -> None:
    assert start(output, run_id="0" * 32) != "0" * 32
    deleted = start(output)
    client.delete_run(deleted)
    assert start(output, run_id=deleted) != deleted


def test_a_resumed_step_continues_its_run_and_doubles_no_metric(output: str, client: MlflowClient) -> None:
    stream = start(output)
    first = StepTracker(TRACKING, output=output, stream_run=stream, step=0)

    def interrupted() -> None:
        with first:
            for epoch in range(3):
                first.metrics({"loss": 3.0 - epoch}, epoch)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert client.get_run(first.run_id).info.status == "KILLED"
    with StepTracker(TRACKING, output=output, stream_run=stream, step=0) as second:
        assert client.get_run(second.run_id).info.status == "RUNNING"
        for epoch in range(1, 5):
            second.metrics({"loss": 3.0 - epoch, "lr": 0.1}, epoch)
            second.metrics({"loss": 99.0}, epoch)
    assert second.run_id == first.run_id
    assert history(client, first.run_id, "loss") == [(0, 3.0), (1, 2.0), (2, 1.0), (3, 0.0), (4, -1.0)]
    assert [position for position, _ in history(client, first.run_id, "lr")] == [1, 2, 3, 4]


def test_the_stream_run_holds_the_streams_numbers_by_step(output: str, client: MlflowClient) -> None:
    stream = start(output)
    first = StreamMetrics(0, ((0.9,),), (0.9,), {}, 5, 1, None)
    for metrics in (first, METRICS, METRICS):  # the last step is done twice, as after a kill before its commit
        with StepTracker(TRACKING, output=output, stream_run=stream, step=metrics.step) as tracker:
            tracker.stream_metrics(metrics)
    assert history(client, stream, "seen_accuracy") == [(0, 0.9), (1, 0.6)]
    assert history(client, stream, "mean_accuracy") == [(0, 0.9), (1, 0.75)]
    assert history(client, stream, "forgetting") == [(1, pytest.approx(0.4))]
    assert history(client, stream, "average_forgetting") == [(1, pytest.approx(0.4))]
    assert history(client, tracker.run_id, "accuracy_task_0") == [(1, 0.5)]
    assert history(client, tracker.run_id, "accuracy_task_1") == [(1, 0.8)]


def test_the_step_run_holds_every_class_and_the_stream_run_the_source_disjoint_clips(
    output: str, client: MlflowClient
) -> None:
    classes = {"railroad car, train wagon": 0.25, "dog": 1.0} | {f"class {number}": 0.5 for number in range(1500)}
    metrics = StreamMetrics.after(
        None,
        step=0,
        row=[0.5],
        seen=0.5,
        per_class=classes,
        num_test_clips=8,
        epoch=0,
        val_accuracy=None,
        source_disjoint=(0.375, 4),
    )
    stream = start(output)
    for _ in range(2):  # told twice, kept once
        with StepTracker(TRACKING, output=output, stream_run=stream, step=0) as tracker:
            tracker.stream_metrics(metrics)
    found = client.get_run(tracker.run_id).data.metrics
    assert found["accuracy_class/railroad car_ train wagon"] == 0.25
    assert found["accuracy_class/dog"] == 1.0
    assert len([key for key in found if key.startswith("accuracy_class/")]) == 1502
    assert len(client.get_metric_history(tracker.run_id, "accuracy_class/dog")) == 1
    assert client.get_run(stream).data.metrics["source_disjoint_accuracy"] == 0.375


def test_an_artifact_comes_back_as_it_went(output: str, client: MlflowClient, tmp_path: Path) -> None:
    folder = tmp_path / "local"
    (folder / "sub").mkdir(parents=True)
    files = {"model.safetensors": bytes(range(256)), "COMMITTED.json": b"{}", "sub/part.json": b"[1]"}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    stream = start(output)
    with StepTracker(TRACKING, output=output, stream_run=stream, step=12) as tracker:
        tracker.artifact(str(folder))
    back = Path(client.download_artifacts(tracker.run_id, "step_012", str(tmp_path)))
    assert {str(path.relative_to(back)): path.read_bytes() for path in back.rglob("*") if path.is_file()} == files
    assert (Path(output) / "mlartifacts").is_dir()


def test_an_empty_artifact_is_refused(output: str, tmp_path: Path) -> None:
    stream = start(output)
    with (
        StepTracker(TRACKING, output=output, stream_run=stream, step=0) as tracker,
        pytest.raises(ArtifactError, match="no files"),
    ):
        tracker.artifact(str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError("bad"), "FAILED"), (KeyboardInterrupt(), "KILLED"), (SystemExit(143), "KILLED")]
)
def test_the_run_says_how_the_step_ended(output: str, client: MlflowClient, error: BaseException, status: str) -> None:
    stream = start(output)
    with (
        pytest.raises(type(error)),
        StepTracker(TRACKING, output=output, stream_run=stream, step=0) as tracker,
    ):
        raise error
    assert client.get_run(tracker.run_id).info.status == status


PROCESS = """
import sys
from avcil_dist.config import TrackingConfig
from avcil_dist.tracking.mlflow import StepTracker, close_stream, open_stream
tracking, output, name = TrackingConfig(), sys.argv[1], sys.argv[2]
run = open_stream(tracking, output=output, name=name, parameters={"name": name}, tags={}, run_id=None)
with StepTracker(tracking, output=output, stream_run=run, step=0) as tracker:
    tracker.metrics({"loss": 1.0}, 0)
close_stream(tracking, output=output, stream_run=run, status="FINISHED")
"""


def test_four_processes_at_once_on_a_fresh_database_are_quiet_and_complete(tmp_path: Path) -> None:
    output = str(tmp_path / "runs")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, output, f"stream{i}"], stderr=subprocess.STDOUT, stdout=subprocess.PIPE
        )
        for i in range(4)
    ]
    said = [process.communicate(timeout=120)[0].decode() for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, said
    assert said == [""] * 4
    client = MlflowClient(tracking_uri=f"sqlite:///{output}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("avcil").experiment_id])
    assert sorted(run.info.run_name for run in runs) == sorted([f"stream{i}" for i in range(4)] + ["step_000"] * 4)
    assert {run.info.status for run in runs} == {"FINISHED"}


def test_a_server_that_is_away_is_named_without_its_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "anna")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
    with socket.socket() as closed:  # bound, not listening: a port that refuses
        closed.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(TrackingError) as raised:
            open_stream(TrackingConfig(uri=uri), output=str(tmp_path), name="x", parameters={}, tags={}, run_id=None)
    line = str(raised.value)
    assert line.startswith(f"http://127.0.0.1:{uri.rsplit(':', 1)[1]}: ")
    assert "tracking.uri" in line
    assert "\n" not in line
    assert "secret" not in line
    assert "anna" not in line


def test_a_server_lost_in_mid_step_does_not_hide_what_stopped_the_step(output: str) -> None:
    stream = start(output)
    tracker = StepTracker(TRACKING, output=output, stream_run=stream, step=0)

    def broken() -> None:
        with tracker:
            tracker.run_id = "0" * 32
            raise ValueError("the real reason")

    with pytest.raises(ValueError, match="the real reason"):
        broken()
    with pytest.raises(TrackingError), tracker:
        tracker.run_id = "0" * 32
