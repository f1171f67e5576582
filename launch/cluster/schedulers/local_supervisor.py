"""Supervisor process of a local chain: it runs one job after the other with submitit's local executor.

Started by `schedulers/local.py` as `python -m launch.cluster.schedulers.local_supervisor STREAM RUN_ID [AFTER ...]`.
SIGTERM ends it; the step that runs writes a snapshot first.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from submitit import LocalExecutor, LocalJob

from avcil_dist.streams.stream import next_step
from avcil_dist.system.process_start import end_with_parent
from avcil_dist.system.standard_error import keep_standard_error
from avcil_dist.system.trusted_files import make_private_folder
from avcil_dist.training.device import VISIBLE, gpu_facts
from launch.cluster.chain_record import read_own_chain, write_chain
from launch.cluster.lanes import gpu_assignment, visible_gpus
from launch.cluster.mark_failed import fail_stream
from launch.cluster.rank_entry import RankEntry
from launch.cluster.schedulers.local import POLL_SECONDS, is_supervised, supervising
from launch.local_worlds import reserved_port
from launch.step_run import StepRun


class _Executor(LocalExecutor):
    """submitit's local executor with the program of a rank that both schedulers start, and a job's GPUs by name.

    submitit itself numbers the GPUs from 0, and hides them all from a job that requests none. Its controller, the
    parent of the ranks, would survive this process.
    """

    num_gpus = 0

    @property
    def _submitit_command_str(self) -> str:
        gpus = visible_gpus(gpu_facts().count, os.environ)
        visible = gpu_assignment(gpus, self.num_gpus, os.environ.get(VISIBLE))
        setting = ["-u", VISIBLE] if visible is None else [f"{VISIBLE}={visible}"]
        return shlex.join(["env", *setting, sys.executable, "-u", "-m", "launch.cluster.rank_main", str(self.folder)])

    def _submit_command(self, command: str) -> LocalJob[Any]:
        """Start submitit's controller, with the variables that it reads."""
        values = self.parameters
        variables = {
            "SUBMITIT_EXECUTOR": "local",
            "SUBMITIT_LOCAL_COMMAND": command,
            "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
            "SUBMITIT_LOCAL_NODEID": "0",
            "SUBMITIT_LOCAL_NTASKS": str(values["tasks_per_node"]),
            "SUBMITIT_LOCAL_SIGNAL_DELAY_S": str(values["signal_delay_s"]),
            "SUBMITIT_LOCAL_TIMEOUT_S": str(round(60 * values["timeout_min"])),
            "SUBMITIT_LOCAL_WITH_SHELL": "",
            "SUBMITIT_STDERR_TO_STDOUT": "1",
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "submitit.local._local", str(self.folder)],
            env=os.environ | variables,
            preexec_fn=end_with_parent,
        )
        tasks = list(range(values["tasks_per_node"]))
        return LocalJob(folder=self.folder, job_id=str(process.pid), process=process, tasks=tasks)


class Supervisor:
    """Runs a chain's jobs in order, each again until its step is done or has failed for good."""

    def __init__(self, stream: str, run_id: str) -> None:
        self.stream, self.run_id = stream, run_id
        self.chain = read_own_chain(stream)
        self.config, self.cluster = self.chain.config(), self.chain.cluster()
        self.first_step = next_step(stream, self.chain.num_steps)
        self.stop_requested = False

    def run(self, after: Sequence[str]) -> None:
        """Run all steps that are not committed; `after`: the folders of chains to wait for."""
        signal.signal(signal.SIGTERM, self._request_stop)
        waiting = after  # a chain that has ended may be submitted again, and then waits for this one
        while (waiting := [folder for folder in waiting if is_supervised(folder)]) and not self.stop_requested:
            time.sleep(POLL_SECONDS)
        for step in range(self.first_step, self.chain.num_steps):
            if not self._run_step(step):
                return

    def _run_step(self, step: int) -> bool:
        """Run a step's job until the step is done or has failed. Returns whether it is done."""
        done, failed = self.chain.done_file(step), self.chain.failed_file(step)
        for start in range(self.cluster.max_requeues + 1):
            if self.stop_requested:
                return False
            code = self._run_job(step)
            if done.exists() or failed.exists():
                return done.exists()
            sys.stderr.write(f"step {step} is not done (exit code {code}, start {start + 1})\n")
        text = f"step {step} is not done after {self.cluster.max_requeues + 1} starts; see its log"
        fail_stream(self.config, self.chain.folder, step, text)
        return False

    def _run_job(self, step: int) -> int:
        """Run one job with submitit's local executor. Returns its exit code."""
        resources = self.cluster.at(step)
        executor = _Executor(make_private_folder(self.chain.log_folder(step)))
        executor.num_gpus = resources.gpus_per_node or 0
        executor.update_parameters(
            tasks_per_node=resources.tasks,
            timeout_min=resources.hours * 60,
            signal_delay_s=resources.signal_seconds,
        )
        num_steps, progress_file = self.chain.num_steps, self.chain.progress_file(step)
        run = StepRun(self.config, step, num_steps, self.run_id, progress_file)
        with reserved_port() as port:
            job = executor.submit(RankEntry(run, self.chain.folder, self.chain.kind, port))
            self.chain = self.chain.with_job(step, str(job.job_id))
            write_chain(self.stream, self.chain)
            return self._wait(job._process)

    def _wait(self, controller: subprocess.Popen[bytes]) -> int:
        """Wait for the end of a job, and pass a requested stop to it. Returns its exit code."""
        is_stopping = False
        while (code := controller.poll()) is None:
            if self.stop_requested and not is_stopping:
                controller.send_signal(signal.SIGTERM)  # the controller forwards it to the ranks
                is_stopping = True
            time.sleep(POLL_SECONDS)
        return int(code)

    def _request_stop(self, *_: object) -> None:
        self.stop_requested = True


def main(stream: str, run_id: str, *after: str) -> None:
    """Run the chain of a stream; the arguments are those of the command line."""
    keep_standard_error()
    with supervising(read_own_chain(stream).folder):
        Supervisor(stream, run_id).run(after)


if __name__ == "__main__":
    main(*sys.argv[1:])
