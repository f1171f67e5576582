"""Daemons that outlive the command which started them: start, look up and end them by the name in a folder.

A process is identified by its id and its start time, since the system reuses ids.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from avcil_dist import storage
from avcil_dist.errors import AvcilError

RECORD = "daemons.json"
POLL_SECONDS = 0.1
REMEDY = "end its processes by hand, and remove the folder of the sandbox"


class SandboxError(AvcilError):
    """A sandbox that cannot be started here, or did not start."""


class Daemons:
    """The daemons of a sandbox by name, recorded in a file of its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.record = folder / RECORD

    def start(self, name: str, command: Sequence[str], environment: dict[str, str]) -> None:
        """Start a daemon in a session of its own, unless it runs already; its output is written to log/NAME.out."""
        if self.is_running(name):
            return
        log = self.folder / "log" / f"{name}.out"
        with storage.writing(log, storage.REFUSED), log.open("ab") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                cwd=self.folder,
                env=environment,
            )
        self._write(self._read() | {name: {"pid": process.pid, "started": _started(process.pid)}})

    def is_running(self, name: str) -> bool:
        """Whether the daemon runs."""
        return self.pid(name) is not None

    def pid(self, name: str) -> int | None:
        """Return the daemon's process id, None when it does not run."""
        recorded = self._read().get(name, {})
        pid, started = recorded.get("pid"), recorded.get("started")
        return pid if pid is not None and started is not None and _started(pid) == started else None

    def stop(self, name: str, seconds: float) -> None:
        """End a daemon with SIGTERM, and after `seconds` with SIGKILL."""
        pid = self.pid(name)
        if pid is not None:
            os.kill(pid, signal.SIGTERM)
            if not wait_until(lambda: not self.is_running(name), seconds):
                os.kill(pid, signal.SIGKILL)
                wait_until(lambda: not self.is_running(name), seconds)
        records = self._read()
        if records.pop(name, None) is not None:
            self._write(records)

    def require(self, name: str, is_ready: Callable[[], bool], seconds: float) -> None:
        """Wait until a daemon is ready. Raises SandboxError with its last log lines when it is not in time."""
        ready = wait_until(lambda: is_ready() or not self.is_running(name), seconds) and self.is_running(name)
        if not ready:
            logs = [self.folder / "log" / f"{name}.log", self.folder / "log" / f"{name}.out"]
            lines = [line for log in logs if log.is_file() for line in log.read_text().splitlines()[-3:]]
            raise SandboxError(f"{name} did not start: {' / '.join(lines) or 'its log is empty'}; see {logs[0].parent}")

    def _read(self) -> dict[str, dict[str, int | None]]:
        if not self.record.exists():
            return {}
        kind = dict[str, dict[str, int | None]]
        return storage.read_json(str(self.record), kind, "a record of daemons", remedy=REMEDY, fault=SandboxError)

    def _write(self, record: dict[str, dict[str, int | None]]) -> None:
        self.record.write_text(json.dumps(record, indent=1))


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait for a condition. Returns whether it became true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def processes_with(*words: str) -> list[int]:
    """Return the processes with all of these variables: NAME=VALUE, or NAME= for any value."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            variables = (
                (entry / "environ").read_bytes().decode(errors="replace").split("\0") if entry.name.isdigit() else []
            )
        except OSError:  # it has ended, or belongs to another user
            continue
        names = {variable.partition("=")[0] + "=" for variable in variables}
        if names.union(variables).issuperset(words):
            found.append(int(entry.name))
    return found


def command_of(pid: int) -> str:
    """Return the command line of a process; empty when there is none."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
    except OSError:
        return ""


def _started(pid: int) -> int | None:
    """Return the start time of a process in clock ticks since boot; None when there is none, or it is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
