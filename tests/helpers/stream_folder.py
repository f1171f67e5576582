"""A stream's folder with an event queue and committed steps, without training, and a sender to MLflow."""

import json
import time
from pathlib import Path

from avcil_dist.config.schema import TrackingConfig
from avcil_dist.streams.commit import write_commit, write_files
from avcil_dist.streams.metrics import StreamMetrics
from avcil_dist.tracking.event_queue import EventQueue
from avcil_dist.tracking.mlflow_writer import MlflowWriter
from avcil_dist.tracking.sender import Sender
from avcil_dist.tracking.uris import tracking_uri

TRACKING = TrackingConfig(experiment="streams")


class StreamFolder:
    """A stream's folder and queue, and a sender for them."""

    def __init__(self, folder: Path, output: str, uri: str | None = None) -> None:
        self.folder, self.output, self.id = str(folder), output, folder.name
        self.tracking = TRACKING
        self.uri = uri or tracking_uri(TRACKING, output)
        self.queue = EventQueue(folder / "events")

    def open(self, **parameters: object) -> None:
        self.queue.append("open", name="tiny-avcil-seed0", parameters=parameters, tags={"version": "1"})

    def sender(self) -> Sender:
        def connect(runs: dict[str, str]) -> MlflowWriter:
            return MlflowWriter(
                self.uri, self.tracking, output=self.output, stream=self.folder, stream_id=self.id, runs=runs
            )

        return Sender(self.queue, self.uri, connect, shown=self.uri)

    def send(self, patience: float = 60.0) -> bool:
        sender = self.sender()
        sender.start()
        return sender.close(patience)

    def send_all(self) -> dict[str, str]:
        """Send everything; return the ids of the runs."""
        assert self.send()
        return self.queue.cursor(self.uri).runs

    def commit(self, metrics: StreamMetrics, **files: bytes) -> None:
        """A step's folder with these metrics."""
        folder = f"{self.folder}/step_{metrics.step:03d}"
        steps = [list(metrics.per_class), *([f"class of task {task}"] for task in range(metrics.step))]
        contents = {"metrics.json": metrics.to_dict(), "scenario.json": {"steps": steps}}
        contents = {name: json.dumps(value).encode() for name, value in contents.items()} | files
        write_commit(folder, write_files(folder, contents), step=metrics.step, manifest_hash="m", code_version="1")


def wait_for_outage(sender: Sender) -> None:
    """Wait until a sender has recorded in its cursor that the server is unavailable."""
    while sender.queue.cursor(sender.uri).unavailable_since is None:
        time.sleep(0.01)
