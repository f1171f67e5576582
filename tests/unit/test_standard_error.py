"""Lines on a standard error that is full, closed, or a pipe without reader: dropped, without an end of the process."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # every test starts a process
LINES = """
import os, sys, warnings
from avcil_dist.system.standard_error import keep_standard_error
keep_standard_error()
import click
from rich.console import Console
for _ in range(3):
    sys.stderr.write("a line\\n")
    click.echo("a line", err=True)
    Console(stderr=True).print("a line")
    warnings.warn("a warning")
opened = os.open("file", os.O_CREAT | os.O_WRONLY)
sys.stdout.write(f"the end {opened}")
"""


@pytest.mark.parametrize("where", ["2>/dev/full", "2>&-", "0<&- 2>&-", "2> >(true)"])
def test_lines_that_cannot_be_written_are_dropped(tmp_path: Path, where: str) -> None:
    (tmp_path / "lines.py").write_text(LINES)
    words = ["bash", "-c", f'"$1" lines.py {where}', "-", sys.executable]
    root = str(Path(__file__).parents[2])
    run = subprocess.run(words, cwd=tmp_path, env={"PYTHONPATH": root}, capture_output=True, text=True, check=False)
    assert run.returncode == 0
    assert run.stdout.startswith("the end ")
    assert int(run.stdout.split()[-1]) > 2


def test_lines_that_can_be_written_are(tmp_path: Path) -> None:
    (tmp_path / "lines.py").write_text(LINES)
    root = str(Path(__file__).parents[2])
    words = [sys.executable, "lines.py"]
    run = subprocess.run(words, cwd=tmp_path, env={"PYTHONPATH": root}, capture_output=True, text=True, check=False)
    assert run.stderr.count("a line") == 9
