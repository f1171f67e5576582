"""Run of tests on the device, each in a process of its own: one that hangs or crashes costs no other its result.

Usage: python -m tests.gpu.run_tests RESULTS.json [--limit SECONDS] [--side-by-side N] TEST...
TEST is a file or a node id of pytest; with `--each` a file stands for each of its tests. The results are rewritten
after each test, and its output is printed when it ends. A test that exceeds its limit is stopped: each of its Python
processes first prints where its threads are. So does a test under way when this process is interrupted.
"""

import argparse
import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil

ROOT = Path(__file__).parents[2]
POLL_SECONDS = 0.2
TRACE_SECONDS = 0.3  # in which a process prints its traces
# The output of the processes of a test goes straight to its log: what pytest captures is lost when it is killed.
PYTEST = ("-m", "pytest", "-q", "--capture=no", "-p", "no:cacheprovider", "--tb=short", "-W", "ignore", "-rsf")


@dataclass
class Running:
    """A test under way: its process group, its output, and its start."""

    test: str
    process: subprocess.Popen[bytes]
    output: IO[bytes]
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return time.monotonic() - self.started

    def text(self) -> str:
        """Return the output so far."""
        self.output.seek(0)
        return self.output.read().decode(errors="replace")


def start(test: str, shared: str) -> Running:
    """Start a test. `shared` is a folder that all tests may use."""
    output = tempfile.TemporaryFile()  # noqa: SIM115 - it is open as long as the test runs
    # Python prints the traces of all threads when it gets SIGABRT.
    environment = os.environ | {"PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1", "GPU_TESTS_SHARED": shared}
    process = subprocess.Popen(
        [sys.executable, *PYTEST, test],
        cwd=ROOT,
        env=environment,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    return Running(test, process, output)


def stop(running: Running) -> None:
    """Print the traces of all processes of a test to its output, and end them: its children first."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(running.process.pid)
        processes = (*reversed(parent.children(recursive=True)), parent)
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                words = " ".join(process.cmdline())[:200]
                os.write(running.output.fileno(), f"\n-- stopping process {process.pid}: {words}\n".encode())
                process.send_signal(signal.SIGABRT)
                time.sleep(TRACE_SECONDS)
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    running.process.wait()


def run_tests(tests: list[str], results: Path, *, limit: float, side_by_side: int) -> dict[str, dict[str, Any]]:
    """Run tests in their order, at most so many at a time; return the end and seconds of each."""
    found: dict[str, dict[str, Any]] = {test: {"ended": "not run", "seconds": 0.0} for test in tests}
    waiting, running = list(tests), list[Running]()

    def finish(one: Running, ended: str) -> None:
        running.remove(one)
        found[one.test] = {"ended": ended, "seconds": round(one.seconds, 1)}
        results.write_text(json.dumps(found, indent=1))
        print(f"\n==== {ended}: {one.test}, {one.seconds:.1f} s\n{one.text()}", flush=True)
        one.output.close()

    with tempfile.TemporaryDirectory() as shared:
        try:
            while waiting or running:
                while waiting and len(running) < side_by_side:
                    running.append(start(waiting.pop(0), shared))
                time.sleep(POLL_SECONDS)
                for one in list(running):
                    if (code := one.process.poll()) is not None:
                        finish(one, {0: "passed", 5: "no tests"}.get(code, "failed"))
                    elif one.seconds > limit:
                        stop(one)
                        finish(one, f"stopped after {limit:.0f} s")
        finally:
            for one in list(running):
                stop(one)
                finish(one, "interrupted")
    return found


def tests_of(file: str) -> list[str]:
    """Return the node ids of a file's tests, in its order."""
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", file]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found = [line for line in done.stdout.splitlines() if line.startswith(f"{file}::")]
    if not found:
        raise SystemExit(f"no tests in {file}:\n{done.stdout}{done.stderr}")
    return found


def main() -> int:
    """Run the tests of the command line; return 0 if all passed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("results", type=Path)
    parser.add_argument("tests", nargs="+")
    parser.add_argument("--each", action="store_true")
    parser.add_argument("--limit", type=float, default=100.0)
    parser.add_argument("--side-by-side", type=int, default=1)
    given = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # SIGABRT would leave files of gigabytes
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    tests = [test for file in given.tests for test in tests_of(file)] if given.each else given.tests
    try:
        found = run_tests(tests, given.results, limit=given.limit, side_by_side=given.side_by_side)
    except KeyboardInterrupt:
        return 130
    return int(any(result["ended"] != "passed" for result in found.values()))


if __name__ == "__main__":
    sys.exit(main())
