"""The SLURM scheduler with programs of SLURM on the path that print what the test writes, and record their calls."""

import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock, Timeout

from avcil_dist.compose import load_config
from avcil_dist.errors import SchedulerError
from avcil_dist.streams.stream import stream_url
from launch.cluster.chain_record import Chain, mark_failed, read_chain, write_chain
from launch.cluster.rank_entry import RankEntry
from launch.cluster.resources import ClusterConfig
from launch.cluster.schedulers import slurm_commands
from launch.cluster.schedulers.base import JobStart, scheduler_of
from launch.cluster.status import cancel_chains
from launch.step_run import StepRun
from tests.helpers.fake_slurm import FakeSlurm

pytestmark = pytest.mark.slow  # each command is a process

SQUEUE = """\
90|COMPLETING|node1|10:02|4:00:00|1|None|{jobs}/step_000/0a.sh|
101|RUNNING|node[1-2]|5:00|4:00:00|0|None|/elsewhere/step_001/0b.sh|
99|PENDING||0:00|4:00:00|0|Dependency|{jobs}/step_002/0c.sh|
7|RUNNING|node3|1:00|4:00:00|0|None|{jobs}-more/step_001/0d.sh|
8|RUNNING|node4|1:00|4:00:00|0|None|(null)|
40|RUNNING|node4|1:00|4:00:00|0|None|/other/script.sh|
9|PENDING|"""
SACCT = """\
80|COMPLETED|node1|00:10:00|04:00:00|0:0
81|CANCELLED by 1000|None assigned|00:00:00|04:00:00|0:15
82|FAILED|node[1-2]|00:01:00|04:00:00|2:0
83|"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    found = FakeSlurm(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{found.folder}:{os.environ['PATH']}")
    return found


def chain(folder: Path, **jobs: tuple[str, ...]) -> Chain:
    recorded = {int(step.removeprefix("step_")): ids for step, ids in jobs.items()}
    return Chain("slurm", "vs100-0a1b2c", str(folder), num_steps=4, jobs=recorded)


def write_script(folder: Path, step: int, name: str) -> None:
    """Write a script of a step that was submitted under another path of the same folder."""
    (folder / f"step_{step:03d}").mkdir()
    (folder / f"step_{step:03d}" / name).touch()


def live(record: Chain) -> dict[int, Any]:
    return scheduler_of("slurm").live_jobs({"runs/vs100": record})["runs/vs100"]


def test_live_jobs_are_those_that_were_recorded_or_whose_script_is_in_the_folder_of_the_step(
    slurm: FakeSlurm, tmp_path: Path
) -> None:
    slurm.answer("squeue", SQUEUE.format(jobs=tmp_path))
    write_script(tmp_path, 1, "0b.sh")
    found = live(chain(tmp_path, step_1=("101",), step_3=("40",)))  # 40 is by now a job of something else
    assert {step: (job.id, job.state, job.nodes, job.reason, job.restarts) for step, job in found.items()} == {
        0: ("90", "COMPLETING", "node1", "", 1),
        1: ("101", "RUNNING", "node[1-2]", "", 0),
        2: ("99", "PENDING", "", "Dependency", 0),
    }
    assert [(job.elapsed, job.limit) for job in found.values()] == [
        ("10:02", "4:00:00"),
        ("5:00", "4:00:00"),
        ("", "4:00:00"),
    ]
    assert all(job.is_live for job in found.values())
    assert [step for step, job in found.items() if job.is_ending] == [0]


def test_a_record_that_names_jobs_of_another_chain_does_not_reach_them(slurm: FakeSlurm, tmp_path: Path) -> None:
    slurm.answer("squeue", SQUEUE.format(jobs=tmp_path))
    strange = chain(tmp_path / "strange", step_0=("90",), step_1=("101",))
    assert live(strange) == {}
    assert scheduler_of("slurm").cancel({"runs/vs100": strange}) == {"runs/vs100": 0}
    assert not slurm.calls("scancel")


def test_a_chain_whose_record_another_user_wrote_is_not_cancelled(tmp_path: Path) -> None:
    if os.getuid():
        pytest.skip("only root can give a file to another user")
    stream = str(tmp_path / "vs100")
    write_chain(stream, chain(tmp_path / "vs100/jobs"))
    os.chown(f"{stream}/jobs.json", 65534, 65534)
    ended, [fault] = cancel_chains([stream])
    assert not ended
    assert "jobs.json: belongs to another user, so it is not trusted" in str(fault)


def test_one_call_finds_the_jobs_of_many_streams(slurm: FakeSlurm, tmp_path: Path) -> None:
    slurm.answer("squeue", SQUEUE.format(jobs=tmp_path))
    more = chain(Path(f"{tmp_path}-more"))
    found = scheduler_of("slurm").live_jobs({"a": chain(tmp_path), "b": more, "c": chain(tmp_path / "c")})
    assert {stream: sorted(jobs) for stream, jobs in found.items()} == {"a": [0, 2], "b": [1], "c": []}
    assert len(slurm.calls("squeue")) == 1


def test_the_job_that_was_recorded_last_comes_before_others_of_the_step(slurm: FakeSlurm, tmp_path: Path) -> None:
    slurm.answer(
        "squeue", "".join(f"{id}|RUNNING|n|1:00|1:00|0|None|{tmp_path}/step_001/x.sh|\n" for id in (9, 50, 101))
    )
    for jobs, newest in ((("40", "101"), "101"), (("101", "50"), "50"), ((), "101")):
        assert live(chain(tmp_path, step_1=jobs))[1].id == newest


def test_past_jobs_are_the_newest_of_each_step(slurm: FakeSlurm, tmp_path: Path) -> None:
    slurm.answer("sacct", SACCT)
    recorded = chain(tmp_path, step_1=("70", "81"), step_2=("82",), step_3=("83",))
    past = scheduler_of("slurm").past_jobs({"runs/vs100": recorded})["runs/vs100"]
    assert "--jobs=81,82,83" in slurm.calls("sacct")[0][0]
    assert {step: (job.state, job.nodes, job.reason, job.elapsed, job.is_live) for step, job in past.items()} == {
        1: ("CANCELLED", "", "exit code 0", "0:00", False),
        2: ("FAILED", "node[1-2]", "exit code 2", "1:00", False),
    }
    assert scheduler_of("slurm").past_jobs({"runs/vs100": chain(tmp_path)}) == {"runs/vs100": {}}
    assert len(slurm.calls("sacct")) == 1


def test_later_jobs_are_cancelled_first_and_no_others(slurm: FakeSlurm, tmp_path: Path) -> None:
    slurm.answer("squeue", SQUEUE.format(jobs=tmp_path))
    write_script(tmp_path, 1, "0b.sh")
    streams = {"a": chain(tmp_path, step_1=("101",)), "b": chain(Path(f"{tmp_path}-more"))}
    assert scheduler_of("slurm").cancel(streams) == {"a": 3, "b": 1}
    assert scheduler_of("slurm").cancel(streams, first_step=2) == {"a": 1, "b": 0}
    assert scheduler_of("slurm").cancel(streams, first_step=3) == {"a": 0, "b": 0}
    assert [arguments for arguments, _ in slurm.calls("scancel")] == [["101", "99", "90", "7"], ["99"]]


@pytest.mark.parametrize(
    ("program", "answer", "error"),
    [
        (
            "squeue",
            {"output": "slurm_load_jobs error: \n timeout", "code": 1},
            "squeue: slurm_load_jobs error: timeout",
        ),
        ("squeue", {"output": "", "code": 7}, "squeue: exit code 7"),
        ("squeue", {"output": "", "seconds": 9}, "squeue: SLURM does not answer within 0.5 s; try again"),
        ("sbatch", {"output": "slurm is fine\n"}, "step 2: sbatch: no job id in its output: 'slurm is fine'"),
        ("sbatch", {"output": "invalid partition", "code": 1}, "step 2: sbatch: invalid partition"),
    ],
)
def test_a_program_that_fails_or_does_not_answer_is_one_line(
    slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, answer: dict[str, Any], error: str
) -> None:
    slurm.answer(program, **answer)
    monkeypatch.setattr(slurm_commands, "COMMAND_SECONDS", 0.5 if answer.get("seconds") else 60)
    with pytest.raises(SchedulerError) as caught:
        submit(tmp_path, ClusterConfig(kind="slurm")) if program == "sbatch" else live(chain(tmp_path))
    assert str(caught.value) == error


def test_a_program_that_is_missing_is_one_line(
    slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(slurm.folder))
    (slurm.folder / "squeue").unlink()
    with pytest.raises(SchedulerError, match="squeue: not found; it belongs to SLURM's client programs"):
        live(chain(tmp_path))


def submit(folder: Path, cluster: ClusterConfig, start: JobStart | None = None, *steps: int) -> Chain:
    config, record = load_config("demo", [f"output={folder}"]), replace(chain(folder / "jobs"), code="/code")
    start = start or JobStart("id", first_step=2)
    return scheduler_of("slurm").submit(config, cluster, record, steps or (2,), start)


def test_a_job_has_its_ranks_and_its_script_before_it_is_submitted(slurm: FakeSlurm, tmp_path: Path) -> None:
    record = chain(tmp_path / "jobs")
    (tmp_path / "jobs").mkdir()
    mark_failed(record.folder, 2, "an earlier error")
    slurm.answer("sbatch", "sbatch: welcome to the cluster\n4711;gpus\n")
    submitted = submit(tmp_path, ClusterConfig(kind="slurm", partition="gpu"), JobStart("id", 2, after=("8", "9")))
    assert submitted.jobs == {2: ("4711",)}
    assert record.failure(2) is None
    [([parsable, script], _)] = slurm.calls("sbatch")
    assert parsable == "--parsable"
    assert Path(script).parent == record.log_folder(2)
    text = Path(script).read_text()
    for line in ("job-name=s02-vs100-0a1b2c", "partition=gpu", "dependency=afterany:8:9", "signal=USR2@120"):
        assert f"#SBATCH --{line}\n" in text
    ranks = Path(script).with_suffix(".pkl")
    assert f"{record.log_folder(2)} {ranks.name}\n" in text
    run = StepRun(load_config("demo", [f"output={tmp_path}"]), 2, 4, "id", record.progress_file(2))
    assert pickle.loads(ranks.read_bytes()).function == RankEntry(run, record.folder, "slurm")


def test_each_job_waits_for_the_one_before_it_and_is_recorded_at_once(slurm: FakeSlurm, tmp_path: Path) -> None:
    start = JobStart("id", first_step=1, after=("77",))
    submit(tmp_path, ClusterConfig(kind="slurm"), start, 1, 2, 3)
    texts = [Path(arguments[1]).read_text() for arguments, _ in slurm.calls("sbatch")]
    waits_for = [[line for line in text.splitlines() if "--dependency" in line] for text in texts]
    assert waits_for == [[f"#SBATCH --dependency={word}"] for word in ("afterany:77", "afterok:1", "afterok:2")]
    runs = [
        pickle.loads(Path(arguments[1]).with_suffix(".pkl").read_bytes()).function.run
        for arguments, _ in slurm.calls("sbatch")
    ]
    assert [run.step for run in runs] == [1, 2, 3]
    stream = stream_url(load_config("demo", [f"output={tmp_path}"]))
    assert read_chain(stream).jobs == {1: ("1",), 2: ("2",), 3: ("3",)}

    slurm.answer("sbatch", "no", code=1)
    with pytest.raises(SchedulerError, match="step 1: sbatch: no"):
        submit(tmp_path, ClusterConfig(kind="slurm"), JobStart("id", first_step=1), 1)
    assert read_chain(stream).jobs == {1: ("1",), 2: ("2",), 3: ("3",)}


# Set around each program: by jobs and launchers, by options that users have in their profiles, and by what they mean.
OUTER = {
    "job": {
        "SLURM_JOB_ID": "7",
        "SLURM_MEM_PER_CPU": "500",
        "SLURM_CPU_BIND": "quiet,mask_cpu:0x1",
        "SLURM_GPUS_PER_TASK": "1",
        "SLURM_HET_SIZE": "2",
        "SLURM_JOB_ID_HET_GROUP_0": "7",
        "SLURM_ARRAY_JOB_ID": "7",
        "SLURM_ARRAY_TASK_ID": "3",
        "SLURM_EXPORT_ENV": "NONE",
        "SLURM_TIME_FORMAT": "relative",
        "SRUN_CPUS_PER_TASK": "3",
        "PMI_RANK": "0",
        "PMIX_NAMESPACE": "x",
        "OMPI_COMM_WORLD_RANK": "0",
        "RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "elsewhere",
        "SUBMITIT_PREEMPT_SIGNAL": "HUP",
        "SUBMITIT_LOCAL_NTASKS": "3",
    },
    "options": {
        "SBATCH_JOB_NAME": "mine",
        "SBATCH_OUTPUT": "mine",
        "SBATCH_TIMELIMIT": "1",
        "SBATCH_NO_REQUEUE": "1",
        "SBATCH_EXPORT": "NONE",
        "SBATCH_SIGNAL": "HUP@1",
        "SQUEUE_STATES": "RUNNING",
        "SQUEUE_FORMAT": "%i",
        "SACCT_LOCAL": "1",
        "SCANCEL_INTERACTIVE": "1",
    },
    "meant": {
        "SLURM_CONF": "/etc/mine.conf",
        "SLURM_CLUSTERS": "a",
        "HTTPS_PROXY": "http://proxy:3128",
        "LD_LIBRARY_PATH": "/opt/lib",
        "LOADEDMODULES": "cuda/12",
        "MLFLOW_TRACKING_TOKEN": "secret",
        "OMPI_MCA_btl": "tcp",
        "PYTHONPATH": "/plugins",
        "PMIDDLE": "x",
    },
}


@pytest.mark.parametrize("program", ["sbatch", "squeue", "sacct", "scancel"])
def test_no_program_gets_variables_of_an_outer_job_or_options_of_a_profile(
    slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    for name, value in (OUTER["job"] | OUTER["options"] | OUTER["meant"]).items():
        monkeypatch.setenv(name, value)
    slurm.answer("squeue", SQUEUE.format(jobs=tmp_path))
    record = {"runs/vs100": chain(tmp_path, step_0=("80",))}
    call: dict[str, Callable[[], object]] = {
        "sbatch": lambda: submit(tmp_path, ClusterConfig(kind="slurm")),
        "squeue": lambda: scheduler_of("slurm").live_jobs(record),
        "sacct": lambda: scheduler_of("slurm").past_jobs(record),
        "scancel": lambda: scheduler_of("slurm").cancel(record),
    }
    call[program]()
    [(_, environment)] = slurm.calls(program)
    assert not {*OUTER["job"], *OUTER["options"]} & environment.keys()
    assert OUTER["meant"].items() <= environment.items()


def test_an_account_of_the_profile_stays_where_the_cluster_file_has_none(
    slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBATCH_ACCOUNT", "lab")
    monkeypatch.setenv("SBATCH_PARTITION", "long")
    monkeypatch.setenv("SBATCH_RESERVATION", "course")
    submit(tmp_path, ClusterConfig(kind="slurm", partition="gpu", extra={"reservation": "mine"}))
    [(_, environment)] = slurm.calls("sbatch")
    assert {name for name in environment if name.startswith("SBATCH_")} == {"SBATCH_ACCOUNT"}


def test_devices_of_an_outer_job_are_not_those_of_the_new_one(
    slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    submit(tmp_path, ClusterConfig(kind="slurm"))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    submit(tmp_path, ClusterConfig(kind="slurm"))
    assert [environment.get("CUDA_VISIBLE_DEVICES") for _, environment in slurm.calls("sbatch")] == ["0", None]


def test_an_sbatch_that_outlives_a_killed_submission_holds_its_lock(slurm: FakeSlurm, tmp_path: Path) -> None:
    slurm.answer("sbatch", "1\n", seconds=1.5)
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from launch.cluster.submission_lock import submission_lock\n"
        "from launch.cluster.schedulers.slurm_commands import submit_script\n"
        "folder = sys.argv[1]\n"
        "with submission_lock(f'{folder}/s', Path(folder, 's/jobs')):\n"
        "    submit_script(Path(folder, 'x.sh'), ())\n"
    )
    submission = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    deadline = time.monotonic() + 60
    while not slurm.calls("sbatch"):
        assert submission.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    submission.kill()
    submission.wait()
    lock = FileLock(tmp_path / ".s.submit.lock")
    with pytest.raises(Timeout):
        lock.acquire(timeout=0)
    with lock.acquire(timeout=30):
        assert len(slurm.calls("sbatch")) == 1


def test_ranks_get_the_environment_of_the_script_and_the_names_of_files_as_they_are(
    slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_EXPORT_ENV", "NONE")  # as `--export=NONE` of a site sets it in the job
    monkeypatch.setenv("PYTHONPATH", "/plugins")
    folder = tmp_path / 'it\'s a "run" #1? ~x$HOME `id`'
    record = replace(chain(folder), code=f"{folder}/code")
    folder.mkdir()
    cluster = ClusterConfig(kind="slurm", setup=["export OF_SETUP=1"], extra={"export": "NONE"})
    script = scheduler_of("slurm").script(record, cluster, 2, None)
    slurm.answer("scontrol", "JobId=7 JobState=COMPLETING Reason=None")
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")
    [(arguments, environment)] = slurm.calls("srun")
    assert "--export=ALL" in arguments
    assert f"{folder}/step_002/%j_%t_log.out" in arguments
    assert arguments[-3:] == ["launch.cluster.rank_main", f"{folder}/step_002", "PICKLED_RANKS"]
    expected = {"OF_SETUP": "1", "PYTHONSAFEPATH": "1", "PYTHONPATH": f"{folder}/code:/plugins"}
    assert expected.items() <= environment.items()
