"""Base of a tracker beside MLflow: it writes the events of a stream's queue to files of another program.

The queue's sender calls it, as it calls MLflow's writer (`avcil_dist/tracking/sender.py:EventWriter`): events come in
order, and some twice after a kill. Each run has a log, which reads its values from its own file, so each is in it once.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from avcil_dist.tracking.event_queue import Event
from avcil_dist.tracking.events import STREAM
from avcil_dist.tracking.outcomes import RejectedError, RunDeletedError, UnavailableError
from avcil_dist.tracking.tags import NOTE_TAG

MILLISECONDS = 1000


@dataclass(frozen=True)
class StreamName:
    """Names of a stream: of the stream itself, its id, and the experiment that it belongs to."""

    name: str
    id: str
    experiment: str


class RunLog(ABC):
    """Log of a run, the stream's or that of a step, in a file of its own.

    `positions`: those of each metric that are in the file. `texts`: the newest content of each text in it. `was_cut`:
    the file ended within a record, so values that were delivered may be missing.
    """

    def __init__(self) -> None:
        self.positions: dict[str, set[int]] = {}
        self.texts: dict[str, str] = {}
        self.was_cut = False

    @abstractmethod
    def add_values(self, values: Mapping[str, float], position: int, seconds: float) -> None:
        """Append values at a position; `seconds`: Unix time."""

    @abstractmethod
    def add_texts(self, texts: Mapping[str, str], seconds: float) -> None:
        """Append texts by name: `name`, `parameter/…`, `tag/…`, `data set`, `results` and `status`."""

    @abstractmethod
    def sync(self) -> None:
        """Return once all is on the disk."""

    @abstractmethod
    def close(self) -> None:
        """Close the file."""


class Tracker(ABC):
    """Writer of a stream to a folder. `runs`: the file of each run that the tracker has written before."""

    is_uploading = False
    experiment = None

    def __init__(self, folder: Path, stream: StreamName, runs: dict[str, str]) -> None:
        self.folder, self.stream, self.runs = folder, stream, runs
        self._logs: dict[str, RunLog] = {}

    @abstractmethod
    def path(self, run: str, seconds: float) -> Path:
        """Return the file of a run, `stream` or the number of a step: that which is there, or else a new one.

        `seconds`: Unix time of the run's first event.
        """

    @abstractmethod
    def open(self, run: str, path: Path) -> RunLog:
        """Open the log of a run, and read what it holds."""

    def write(self, events: Sequence[Event]) -> None:
        """Write events, and return once they are on the disk.

        Raises UnavailableError where the disk does not take them, RunDeletedError where a file has lost records,
        RejectedError for an event of no run.
        """
        try:
            used = {run: self._log(run, event) for event in events for run in [_run_of(event)] if run is not None}
            for event in events:
                run = _run_of(event)
                if run is not None:
                    _append(used[run], event)
            for log in used.values():
                log.sync()
        except OSError as error:
            for log in self._logs.values():
                log.close()
            raise UnavailableError(f"{self.folder}: {error.strerror or error}") from None

    def _log(self, run: str, event: Event) -> RunLog:
        if run not in self._logs:
            path = self.path(run, _seconds(event))
            if run in self.runs and not path.exists():
                raise RunDeletedError
            log = self.open(run, path)
            if log.was_cut and self.runs:
                log.close()
                raise RunDeletedError  # all events are written again, but those that the file still has
            self._logs[run] = log
            self.runs[run] = str(path.relative_to(self.folder))
        return self._logs[run]


def _run_of(event: Event) -> str | None:
    """Return the run that an event is about; None for files, which MLflow alone has."""
    if event["kind"] == "open":
        return STREAM
    if event["kind"] in ("artifact", "file", "register"):
        return None
    run = str(event["step"] if event["kind"] == "begin" else event["run"])
    if run != STREAM and not re.fullmatch("[0-9]{1,9}", run):
        raise RejectedError(f"no run of a step: {run[:100]!r}")
    return run


def _append(log: RunLog, event: Event) -> None:
    """Append what the log does not have yet."""
    seconds = _seconds(event)
    if event["kind"] == "metrics":
        position, new = event["position"], dict[str, float]()
        for name, value in event["values"].items():
            if position not in log.positions.setdefault(name, set()):
                new[name] = value
        if new:
            log.add_values(new, position, seconds)
            for name in new:
                log.positions[name].add(position)
        return
    changed = {name: text for name, text in _texts(event).items() if log.texts.get(name) != text}
    if changed:
        log.add_texts(changed, seconds)
        log.texts |= changed


def _texts(event: Event) -> dict[str, str]:
    if event["kind"] == "end":
        return {"status": event["status"]}
    if event["kind"] == "dataset":
        return {"data set": f"{event['name']} {event['digest']} {event['url']}"}
    tags = {**event.get("tags", {}), **event.get("shared_tags", {})}
    texts = {f"parameter/{name}": str(value) for name, value in event.get("parameters", {}).items()}
    texts |= {"results" if name == NOTE_TAG else f"tag/{name}": str(value) for name, value in tags.items()}
    if event["kind"] in ("open", "begin"):
        texts |= {"name": str(event.get("name", "")), "status": "RUNNING"}
    return texts


def _seconds(event: Event) -> float:
    return float(event.get("time", 0)) / MILLISECONDS
