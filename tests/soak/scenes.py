"""Scenes of the soak: ways to run a stream, each with the processes that are killed in it."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from avcil_dist.streams.artifact import load_artifact
from avcil_dist.streams.summary import committed_steps
from launch.cluster.chain_record import read_chain
from launch.cluster.schedulers.local import PID, is_supervised
from launch.sandbox.cluster import Sandbox
from tests.end_to_end.test_kills import newest, ranks_of
from tests.helpers import chains
from tests.helpers.mlflow_server import TrackingServer
from tests.helpers.ports import reserve_port
from tests.helpers.sent_events import check_sent
from tests.helpers.streams import weights_digest, write_config

PROJECT = Path(__file__).parents[2]
SECONDS = 300.0  # for any one wait, on a machine that does other things too
STEPS = (0, 1)
# Small steps of many iterations, so that a kill may come at any of them.
LONG = {
    "scenario": {"classes_per_step": 3},
    "optim": {"epochs": 40, "global_batch": 12, "global_replay_batch": 6, "global_eval_batch": 18, "lr": 0.003},
    "snapshot": {"every_iterations": 5},
}


@dataclass
class Soak:
    """State of a soak: its folder, server and random moments, the kills so far, and the faults that were found."""

    folder: Path
    server: TrackingServer
    moment: random.Random
    deadline: float  # on the monotonic clock; no kill after it
    config: Path = field(init=False)
    whole: str = field(init=False)
    kills: Counter[str] = field(default_factory=Counter)
    streams: Counter[str] = field(default_factory=Counter)
    values: int = 0  # of metrics that were compared with the server
    faults: list[str] = field(default_factory=list)
    names: Iterator[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        self.config = write_config(self.folder, **LONG)
        self.whole = self.train("whole", "tracking.register_as=none")

    def words(self, name: str) -> list[str]:
        """The arguments of a stream of this name that is tracked on the server."""
        tracking = [f"tracking.uri={self.server.uri}", "tracking.register_as=none", "tracking.wait_seconds=5"]
        return [str(self.config), f"output={self.folder}/{name}", *tracking]

    def train(self, name: str, *settings: str) -> str:
        """Run a stream to its end. Returns its folder."""
        done = self.avcil("train", str(self.config), f"output={self.folder}/{name}", *settings, "-n", "2")
        if done.returncode:
            raise RuntimeError(f"{name}: not trained: {done.stderr[-2000:]}")
        return f"{self.folder}/{name}/tiny-avcil-seed0"

    def avcil(self, *words: str) -> "subprocess.CompletedProcess[str]":
        """Run the command to its end."""
        return subprocess.run(command(*words), cwd=PROJECT, capture_output=True, text=True, timeout=4 * SECONDS)

    @property
    def is_over(self) -> bool:
        """Whether the time for kills is over."""
        return time.monotonic() > self.deadline

    def killed(self, kind: str, count: int = 1) -> None:
        """Count kills, and show the progress."""
        self.kills[kind] += count
        print(f"{time.strftime('%H:%M:%S')} {sum(self.kills.values())} kills, the last: {kind}", file=sys.stderr)

    def check(self, kind: str, stream: str, *words: str) -> None:
        """Compare an ended stream with the undisturbed one, and the server with the stream, after `avcil sync`."""
        self.streams[kind] += 1
        synced = self.avcil("sync", stream, *words)
        if synced.returncode:
            self.faults.append(f"{stream}: sync: {synced.stderr.strip()[-500:]}")
            return
        try:
            for step in STEPS:
                assert weights_digest(stream, step) == weights_digest(self.whole, step), f"bits of step {step}"
            ours, theirs = (load_artifact(folder, STEPS[-1]) for folder in (stream, self.whole))
            assert (ours.metrics, ours.memory) == (theirs.metrics, theirs.memory), "metrics or memory"
            self.values += check_sent(self.server.uri, stream, Path(stream, "..", "back"))
        except AssertionError as fault:
            self.faults.append(f"{stream}: {fault}")

    def wait(self, condition: Callable[[], bool], what: str) -> bool:
        """Wait for a condition; a wait that does not end is a fault."""
        deadline = time.monotonic() + SECONDS
        while not condition():
            if time.monotonic() > deadline:
                self.faults.append(f"not within {SECONDS:.0f} s: {what}")
                return False
            time.sleep(0.05)
        return True


def command(*words: str) -> list[str]:
    """The command line of `avcil` with these words."""
    return [sys.executable, "-m", "avcil_dist", *words]


def is_done(stream: str) -> bool:
    """Whether all steps of the stream are committed."""
    return committed_steps(stream) == list(STEPS)


def local(soak: Soak, kinds: Sequence[str]) -> None:
    """`avcil train` with two ranks: trainer (rank 0), rank (rank 1), launcher and server are killed."""
    left = list(kinds)
    while left and not soak.is_over:
        name = f"local-{next(soak.names)}"
        stream = f"{soak.folder}/{name}/tiny-avcil-seed0"
        words = command("train", *soak.words(name), "-n", "2")
        while left and not is_done(stream) and not soak.is_over:
            process = subprocess.Popen(
                words,
                cwd=PROJECT,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            while left and process.poll() is None and not soak.is_over:
                if _kill_one(soak, left[-1], process, stream):
                    soak.killed(left.pop())
            errors = process.communicate(timeout=SECONDS)[1]
            if "Traceback" in errors and "SIGKILL" not in errors:
                soak.faults.append(f"{stream}: {errors[-800:]}")
        soak.train(name, *soak.words("")[2:])
        soak.check("train", stream)


def _kill_one(soak: Soak, kind: str, process: "subprocess.Popen[str]", stream: str) -> bool:
    """Kill the victim at a random moment of start-up or training. Returns whether the kill came before the end."""
    before, deadline = newest(Path(stream)), time.monotonic() + SECONDS
    if soak.moment.random() < 0.7:  # else while it starts
        while newest(Path(stream)) == before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
    _pause(soak.moment.uniform(0, 1.5), process)
    if process.poll() is not None:
        return False
    if kind == "server":
        soak.server.kill()
        time.sleep(soak.moment.uniform(0, 2.0))
        soak.server.start()
        return True
    ranks = sorted(ranks_of(psutil.Process(process.pid)), key=lambda rank: rank.pid)
    victims = [psutil.Process(process.pid)] if kind == "launcher" else ranks[:1] if kind == "trainer" else ranks[1:]
    for victim in victims:
        if victim.is_running():
            os.kill(victim.pid, signal.SIGKILL)
    return bool(victims)


def _pause(seconds: float, process: "subprocess.Popen[str]") -> None:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return


def sender(soak: Soak, count: int) -> None:
    """`avcil sync` of a stream whose server was away: the process is killed at random moments."""
    away = [f"tracking.uri=http://127.0.0.1:{reserve_port()}", "tracking.wait_seconds=0.2", "tracking.register_as=none"]
    source = f"{soak.folder}/away/tiny-avcil-seed0"
    if not is_done(source):
        soak.train("away", *away)
    while count and not soak.is_over:
        stream = f"{soak.folder}/sync-{next(soak.names)}/tiny-avcil-seed0"
        shutil.copytree(source, stream)
        identity = Path(stream, "stream.json")
        identity.write_text(json.dumps(json.loads(identity.read_text()) | {"id": uuid.uuid4().hex}))
        words = command("sync", stream, "--uri", soak.server.uri)
        cursor = Path(stream, "events")
        done = False
        while count and not done and not soak.is_over:
            process = subprocess.Popen(words, cwd=PROJECT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
            before = _cursors(cursor)
            if soak.moment.random() < 0.8:  # from the first event on; else while it starts
                soak.wait(lambda: _cursors(cursor) != before or process.poll() is not None, "the sender's first event")  # noqa: B023
            _pause(soak.moment.uniform(0, 0.6), process)
            done = process.poll() is not None
            if not done:
                process.kill()
                process.wait()
                count -= 1
                soak.killed("sender")
        soak.check("sync", stream, "--uri", soak.server.uri)


def _cursors(folder: Path) -> list[str]:
    return [path.read_text() for path in sorted(folder.glob("cursor-*.json"))]


def supervisor(soak: Soak, count: int) -> None:
    """A chain on this machine: its supervisor is killed, and the chain submitted again."""
    while count and not soak.is_over:
        name = f"chain-{next(soak.names)}"
        stream = f"{soak.folder}/{name}/tiny-avcil-seed0"
        words = ["submit", *soak.words(name), "--cluster", "local", "cluster.tasks_per_node=2"]
        while not is_done(stream):
            submitted = soak.avcil(*words)
            if submitted.returncode:
                soak.faults.append(f"{stream}: submit: {submitted.stderr[-500:]}")
                return
            folder, before = read_chain(stream).folder, newest(Path(stream))
            soak.wait(lambda: newest(Path(stream)) != before or not is_supervised(folder), "the chain to train")  # noqa: B023
            time.sleep(soak.moment.uniform(0, 1.5))
            count = 0 if soak.is_over else count
            if count and is_supervised(folder):
                os.kill(int(Path(folder, PID).read_text()), signal.SIGKILL)
                count -= 1
                soak.killed("supervisor")
            elif not count:
                soak.wait(lambda: not is_supervised(folder), "the end of the chain")  # noqa: B023
            soak.wait(lambda: not is_supervised(folder), "the end of the supervisor")  # noqa: B023
        soak.check("local chain", stream)


def slurmd(soak: Soak, sandbox: Sandbox, count: int) -> None:
    """Jobs on two nodes: the daemon of a node's rank is killed; SLURM requeues the job."""
    while count and not soak.is_over:
        name = f"slurm-{next(soak.names)}"
        stream = f"{soak.folder}/{name}/tiny-avcil-seed0"
        nodes = ["cluster.nodes=2", "cluster.cpus_per_task=1", "cluster.max_requeues=50"]
        submitted = soak.avcil("submit", *soak.words(name), "--cluster", "slurm", *nodes)
        if submitted.returncode:
            soak.faults.append(f"{stream}: submit: {submitted.stderr[-500:]}")
            return
        for step in STEPS:
            while count and not soak.is_over and not Path(stream, f"step_{step:03d}", "COMMITTED.json").exists():
                job = chains.job_of(stream, step)
                chains.wait_until_it_trains(stream, step)
                time.sleep(soak.moment.uniform(0, 1.0))
                restarts = chains.restarts(sandbox, job)
                try:
                    chains.kill_daemon_of_node(sandbox, job)
                except (AssertionError, psutil.NoSuchProcess, IndexError):  # the step has just ended
                    break
                count -= 1
                soak.killed("slurmd")
                chains.wait_for_restart(sandbox, job, restarts + 1)
        chains.wait_for_end(stream)
        soak.check("SLURM chain", stream)
