"""Comparison of a stream's runs on a server with its event queue and artifacts."""

from collections import defaultdict
from pathlib import Path

from mlflow import MlflowClient

from avcil_dist import storage
from avcil_dist.config.schema import TrackingConfig
from avcil_dist.streams.identity import read_identity
from avcil_dist.streams.summary import committed_steps, step_url
from avcil_dist.tracking.artifacts import download_step
from avcil_dist.tracking.client import find_stream
from avcil_dist.tracking.event_queue import EventQueue, queue_folder
from avcil_dist.tracking.uris import tracking_uri


def queue_of(stream: str) -> EventQueue:
    identity = read_identity(stream)
    assert identity is not None
    return EventQueue(queue_folder(stream, identity.id))


def histories(client: MlflowClient, run_id: str) -> dict[str, list[tuple[int, float]]]:
    """Every value of every metric of a run, in order of position."""
    keys = client.get_run(run_id).data.metrics
    return {key: sorted((m.step, m.value) for m in client.get_metric_history(run_id, key)) for key in keys}


def check_sent(uri: str, stream: str, folder: Path) -> int:
    """Check that a server has every event and artifact of a stream exactly once; return the number of values."""
    identity = read_identity(stream)
    assert identity is not None
    tracked = find_stream(uri, identity.id)
    expected: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for event in queue_of(stream).events("metrics"):
        for key, value in event["values"].items():
            expected[event["run"]][key].setdefault(event["position"], value)
    assert set(expected) == {"stream", *map(str, tracked.steps)}
    for run, metrics in expected.items():
        run_id = tracked.run.info.run_id if run == "stream" else tracked.steps[int(run)].info.run_id
        logged = histories(tracked.client, run_id)
        assert logged == {key: sorted(values.items()) for key, values in metrics.items()}
    for step in committed_steps(stream):
        download_step(tracked.client, uri, tracked.steps[step], step, str(folder))
        for path in Path(step_url(stream, step)).iterdir():
            assert storage.sha256_file(f"{step_url(str(folder), step)}/{path.name}") == storage.sha256_file(str(path))
    return sum(len(values) for metrics in expected.values() for values in metrics.values())


def uri_of(output: str) -> str:
    """The database in an output folder."""
    return tracking_uri(TrackingConfig(), output)
