"""Mutation testing: small faults are put into the code, one at a time; a fault is caught if a test fails.

    python -m tests.mutants FILE... [--tests TEST...] [--marks MARKS] [--sample N] [--seed N] [--timeout SECONDS]

Each mutant is written into a temporary copy of the repository; the working tree stays as it is. Only one test run is
active at a time: a fork of this process, which has imported the third-party packages beforehand. Without `--tests`,
`TESTS` names the test files of a source file. The sample depends only on the seed and the text of the file. The last
lines are the table of CONTRIBUTING.md. Mutants that do not change the behaviour are listed in `EQUIVALENT` by hand.
"""

import argparse
import contextlib
import gc
import importlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mutants.changes import mutants_of
from tests.mutants.tables import TESTS, is_equivalent

ROOT = Path(__file__).resolve().parents[2]


def run_forked(work: Callable[[], int], log: Path, timeout: float) -> int | None:
    """Run `work` in a fork, its output in `log`; return its exit status, or None after `timeout` seconds."""
    child = os.fork()
    if not child:
        os.setpgid(0, 0)
        with log.open("w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        with contextlib.suppress(BaseException):
            os._exit(work())
        os._exit(99)
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def run_tests(copy: Path, marks: str, tests: list[str], is_baseline: bool = False) -> int:
    """Run the fast tests of a copy of the repository. Without the mutant, also list the modules that they load."""
    sys.dont_write_bytecode = not is_baseline
    os.chdir(copy)
    sys.path[:] = [str(copy), *(folder for folder in sys.path if folder not in ("", str(ROOT)))]
    for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
        del sys.modules[name]
    code = int(pytest.main(["-x", "-q", "-m", marks, "-p", "no:cacheprovider", *tests]))
    if is_baseline:
        files = {name: getattr(module, "__file__", None) or "" for name, module in list(sys.modules.items())}
        (copy / "modules").write_text("\n".join(name for name, file in files.items() if "site-packages" in file))
    return code


def run_file(file: str, tests: list[str], copy: Path, options: argparse.Namespace) -> Counter[str]:
    """Run the sampled mutants of a file; return how many were caught, and how many not."""
    path, log = copy / file, copy / "log"
    source = (ROOT / file).read_text()
    lines = source.splitlines()
    if run_forked(lambda: run_tests(copy, options.marks, tests, True), log, 600) != 0:
        sys.exit(f"{file}: the tests fail without a mutant\n{log.read_text()[-3000:]}")
    for name in (copy / "modules").read_text().split():
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    for cached in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
        cached.unlink()  # two mutants of equal size within a second would be taken for the same
    gc.freeze()  # a collection in a fork would visit, and so copy, all that it shares with this process
    candidates = mutants_of(source)
    sample = random.Random(f"{options.seed}:{file}").sample(candidates, min(options.sample, len(candidates)))
    count = Counter[str]()
    for mutant in sorted(sample, key=lambda mutant: mutant.line):
        verdict = "equivalent"
        if not is_equivalent(file, lines[mutant.line - 1], mutant.change):
            path.write_text(mutant.text)
            code = run_forked(lambda: run_tests(copy, options.marks, tests), log, options.timeout)
            verdict = "survived" if code == 0 else "caught" if code else "timeout"
        count[verdict] += 1
        print(f"{verdict:10} {file}:{mutant.line}: {mutant.change}", flush=True)
    path.write_text(source)
    return count


def main() -> None:
    """Run the mutants of the files named on the command line, and print the table."""
    parser = argparse.ArgumentParser(prog="tests.mutants")
    parser.add_argument("files", nargs="+")
    parser.add_argument("--tests", nargs="+")
    parser.add_argument("--marks", default="fast")
    parser.add_argument("--sample", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=180)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__"))
        for file in options.files:
            count = run_file(file, options.tests or TESTS[file], copy, options)
            num_different = count.total() - count["equivalent"]
            num_caught = count["caught"] + count["timeout"]
            rows.append((file, count.total(), num_caught, count["equivalent"], f"{num_caught / num_different:.0%}"))
    print("| file | mutants | caught | equivalent | share caught |\n| --- | ---: | ---: | ---: | ---: |")
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")


if __name__ == "__main__":
    main()
