"""The `avcil` command in a process of its own, so that its ranks and workers have the current environment."""

import os
import subprocess
import sys
from pathlib import Path

import psutil

PROJECT = Path(__file__).parents[2]


def run_avcil(*words: object) -> "subprocess.CompletedProcess[str]":
    """Run `avcil` with these words to its end."""
    command = [sys.executable, "-m", "avcil_dist", *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, env=environment)


def has_ended(process: int) -> bool:
    """Whether a process has ended; its parent may not have waited for it."""
    try:
        return psutil.Process(process).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
