"""Ranks do not change their environment once they have threads: libraries read it there, and would crash."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from avcil_dist.streams.summary import committed_steps
from tests.helpers.streams import write_config

PROJECT = Path(__file__).parents[2]
SECONDS = 240
NATIVE = ("gloo", "pt_")  # names of threads of torch's process groups and stores

# In every process of a command: a line for each change of the environment, with what runs beside the main thread.
HOOK = f"""
import os, sys, threading, traceback
from pathlib import Path

def name_of(task):
    try:
        return task.read_text()
    except OSError:  # the thread has ended
        return ""

def record(event, arguments):
    if event not in ("os.putenv", "os.unsetenv"):
        return
    tasks = map(name_of, Path("/proc/self/task").glob("*/comm"))
    others = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
    others += [name.strip() for name in tasks if name.startswith({NATIVE!r})]
    line = f"{{arguments[0].decode()}} beside {{others}}: {{traceback.extract_stack()[:-1]}}" if others else "alone"
    with open(os.environ["CHANGES"], "a") as file:
        file.write(line + "\\n")

sys.addaudithook(record)
"""


TRACKERS = "tracking.trackers=[tensorboard,wandb]"


@pytest.mark.parametrize(
    "words", [["train", "-n", "2"], ["submit", "--cluster", "local", "cluster.tasks_per_node=2", TRACKERS]]
)
def test_the_environment_of_a_rank_changes_only_before_it_has_threads(tmp_path: Path, words: list[str]) -> None:
    """Of ranks that are forked, and of those of a job."""
    command, *options = words
    config = write_config(tmp_path, scenario={"classes_per_step": [6]})
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(HOOK)
    changes = tmp_path / "changes"
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}/hook:{PROJECT}", "CHANGES": str(changes)}
    done = subprocess.run(
        [sys.executable, "-m", "avcil_dist", command, str(config), "optim.epochs=1", *options],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    page = tmp_path / "runs" / "tiny-avcil-seed0" / "report.html"
    deadline = time.monotonic() + SECONDS
    while not page.exists():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert committed_steps(str(page.parent)) == [0]
    lines = changes.read_text().splitlines()
    assert "alone" in lines
    assert [line for line in lines if line != "alone"] == []
