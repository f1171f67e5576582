"""Jobs of SLURM that end while their chain is submitted again or cancelled, with programs that print what is set."""

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest

from avcil_dist import storage
from avcil_dist.compose import load_config
from avcil_dist.config.schema import Config
from avcil_dist.errors import SchedulerError
from avcil_dist.streams.stream import stream_url
from launch.cluster import chain as chain_module
from launch.cluster import live_jobs, submission_lock
from launch.cluster.chain import Submission, submit_stream
from launch.cluster.chain_record import read_chain
from launch.cluster.resources import ClusterConfig
from tests.helpers.fake_slurm import FakeSlurm
from tests.helpers.streams import avcil

pytestmark = pytest.mark.slow  # each command of SLURM is a process


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """SLURM without jobs; streams have three steps."""
    found = FakeSlurm(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{found.folder}:{os.environ['PATH']}")
    monkeypatch.setattr(chain_module, "preflight", lambda *_, **__: SimpleNamespace(num_steps=3))
    monkeypatch.setattr("launch.cluster.status.close_run", lambda *_: None)
    monkeypatch.setattr(submission_lock, "LOCK_SECONDS", 0.1)
    return found


def config_of(folder: Path, seed: int = 0) -> Config:
    return load_config("demo", [f"output={folder}/runs", f"seed={seed}"])


def submit(config: Config) -> Submission:
    return submit_stream(config, ClusterConfig(kind="slurm"), run_id="id")


def set_queue(slurm: FakeSlurm, states: Mapping[str, Mapping[int, str]]) -> None:
    """Set the state of each step's newest job, by stream; the others are gone."""
    chains = {stream: read_chain(stream) for stream in states}
    slurm.answer(
        "squeue",
        "".join(
            f"{chains[stream].newest_job(step)}|{state}|n|1:00|4:00|0|None|{chains[stream].log_folder(step)}/x.sh|\n"
            for stream in states
            for step, state in states[stream].items()
        ),
    )


def while_waiting(monkeypatch: pytest.MonkeyPatch, change: Callable[[], None]) -> None:
    """Call a function in the place of each pause."""
    clock = SimpleNamespace(sleep=lambda seconds: change(), monotonic=time.monotonic)
    monkeypatch.setattr(live_jobs, "time", clock)


@pytest.mark.parametrize(
    ("later", "new", "kept"),
    [
        ({}, (0, 1, 2), ()),  # it was cancelled
        ({1: "PENDING", 2: "PENDING"}, (0, 1, 2), ()),  # it failed, and they wait in vain
        ({0: "PENDING", 1: "PENDING"}, (2,), (0, 1)),  # it was requeued
    ],
)
def test_a_submission_waits_for_the_end_of_a_job(
    slurm: FakeSlurm,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    later: dict[int, str],
    new: tuple[int, ...],
    kept: tuple[int, ...],
) -> None:
    stream = submit(config_of(tmp_path)).stream
    set_queue(slurm, {stream: {0: "COMPLETING", 1: "PENDING"}})
    while_waiting(monkeypatch, lambda: set_queue(slurm, {stream: later}))
    done = submit(config_of(tmp_path))
    assert (done.new, done.kept) == (new, kept)
    assert f"{stream}: the job 1 of step 0 is still COMPLETING; waiting for its end\n" in capsys.readouterr().err


def test_a_job_that_does_not_end_is_named_and_that_of_a_committed_step_is_not_waited_for(
    slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = submit(config_of(tmp_path)).stream
    set_queue(slurm, {stream: {0: "COMPLETING", 1: "PENDING", 2: "PENDING"}})
    monkeypatch.setattr(live_jobs, "END_SECONDS", -1.0)
    with pytest.raises(SchedulerError, match=r"the job 1 of step 0 is still COMPLETING after .* s; try again"):
        submit(config_of(tmp_path))
    storage.write_bytes(f"{stream_url(config_of(tmp_path))}/step_000/COMMITTED.json", b"{}")
    assert submit(config_of(tmp_path)).kept == (1, 2)


def test_cancelling_waits_for_the_end_of_all_jobs_and_no_submission_comes_between(
    slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = [submit(config_of(tmp_path, seed)).stream for seed in (0, 1)]
    set_queue(slurm, {stream: {0: "COMPLETING", 1: "PENDING"} for stream in streams})
    refused: list[str] = []

    def end_jobs() -> None:
        """While the jobs end."""
        for seed in (0, 1):
            with pytest.raises(SchedulerError, match="another submission or cancellation") as caught:
                submit(config_of(tmp_path, seed))
            refused.append(str(caught.value).partition(":")[0])
        slurm.answer("squeue", "")

    while_waiting(monkeypatch, end_jobs)
    result = avcil("cancel", tmp_path / "runs")
    assert result.exit_code == 0, result.output
    assert "the job 1 of step 0 is still COMPLETING; waiting for its end\n" in result.output
    assert [f"{stream}: 2 ended" in result.output.splitlines() for stream in streams] == [True, True]
    assert refused == streams
    assert [arguments for arguments, _ in slurm.calls("scancel")] == [["5", "4", "2", "1"]]
    assert submit(config_of(tmp_path)).new == (0, 1, 2)


def test_faulty_streams_do_not_keep_others_from_being_cancelled(
    slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = [submit(config_of(tmp_path, seed)).stream for seed in range(4)]
    whole, damaged, without_settings, busy = streams
    set_queue(slurm, {stream: {0: "RUNNING"} for stream in streams})
    Path(damaged, "jobs.json").write_text("{")
    Path(without_settings, "jobs/config.yaml").unlink()
    monkeypatch.setattr(live_jobs, "END_SECONDS", -1.0)
    with submission_lock.submission_lock(busy, Path(busy, "jobs")):
        result = avcil("cancel", tmp_path / "runs")
    assert result.exit_code == 2
    lines = result.output.splitlines()
    assert [line for line in lines if not line.startswith("avcil: ")] == [
        f"{whole}: 1 ended",
        f"{without_settings}: 1 ended",
    ]
    beginnings = [
        f"avcil: {damaged}/jobs.json: ",
        f"avcil: {busy}: another submission",
        f"avcil: {whole}: the job 1 of step 0 is still RUNNING after ",
        f"avcil: {without_settings}/jobs/config.yaml: ",
    ]
    for line, beginning in zip(lines[2:], beginnings, strict=True):
        assert line.startswith(beginning)
    assert [arguments for arguments, _ in slurm.calls("scancel")] == [["7", "1"]]
