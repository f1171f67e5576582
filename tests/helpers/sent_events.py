"""What a server must hold of a stream, held against what it holds."""

from collections import defaultdict
from pathlib import Path

from mlflow import MlflowClient

from avcil_dist import storage
from avcil_dist.config.schema import TrackingConfig
from avcil_dist.streams.artifact import committed_steps, step_url
from avcil_dist.streams.identity import read_identity
from avcil_dist.tracking.artifacts import download_step
from avcil_dist.tracking.client import find_stream, tracking_uri
from avcil_dist.tracking.event_queue import EventQueue, queue_folder


def spool_of(stream: str) -> EventQueue:
    record = read_identity(stream)
    assert record is not None
    return EventQueue(queue_folder(stream, record.id))


def histories(client: MlflowClient, run_id: str) -> dict[str, list[tuple[int, float]]]:
    """Every value of every metric of a run, in order of position."""
    keys = client.get_run(run_id).data.metrics
    return {key: sorted((m.step, m.value) for m in client.get_metric_history(run_id, key)) for key in keys}


def check_told(uri: str, stream: str, folder: Path) -> int:
    """Hold a server against a stream's spool and artifacts: nothing is missing and nothing is double; the values."""
    record = read_identity(stream)
    assert record is not None
    found = find_stream(uri, record.id)
    expected: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for told in spool_of(stream).records("metrics"):
        for key, value in told["values"].items():
            expected[told["run"]][key].setdefault(told["position"], value)
    assert set(expected) == {"stream", *map(str, found.steps)}
    for run, metrics in expected.items():
        run_id = found.run.info.run_id if run == "stream" else found.steps[int(run)].info.run_id
        held = histories(found.client, run_id)
        assert held == {key: sorted(values.items()) for key, values in metrics.items()}
    for step in committed_steps(stream):
        download_step(found.client, uri, found.steps[step], step, str(folder))
        for path in Path(step_url(stream, step)).iterdir():
            assert storage.sha256_file(f"{step_url(str(folder), step)}/{path.name}") == storage.sha256_file(str(path))
    return sum(len(values) for metrics in expected.values() for values in metrics.values())


def uri_of(output: str) -> str:
    """The database in an output folder."""
    return tracking_uri(TrackingConfig(), output)
