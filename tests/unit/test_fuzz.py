"""Fuzz run: hundreds of damaged files of each kind end in one line, soon, in bounded memory, and touch nothing else."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.fuzz import KINDS, MEGABYTES, SECONDS

COUNT = int(os.environ.get("AVCIL_FUZZ_INPUTS", "520"))  # of each kind
PROJECT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The result of each kind, all tried in one process; a kind that ends the process is the last with an input."""
    folder = tmp_path_factory.mktemp("fuzz")
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tests.helpers.fuzz", str(folder), str(COUNT), *KINDS]
    project = Path(__file__).parents[2]
    run = subprocess.run(
        command, cwd=project, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    found = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    for path in folder.glob("*.last"):
        found.setdefault(path.stem, {"failures": [f"exit {run.returncode}: {run.stderr[-2000:]}\n{path.read_text()}"]})
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_end_in_one_line(kind: str, results: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    result = results[kind]
    assert result["failures"] == []
    with capsys.disabled():
        print(
            f"\nfuzz: {result['tried']} {kind} tried, {result['accepted']} of them accepted; "
            f"each within {SECONDS} s and {MEGABYTES} MB (peak of the process: {result['peak_megabytes']} MB)"
        )
    assert result["tried"] >= min(COUNT, 500)
    assert 0 < result["accepted"] < result["tried"]  # the others were read up to their damage
