"""Links to the runs of a stream on its server, read from its event queue. No server is contacted."""

import re

from avcil_dist.streams.identity import read_identity
from avcil_dist.text.redaction import redacted
from avcil_dist.tracking.event_queue import EventQueue, queue_folder
from avcil_dist.tracking.events import STREAM

VIEW = "?workflowType=machine_learning"  # newer pages of MLflow have a view of language models, too


def tracked_at(stream: str) -> str | None:
    """Return the url of a stream's run in MLflow, or the uri of its database and the run's id; None without tracking.

    The uri alone stands for a run that is not sent yet.
    """
    identity = read_identity(stream)
    if identity is None or not (folder := queue_folder(stream, identity.id)).is_dir():
        return None
    queue = EventQueue(folder)
    opened = queue.last("open")
    if opened is None or "server" not in opened:
        return None
    server = str(opened["server"])
    cursor = queue.cursor(server)
    if STREAM not in cursor.runs or not cursor.experiment:
        return redacted(server)
    if not re.match("https?://", server):
        return f"{redacted(server)} run {cursor.runs[STREAM]}"
    return f"{redacted(server).rstrip('/')}/#/experiments/{cursor.experiment}/runs/{cursor.runs[STREAM]}{VIEW}"
