"""A stream whose processes are killed again and again ends with the bits of an undisturbed one."""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from avcil_dist import storage
from avcil_dist.exit_codes import STOPPED
from avcil_dist.streams.artifact import load_artifact
from tests.helpers.streams import train, weights_digest, write_config

ROOT = Path(__file__).parents[2]
NUM_KILLS = 20
# Small steps of many iterations, so that a kill may come at any of them.
LONG = {
    "scenario": {"classes_per_step": 3},
    "optim": {"epochs": 40, "global_batch": 12, "global_replay_batch": 6, "global_eval_batch": 18, "lr": 0.003},
    "snapshot": {"every_iterations": 5},
}


def ranks_of(launcher: psutil.Process) -> list[psutil.Process]:
    """Return the processes of the ranks: children of the launcher's fork server; on a GPU its own, spawned."""
    try:
        commands = {child: " ".join(child.cmdline()) for child in launcher.children()}
        forked = [
            rank
            for child, command in commands.items()
            if "multiprocessing.forkserver" in command
            for rank in child.children()
            if rank.cmdline() == child.cmdline()  # not a program that an import starts
        ]
        return forked + [child for child, command in commands.items() if "multiprocessing.spawn" in command]
    except psutil.NoSuchProcess:
        return []


def newest(stream: Path) -> str:
    """Return the last committed folder of the stream; folders may disappear during the walk."""
    return max((folder for folder, _, files in os.walk(stream) if "COMMITTED.json" in files), default="")


def run_and_kill(command: list[str], stream: Path, kind: str, moment: random.Random) -> int:
    """Run the command and kill the processes that `kind` selects, at a random moment of its start or training."""
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE, text=True)
    launcher, before = psutil.Process(process.pid), newest(stream)
    if moment.random() < 0.8:  # else while it starts
        deadline = time.monotonic() + 120
        while newest(stream) == before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
    time.sleep(moment.uniform(0, 1.5))
    ranks = ranks_of(launcher)
    while kind in ("rank", "all ranks") and len(ranks) < 2 and process.poll() is None:
        time.sleep(0.02)
        ranks = ranks_of(launcher)
    if kind == "launcher":
        victims, number = [launcher], signal.SIGKILL
    elif kind == "stop":
        victims, number = [launcher], signal.SIGTERM
    else:
        victims, number = (ranks if kind == "all ranks" else ranks[-1:]), signal.SIGKILL
    for victim in victims:
        with suppress(psutil.NoSuchProcess):
            victim.send_signal(number)
    errors = process.communicate(timeout=600)[1]
    assert "Traceback" not in errors or kind != "stop", errors
    return process.returncode


@pytest.mark.timeout(3600)  # about 30 starts of two ranks
def test_a_stream_killed_twenty_times_ends_with_the_bits_of_an_undisturbed_one(tmp_path: Path) -> None:
    config = write_config(tmp_path, **LONG)
    whole = train(config, f"output={tmp_path}/whole", "-n", 2)
    moment = random.Random(5)
    kinds = ["rank", "all ranks", "launcher", "stop"] * (NUM_KILLS // 4)
    moment.shuffle(kinds)
    number = 0
    codes: dict[str, list[int]] = {kind: [] for kind in kinds}
    while kinds:
        output = tmp_path / f"killed-{number}"
        stream = output / Path(whole).name
        command = [sys.executable, "-m", "avcil_dist", "train", str(config), f"output={output}", "-n", "2"]
        while kinds and not (stream / "step_001" / "COMMITTED.json").exists():
            kind = kinds.pop()
            codes[kind].append(run_and_kill(command, stream, kind, moment))
        train(config, f"output={output}", "-n", 2)
        for step in (0, 1):
            assert weights_digest(str(stream), step) == weights_digest(whole, step)
        ours, theirs = (load_artifact(str(folder), 1) for folder in (stream, whole))
        assert (ours.metrics, ours.memory) == (theirs.metrics, theirs.memory)
        assert storage.list_folder(str(stream)) == storage.list_folder(whole)
        number += 1
    assert STOPPED in codes["stop"]
    assert -signal.SIGKILL in codes["launcher"]
    assert 2 in codes["rank"]
