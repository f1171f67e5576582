"""The `avcil` command in a process of its own, so that its ranks and workers have the current environment."""

import os
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).parents[2]


def run_avcil(*words: object) -> "subprocess.CompletedProcess[str]":
    """Run `avcil` with these words to its end."""
    command = [sys.executable, "-m", "avcil_dist", *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, env=environment)
