"""Cluster files, job scripts (compared with files of their text), and the copy of the code for jobs."""

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from avcil_dist.errors import ConfigError, SchedulerError
from launch.cli.options import split_words
from launch.cluster.code_snapshot import snapshot_code, snapshot_folder, source_folder
from launch.cluster.resources import ClusterConfig, load_cluster
from launch.cluster.schedulers.base import scheduler_of
from launch.cluster.schedulers.local import start_supervisor
from launch.cluster.schedulers.slurm_commands import require_slurm
from launch.cluster.schedulers.slurm_script import (
    REQUEUE_SECONDS,
    rank_command,
    sbatch_options,
    sbatch_parameters,
    sbatch_text,
)
from tests.helpers.data import DATA

GOLDEN = DATA / "sbatch"
JOBS, PYTHON = "/shared/runs/vs100-avcil-seed0/jobs", "/shared/venv/bin/python"

SMALL = ClusterConfig(kind="slurm")
LARGE = ClusterConfig(
    kind="slurm",
    nodes=2,
    gpus_per_node=8,
    cpus_per_task=12,
    memory_gb=480.5,
    hours=7.99,
    partition="gpu",
    account="lab",
    qos="high",
    constraint="a100|h100",
    extra={"exclude": "gpu[03,07]", "exclusive": True},
    setup=["module load cuda/12", 'export NCCL_SOCKET_IFNAME="ib0"'],
    signal_seconds=300,
    max_requeues=20,
    steps={3: {"nodes": 4, "hours": 12}},
)


def script(cluster: ClusterConfig, step: int, code: str | None, dependency: str | None) -> str:
    parameters = sbatch_parameters(
        cluster,
        step,
        name=f"s{step:02d}-vs100-avcil-seed0-0a1b2c",
        code=code,
        prefix=f"{JOBS}/step_{step:03d}",
        python=PYTHON,
        dependency=dependency,
    )
    folder = f"{JOBS}/step_{step:03d}"
    return sbatch_text(
        parameters, folder=folder, command=rank_command(cluster.at(step), PYTHON, JOBS, folder, "0123abcd.pkl")
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("first_step.sh", script(SMALL, 0, None, None)),
        ("grown_step.sh", script(LARGE, 4, f"{JOBS}/code-0123456789ab", "afterok:4711")),
    ],
)
def test_the_job_script_equals_the_golden_file(name: str, text: str) -> None:
    assert text == (GOLDEN / name).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["first_step.sh", "grown_step.sh"])
def test_the_job_script_is_valid_bash(name: str) -> None:
    subprocess.run(["bash", "-n", GOLDEN / name], check=True)


LATER = "sleep 0.3; echo 2099-01-01T00:00:00"
NO_ANSWER = "Socket timed out\n"


