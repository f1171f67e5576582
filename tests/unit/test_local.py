"""Supervision of a stream's steps on this machine, without training."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from avcil_dist import storage
from avcil_dist.compose import load_config
from avcil_dist.config.schema import Config
from avcil_dist.errors import ConfigError, SchedulerError
from avcil_dist.streams.stream import sole_runner, sole_writer, stream_url
from launch import local
from launch.cluster.chain_record import Chain, write_chain
from launch.cluster.schedulers.base import JobState
from launch.cluster.schedulers.slurm import SlurmScheduler
from launch.local import run_stream
from launch.local_worlds import local_worlds
from launch.resume_policy import ResumePolicy
from launch.step_run import StepRun


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A stream of two steps, of which the first is committed."""
    monkeypatch.setattr(local, "preflight", lambda *_, **__: SimpleNamespace(num_steps=2))
    monkeypatch.setattr("avcil_dist.streams.stream.LOCK_SECONDS", 0.1)
    found = load_config("demo", [f"output={tmp_path}/runs"])
    storage.write_bytes(f"{stream_url(found)}/step_000/COMMITTED.json", b"{}")
    return found


@pytest.mark.parametrize("lock", [sole_writer, sole_runner])
def test_restart_discards_nothing_while_another_process_trains(config: Config, lock: object) -> None:
    with lock(stream_url(config)), pytest.raises(ConfigError, match="another process trains this stream"):  # type: ignore[operator]
        run_stream(config, processes=1, policy=ResumePolicy(restart=True))
    assert Path(stream_url(config), "step_000", "COMMITTED.json").exists()


def test_restart_discards_nothing_while_jobs_wait_or_run(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = stream_url(config)
    write_chain(stream, Chain("slurm", "demo-0a1b2c", f"{stream}/jobs", 2, jobs={1: ("7",)}))
    waiting = JobState("7", "PENDING", "", "", is_live=True)
    monkeypatch.setattr(SlurmScheduler, "live_jobs", lambda self, chains: {name: {1: waiting} for name in chains})
    with pytest.raises(ConfigError, match=r"its jobs wait or run; end them first: avcil cancel"):
        run_stream(config, processes=1, policy=ResumePolicy(restart=True))
    monkeypatch.setattr(SlurmScheduler, "live_jobs", _no_answer)
    with pytest.raises(SchedulerError, match=r"no answer; if no job of this stream waits or runs, remove .*jobs.json"):
        run_stream(config, processes=1, policy=ResumePolicy(restart_step=True))
    assert Path(stream, "step_000", "COMMITTED.json").exists()


def _no_answer(self: object, chains: object) -> None:
    raise SchedulerError("squeue: no answer")


def test_steps_that_another_command_committed_meanwhile_are_not_trained(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def waited(stream: str) -> Iterator[None]:
        storage.write_bytes(f"{stream}/step_001/COMMITTED.json", b"{}")
        yield

    monkeypatch.setattr(local, "sole_runner", waited)
    monkeypatch.setattr(local, "stream_run", lambda *_, **__: nullcontext("id"))
    monkeypatch.setattr(StepRun, "publish_unpublished", lambda self: None)
    monkeypatch.setattr(local, "_run_step", lambda *_: pytest.fail("trained again"))
    assert run_stream(config, processes=1) == stream_url(config)


def test_ranks_of_one_machine_share_a_port() -> None:
    with local_worlds(3) as worlds, local_worlds(3) as others:
        assert worlds[0].master_port != others[0].master_port
    assert [(world.rank, world.local_rank, world.size, world.local_size) for world in worlds] == [
        (rank, rank, 3, 3) for rank in range(3)
    ]
    assert len({world.master_port for world in worlds}) == 1
    assert len({world.start_id for world in (*worlds, *others)}) == 2


def test_an_output_that_no_database_can_be_in_is_refused_before_anything_is_made(config: Config) -> None:
    output = f"{config.output}/what?"
    with pytest.raises(ConfigError, match=r"cannot be in the path of a tracking database"):
        run_stream(config.model_copy(update={"output": output}), processes=1)
    assert not Path(output).exists()
