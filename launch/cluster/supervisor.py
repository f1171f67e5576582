"""A chain of jobs on one machine: a process that outlives the shell, and runs one job after the other by submitit.

It holds a lock for as long as it lives, so that who asks knows whether it does. SIGTERM ends it: the step that runs
writes a snapshot first. Run as `python -m launch.cluster.supervisor`, by `avcil submit ... --cluster local` alone.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from filelock import FileLock, Timeout
from submitit import LocalExecutor

from avcil_dist.errors import SchedulerError
from avcil_dist.streams.stream import next_step
from launch.cluster.chain_record import DONE, FAILED, Chain, read_chain, write_chain
from launch.cluster.mark_failed import give_up
from launch.cluster.rank_entry import RankEntry
from launch.local import local_worlds
from launch.step_run import StepRun

LOCK, PID, LOG = "supervisor.lock", "supervisor.pid", "supervisor.log"
POLL_SECONDS, START_SECONDS, STOP_SECONDS = 0.2, 60.0, 120.0


def is_supervised(folder: str) -> bool:
    """Whether a supervisor runs the chain of this folder."""
    if not Path(folder, LOCK).exists():
        return False
    try:
        with FileLock(Path(folder, LOCK), timeout=0):
            return False
    except Timeout:
        return True


def start_supervisor(chain: Chain, stream: str, run_id: str, after: str | None, reset_optimizer: bool) -> None:
    """Start it, in a session of its own. Raises SchedulerError when it does not come up.

    `after`: it begins once the chain in that folder has ended. `reset_optimizer`: as of StepRun, of the first step.
    """
    folder = chain.folder
    path = os.pathsep.join(part for part in (chain.code, os.environ.get("PYTHONPATH")) if part)
    words = [
        sys.executable,
        "-u",
        "-m",
        "launch.cluster.supervisor",
        stream,
        run_id,
        after or "",
        str(int(reset_optimizer)),
    ]
    script = "\n".join(["set -e", *chain.cluster().setup, f"exec {shlex.join(words)}"])
    with Path(folder, LOG).open("ab") as log:
        process = subprocess.Popen(
            ["/bin/bash", "-c", script],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=os.environ | {"PYTHONSAFEPATH": "1", "PYTHONPATH": path},
        )
    deadline = time.monotonic() + START_SECONDS
    while not is_supervised(folder):
        if process.poll() is not None or time.monotonic() > deadline:
            raise SchedulerError(f"the chain did not start; see {Path(folder, LOG)}")
        time.sleep(POLL_SECONDS)


def stop_supervisor(folder: str) -> bool:
    """End it and the step that runs; whether there was one. Raises SchedulerError when it does not end."""
    if not is_supervised(folder):
        return False
    os.kill(int(Path(folder, PID).read_text()), signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    while is_supervised(folder):
        if time.monotonic() > deadline:
            raise SchedulerError(f"the chain does not end; see {Path(folder, LOG)}")
        time.sleep(POLL_SECONDS)
    return True


class Supervisor:
    """Runs a chain's jobs in order, each again until it is done or fails for good."""

    def __init__(self, stream: str, run_id: str, reset_optimizer: bool) -> None:
        self.stream, self.run_id, self.reset_optimizer = stream, run_id, reset_optimizer
        self.chain = read_chain(stream)
        self.config, self.cluster = self.chain.config(), self.chain.cluster()
        self.is_asked_to_stop = False

    def run(self, after: str) -> None:
        """Run what is not committed; `after`: once the chain in that folder has ended, if it is given."""
        signal.signal(signal.SIGTERM, self._stop)
        while after and is_supervised(after) and not self.is_asked_to_stop:
            time.sleep(POLL_SECONDS)
        for step in range(next_step(self.stream, self.chain.num_steps), self.chain.num_steps):
            if not self._run_step(step):
                return

    def _run_step(self, step: int) -> bool:
        """Whether the step was done."""
        done, failed = (Path(f"{self.chain.mark(step)}.{ending}") for ending in (DONE, FAILED))
        for start in range(self.cluster.max_requeues + 1):
            if self.is_asked_to_stop:
                return False
            code = self._run_job(step)
            if done.exists() or failed.exists():
                return done.exists()
            print(f"step {step} is not done (exit code {code}, start {start + 1})")
        text = f"step {step} is not done after {self.cluster.max_requeues + 1} starts; its log says more"
        give_up(self.config, self.chain.folder, step, text)
        return False

    def _run_job(self, step: int) -> int:
        """One job, by submitit's local executor; its exit code."""
        found = self.cluster.at(step)
        executor = LocalExecutor(self.chain.logs(step))
        executor.update_parameters(
            tasks_per_node=found.tasks,
            gpus_per_node=found.gpus_per_node,
            timeout_min=found.hours * 60,
            signal_delay_s=found.signal_seconds,
            stderr_to_stdout=True,
        )
        job = StepRun(self.config, step, self.chain.num_steps, self.run_id, self.reset_optimizer, self.chain.note(step))
        self.reset_optimizer = False
        submitted = executor.submit(RankEntry(job, self.chain.folder, local_worlds(found.tasks)[0].master_port))
        self.chain = self.chain.with_job(step, str(submitted.job_id))
        write_chain(self.stream, self.chain)
        controller = submitted._process
        is_told = False
        while (code := controller.poll()) is None:
            if self.is_asked_to_stop and not is_told:
                controller.send_signal(signal.SIGTERM)  # it hands it on to the ranks
                is_told = True
            time.sleep(POLL_SECONDS)
        return int(code)

    def _stop(self, *_: object) -> None:
        self.is_asked_to_stop = True


def main(stream: str, run_id: str, after: str, reset_optimizer: str) -> None:
    """Run the chain of a stream; the words of a command line."""
    folder = Path(read_chain(stream).folder)
    with FileLock(folder / LOCK, timeout=0):
        (folder / PID).write_text(str(os.getpid()))
        Supervisor(stream, run_id, bool(int(reset_optimizer))).run(after)


if __name__ == "__main__":
    main(*sys.argv[1:])
