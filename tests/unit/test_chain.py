"""Submission of a chain of jobs with a scheduler that only records what it is given."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

from avcil_dist import storage
from avcil_dist.compose import load_config
from avcil_dist.config.schema import Config
from avcil_dist.config.serialization import flatten
from avcil_dist.errors import ConfigError, SchedulerError
from avcil_dist.streams.commit import write_commit
from avcil_dist.streams.snapshots import snapshot_identity, snapshots_url
from avcil_dist.streams.stream import sole_writer, stream_url
from avcil_dist.world import World
from launch.cluster import chain as chain_module
from launch.cluster import submission_lock as submission_lock_module
from launch.cluster.chain import Submission, dry_run_text, kept_events_note, submit_stream
from launch.cluster.chain_record import Chain, read_chain, write_chain
from launch.cluster.resources import ClusterConfig
from launch.cluster.schedulers.base import JobStart, JobState, Lane
from launch.resume_policy import KEEP_ALL, ResumePolicy
from launch.step_run import StepRun

NUM_STEPS = 4
CLUSTER = ClusterConfig(kind="slurm")
RESTART = ResumePolicy(restart=True)


@dataclass
class RecordingScheduler:
    """A scheduler whose live jobs are set by the test."""

    live: dict[int, JobState] = field(default_factory=dict)
    starts: list[JobStart] = field(default_factory=list)
    cancelled_from: list[int] = field(default_factory=list)

    def check(self, cluster: ClusterConfig) -> None: ...

    def require(self) -> None: ...

    def lanes(self, cluster: ClusterConfig, num_streams: int) -> list[Lane]:
        return [Lane(cluster)] * num_streams

    def submit(
        self, config: Config, cluster: ClusterConfig, chain: Chain, steps: Sequence[int], start: JobStart
    ) -> Chain:
        self.starts.append(start)
        for step in steps:
            chain = chain.with_job(step, f"new-{step}")
        write_chain(stream_url(config), chain)
        return chain

    def live_jobs(self, chains: Mapping[str, Chain]) -> dict[str, dict[int, JobState]]:
        return dict.fromkeys(chains, self.live)

    def past_jobs(self, chains: Mapping[str, Chain]) -> dict[str, dict[int, JobState]]:
        return {stream: {} for stream in chains}

    def last_job(self, chain: Chain) -> str:
        return chain.jobs[chain.num_steps - 1][-1]

    def cancel(self, chains: Mapping[str, Chain], first_step: int = 0) -> dict[str, int]:
        self.cancelled_from.append(first_step)
        return {stream: len(self.live) for stream in chains}

    def script(self, chain: Chain, cluster: ClusterConfig, step: int, previous: str | None) -> str:
        return f"{step} after {previous}"

    def options(self, chain: Chain, cluster: ClusterConfig, step: int, previous: str | None) -> dict[str, str]:
        return {}

    def world(self, port: int) -> World:
        return World()


def waiting(step: int) -> JobState:
    return JobState(f"old-{step}", "PENDING", "", "", is_live=True)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config("demo", [f"output={tmp_path}/runs", f"snapshot.folder={tmp_path}/fast"])


@pytest.fixture
def scheduler(monkeypatch: pytest.MonkeyPatch) -> RecordingScheduler:
    recording = RecordingScheduler()
    monkeypatch.setattr(chain_module, "scheduler_of", lambda kind: recording)
    monkeypatch.setattr(chain_module, "preflight", lambda *_, **__: SimpleNamespace(num_steps=NUM_STEPS))
    return recording


def submit(config: Config, policy: ResumePolicy = KEEP_ALL, after: Sequence[str] = ()) -> Submission:
    return submit_stream(config, CLUSTER, run_id="id", after=after, policy=policy)


def commit_steps(config: Config, count: int) -> None:
    for step in range(count):
        storage.write_bytes(f"{stream_url(config)}/step_{step:03d}/COMMITTED.json", b"{}")


def test_a_new_stream_gets_a_job_for_each_step(config: Config, scheduler: RecordingScheduler) -> None:
    done = submit(config, after=["before"])
    assert (done.new, done.kept, done.last) == ((0, 1, 2, 3), (), "new-3")
    assert scheduler.starts == [JobStart("id", 0, ("before",))]
    assert read_chain(done.stream).config() == config


def test_committed_steps_get_no_job(config: Config, scheduler: RecordingScheduler) -> None:
    commit_steps(config, 2)
    done = submit(config)
    assert done.new == (2, 3)
    assert scheduler.starts == [JobStart("id", 2)]
    commit_steps(config, NUM_STEPS)
    done = submit(config)
    assert (done.new, done.kept, done.last) == ((), (), None)
    assert len(scheduler.starts) == 1


def test_of_a_finished_stream_the_submission_publishes_what_a_killed_job_did_not(
    config: Config, scheduler: RecordingScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    published: list[int] = []
    monkeypatch.setattr(StepRun, "publish_unpublished", lambda run: published.append(run.step))
    for committed, expected in ((NUM_STEPS - 1, []), (NUM_STEPS, [NUM_STEPS - 1])):
        commit_steps(config, committed)
        submit(config)
        assert published == expected


def test_jobs_that_wait_or_run_are_kept_and_recorded(config: Config, scheduler: RecordingScheduler) -> None:
    submit(config)
    scheduler.live = {0: waiting(0), 1: waiting(1)}
    done = submit(config)
    assert (done.new, done.kept) == ((2, 3), (0, 1))
    jobs = read_chain(done.stream).jobs
    assert jobs == {step: (f"new-{step}", f"old-{step}" if step < 2 else f"new-{step}") for step in range(NUM_STEPS)}


def test_a_job_is_recorded_once(config: Config, scheduler: RecordingScheduler) -> None:
    submit(config)
    scheduler.live = {step: JobState(f"new-{step}", "PENDING", "", "", is_live=True) for step in range(3)}
    done = submit(config)
    assert done.chain.jobs == {0: ("new-0",), 1: ("new-1",), 2: ("new-2",), 3: ("new-3", "new-3")}


def test_the_stream_is_checked_for_every_number_of_ranks(
    config: Config, scheduler: RecordingScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[tuple[int, bool]] = []

    def check(config: Config, world_sizes: list[int], *, restart: bool) -> SimpleNamespace:
        checked.extend((size, restart) for size in world_sizes)
        return SimpleNamespace(num_steps=NUM_STEPS)

    monkeypatch.setattr(chain_module, "preflight", check)
    cluster = ClusterConfig.model_validate({"kind": "slurm", "steps": {1: {"nodes": 2}, 3: {"nodes": 4}}})
    submit_stream(config, cluster, run_id="id", policy=RESTART)
    assert checked == [(1, True), (2, True), (4, True)]


def test_other_settings_than_those_of_the_live_jobs_are_refused(config: Config, scheduler: RecordingScheduler) -> None:
    submit(config)
    scheduler.live = {step: waiting(step) for step in range(NUM_STEPS)}
    changed = config.model_copy(update={"seed": config.seed, "memory": config.memory.model_copy(update={"size": 999})})
    with pytest.raises(ConfigError, match=r"memory\.size=.*, not 999; end them first: avcil cancel"):
        submit(changed)
    assert submit(config).kept == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("cluster", "error"),
    [
        (ClusterConfig(kind="slurm", partition="gpu"), "cluster.partition=None, not gpu"),
        (ClusterConfig(kind="slurm", setup=["module load x"]), r"cluster.setup=\[\], not \['module load x'\]"),
        (ClusterConfig.model_validate({"kind": "slurm", "steps": {2: {"hours": 3}}}), r"cluster.steps=\{\}, not "),
    ],
)
def test_other_cluster_settings_than_those_of_the_live_jobs_are_refused(
    config: Config, scheduler: RecordingScheduler, cluster: ClusterConfig, error: str
) -> None:
    submit(config)
    scheduler.live = {step: waiting(step) for step in range(NUM_STEPS)}
    with pytest.raises(ConfigError, match=f"{error}.*; end them first: avcil cancel"):
        submit_stream(config, cluster, run_id="id")
    assert submit_stream(config, CLUSTER.model_copy(update={"max_parallel": 9}), run_id="id").kept == (0, 1, 2, 3)
    scheduler.live = {}
    assert submit_stream(config, cluster, run_id="id").chain.cluster() == cluster


def test_operational_settings_are_not_dropped_either(config: Config, scheduler: RecordingScheduler) -> None:
    submit(config)
    scheduler.live = {step: waiting(step) for step in range(NUM_STEPS)}
    data = config.data.model_copy(update={"decode_workers": 3})
    with pytest.raises(ConfigError, match=r"data\.decode_workers=0, not 3; end them first"):
        submit(config.model_copy(update={"data": data}))


@pytest.mark.parametrize(("changes", "is_refused"), [({}, True), ({"manifest_hash": "of other data"}, False)])
def test_settings_that_cannot_continue_a_snapshot_are_refused_and_other_ranks_are_not(
    config: Config,
    scheduler: RecordingScheduler,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, str],
    is_refused: bool,
) -> None:
    monkeypatch.setattr(chain_module, "load_data", lambda _: SimpleNamespace(content_hash="of this data"))
    commit_steps(config, 1)
    write_commit(
        f"{snapshots_url(config, 1)}/000000676",
        {},
        settings=flatten(config),
        zero_stage=2,
        world_size=1,
        **snapshot_identity(config, 1, "of this data") | changes,
    )
    changed = config.model_copy(update={"optim": config.optim.model_copy(update={"lr": 0.5})})
    if is_refused:
        with pytest.raises(ConfigError, match=r"step 1 was begun with optim.lr=.*, not 0.5; .*--restart-step"):
            submit_stream(changed, CLUSTER, run_id="id")
        assert not scheduler.starts
    else:
        assert submit_stream(changed, CLUSTER, run_id="id").new == (1, 2, 3)
    two_nodes = CLUSTER.model_copy(update={"nodes": 2})
    assert submit_stream(config, two_nodes, run_id="id").new == (1, 2, 3)
    assert submit_stream(changed, CLUSTER, run_id="id", policy=ResumePolicy(restart_step=True)).new == (1, 2, 3)


@pytest.mark.parametrize("name", ["100%jb", "a:b", "back\\slash"])
def test_a_folder_that_is_taken_for_something_else_is_refused(
    config: Config, scheduler: RecordingScheduler, tmp_path: Path, name: str
) -> None:
    elsewhere = config.model_copy(update={"output": f"{tmp_path}/{name}"})
    with pytest.raises(ConfigError, match=r"in the path: .*; choose another output=, or cluster.folder="):
        submit(elsewhere)
    assert not Path(elsewhere.output).exists()
    cluster = CLUSTER.model_copy(update={"folder": f"{tmp_path}/jobs"})
    assert submit_stream(elsewhere, cluster, run_id="id").chain.folder == f"{tmp_path}/jobs/{config.stream_name}"


def test_an_output_that_no_database_can_be_in_is_refused_before_anything_is_made(
    config: Config, scheduler: RecordingScheduler
) -> None:
    elsewhere = config.model_copy(update={"output": f"{config.output}/what?"})
    with pytest.raises(ConfigError, match="cannot be in the path of a tracking database"):
        submit_stream(elsewhere, CLUSTER)
    assert not Path(elsewhere.output).exists()


@pytest.mark.parametrize(("kind", "uri"), [("local", None), ("slurm", "http://tracking:5000")])
def test_jobs_send_their_events_where_one_machine_writes_or_a_server_does(
    config: Config, kind: str, uri: str | None
) -> None:
    tracking = config.tracking.model_copy(update={"uri": uri})
    sending = config.model_copy(update={"tracking": tracking})
    assert kept_events_note(sending, ClusterConfig(kind=kind), "runs") is None


@pytest.mark.parametrize("uri", [None, "sqlite:////shared/mlflow.db", "sqlite+pysqlite:////shared/mlflow.db"])
def test_jobs_of_other_machines_leave_an_sqlite_file_to_sync(config: Config, uri: str | None) -> None:
    kept = config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": uri})})
    note = kept_events_note(kept, CLUSTER, "my runs")
    assert note is not None
    assert note.startswith(uri or f"sqlite:///{config.output}/mlflow.db")
    assert "avcil sync 'my runs', or give tracking.uri a server" in note


def test_the_files_of_jobs_are_for_the_user_alone(config: Config, scheduler: RecordingScheduler) -> None:
    folder = Path(submit(config).chain.folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o770)
    with pytest.raises(ConfigError, match=r"others can write it, .* chmod go-w"):
        submit(config)


def test_jobs_whose_predecessor_is_gone_are_ended_and_submitted_again(
    config: Config, scheduler: RecordingScheduler
) -> None:
    commit_steps(config, 1)
    scheduler.live = {0: waiting(0), 2: waiting(2), 3: waiting(3)}
    done = submit(config)
    assert scheduler.cancelled_from == [1]
    assert (done.new, done.kept) == ((1, 2, 3), ())


def test_restart_discards_steps_and_all_snapshots_wherever_they_are(
    config: Config, scheduler: RecordingScheduler
) -> None:
    commit_steps(config, 2)
    snapshots = Path(storage.parent(snapshots_url(config, 0)))
    for name in ("step_000", "teacher_001", "step_002"):
        (snapshots / name).mkdir(parents=True)
    assert submit(config, RESTART).new == (0, 1, 2, 3)
    assert not Path(stream_url(config), "step_000").exists()
    assert not snapshots.exists()


def test_restart_of_a_step_keeps_committed_steps(config: Config, scheduler: RecordingScheduler) -> None:
    commit_steps(config, 2)
    snapshots = Path(storage.parent(snapshots_url(config, 0)))
    for name in ("step_002", "teacher_002"):
        (snapshots / name).mkdir(parents=True)
    assert submit(config).new == (2, 3)
    assert sorted(path.name for path in snapshots.iterdir()) == ["step_002", "teacher_002"]
    assert submit(config, ResumePolicy(restart_step=True)).new == (2, 3)
    assert not snapshots.exists()
    assert Path(stream_url(config), "step_001", "COMMITTED.json").exists()


def test_restart_discards_nothing_while_jobs_wait_or_run(config: Config, scheduler: RecordingScheduler) -> None:
    commit_steps(config, 1)
    scheduler.live = {1: waiting(1)}
    with pytest.raises(ConfigError, match="wait or run; end them first"):
        submit(config, RESTART)
    assert Path(stream_url(config), "step_000", "COMMITTED.json").exists()


def test_restart_discards_nothing_while_another_process_trains(
    config: Config, scheduler: RecordingScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit_steps(config, 1)
    monkeypatch.setattr("avcil_dist.streams.stream.LOCK_SECONDS", 0.1)
    with sole_writer(stream_url(config)), pytest.raises(ConfigError, match="another process trains this stream"):
        submit(config, RESTART)
    assert Path(stream_url(config), "step_000", "COMMITTED.json").exists()


def test_restart_discards_nothing_during_another_submission(
    config: Config, scheduler: RecordingScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit_steps(config, 1)
    monkeypatch.setattr(submission_lock_module, "LOCK_SECONDS", 0.1)

    def submit_again(chains: Mapping[str, Chain]) -> dict[str, dict[int, JobState]]:
        """While the outer submission holds the lock; it must refuse before it discards anything."""
        monkeypatch.setattr(scheduler, "live_jobs", lambda chains: {stream: {} for stream in chains})
        with pytest.raises(SchedulerError, match="another submission"):
            submit(config, RESTART)
        assert Path(stream_url(config), "step_000", "COMMITTED.json").exists()
        return {stream: {} for stream in chains}

    monkeypatch.setattr(scheduler, "live_jobs", submit_again)
    assert submit(config).new == (1, 2, 3)


def test_a_submission_stays_locked_after_it_has_discarded_the_stream(
    config: Config, scheduler: RecordingScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit_steps(config, 1)
    monkeypatch.setattr(submission_lock_module, "LOCK_SECONDS", 0.1)
    first = scheduler.submit

    def submit_again(*arguments: object) -> Chain:
        with pytest.raises(SchedulerError, match="another submission"):
            submit(config)
        return first(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(scheduler, "submit", submit_again)
    assert submit(config, RESTART).new == (0, 1, 2, 3)


def test_a_dry_run_shows_one_script_and_what_differs_by_step(
    config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(chain_module, "preflight", lambda *_, **__: SimpleNamespace(num_steps=NUM_STEPS))
    commit_steps(config, 1)
    cluster = ClusterConfig.model_validate(
        {"kind": "slurm", "hours": 2, "steps": {3: {"nodes": 2}}, "extra": {"exclude": "n1"}}
    )
    text = dry_run_text(config, cluster)
    assert text.count("#!/bin/bash") == 1
    assert "#SBATCH --job-name=s01-demo-avcil-seed0-" in text
    assert "--dependency" not in text
    table = [line.split() for line in text.partition("### what differs")[2].splitlines()[1:]]
    assert table[0] == ["step", "dependency", "job-name", "nodes"]
    assert [row[:2] + row[3:] for row in table[1:]] == [
        ["1", "-", "1"],
        ["2", "afterok:JOB_OF_STEP_1", "1"],
        ["3", "afterok:JOB_OF_STEP_2", "2"],
    ]
    assert not Path(stream_url(config), "jobs").exists()
    commit_steps(config, NUM_STEPS)
    assert dry_run_text(config, cluster).endswith("all steps are committed, nothing would be submitted")
