"""Tracker of Weights & Biases: one offline run per run, in the group of the stream; `wandb sync` uploads them.

The package's own offline mode keeps up to 32 KiB in another process, which a kill loses. This tracker writes the same
file of records itself. Its history has a row per event; `iteration`, `seconds` and `incremental_step` are the axes.
"""

import json
import struct
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from wandb import __version__
from wandb.proto import wandb_internal_pb2 as proto

from avcil_dist.tracking.events import STREAM
from avcil_dist.tracking.trackers.base import RunLog, StreamName, Tracker
from avcil_dist.tracking.trackers.record_file import RecordFile

MARK = b":W&B" + struct.pack("<HB", 0xBEE1, 0)  # at the beginning of the file: name, magic number, version
BLOCK = 32768
HEAD = struct.Struct("<IHB")  # of a part of a record in one block: checksum, length, kind
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4
BY_STEP = ("test", "test_task", "time")
ENDED = {"FINISHED": 0, "FAILED": 1, "KILLED": 130}


class RunFile(RecordFile):
    """Log of records in blocks, in the form of LevelDB's."""

    def frame(self, record: bytes, offset: int) -> bytes:
        """Return the record in as many parts as it touches blocks; before the first one the mark of the file."""
        framed = b"" if offset else MARK
        kinds = (WHOLE, FIRST)
        while True:
            room = BLOCK - (offset + len(framed)) % BLOCK
            if room < HEAD.size:
                framed += bytes(room)
                continue
            part, record = record[: room - HEAD.size], record[room - HEAD.size :]
            kind = kinds[bool(record)]
            framed += HEAD.pack(_checksum(kind, part), len(part), kind) + part
            if not record:
                return framed
            kinds = (LAST, MIDDLE)

    def scan(self, data: bytes) -> Iterator[tuple[bytes, int]]:
        """Yield records with their ends."""
        if not data.startswith(MARK):
            return
        start, record = len(MARK), b""
        while start + HEAD.size <= len(data):
            room = BLOCK - start % BLOCK
            if room < HEAD.size:
                start += room
                continue
            checksum, length, kind = HEAD.unpack_from(data, start)
            start += HEAD.size + length
            part = data[start - length : start]
            if len(part) < length or checksum != _checksum(kind, part):
                return
            record += part
            if kind in (WHOLE, LAST):
                yield record, start
                record = b""


def _checksum(kind: int, part: bytes) -> int:
    return zlib.crc32(part, zlib.crc32(bytes([kind])))


