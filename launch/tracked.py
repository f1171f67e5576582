"""A stream and its runs in MLflow: which run belongs to which stream, and what it has been told.

`stream.json` beside the step artifacts holds the stream run's id and the steps published to it,
so a start that was cut off between commit and upload makes up for it at the next one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from avcil_dist import storage
from avcil_dist.compose import flatten
from avcil_dist.config import Config
from avcil_dist.tracking.mlflow import Status, StepTracker, close_stream, open_stream
from avcil_dist.training.artifact import is_committed, load_artifact, step_url
from avcil_dist.training.stream import stream_url

RECORD = "stream.json"


@contextmanager
def stream_run(config: Config, *, is_main: bool) -> Iterator[str | None]:
    """The id of the stream run, for the main process alone; the run ends as the block ends."""
    if not is_main:
        yield None
        return
    run_id = open_run(config)
    kind: type[BaseException] | None = None
    try:
        yield run_id
    except BaseException as error:
        kind = type(error)
        raise
    finally:
        close_run(config, kind)


def track_step(config: Config, run_id: str, step: int) -> StepTracker:
    """The step's own run."""
    return StepTracker(config.tracking, output=config.output, stream_run=run_id, step=step)


def publish_step(config: Config, tracker: StepTracker, step: int) -> None:
    """Send a committed step's metrics and files to its run, and note that it was done."""
    stream = stream_url(config)
    tracker.stream_metrics(load_artifact(stream, step).metrics)
    with storage.local_copy(step_url(stream, step)) as folder:
        tracker.artifact(folder)
    record = _read_record(config)
    _write_record(config, record | {"published": sorted({*record["published"], step})})


def close_run(config: Config, kind: type[BaseException] | None) -> None:
    """Say how the stream ended: `kind` is what it was ended by, None where it ended well."""
    run_id = _read_record(config)["run_id"]
    status: Status = "FINISHED" if kind is None else "KILLED" if kind is KeyboardInterrupt else "FAILED"
    close_stream(config.tracking, output=config.output, stream_run=run_id, status=status)


def open_run(config: Config) -> str:
    """Make the stream run or open it again; what is committed and not published yet is published. Returns its id."""
    record = _read_record(config)
    run_id = open_stream(
        config.tracking,
        output=config.output,
        name=config.stream_name,
        parameters=flatten(config),
        tags={"avcil.method": config.method.name, "avcil.stream": stream_url(config)},
        run_id=record["run_id"],
    )
    if run_id != record["run_id"]:
        record = {"run_id": run_id, "published": []}
        _write_record(config, record)
    step = 0
    while is_committed(stream_url(config), step):
        if step not in record["published"]:
            with track_step(config, run_id, step) as tracker:
                publish_step(config, tracker, step)
        step += 1
    return run_id


def _read_record(config: Config) -> dict[str, Any]:
    url = storage.join(stream_url(config), RECORD)
    return dict(storage.read_json(url)) if storage.exists(url) else {"run_id": None, "published": []}


def _write_record(config: Config, record: dict[str, Any]) -> None:
    storage.write_json(storage.join(stream_url(config), RECORD), record)
