"""Trackers beside MLflow: their files, what a kill leaves of them, and the guarantees of the queue for each."""

import json
import random
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from wandb.proto.wandb_internal_pb2 import Record

from avcil_dist.compose import load_config
from avcil_dist.errors import ConfigError
from avcil_dist.tracking.event_queue import DeliveryCursor, Event, EventQueue
from avcil_dist.tracking.outcomes import RejectedError, UnavailableError
from avcil_dist.tracking.sender import Sender
from avcil_dist.tracking.session import check_tracking
from avcil_dist.tracking.trackers import tracker_class
from avcil_dist.tracking.trackers.base import StreamName
from avcil_dist.tracking.trackers.record_file import RecordFile
from avcil_dist.tracking.trackers.tensorboard import EventFile
from avcil_dist.tracking.trackers.wandb import BLOCK, RunFile
from tests.helpers.documents import PROJECT, blocks
from tests.helpers.plugins import fresh_plug_ins, install
from tests.helpers.tracker_files import tensorboard_values, wandb_records, wandb_values

__all__ = ["fresh_plug_ins"]
NAME = StreamName("demo-avcil-seed0", "0123abcd", "avcil")
by_file = pytest.mark.parametrize("kind", [EventFile, RunFile])
by_tracker = pytest.mark.parametrize("name", ["tensorboard", "wandb"])
NUM_KILLED = 1000
RECORDS = [b"a" * size for size in (1, 100, BLOCK - 150, 3, 2, BLOCK, 3 * BLOCK, 7)]  # parts end everywhere in a block


def written(kind: type[RecordFile], path: Path, records: list[bytes]) -> bytes:
    file = kind(path)
    for record in records:
        file.append(record)
    file.close()
    return path.read_bytes()


@by_file
def test_any_beginning_of_a_file_has_its_whole_records_and_can_be_continued(
    kind: type[RecordFile], tmp_path: Path
) -> None:
    data = written(kind, tmp_path / "whole", RECORDS)
    file = kind(tmp_path / "whole")
    ends = [end for _, end in file.scan(data)]
    assert [record for record, _ in file.scan(data)] == RECORDS
    assert ends[-1] == len(data)
    cuts = {cut for end in ends for cut in (end - 1, end, end + 1, end + 6)} | {0, 3}
    for cut in sorted(cut for cut in cuts if cut <= len(data)):
        path = tmp_path / f"{cut}"
        path.write_bytes(data[:cut])
        half = kind(path)
        kept = list(half.read())
        assert kept == RECORDS[: sum(end <= cut for end in ends)]
        assert half.was_cut == (cut not in (0, *ends))
        for record in RECORDS[len(kept) :]:
            half.append(record)
        assert path.read_bytes() == data


@by_file
def test_a_changed_byte_ends_the_records_that_count(kind: type[RecordFile], tmp_path: Path) -> None:
    data = bytearray(written(kind, tmp_path / "file", [b"first", b"second", b"third"]))
    data[data.index(b"second")] ^= 1
    (tmp_path / "file").write_bytes(bytes(data))
    assert list(kind(tmp_path / "file").read()) == [b"first"]


def fill(queue: EventQueue, iterations: int, first: int = 0) -> None:
    if not first:
        queue.append("open", is_synced=False, name="demo", parameters={"seed": 0}, tags={"method": "avcil"})
        queue.append("begin", is_synced=False, step=0, name="demo-step000", parameters={"optim.lr": 0.1})
    for position in range(first, first + iterations):
        values = {"loss/total": 1 / (1 + position), "speed/x": 2.0}
        queue.append("metrics", is_synced=False, run="0", position=position, values=values)
    queue.append("metrics", is_synced=False, run="stream", position=0, values={"test/seen_accuracy": 0.5})


def send(queue: EventQueue, name: str, folder: Path) -> None:
    sender = Sender(queue, name, lambda runs: tracker_class(name)(folder, NAME, runs), shown=name)
    sender.start()
    assert sender.close(60.0)