class OfflineRun(RunLog):
    """The file of an offline run."""

    def __init__(self, path: Path, stream: StreamName, run: str) -> None:
        super().__init__()
        self._stream, self._run, self._id = stream, run, run_id(stream, run)
        self._file = RunFile(path)
        self._rows = self._records = 0
        self._began = time.time()
        self._groups: set[str] = set()  # of metrics whose axis is in the file
        self._has_ended = False  # the last record is that of the run's end
        for data in self._file.read():
            self._note(proto.Record.FromString(data))
        self.was_cut = self._file.was_cut

    def add_values(self, values: Mapping[str, float], position: int, seconds: float) -> None:
        """Append a row, and the last values of its metrics."""
        axes = {self._axis(name): position for name in values}
        row = {**values, **axes, "_step": self._rows, "_timestamp": seconds, "_runtime": seconds - self._began}
        for glob in sorted({f"{name.partition('/')[0]}/*" for name in values} - self._groups):
            metric = proto.MetricRecord(glob_name=glob, step_metric=self._axis(glob))
            metric.options.defined = metric.options.step_sync = True
            self._append(proto.Record(metric=metric))
            self._groups.add(glob)
        history = proto.HistoryRecord(step=proto.HistoryStep(num=self._rows))
        summary = proto.SummaryRecord()
        for name, value in row.items():
            text = json.dumps(value)
            history.item.add(nested_key=[name], value_json=text)
            summary.update.add(nested_key=[name], value_json=text)
        self._append(proto.Record(summary=summary))
        self._append(proto.Record(history=history))
        self._rows += 1

    def add_texts(self, texts: Mapping[str, str], seconds: float) -> None:
        """Append parameters and tags as the run's configuration; its name and its end as records of their own."""
        config = proto.ConfigRecord()
        for name, text in texts.items():
            if name not in ("name", "status"):
                config.update.add(nested_key=name.split("/", 1), value_json=json.dumps(text))
        if not self._records:
            self._begin(texts.get("name", ""), config, seconds)
        elif config.update:
            self._append(proto.Record(config=config))
        if texts.get("status") in ENDED:
            self._end(ENDED[texts["status"]], seconds)

    def _begin(self, name: str, config: proto.ConfigRecord, seconds: float) -> None:
        self._began = seconds
        version = proto.VersionInfo(producer=__version__)
        self._append(proto.Record(header=proto.HeaderRecord(version_info=version)))
        run = proto.RunRecord(
            run_id=self._id,
            project=self._stream.experiment,
            run_group=self._stream.name,
            display_name=name or self._id,
            job_type=STREAM if self._run == STREAM else "step",
            config=config,
        )
        run.start_time.FromMilliseconds(round(seconds * 1000))
        self._append(proto.Record(run=run))

    def _end(self, code: int, seconds: float) -> None:
        runtime = max(0, round(seconds - self._began))
        self._append(proto.Record(exit=proto.RunExitRecord(exit_code=code, runtime=runtime)))
        self._has_ended = True

    def _append(self, record: proto.Record) -> None:
        if self._has_ended:  # the run continues: an upload would stop at the record of its end
            self._file.truncate(self._file.last)
            self._records -= 1
            self._has_ended = False
        if not self._records and not record.HasField("header"):
            self._begin("", proto.ConfigRecord(), self._began)
        self._records += 1
        record.num = self._records
        getattr(record, record.WhichOneof("record_type"))._info.stream_id = self._id
        self._file.append(record.SerializeToString())

    def _axis(self, name: str) -> str:
        group = name.partition("/")[0]
        if self._run == STREAM or group in BY_STEP:
            return "incremental_step"
        return "seconds" if group == "system" else "iteration"

    def _note(self, record: proto.Record) -> None:
        """Count a record of the file, and note what it holds."""
        self._records += 1
        kind = record.WhichOneof("record_type")
        if kind == "run":
            self.texts["name"] = record.run.display_name
            self._began = record.run.start_time.ToMilliseconds() / 1000
        if kind in ("run", "config"):
            for item in (record.run.config if kind == "run" else record.config).update:
                self.texts["/".join(item.nested_key)] = json.loads(item.value_json)
        elif kind == "history":
            self._rows += 1
            row = {item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            for name in row:
                if self._axis(name) in row and not name.startswith("_"):
                    self.positions.setdefault(name, set()).add(row[self._axis(name)])
        elif kind == "metric":
            self._groups.add(record.metric.glob_name)
        elif kind == "exit":
            self._has_ended = True
            self.texts["status"] = next(word for word, code in ENDED.items() if code == record.exit.exit_code)

    def sync(self) -> None:
        """See `RunLog.sync`."""
        self._file.sync()

    def close(self) -> None:
        """See `RunLog.close`."""
        self._file.close()


def run_id(stream: StreamName, run: str) -> str:
    """Return the id of a run, which it has on a server too."""
    return stream.id if run == STREAM else f"{stream.id}-step{int(run):03d}"


class Wandb(Tracker):
    """Offline runs in the folders that `wandb sync` expects."""

    def path(self, run: str, seconds: float) -> Path:
        """Return the file of a run that is there, or of a new one, named by the time of its first event."""
        name = run_id(self.stream, run)
        there = sorted(self.folder.glob(f"offline-run-????????_??????-{name}/run-{name}.wandb"))
        began = time.strftime("%Y%m%d_%H%M%S", time.gmtime(seconds))
        return there[0] if there else self.folder / f"offline-run-{began}-{name}" / f"run-{name}.wandb"

    def open(self, run: str, path: Path) -> OfflineRun:
        """See `Tracker.open`."""
        return OfflineRun(path, self.stream, run)


TRACKER = Wandb
