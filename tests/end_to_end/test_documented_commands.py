"""Blocks of the documents that are marked to be run: each document's, in order, in a folder of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.documents import DOCUMENTS, PROJECT, blocks

WITH_RUNS = [document for document in DOCUMENTS if any(block.is_run for block in blocks(document))]


def test_a_document_is_run() -> None:
    assert PROJECT / "docs" / "getting-started.md" in WITH_RUNS


@pytest.mark.parametrize("document", WITH_RUNS, ids=lambda path: path.stem)
def test_marked_commands_run(tmp_path: Path, document: Path) -> None:
    command = tmp_path / "bin" / "avcil"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m avcil_dist "$@"\n')
    command.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(PROJECT),
        "OMP_NUM_THREADS": "1",
    }
    for block in blocks(document):
        if block.is_run:
            assert block.language == "bash"
            script = ["bash", "-euo", "pipefail", "-c", block.text]
            ran = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True)
            assert ran.returncode == 0, f"{block.text}\n{ran.stdout}\n{ran.stderr}"
