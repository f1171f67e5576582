"""Processes that outlive the command that started them: started, found again, ended, by folder.

A process is known by its id and the time it started, so that an id given anew is never mistaken for it.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from avcil_dist.errors import AvcilError

RECORD = "daemons.json"
POLL_SECONDS = 0.1


class SandboxError(AvcilError):
    """A sandbox that cannot be started here, or did not start."""


class Daemons:
    """The daemons of a sandbox, by name; the record of them is a file in its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.record = folder / RECORD

    def start(self, name: str, command: Sequence[str], environment: dict[str, str]) -> None:
        """Start a daemon in the foreground of a session of its own, unless it runs; its output goes to log/NAME.out."""
        if self.is_running(name):
            return
        with (self.folder / "log" / f"{name}.out").open("ab") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                cwd=self.folder,
                env=os.environ | environment,
            )
        self._write(self._read() | {name: {"pid": process.pid, "started": _started(process.pid)}})

    def is_running(self, name: str) -> bool:
        """Whether the daemon of that name runs."""
        return self.pid(name) is not None

    def pid(self, name: str) -> int | None:
        """The daemon's process, None when it does not run."""
        known = self._read().get(name, {})
        pid, started = known.get("pid"), known.get("started")
        return pid if pid is not None and started is not None and _started(pid) == started else None

    def stop(self, name: str, seconds: float) -> None:
        """End a daemon: asked first, killed after `seconds`."""
        pid = self.pid(name)
        if pid is not None:
            os.kill(pid, signal.SIGTERM)
            if not wait_until(lambda: not self.is_running(name), seconds):
                os.kill(pid, signal.SIGKILL)
                wait_until(lambda: not self.is_running(name), seconds)
        known = self._read()
        if known.pop(name, None) is not None:
            self._write(known)

    def require(self, name: str, is_ready: Callable[[], bool], seconds: float) -> None:
        """Wait until a daemon answers. Raises SandboxError, with its log's last lines, when it ends or stays silent."""
        ready = wait_until(lambda: is_ready() or not self.is_running(name), seconds) and self.is_running(name)
        if not ready:
            logs = [self.folder / "log" / f"{name}.log", self.folder / "log" / f"{name}.out"]
            lines = [line for log in logs if log.is_file() for line in log.read_text().splitlines()[-3:]]
            raise SandboxError(f"{name} did not start: {' / '.join(lines) or 'it said nothing'}; see {logs[0].parent}")

    def _read(self) -> dict[str, dict[str, int | None]]:
        return dict(json.loads(self.record.read_text())) if self.record.exists() else {}

    def _write(self, record: dict[str, dict[str, int | None]]) -> None:
        self.record.write_text(json.dumps(record, indent=1))


def wait_until(is_so: Callable[[], bool], seconds: float) -> bool:
    """Wait for a condition; whether it came true in time."""
    deadline = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def processes_with(*words: str) -> list[int]:
    """The processes whose environment holds all of these words: NAME=VALUE, or NAME= for any value."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            variables = (
                (entry / "environ").read_bytes().decode(errors="replace").split("\0") if entry.name.isdigit() else []
            )
        except OSError:  # it ended, or is another user's
            continue
        names = {variable.partition("=")[0] + "=" for variable in variables}
        if names.union(variables).issuperset(words):
            found.append(int(entry.name))
    return found


def command_of(pid: int) -> str:
    """What a process calls itself, with its words; empty when there is none."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
    except OSError:
        return ""


def _started(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None when there is none, or it is only waited for."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
