"""Start and end of the server that forks the ranks."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch.fork_server import PRELOADED
from tests.helpers.commands import has_ended

SCRIPT = """\
import os, signal, sys, threading, time
from multiprocessing import forkserver
from avcil_dist.system.process_start import await_fork_server
from launch.fork_server import start_early
start_early()
print(forkserver._forkserver._forkserver_pid, 'torch' in sys.modules, flush=True)
threading.Timer(0.2, os.killpg, (0, signal.SIGINT)).start()
try:
    await_fork_server("ranks")
finally:
    time.sleep(0.5)  # the server has time for a traceback of its own
"""


@pytest.mark.slow
@pytest.mark.skipif(any(Path("/dev").glob("nvidia[0-9]*")), reason="ranks on a GPU are not forked")
def test_the_server_starts_before_torch_is_imported_and_ends_with_the_command_at_an_interrupt() -> None:
    command = [sys.executable, "-c", SCRIPT]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, start_new_session=True)
    server, has_torch = ended.stdout.split()  # complete: the server does not hold it open
    assert has_torch == "False"
    assert ended.returncode == -signal.SIGINT
    assert ended.stderr.count("KeyboardInterrupt") == 1  # of the command alone
    assert has_ended(int(server))


def test_what_mlflow_reads_is_set_before_any_package_can_import_it() -> None:
    assert PRELOADED[0] == "avcil_dist.tracking"
