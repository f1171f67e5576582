"""Snapshots in object storage: a stream that was stopped goes on from them to the same bits."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from avcil_dist import storage
from tests.helpers.commands import PROJECT, run_avcil
from tests.helpers.foreign_methods import SLOW_AVCIL
from tests.helpers.streams import weights_digest, write_config

STOPPED = 143
NAME = "tiny-SlowAvcil-seed0"


def test_a_stream_stopped_with_its_snapshots_in_s3_ends_in_the_bits_of_one_that_was_not(
    s3: str, tmp_path: Path
) -> None:
    config = write_config(
        tmp_path,
        method=SLOW_AVCIL,
        optim={"epochs": 20, "global_batch": 12, "global_replay_batch": 6, "global_eval_batch": 18, "lr": 0.003},
        scenario={"classes_per_step": 3},
        snapshot={"every_iterations": 20, "folder": s3},
    )
    words = ["method=avcil", f"output={tmp_path}/whole", "snapshot.folder=null"]
    assert run_avcil("train", config, *words).returncode == 0

    words = [sys.executable, "-m", "avcil_dist", "train", str(config), f"output={tmp_path}/stopped"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, cwd=PROJECT, env=environment, stderr=subprocess.PIPE, text=True)
    folder, deadline = f"{s3}/{NAME}/snapshots/step_000", time.monotonic() + 120
    while not storage.list_folder(folder) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == STOPPED, said
    assert storage.list_folder(f"{s3}/{NAME}/snapshots")

    again = run_avcil("train", config, f"output={tmp_path}/stopped")
    assert again.returncode == 0, again.stderr
    [line] = [line for line in again.stderr.splitlines() if "continues from iteration" in line]
    assert re.search(r"step 0 of 2  continues from iteration [1-9]\d* of \d+$", line)
    for step in (0, 1):
        whole = weights_digest(f"{tmp_path}/whole/tiny-avcil-seed0", step)
        assert weights_digest(f"{tmp_path}/stopped/{NAME}", step) == whole
    assert not storage.list_folder(f"{s3}/{NAME}/snapshots")
