"""Tracker of TensorBoard: one event file per run, with the metrics at their positions and the texts.

`tensorboard --logdir runs` finds them in the folders of the streams. The package's own writer has a thread that may
lose its last records unnoticed; this one writes the same records itself.
"""

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorboard.plugins.text.metadata import create_summary_metadata

from avcil_dist.tracking.events import STREAM
from avcil_dist.tracking.trackers.base import RunLog, Tracker
from avcil_dist.tracking.trackers.record_file import RecordFile

VERSION = "brain.Event:2"
FILE = "events.out.tfevents.0.avcil"
HEAD, CHECKSUM = struct.Struct("<Q"), struct.Struct("<I")


class EventFile(RecordFile):
    """Records with their length, and checksums of both."""

    def frame(self, record: bytes, offset: int) -> bytes:
        """Return length, checksum, record, checksum."""
        head = HEAD.pack(len(record))
        return b"".join([head, CHECKSUM.pack(masked_crc32c(head)), record, CHECKSUM.pack(masked_crc32c(record))])

    def scan(self, data: bytes) -> Iterator[tuple[bytes, int]]:
        """Yield records with their ends."""
        start, before = 0, HEAD.size + CHECKSUM.size
        while start + before <= len(data):
            head = data[start : start + HEAD.size]
            if CHECKSUM.unpack_from(data, start + HEAD.size) != (masked_crc32c(head),):
                return
            end = start + before + HEAD.unpack(head)[0]
            record = data[start + before : end]
            if end + CHECKSUM.size > len(data) or CHECKSUM.unpack_from(data, end) != (masked_crc32c(record),):
                return
            start = end + CHECKSUM.size
            yield record, start


class EventLog(RunLog):
    """An event file. TensorBoard keeps the values in float32."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = EventFile(path)
        for record in self._file.read():
            event = Event.FromString(record)
            for value in event.summary.value:
                if value.HasField("tensor"):
                    self.texts[value.tag] = value.tensor.string_val[0].decode()
                else:
                    self.positions.setdefault(value.tag, set()).add(event.step)
        self.was_cut = self._file.was_cut
        if not self._file.size:
            self._file.append(Event(file_version=VERSION).SerializeToString())

    def add_values(self, values: Mapping[str, float], position: int, seconds: float) -> None:
        """Append one record."""
        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        self._append(summary, position, seconds)

    def add_texts(self, texts: Mapping[str, str], seconds: float) -> None:
        """Append one record. The page "Text" shows the newest of each."""
        summary = Summary()
        for name, text in texts.items():
            tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode()])
            tensor.tensor_shape.dim.add(size=1)
            summary.value.add(tag=name, tensor=tensor, metadata=create_summary_metadata(name, ""))
        self._append(summary, 0, seconds)

    def _append(self, summary: Summary, position: int, seconds: float) -> None:
        self._file.append(Event(wall_time=seconds, step=position, summary=summary).SerializeToString())

    def sync(self) -> None:
        """See `RunLog.sync`."""
        self._file.sync()

    def close(self) -> None:
        """See `RunLog.close`."""
        self._file.close()


class TensorBoard(Tracker):
    """A folder for each run: TensorBoard takes it for the run's name."""

    def path(self, run: str, seconds: float) -> Path:
        """Return `stream/…` or `step_003/…`."""
        return self.folder / (STREAM if run == STREAM else f"step_{int(run):03d}") / FILE

    def open(self, run: str, path: Path) -> EventLog:
        """See `Tracker.open`."""
        return EventLog(path)


TRACKER = TensorBoard
