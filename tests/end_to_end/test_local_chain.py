"""The chain of jobs on this machine, by submitit's local executor: it outlives the command, and a killed rank."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from launch.record import read_chain
from launch.supervisor import LOG, PID, is_supervised
from launch.watch import chain_status
from tests.streams import STEPS, avcil, last_artifact, train, weights_digest, write_config


def wait_for(is_so: Callable[[], bool], stream: str) -> None:
    deadline = time.monotonic() + 200
    while not is_so():
        assert time.monotonic() < deadline, Path(read_chain(stream).folder, LOG).read_text()
        time.sleep(0.2)


def progress(stream: str, step: int) -> int:
    note = Path(read_chain(stream).note(step))
    return int(json.loads(note.read_text())["done"]) if note.exists() else 0


def running() -> list[psutil.Process]:
    return [process for process in psutil.process_iter() if process.status() != psutil.STATUS_ZOMBIE]


def submit(config: Path, *words: object) -> str:
    result = avcil("submit", config, "--cluster", "local", *words)
    assert result.exit_code == 0, result.output
    return result.output


def test_a_local_chain_survives_and_ends_with_the_bits_of_the_plain_run(tmp_path: Path) -> None:
    optim = {"epochs": 25, "batch": 12, "replay_batch": 6, "eval_batch": 16, "lr": 0.001}
    config = write_config(tmp_path, optim=optim, snapshot={"iterations": 20})
    whole = train(config, f"output={tmp_path}/plain")

    stream = submit(config).splitlines()[-1].split(":")[0]
    wait_for(lambda: progress(stream, 0) > 0, stream)
    supervisor = int(Path(read_chain(stream).folder, PID).read_text())
    assert os.getsid(supervisor) != os.getsid(0)  # the end of this shell is not the chain's
    assert "waits or runs already" in submit(config)
    assert "RUNNING" in avcil("status", stream).output

    [rank] = [
        child for child in psutil.Process(supervisor).children(recursive=True) if "_submit" in str(child.cmdline())
    ]
    rank.kill()  # as a machine short of memory does
    wait_for(lambda: len(read_chain(stream).jobs.get(0, ())) == 2, stream)  # it begins again
    wait_for(lambda: progress(stream, 1) > 0, stream)
    assert "1 ended" in avcil("cancel", stream).output
    assert not is_supervised(read_chain(stream).folder)
    wait_for(lambda: supervisor not in {process.pid for process in running()}, stream)
    assert chain_status(stream)[1][1].state == "ENDED"

    submit(config)
    wait_for(lambda: not is_supervised(read_chain(stream).folder), stream)
    assert [step.state for step in chain_status(stream)[1]] == ["COMMITTED"] * len(STEPS)
    assert weights_digest(stream) == weights_digest(whole)
    assert last_artifact(stream).metrics == last_artifact(whole).metrics
    log = avcil("logs", stream, "--step", 2).output
    assert "epoch 25/25" in log
    assert "all steps are committed" in submit(config)
