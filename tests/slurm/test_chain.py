"""A stream as SLURM jobs over two nodes: through every disturbance, the bits of the local run."""

from pathlib import Path

from launch.sandbox.cluster import Sandbox
from tests.slurm.chains import (
    job_of,
    kill_daemon_of_node,
    wait_for_end,
    wait_for_restart,
    wait_until_it_trains,
)
from tests.streams import avcil, last_artifact, train, weights_digest, write_config

TWO_NODES = ("--cluster", "slurm", "cluster.nodes=2", "cluster.cpus_per_task=1")


def submit(config: Path, *words: object) -> str:
    """Submit a stream; its folder."""
    result = avcil("submit", config, *TWO_NODES, *words)
    assert result.exit_code == 0, result.output
    return result.output.splitlines()[-1].split(":")[0]


def high_priority_job(sandbox: Sandbox) -> None:
    """A job that takes both nodes, for a moment."""
    words = ("--partition=high", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=4", "--output=/dev/null")
    sandbox.run("sbatch", *words, "--wrap=sleep 1")


def test_a_disturbed_chain_ends_with_the_bits_of_the_local_run(sandbox: Sandbox, tmp_path: Path) -> None:
    optim = {"epochs": 60, "batch": 12, "replay_batch": 6, "eval_batch": 16, "lr": 0.0005}
    config = write_config(tmp_path, optim=optim, snapshot={"iterations": 20})
    whole = train(config, f"output={tmp_path}/local", "-n", 2)

    stream = submit(config, "cluster.hours=0.02", "cluster.signal_seconds=15")
    jobs = [job_of(stream, step) for step in range(3)]
    sandbox.run("scontrol", "update", f"job={jobs[0]}", "TimeLimit=30")  # it is the last step that runs out of time
    sandbox.run("scontrol", "update", f"job={jobs[1]}", "Partition=nowarn", "TimeLimit=30")
    assert "waits or runs already" in avcil("submit", config, *TWO_NODES).output

    wait_until_it_trains(stream, 0)
    high_priority_job(sandbox)  # preemption with a warning
    wait_for_restart(sandbox, jobs[0], 1)
    wait_until_it_trains(stream, 0)
    sandbox.run("scancel", "--signal=USR2", jobs[0])
    wait_for_restart(sandbox, jobs[0], 2)

    wait_until_it_trains(stream, 1)
    high_priority_job(sandbox)  # preemption without a warning
    wait_for_restart(sandbox, jobs[1], 1)
    wait_until_it_trains(stream, 1)
    kill_daemon_of_node(jobs[1])
    wait_for_restart(sandbox, jobs[1], 2)
    wait_until_it_trains(stream, 1)
    sandbox.run("scontrol", "requeue", jobs[1])

    steps = wait_for_end(stream)
    assert [step.state for step in steps] == ["COMMITTED"] * 3
    assert [job_of(stream, step) for step in range(3)] == jobs  # nothing was doubled
    assert weights_digest(stream) == weights_digest(whole)
    assert last_artifact(stream).metrics == last_artifact(whole).metrics
    assert "all steps are committed" in avcil("submit", config, *TWO_NODES).output
