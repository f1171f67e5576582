"""Chain of jobs on this machine with submitit's local executor: it outlives the command and a killed rank."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from avcil_dist.tracking.client import find_stream
from launch.cluster.chain_record import read_chain
from launch.cluster.schedulers.local import LOG, PID, is_supervised
from launch.cluster.status import chain_status
from tests.helpers.commands import PROJECT, has_ended
from tests.helpers.foreign_methods import SLOW_AVCIL
from tests.helpers.ports import reserve_port
from tests.helpers.sent_events import uri_of
from tests.helpers.streams import STEPS, avcil, last_artifact, train, weights_digest, write_config


def wait_for(condition: Callable[[], bool], stream: str) -> None:
    deadline = time.monotonic() + 400
    while not condition():
        assert time.monotonic() < deadline, Path(read_chain(stream).folder, LOG).read_text()
        time.sleep(0.02)


def progress(stream: str, step: int) -> int:
    file = Path(read_chain(stream).progress_file(step))
    return int(json.loads(file.read_text())["done"]) if file.exists() else 0


def submit(config: Path, *words: object) -> str:
    result = avcil("submit", config, "--cluster", "local", *words)
    assert result.exit_code == 0, result.output
    return result.output


def ranks(supervisor: int) -> list[psutil.Process]:
    children = psutil.Process(supervisor).children(recursive=True)
    return [child for child in children if "launch.cluster.rank_main" in child.cmdline()]


def supervisor_of(stream: str) -> int:
    return int(Path(read_chain(stream).folder, PID).read_text())


def test_a_local_chain_survives_and_ends_with_the_bits_of_the_plain_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))  # the jobs import the slow method
    optim = {"epochs": 25, "global_batch": 12, "global_replay_batch": 6, "global_eval_batch": 16, "lr": 0.001}
    config = write_config(tmp_path, method=SLOW_AVCIL, optim=optim, snapshot={"every_iterations": 20})
    whole = train(config, "method=avcil", f"output={tmp_path}/plain")

    away = (f"tracking.uri=http://127.0.0.1:{reserve_port()}", "tracking.wait_seconds=0.5")
    stream = submit(config, *away).splitlines()[-1].split(":")[0]
    wait_for(lambda: progress(stream, 0) > 0, stream)
    supervisor = supervisor_of(stream)
    assert os.getsid(supervisor) != os.getsid(0)  # it does not end with this shell
    assert "waits or runs already" in submit(config, *away)
    shown = avcil("status", stream).output
    assert "RUNNING" in shown
    assert "not all is uploaded" not in shown  # it may be on its way

    [rank] = ranks(supervisor)
    rank.kill()  # as a machine short of memory does
    wait_for(lambda: len(read_chain(stream).jobs.get(0, ())) == 2, stream)  # it is started again
    wait_for(lambda: progress(stream, 1) > 0, stream)
    assert "1 ended" in avcil("cancel", stream).output
    assert not is_supervised(read_chain(stream).folder)
    wait_for(lambda: has_ended(supervisor), stream)
    assert chain_status(stream).steps[1].state == "ENDED"

    submit(config, *away)
    wait_for(lambda: not is_supervised(read_chain(stream).folder), stream)
    assert [step.state for step in chain_status(stream).steps] == ["COMMITTED"] * len(STEPS)
    assert weights_digest(stream) == weights_digest(whole)
    assert last_artifact(stream).metrics == last_artifact(whole).metrics
    log = avcil("logs", stream, "--step", 2).output
    assert "epoch 25/25" in log
    assert "all steps are committed" in submit(config, *away)
    shown = avcil("status", stream).output
    assert "not all is uploaded" in shown
    assert f"avcil sync {stream}" in shown


@pytest.mark.parametrize("is_training", [False, True])
def test_a_rank_ends_with_a_killed_supervisor(tmp_path: Path, is_training: bool) -> None:
    optim = {"epochs": 100_000, "global_batch": 12, "global_replay_batch": 6, "global_eval_batch": 16}
    stream = submit(write_config(tmp_path, optim=optim)).splitlines()[-1].split(":")[0]
    supervisor = supervisor_of(stream)
    if is_training:
        wait_for(lambda: progress(stream, 0) > 0, stream)
    wait_for(lambda: bool(ranks(supervisor)), stream)
    [rank] = ranks(supervisor)
    os.kill(supervisor, signal.SIGKILL)
    wait_for(lambda: has_ended(rank.pid), stream)
    assert not is_supervised(read_chain(stream).folder)


def test_a_step_that_dies_at_each_start_fails_with_its_runs(tmp_path: Path) -> None:
    config = write_config(
        tmp_path, optim={"epochs": 1000, "global_batch": 12, "global_replay_batch": 6, "global_eval_batch": 16}
    )
    stream = submit(config, "cluster.max_requeues=0").splitlines()[-1].split(":")[0]
    wait_for(lambda: progress(stream, 0) > 0, stream)
    [rank] = ranks(supervisor_of(stream))
    rank.kill()
    wait_for(lambda: not is_supervised(read_chain(stream).folder), stream)
    assert "step 0 is not done after 1 starts" in avcil("status", stream).output
    assert avcil("sync", stream).exit_code == 0  # the end of a run waits a few seconds only for a busy machine
    found = find_stream(uri_of(str(tmp_path / "runs")), Path(stream).name)
    assert found.run.info.status == "FAILED"
    assert found.steps[0].info.status == "FAILED"