def values_of(name: str, folder: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """The values in a folder's files by run and metric, in order. W&B's own program reads them in slow tests."""
    if name == "tensorboard":
        return tensorboard_values(folder)
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for path in folder.glob("*/*.wandb"):
        values = found.setdefault("0" if "-step000" in path.name else "stream", {})
        for record in RunFile(path).read():
            row = {item.nested_key[0]: json.loads(item.value_json) for item in Record.FromString(record).history.item}
            for key in row.keys() - {"iteration", "incremental_step"}:
                if not key.startswith("_"):
                    values.setdefault(key, []).append((row.get("iteration", row.get("incremental_step")), row[key]))
    return found


def delivered(
    name: str, tmp_path: Path, count: int
) -> tuple[EventQueue, Path, dict[str, dict[str, list[tuple[int, float]]]]]:
    """A queue that was sent whole, the tracker's folder, and the values there."""
    queue, folder = EventQueue(tmp_path / "events"), tmp_path / name
    fill(queue, count)
    send(queue, name, folder)
    return queue, folder, values_of(name, folder)


@by_tracker
def test_each_value_is_delivered_once_wherever_a_sender_was_killed(name: str, tmp_path: Path) -> None:
    queue, folder, whole = delivered(name, tmp_path, 30)
    sent = queue.cursor(name)
    choices = random.Random(0)
    offsets = [0, *(offset for _, offset in queue.read(0, limit=100))]
    for _ in range(6):  # a cursor behind the files, files that lost their end, and both
        for path in [path for path in folder.rglob("*") if path.is_file()]:
            data = path.read_bytes()
            path.write_bytes(data[: choices.randrange(len(data) // 2, len(data) + 1)])
        sent.offset = choices.choice(offsets)
        queue.save_cursor(name, sent)
        queue.append("tags", run="stream", tags={"again": str(choices.random())})
        send(queue, name, folder)
        assert values_of(name, folder) == whole
    assert [position for position, _ in whole["0"]["loss/total"]] == list(range(30))


@by_tracker
def test_all_is_sent_again_where_a_file_was_deleted(name: str, tmp_path: Path) -> None:
    queue, folder, whole = delivered(name, tmp_path, 5)
    for path in [path for path in folder.rglob("*") if path.is_file() and "step" in str(path.relative_to(folder))]:
        path.unlink()
    queue.append("metrics", run="0", position=1, values={"loss/total": 9.0})
    send(queue, name, folder)
    assert values_of(name, folder) == whole


@by_tracker
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_link_in_a_folder_of_somebody_else_is_not_followed(name: str, depth: int, tmp_path: Path) -> None:
    begin: Event = {"kind": "begin", "step": 0, "time": 1000}
    tracker_class(name)(tmp_path / name, NAME, {}).write([begin])
    [path] = [path for path in (tmp_path / name).rglob("*") if path.is_file()]
    precious = tmp_path / "precious"
    precious.write_bytes(b"no records")
    link = [path, *path.parents][depth]
    link.rename(tmp_path / "moved")
    link.symlink_to(precious if depth == 0 else tmp_path / "moved", target_is_directory=depth > 0)
    with pytest.raises(UnavailableError, match="symbolic link"):
        tracker_class(name)(tmp_path / name, NAME, {}).write([begin | {"parameters": {"seed": 1}}])
    assert precious.read_bytes() == b"no records"


@by_tracker
def test_an_event_of_no_run_is_rejected(name: str, tmp_path: Path) -> None:
    with pytest.raises(RejectedError, match=r"no run of a step: '\.\./x'"):
        tracker_class(name)(tmp_path, NAME, {}).write([{"kind": "end", "run": "../x", "status": "FINISHED"}])
    assert not list(tmp_path.iterdir())


@pytest.fixture
def full_disk() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@by_tracker
def test_a_full_disk_is_an_outage(name: str, tmp_path: Path, full_disk: None) -> None:
    tracker = tracker_class(name)(tmp_path, NAME, {})
    event: Event = {"kind": "begin", "step": 0, "time": 1000, "parameters": {str(number): "x" for number in range(200)}}
    with pytest.raises(UnavailableError, match="File too large"):
        tracker.write([event])


@pytest.mark.slow
def test_a_run_that_continues_after_its_end_ends_once(tmp_path: Path) -> None:
    tracker = tracker_class("wandb")(tmp_path, NAME, {})
    end: Event = {"kind": "end", "run": "0", "time": 9000, "status": "KILLED"}
    begin: Event = {"kind": "begin", "step": 0, "time": 1000, "name": "demo-step000", "parameters": {"optim.lr": 0.1}}
    row: Event = {"kind": "metrics", "run": "0", "time": 2000, "position": 7, "values": {"system/node_0/cpu": 50.0}}
    tracker.write([begin, end])
    again = tracker_class("wandb")(tmp_path, NAME, dict(tracker.runs))
    again.write([begin, row, end | {"status": "FINISHED"}])
    [run] = tmp_path.iterdir()
    records = wandb_records(run)
    assert [record["type"] for record in records] == ["header", "run", "metric", "summary", "history", "exit"]
    assert records[1]["run"] | {"run_id": "0123abcd-step000", "run_group": NAME.name} == records[1]["run"]
    assert records[1]["run"]["config"]["update"]["parameter.optim.lr"] == "0.1"
    assert (records[2]["metric"]["glob_name"], records[2]["metric"]["step_metric"]) == ("system/*", "seconds")
    assert records[-1]["exit"].get("exit_code", 0) == 0


SENDING = """
import sys
from pathlib import Path
from avcil_dist.tracking import sender
from avcil_dist.tracking.event_queue import EventQueue
from avcil_dist.tracking.trackers import tracker_class
from avcil_dist.tracking.trackers.base import StreamName

sender.EVENTS_PER_BATCH = 1
folder, queue = Path(sys.argv[1]), EventQueue(Path(sys.argv[1], "events"))
for name in ("tensorboard", "wandb"):
    def connect(runs, name=name):
        return tracker_class(name)(folder / name, StreamName("demo-avcil-seed0", "0123abcd", "avcil"), runs)
    sender.Sender(queue, name, connect, shown=name).start()
sys.stdin.read()
"""


@pytest.mark.slow
def test_a_killed_process_and_the_next_deliver_each_value_once_and_in_order(tmp_path: Path) -> None:
    queue, names = EventQueue(tmp_path / "events"), ("tensorboard", "wandb")
    fill(queue, NUM_KILLED)

    def is_in_it(name: str) -> bool:
        return any(path.stat().st_size > 3000 for path in (tmp_path / name).rglob("*") if path.is_file())

    with subprocess.Popen([sys.executable, "-c", SENDING, str(tmp_path)], stdin=subprocess.PIPE) as process:
        while not all(map(is_in_it, names)):
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    assert not any(map(queue.is_sent, names))
    for name in names:
        send(queue, name, tmp_path / name)
    expected = {position: 1 / (1 + position) for position in range(NUM_KILLED)}
    for found in (tensorboard_values(tmp_path / "tensorboard"), wandb_values(tmp_path / "wandb")):
        assert [position for position, _ in found["0"]["loss/total"]] == list(expected)
        assert dict(found["0"]["loss/total"]) == pytest.approx(expected, rel=1e-6)
        assert Counter(found["stream"]["test/seen_accuracy"]) == {(0, 0.5): 1}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("[tensorboard,tensorboard]", "a tracker is there twice"),
        ("[comet]", "tracking.trackers: 'comet' is none of tensorboard, wandb"),
        ("[json:JSONDecoder]", "'json:JSONDecoder' is no class derived from avcil_dist.tracking.trackers.base.Tracker"),
    ],
)
def test_a_tracker_that_cannot_be_used_is_one_line_before_anything_is_made(
    words: str, message: str, tmp_path: Path
) -> None:
    config = load_config("demo", [f"output={tmp_path}/runs", f"tracking.trackers={words}"])
    with pytest.raises(ConfigError, match=message):
        check_tracking(config)
    assert not (tmp_path / "runs").exists()


def test_the_documented_tracker_of_another_package_has_each_value_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [shown] = [block.text for block in blocks(PROJECT / "docs" / "extending.md") if "(Tracker)" in block.text]
    imports = "import csv, os\nfrom avcil_dist.tracking.trackers.base import RunLog, Tracker\n"
    install(monkeypatch, tmp_path, "own_t", {"trackers": {"csv": "own_t:Csv"}}, imports + shown)
    config = load_config("demo", [f"output={tmp_path}", "tracking.trackers=[csv]"])
    check_tracking(config)
    queue, folder = EventQueue(tmp_path / "events"), tmp_path / "csv"
    fill(queue, 3)
    send(queue, "csv", folder)
    whole = (folder / "0.csv").read_text()
    assert whole.splitlines()[:2] == ["loss/total,0,1.0", "speed/x,0,2.0"]
    (folder / "0.csv").write_text(whole[:-4])
    queue.save_cursor("csv", DeliveryCursor())
    send(queue, "csv", folder)
    assert (folder / "0.csv").read_text() == whole


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "avcil_dist.tracking.trackers.wandb")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"wandb needs the package wandb; run pip install 'avcil-dist\[wandb\]'"):
        tracker_class("wandb")
