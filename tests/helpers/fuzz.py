"""Fuzz run: damaged inputs of each kind in this process, of bounded memory. Started by `tests/unit/test_fuzz.py`.

`python -m tests.helpers.fuzz FOLDER COUNT KIND…` writes `FOLDER/KIND.json`: the inputs tried and accepted, and the
failures. A failure is an exception that is no AvcilError, a message of several lines, more than 10 s, more memory
than the limit, or a file changed, a process or a connection opened outside the input's own folder.
"""

import json
import os
import resource
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings

from avcil_dist.errors import AvcilError
from tests.helpers.fuzz_kinds import Csv, Kind, Lists, Manifests, Npy, Tars, Yaml
from tests.helpers.fuzz_streams import Artifacts, Records, Snapshots, Weights

KINDS: dict[str, type[Kind]] = {
    "csv": Csv,
    "yaml": Yaml,
    "manifests": Manifests,
    "tars": Tars,
    "npy": Npy,
    "lists": Lists,
    "records": Records,
    "artifacts": Artifacts,
    "snapshots": Snapshots,
    "weights": Weights,
}

SECONDS = 10
MEGABYTES = 1500  # beyond what the process has before the first input
MAX_MESSAGE = 2000
MAX_FAILURES = 5
PROCESSES = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect")
CHANGES = (
    *("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"),
    "shutil.rmtree",
)
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Hang(BaseException):
    """An input that took longer than SECONDS."""


class Watch:
    """Audit of what the code does: files opened for writing, removed or renamed, processes, connections."""

    def __init__(self) -> None:
        self.allowed: tuple[str, ...] = ()
        self.found: list[str] = []
        sys.addaudithook(self._see)

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.allowed:
            return
        if event in PROCESSES:
            self.found.append(f"{event} {arguments}"[:300])
        elif event in CHANGES or (event == "open" and arguments[2] & WRITES):
            self._check(event, arguments[0])

    def _check(self, event: str, path: Any) -> None:
        if isinstance(path, int):
            return
        real = os.path.realpath(os.fsdecode(path))
        if not real.startswith(self.allowed):
            self.found.append(f"{event} {real}")


def on_alarm(number: int, frame: FrameType | None) -> None:
    raise Hang


def try_input(kind: Kind, folder: Path, value: Any, watch: Watch) -> str | None:
    """Run one input. Returns "accepted", None for an AvcilError, or a description of the failure."""
    watch.found.clear()
    watch.allowed = (str(folder), "/dev/null", "/dev/shm")
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        kind.run(folder, value)
        outcome: str | None = "accepted"
    except AvcilError as error:
        text = str(error)
        outcome = None if len(text.splitlines()) == 1 and len(text) < MAX_MESSAGE else f"message: {text[:300]!r}"
    except (Exception, Hang):
        outcome = traceback.format_exc()[-1500:]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        watch.allowed = ()
    return f"outside: {watch.found}" if watch.found else outcome


def fuzz(name: str, folder: Path, count: int, watch: Watch) -> dict[str, Any]:
    """Try `count` inputs of a kind. Equal failures are counted once."""
    kind = KINDS[name]()
    work = folder / name
    work.mkdir()
    kind.prepare(work)
    tried, accepted, failures = 0, 0, dict[str, str]()
    last = folder / f"{name}.last"

    @settings(
        max_examples=count,
        database=None,
        derandomize=True,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(kind.values)
    def run(value: Any) -> None:
        nonlocal tried, accepted
        last.write_text(repr(value)[:20_000], errors="replace")  # of an input that ends this process
        tried += 1
        outcome = try_input(kind, work, value, watch)
        accepted += outcome == "accepted"
        if outcome not in (None, "accepted") and len(failures) < MAX_FAILURES:
            failures.setdefault(outcome.strip().splitlines()[-1][:200], f"{outcome}\ninput: {repr(value)[:1500]}")

    run()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    return {"tried": tried, "accepted": accepted, "failures": list(failures.values()), "peak_megabytes": peak}


def main(folder: Path, count: int, names: list[str]) -> None:
    watch = Watch()
    signal.signal(signal.SIGALRM, on_alarm)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = used + (MEGABYTES << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for name in names:
        result = fuzz(name, folder, count, watch)
        (folder / f"{name}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