def run_end(
    tmp_path: Path,
    command: str,
    *,
    state: str,
    restarts: int = 0,
    status: str = "",
    queue: str = LATER,
    faults: int = 0,
    setup: Sequence[str] = (),
) -> tuple[int, list[str], str]:
    """Run a script whose ranks are `command`, with a scontrol that prints `state` and a squeue that is `queue`.

    The first `faults` calls of each subcommand of scontrol fail. Returns the script's exit code, the subcommands of
    scontrol, and the arguments of Python, when all processes have ended.
    """
    calls = tmp_path / "calls"
    scontrol = (
        f'echo "$1" >> {calls}\n'
        f'if [ $(grep -cx "$1" {calls}) -le {faults} ]; then echo "{NO_ANSWER.strip()}" >&2; exit 1; fi\n'
        f'if [ "$1" = show ]; then echo "JobId=7 JobState={state} Reason=None"; fi\n'
    )
    for name, text in (("scontrol", scontrol), ("squeue", queue)):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    if status:
        (tmp_path / f"step_002.{status}").touch()
    parameters = sbatch_parameters(
        ClusterConfig(kind="slurm", max_requeues=3, setup=setup),
        2,
        name="x",
        code=None,
        prefix=f"{tmp_path}/step_002",
        python="echo",
        dependency=None,
    )
    text = "\n".join([*parameters["setup"], command, *parameters["teardown"]])
    text = re.sub(r"pause=\d+", "pause=0.01", text.replace(f"sleep {REQUEUE_SECONDS}", "exit 99"))
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts)}
    done = subprocess.run(["bash", "-c", text], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stderr.replace(NO_ANSWER, "") == ""
    return done.returncode, calls.read_text().split() if calls.exists() else [], done.stdout


@pytest.mark.slow
def test_a_step_that_is_done_or_failed_is_not_started_again(tmp_path: Path) -> None:
    assert run_end(tmp_path, "(exit 0)", state="RUNNING", status="done")[:2] == (0, [])
    (tmp_path / "step_002.done").unlink()
    assert run_end(tmp_path, "(exit 2)", state="RUNNING", status="failed")[:2] == (2, [])


@pytest.mark.slow
@pytest.mark.parametrize("code", [0, 1, 75, 137])  # srun gives 0 when it lost a node's daemon
def test_a_step_that_is_neither_done_nor_failed_is_requeued(tmp_path: Path, code: int) -> None:
    assert run_end(tmp_path, f"(exit {code})", state="RUNNING", restarts=2)[:2] == (99, ["show", "requeue"])


@pytest.mark.slow
@pytest.mark.parametrize("command", ["sleep 0.3; (exit 1)", "kill -KILL $$"])
def test_the_wait_for_the_time_limit_ends_with_the_script(tmp_path: Path, command: str) -> None:
    run_end(tmp_path, command, state="RUNNING", queue="echo 2099-01-01T00:00:00")


@pytest.mark.slow
def test_ranks_that_do_not_react_are_requeued_though_slurm_does_not_answer_at_first(tmp_path: Path) -> None:
    queue = f"echo >> {tmp_path}/asked; [ $(wc -l < {tmp_path}/asked) -gt 2 ] && date +%FT%T"
    ranks = f"for _ in $(seq 200); do grep -qs requeue {tmp_path}/calls && break; sleep 0.05; done; (exit 1)"
    code, calls, printed = run_end(tmp_path, ranks, state="RUNNING", queue=queue)
    assert (code, calls) == (99, ["requeue", "show", "requeue"])
    assert "step 2 is not done (the ranks do not react, and the time limit is near); requeued" in printed


@pytest.mark.slow
def test_a_job_that_slurm_itself_ends_is_not_requeued(tmp_path: Path) -> None:
    assert run_end(tmp_path, "(exit 143)", state="COMPLETING") == (1, ["show"], "")


@pytest.mark.slow
def test_calls_that_slurm_does_not_answer_are_repeated(tmp_path: Path) -> None:
    code, calls, printed = run_end(tmp_path, "(exit 75)", state="RUNNING", faults=2)
    assert (code, calls) == (99, ["show"] * 3 + ["requeue", "show"] * 2 + ["requeue"])
    assert printed == "avcil: step 2 is not done (exit code 75); requeued, it continues from its last snapshot\n"
    (tmp_path / "calls").unlink()
    assert run_end(tmp_path, "(exit 143)", state="COMPLETING", faults=1)[:2] == (1, ["show", "show"])
    code, _, printed = run_end(tmp_path, "(exit 75)", state="RUNNING", faults=1000)
    assert code == 1
    assert "step 2 is not done after 1 starts (exit code 75; SLURM did not requeue the job); see its log" in printed


@pytest.mark.slow
def test_options_of_the_shell_that_setup_sets_end_with_it(tmp_path: Path) -> None:
    setup = ["set -euo pipefail", "trap 'echo setup is cleaned up' EXIT"]
    code, calls, printed = run_end(tmp_path, "(exit 75)", state="RUNNING", setup=setup)
    assert (code, calls) == (99, ["show", "requeue"])
    assert printed.endswith("setup is cleaned up\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "code", "command"),
    [("false", 1, "false"), ("fail() { return 3; }; fail", 3, "return 3"), ("true || x; exit 7", 7, "exit 7")],
)
def test_a_start_whose_setup_fails_is_one_that_is_not_done(tmp_path: Path, line: str, code: int, command: str) -> None:
    setup = ["export A=1", line]
    ended, calls, printed = run_end(tmp_path, "echo ranks", state="RUNNING", setup=setup)
    assert (ended, calls) == (99, ["show", "requeue"])
    assert printed.startswith(
        f"avcil: setup failed with exit code {code}: {command}\navcil: step 2 is not done (setup: "
    )
    assert "ranks" not in printed
    (tmp_path / "calls").unlink()
    ended, calls, printed = run_end(tmp_path, "echo ranks", state="RUNNING", setup=setup, restarts=3)
    assert (ended, calls) == (1, ["show"])
    assert f"step 2 is not done after 4 starts (setup: exit code {code}; max_requeues=3); see its log" in printed


@pytest.mark.slow
def test_a_local_chain_whose_setup_fails_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(SchedulerError, match=r"the jobs did not start; see .*supervisor\.log"):
        start_supervisor(str(tmp_path), None, ClusterConfig(kind="local", setup=["test -e /nowhere"]), ["nothing"])
    assert (tmp_path / "supervisor.log").read_text() == "avcil: setup failed with exit code 1: test -e /nowhere\n"


@pytest.mark.slow
def test_a_step_fails_after_the_last_requeue(tmp_path: Path) -> None:
    code, calls, printed = run_end(tmp_path, "(exit 137)", state="RUNNING", restarts=3)
    assert (code, calls) == (1, ["show"])
    text = "step 2 is not done after 4 starts (exit code 137; max_requeues=3); see its log"
    assert printed == f"-m launch.cluster.mark_failed {tmp_path} 2 {text}\n"


def test_a_time_limit_is_in_whole_minutes_rounded_up() -> None:
    parameters = sbatch_parameters(LARGE, 0, name="x", code=None, prefix="x", python="python", dependency=None)
    assert parameters["time"] == 480  # 7.99 hours


def test_resources_grow_from_a_step_on() -> None:
    cluster = ClusterConfig(kind="slurm", hours=1, steps={2: {"nodes": 2}, 5: {"hours": 3, "nodes": 4}})
    found = [(cluster.at(step).nodes, cluster.at(step).hours) for step in (0, 1, 2, 4, 5, 9)]
    assert found == [(1, 1), (1, 1), (2, 1), (2, 1), (4, 3), (4, 3)]
    assert cluster.at(5).world_size == 4


def test_a_task_has_one_gpu() -> None:
    assert ClusterConfig(kind="slurm", gpus_per_node=4, nodes=3).world_size == 12
    with pytest.raises(ValueError, match="a task has one GPU"):
        ClusterConfig(kind="slurm", gpus_per_node=4, steps={1: {"tasks_per_node": 2}})
    with pytest.raises(ConfigError, match="this one machine"):
        scheduler_of("local").check(ClusterConfig(kind="local", nodes=2))


@pytest.mark.parametrize(
    ("setting", "error"),
    [
        ('partition="gpu\\n touch x #"', "partition: .*should match pattern"),
        ("account=a lab", "account: 'a lab'"),
        ("qos=--wrap=id", "qos: '--wrap=id'"),
        ('constraint="a100\'; id"', "constraint: "),
        ('extra={comment: "a\\nb"}', "extra.comment: "),
        ("extra={comment: 'a\\b'}", "extra.comment: "),
        ('extra={"bad key;x": 1}', "extra.bad key;x: "),
        ("extra={Exclude: x}", "extra.Exclude: "),
        ("extra={wrap: id}", "wrap: avcil sets this option itself"),
        ("extra={job_name: x}", "job_name: avcil sets this option itself"),
        ("extra={time: 5}", "time: avcil sets this option itself; use hours"),
        ("hours=.inf", "hours: inf"),
        ("memory_gb=.nan", "memory_gb: nan"),
    ],
)
def test_each_option_of_a_script_has_a_pattern(setting: str, error: str) -> None:
    with pytest.raises(ConfigError, match=f"command line: .*{error}") as caught:
        load_cluster("slurm", [setting])
    assert "\n" not in str(caught.value)


def test_usual_options_are_accepted() -> None:
    settings = ["partition=gpu,long", "account=lab+x@site", "constraint='[rack1*2&rack2]|a100'", "qos=normal"]
    cluster = load_cluster(
        "slurm", [*settings, "extra={exclude: 'n[1-3]', gres: 'gpu:a100:4', comment: \"it's é\", exclusive: false}"]
    )
    parameters = sbatch_parameters(cluster, 0, name="x", code=None, prefix="x", python="python", dependency=None)
    options = sbatch_options(parameters)
    assert options["constraint"] == "[rack1*2&rack2]|a100"
    assert options["comment"] == "it's é"
    assert options["requeue"] == ""
    assert "exclusive" not in options
    text = sbatch_text(parameters, folder="/x", command="true")
    assert "#SBATCH --comment='it'\"'\"'s é'\n" in text
    assert "exclusive" not in text


@pytest.mark.parametrize("settings", [["hours=0.04"], ["steps={3: {hours: 0.04}}"], ["signal_seconds=20000"]])
def test_a_time_limit_must_be_longer_than_warning_and_start(settings: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"a job is warned signal_seconds=\d+ s before its limit and needs 30 s"):
        load_cluster("slurm", settings)
    assert load_cluster("slurm", ["hours=0.04", "signal_seconds=113"]).hours == 0.04


@pytest.mark.parametrize("name", ["slurm", "local"])
def test_a_shipped_cluster_is_found_by_name(name: str) -> None:
    assert load_cluster(name, ["hours=2.5", "steps={1: {hours: 5}}"]).at(1).hours == 5
    assert load_cluster(name).kind == name


def test_a_wrong_cluster_file_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"kind": "slurm", "node": 3}))
    with pytest.raises(ConfigError, match=r"mine\.yaml: node: unknown key; did you mean 'nodes'"):
        load_cluster(str(path))
    with pytest.raises(ConfigError, match="there are: local, slurm"):
        load_cluster("lsf")
    with pytest.raises(ConfigError, match="command line: hours: -1"):
        load_cluster("slurm", ["hours=-1"])


def test_settings_of_the_cluster_are_separated_from_those_of_the_stream() -> None:
    words = ["seed=1", "cluster.nodes=2", "data.shard_cache=none"]
    assert split_words(words, "slurm") == (["seed=1", "data.shard_cache=none"], ["nodes=2"])
    with pytest.raises(ConfigError, match=r"cluster\.nodes=2: .* --cluster"):
        split_words(words, None)


def test_the_code_is_copied_once_for_each_state_of_it(tmp_path: Path) -> None:
    root = source_folder()
    assert root is not None
    copy = snapshot_code(tmp_path)
    assert copy is not None
    assert snapshot_folder(tmp_path) == copy == snapshot_code(tmp_path)
    for name in ("launch/cluster/rank_entry.py", "avcil_dist/world.py", "configs/cluster/slurm.yaml"):
        assert (copy / name).read_bytes() == (root / name).read_bytes()
    assert not (copy / "tests").exists()
    assert [path.name for path in tmp_path.iterdir()] == [copy.name]


def test_without_slurm_the_error_names_the_local_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SchedulerError, match="--cluster local"):
        require_slurm()
