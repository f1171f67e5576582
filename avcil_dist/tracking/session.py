"""Tracking session of a stream: opens and ends its runs, and publishes its steps. `delivery.py` sends the events."""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict

from avcil_dist.config.schema import Config
from avcil_dist.config.serialization import flatten
from avcil_dist.streams.identity import StreamIdentity, new_identity, read_identity, write_identity
from avcil_dist.streams.stream import stream_url
from avcil_dist.streams.summary import commit_digest, committed_steps
from avcil_dist.tracking.delivery import Warn, last_open, sending
from avcil_dist.tracking.event_queue import EventQueue, queue_folder
from avcil_dist.tracking.events import STREAM, StepDescription, StepTracker, end_status, is_finished, unfinished_steps
from avcil_dist.tracking.run_facts import stream_facts
from avcil_dist.tracking.tags import CHANGES_TAG, FOLDER_TAG, ORIGIN_RUN_TAG, ORIGIN_STEP_TAG
from avcil_dist.tracking.trackers import check_trackers
from avcil_dist.tracking.uris import tracking_uri

PAGE = "report.html"  # in the folder of a finished stream
_logger = logging.getLogger(__name__)


def open_run(config: Config, *, is_elsewhere: bool | None = None) -> str:
    """Open the stream's run, or reopen it, and return the stream's id, which identifies the run on any server.

    `is_elsewhere`: jobs on other machines train the stream, and leave an sqlite database to `avcil sync`; None: as at
    the last start. Only appends events; no server is contacted. Raises ConfigError for an invalid tracking.uri.
    """
    stream = stream_url(config)
    opened = last_open(stream)
    server = tracking_uri(config.tracking, config.output, earlier=opened.server if opened else None)
    if is_elsewhere is None:
        is_elsewhere = opened is not None and opened.is_elsewhere
    identity = read_identity(stream)
    if identity is None:
        identity = new_identity()
        write_identity(stream, identity)
    queue = EventQueue(queue_folder(stream, identity.id))
    queue.append(
        "open",
        name=config.stream_name,
        parameters=flatten(config),
        tags=stream_facts(config) | {FOLDER_TAG: stream} | _history_tags(identity),
        tracking=config.tracking.model_dump(mode="json"),
        output=config.output,
        server=server,
        is_elsewhere=is_elsewhere,
    )
    published = {(event["step"], event["committed"]) for event in queue.events("artifact")}
    for step in committed_steps(stream):
        # its process may have ended between commit and event, or may have run on another machine
        if (step, commit_digest(stream, step)) not in published:
            with StepTracker(queue, step, _description(config, step)) as tracker:
                tracker.publish(stream, config.data.manifest)
    return identity.id


def check_tracking(config: Config) -> str:
    """Check what `open_run` needs, before anything is made. Returns the uri of the stream's server or database.

    Raises ConfigError and TrackingError as `open_run` does.
    """
    check_trackers(config.tracking.trackers)
    opened = last_open(stream_url(config))
    return tracking_uri(config.tracking, config.output, earlier=opened.server if opened else None)


@contextmanager
def stream_run(config: Config, *, is_main: bool, warn: Warn = _logger.warning) -> Iterator[str | None]:
    """The run of a stream as a context: yields the stream's id on the main process, None on others.

    `warn` is called with a line of text when events are still unsent at the end.
    """
    if not is_main:
        yield None
        return
    stream_id = open_run(config, is_elsewhere=False)
    kind: type[BaseException] | None = None
    try:
        yield stream_id
    except BaseException as error:
        kind = type(error)
        raise
    finally:
        close_run(config, kind, warn=warn)


def close_run(config: Config, kind: type[BaseException] | None, *, warn: Warn = _logger.warning) -> None:
    """End the stream's run after an exception of type `kind` (None: without one), and send unsent events."""
    status = end_status(kind)
    with sending(config, warn, hurried=kind is not None, is_last=True) as queue:
        if status in ("FAILED", "KILLED"):
            for run in unfinished_steps(queue):  # of a rank that was killed, or stopped by another rank's error
                queue.append("end", run=run, status=status)
        if status != "RUNNING" and not (status == "FINISHED" and is_finished(queue)):
            queue.append("end", run=STREAM, status=status)


@contextmanager
def track_step(
    config: Config, step: int, *, facts: Mapping[str, str] | None = None, warn: Warn = _logger.warning
) -> Iterator[StepTracker]:
    """The run of a step as a context. Its events are sent while the block runs, the rest at its end.

    `facts` are tags about the machines of the step.
    """
    with sending(config, warn) as queue, StepTracker(queue, step, _description(config, step, facts)) as tracker:
        yield tracker


def publish_step(config: Config, tracker: StepTracker, num_steps: int) -> None:
    """Publish what the queue lacks of a committed step. The last step also registers its weights."""
    missing = unpublished(config, tracker.queue, tracker.step, num_steps)
    if "artifact" in missing:
        tracker.publish(stream_url(config), config.data.manifest)
    if "register" in missing:
        name = config.tracking.register_as
        tracker.register(f"{config.name}-{config.method.label}" if name == "auto" else name)


def publish_stream(tracker: StepTracker) -> None:
    """Publish the report page, which is in the stream's folder, and end the stream's run."""
    tracker.queue.append("file", file=PAGE)
    tracker.queue.append("end", run=STREAM, status="FINISHED")


def unpublished(config: Config, queue: EventQueue, step: int, num_steps: int) -> tuple[str, ...]:
    """Return the kinds of events that publish a committed step, in order, from the first that the queue lacks.

    A process may be killed between any two of them. The last step has three: the model and the report page follow its
    artifact. Those before the artifact are of an earlier training of the step.
    """
    expected = {"artifact": {"step": step, "committed": commit_digest(stream_url(config), step)}}
    if step + 1 == num_steps:
        expected |= {"register": {"step": step}} if config.tracking.register_as != "none" else {}
        expected |= {"file": {"file": PAGE}}
    offset = 0
    for number, (kind, values) in enumerate(expected.items()):
        found = queue.read(offset, limit=queue.size(), kind=kind)
        offset = next((end for event, end in found if values.items() <= event.items()), -1)
        if offset < 0:
            return tuple(expected)[number:]
    return ()


def _description(config: Config, step: int, facts: Mapping[str, str] | None = None) -> StepDescription:
    tags = stream_facts(config) | {"step": str(step)}
    name = f"{config.stream_name}-step{step:03d}"
    return StepDescription(name, flatten(config), tags, dict(facts or {}))


def _history_tags(identity: StreamIdentity) -> dict[str, str]:
    """Tags for the origin of a fork and for changed settings."""
    tags: dict[str, str] = {}
    if identity.origin_run is not None:
        tags |= {ORIGIN_RUN_TAG: identity.origin_run, ORIGIN_STEP_TAG: str(identity.origin_step)}
    if identity.changes:
        tags[CHANGES_TAG] = json.dumps([asdict(change) for change in identity.changes])
    return tags
