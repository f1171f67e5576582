"""The status of a chain's steps, from jobs, status files and committed steps that are given."""

import io
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from avcil_dist import storage
from avcil_dist.compose import load_config
from avcil_dist.errors import ConfigError, SchedulerError
from avcil_dist.streams.commit import write_commit
from avcil_dist.streams.identity import new_identity, write_identity
from avcil_dist.streams.snapshots import snapshots_url
from launch.cluster import status as status_module
from launch.cluster.chain_record import Chain, mark_failed, read_chain, write_chain
from launch.cluster.resources import ClusterConfig
from launch.cluster.schedulers.base import JobState
from launch.cluster.status import chain_status, log_file, log_text, streams_below
from launch.cluster.status_table import print_status
from launch.progress import ProgressFile
from tests.helpers.report_streams import write_streams


def job(number: int, state: str, *, is_live: bool) -> JobState:
    return JobState(str(number), state, "node1", "reason", is_live)


@pytest.fixture
def stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A stream of four steps with jobs 10 to 13, of which the first is committed."""
    folder = f"{tmp_path}/stream"
    write_chain(folder, Chain("slurm", "x", f"{folder}/jobs", 4, jobs={step: (f"1{step}",) for step in range(4)}))
    Path(folder, "jobs").mkdir()
    storage.write_bytes(f"{folder}/step_000/COMMITTED.json", b"{}")
    monkeypatch.setattr(status_module, "_seen_accuracies", lambda *_: (0.75,))
    set_jobs(monkeypatch, {}, {})
    return folder


def set_jobs(monkeypatch: pytest.MonkeyPatch, live: dict[int, JobState], past: dict[int, JobState]) -> None:
    scheduler = SimpleNamespace(
        live_jobs=lambda chains: dict.fromkeys(chains, live),
        past_jobs=lambda chains: dict.fromkeys(chains, past),
    )
    monkeypatch.setattr(status_module, "scheduler_of", lambda kind: scheduler)


def states(stream: str) -> list[tuple[str, str, bool]]:
    return [(step.state, step.reason, step.is_live) for step in chain_status(stream).steps]


def test_a_step_is_live_while_its_job_is(stream: str, monkeypatch: pytest.MonkeyPatch) -> None:
    live = {step: job(10 + step, state, is_live=True) for step, state in ((0, "COMPLETING"), (1, "STAGE_OUT"))}
    set_jobs(monkeypatch, live, {1: job(9, "FAILED", is_live=False)})
    assert states(stream) == [
        ("COMMITTED", "", False),
        ("STAGE_OUT", "reason", True),
        ("ENDED", "", False),
        ("ENDED", "", False),
    ]
    assert [step.seen_accuracy for step in chain_status(stream).steps] == [0.75, None, None, None]


def test_a_status_file_decides_once_the_job_is_over(stream: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = read_chain(stream)
    mark_failed(chain.folder, 1, "shard 3 is missing")
    set_jobs(monkeypatch, {1: job(11, "RUNNING", is_live=True)}, {})
    assert states(stream)[1] == ("RUNNING", "reason", True)
    set_jobs(monkeypatch, {}, {1: job(11, "COMPLETED", is_live=False)})
    assert states(stream)[1] == ("FAILED", "reason", False)
    assert chain_status(stream).steps[1].failure == "shard 3 is missing"
    set_jobs(monkeypatch, {}, {})
    assert states(stream)[1] == ("FAILED", "", False)
    chain.clear_status(1)
    assert chain_status(stream).steps[1].failure is None


def test_the_first_cancelled_step_shows_the_iteration_that_it_continues_from(
    stream: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config("demo", [f"output={Path(stream).parent}"])
    chain = read_chain(stream)
    chain.freeze(config, ClusterConfig(kind="slurm"))
    set_jobs(monkeypatch, {}, {step: job(10 + step, "CANCELLED", is_live=False) for step in (1, 2, 3)})
    assert [step.continues_from for step in chain_status(stream).steps] == [None] * 4
    settings = {"settings": {}, "zero_stage": 0, "world_size": 1, "manifest_hash": "x", "previous_step": "y"}
    for iteration in (620, 676):
        write_commit(f"{snapshots_url(config, 1)}/{iteration:09d}", {}, **settings)
    Path(snapshots_url(config, 1), "000000700").mkdir()  # not committed
    assert [step.continues_from for step in chain_status(stream).steps] == [None, 676, None, None]
    assert "step 1: cancelled; continues from 676\n" in shown(stream)
    set_jobs(monkeypatch, {1: job(11, "RUNNING", is_live=True)}, {})
    assert "continues from" not in shown(stream)


def test_without_the_scheduler_committed_streams_have_a_status(stream: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(chains: object) -> dict[str, dict[int, JobState]]:
        raise SchedulerError("squeue: not found")

    monkeypatch.setattr(status_module, "scheduler_of", lambda kind: SimpleNamespace(live_jobs=unreachable))
    with pytest.raises(SchedulerError, match="squeue: not found"):
        chain_status(stream)
    for step in range(1, 4):
        storage.write_bytes(f"{stream}/step_{step:03d}/COMMITTED.json", b"{}")
    assert states(stream) == [("COMMITTED", "", False)] * 4


def test_without_accounting_the_states_of_ended_jobs_are_said_to_be_unknown(
    stream: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(chains: Mapping[str, Chain]) -> dict[str, dict[int, JobState]]:
        raise SchedulerError("sacct: Slurm accounting storage is disabled")

    live = {2: job(12, "RUNNING", is_live=True)}
    scheduler = SimpleNamespace(live_jobs=lambda chains: dict.fromkeys(chains, live), past_jobs=refuse)
    monkeypatch.setattr(status_module, "scheduler_of", lambda kind: scheduler)
    assert [state for state, _, _ in states(stream)] == ["COMMITTED", "ENDED", "RUNNING", "ENDED"]
    line = "the states of jobs that have ended are unknown, ENDED stands for all of them: sacct: Slurm accounting"
    assert line in shown(stream)


def shown(folder: str) -> str:
    """Return what `avcil status` prints at 80 columns."""
    console = Console(width=80, file=io.StringIO())
    print_status(folder, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_table_is_readable_at_80_columns(stream: str, monkeypatch: pytest.MonkeyPatch) -> None:
    running = JobState(
        "123456", "RUNNING", "gpu[0103-0106]", "", is_live=True, elapsed="1-02:03:04", limit="2-00:00:00", restarts=2
    )
    waiting = JobState("123457", "PENDING", "", "Dependency", is_live=True, limit="2-00:00:00")
    set_jobs(monkeypatch, {1: running, 2: waiting}, {0: job(10, "COMPLETED", is_live=False)})
    progress = {"done": 5, "total": 20, "values": "loss 0.459 val 100.0%", "time": time.time()}
    Path(read_chain(stream).progress_file(1)).write_text(json.dumps(progress))
    text = shown(stream)
    assert max(map(len, text.splitlines()[1:])) <= 80
    for word in (
        *("COMMITTED", "75.0%", "RUNNING", "2 restarts", "123456", "gpu[0103-0106]", "1-02:03:04", "/ 2-00:00:00"),
        *("25%", "0.459", "PENDING", "Dependency", "0:00", "ENDED"),
    ):
        assert word in text


def test_a_folder_of_streams_has_a_row_for_each(stream: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    chain = read_chain(stream)
    for name in ("sweep/a", "sweep/deep/b"):
        write_chain(f"{tmp_path}/{name}", replace(chain, folder=f"{tmp_path}/{name}/jobs"))
    for name in ("plain", "mlartifacts/0123/artifacts"):  # the second is MLflow's copy
        storage.write_bytes(f"{tmp_path}/{name}/step_000/COMMITTED.json", b"{}")
    storage.write_bytes(f"{tmp_path}/damaged/jobs.json", b"[]")
    (tmp_path / "something else").mkdir()
    set_jobs(monkeypatch, {1: job(11, "RUNNING", is_live=True)}, {})
    assert streams_below(str(tmp_path)) == [
        f"{tmp_path}/{name}" for name in ("damaged", "plain", "stream", "sweep/a", "sweep/deep/b")
    ]
    assert streams_below(stream) == [stream]
    text = shown(str(tmp_path))
    rows = [line.split() for line in text.splitlines()]
    assert ["stream", "1/4", "step", "1", "RUNNING", "11", "75.0%"] in rows
    assert ["sweep/a", "0/4", "step", "0", "ENDED", "10"] in rows
    assert ["plain", "1", "no", "jobs", "damaged"] in rows
    assert "jobs.json" in text
    with pytest.raises(ConfigError, match="no stream here or below"):
        shown(f"{tmp_path}/something else")


def test_cancelled_steps_name_the_step_that_failed(stream: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cancelled = {step: job(10 + step, "CANCELLED", is_live=False) for step in (2, 3)}
    set_jobs(monkeypatch, {}, {1: job(11, "FAILED", is_live=False)} | cancelled)
    assert [reason for _, reason, _ in states(stream)[1:]] == ["reason", "step 1 failed", "step 1 failed"]
    set_jobs(monkeypatch, {1: job(11, "RUNNING", is_live=True)}, cancelled)
    assert [reason for _, reason, _ in states(stream)[1:]] == ["reason", "", ""]


def test_the_test_of_a_step_has_a_share_of_its_own(stream: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_jobs(monkeypatch, {1: job(11, "RUNNING", is_live=True)}, {})
    monkeypatch.setattr("launch.progress.SECONDS_BETWEEN_WRITES", 0.0)
    monkeypatch.setattr("launch.progress.RemainingTime.seconds", None)
    file = ProgressFile(read_chain(stream).progress_file(1))
    shown = []

    def advance() -> None:
        file.advance()
        shown.append(chain_status(stream).steps[1].progress)

    file.begin(1, num_epochs=1, num_batches=2, num_done=0)
    for _ in range(2):
        advance()
    file.begin_test(4)
    advance()
    assert shown == ["50%", "100%", "testing 25%"]


@pytest.mark.parametrize(("age", "shown"), [(0, "25%  loss 1"), (120, "25%  loss 1  (120 s ago)")])
def test_progress_has_its_age_when_it_is_old(
    stream: str, monkeypatch: pytest.MonkeyPatch, age: int, shown: str
) -> None:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    progress = {"done": 5, "total": 20, "values": "loss 1", "time": now - age}
    Path(read_chain(stream).progress_file(1)).write_text(json.dumps(progress))
    set_jobs(monkeypatch, {1: job(11, "RUNNING", is_live=True)}, {})
    assert chain_status(stream).steps[1].progress == shown


def test_the_log_is_that_of_the_newest_job_and_the_rank(stream: str) -> None:
    chain = read_chain(stream).with_job(1, "21")
    write_chain(stream, chain)
    chain.log_folder(1).mkdir()
    for name in ("11_0", "21_0", "21_1"):
        (chain.log_folder(1) / f"{name}_log.out").write_text(f"log of {name}")
    assert "".join(log_text(stream, 1, 0, follow=False)) == "log of 21_0"
    assert "".join(log_text(stream, 1, 1, follow=False)) == "log of 21_1"
    assert log_file(chain, 1, 2) is None
    with pytest.raises(ConfigError, match="no log of rank 2; its job has fewer ranks"):
        list(log_text(stream, 1, 2, follow=False))
    with pytest.raises(ConfigError, match="step 2 has no log of rank 1; its job has not started"):
        list(log_text(stream, 2, 1, follow=False))
    with pytest.raises(ConfigError, match="no step 4; it has steps 0 to 3"):
        list(log_text(stream, 4, 0, follow=False))


def test_a_log_is_followed_until_its_job_is_over(stream: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = read_chain(stream)
    chain.log_folder(1).mkdir()
    log = chain.log_folder(1) / "11_0_log.out"
    pieces = iter(["one ", "two ", ""])

    def write_more(seconds: float) -> None:
        """While the reader sleeps; the last piece is written as the job ends."""
        piece = next(pieces)
        with log.open("a") as file:
            file.write(piece or "three")
        if not piece:
            set_jobs(monkeypatch, {}, {1: job(11, "COMPLETED", is_live=False)})

    monkeypatch.setattr(time, "sleep", write_more)
    monkeypatch.setattr(status_module, "LIVE_SECONDS", 0)
    set_jobs(monkeypatch, {1: job(11, "RUNNING", is_live=True)}, {})
    assert list(log_text(stream, 1, 0, follow=True)) == ["one ", "two ", "three"]


def test_the_log_of_a_step_that_starts_again_is_shown_from_its_beginning(
    stream: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = read_chain(stream)
    chain.log_folder(1).mkdir()
    first, second = (chain.log_folder(1) / f"{job}_0_log.out" for job in (11, 21))
    first.write_text("the first start, which is longer\n")

    def start_again() -> None:
        with first.open("a") as file:
            file.write("its end\n")
        write_chain(stream, chain.with_job(1, "21"))
        second.write_bytes(b"second: " + "é".encode()[:1])

    changes = iter(
        [
            start_again,
            lambda: second.write_bytes("second: é, cut\n".encode()),
            lambda: second.write_bytes(b"new\n"),
            lambda: set_jobs(monkeypatch, {}, {1: job(21, "COMPLETED", is_live=False)}),
        ]
    )
    monkeypatch.setattr(time, "sleep", lambda seconds: next(changes)())
    monkeypatch.setattr(status_module, "LIVE_SECONDS", 0)
    set_jobs(monkeypatch, {1: job(11, "RUNNING", is_live=True)}, {})
    assert "".join(log_text(stream, 1, 0, follow=True)) == (
        "the first start, which is longer\nits end\nsecond: é, cut\nnew\n"
    )


def test_a_stream_without_jobs_has_a_row_for_each_step(tmp_path: Path) -> None:
    write_streams(tmp_path, {"lwf": {}, "joint": {}})
    stream = f"{tmp_path}/made-lwf-seed0"
    shutil.rmtree(f"{stream}/step_002")
    rows = [line.split() for line in shown(stream).splitlines()]
    assert [row[:2] for row in rows if row[1:] and row[0] in "012" and row[1] != "(no"] == [
        ["0", "COMMITTED"],
        ["1", "COMMITTED"],
        ["2", "NOT"],
    ]
    rows = [line.split() for line in shown(str(tmp_path)).splitlines()]
    assert [row[:3] for row in rows if row and row[0].startswith("made")] == [
        ["made-joint-seed0", "3/3", "COMMITTED"],
        ["made-lwf-seed0", "2/3", "no"],
    ]
    write_identity(f"{tmp_path}/begun", new_identity())
    assert streams_below(str(tmp_path))[0] == f"{tmp_path}/begun"
    assert "begun: no step is committed yet" in shown(f"{tmp_path}/begun").replace("\n", "")
    assert ["begun", "0", "no", "jobs"] in [line.split() for line in shown(str(tmp_path)).splitlines()]
    with pytest.raises(ConfigError, match="a command trained it, not jobs"):
        next(log_text(stream, 0, 0, follow=False))


def test_a_folder_without_a_chain_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no jobs were submitted"):
        chain_status(str(tmp_path))
