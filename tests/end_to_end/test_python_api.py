"""The Python API: the examples of its page, as a user runs them, and a script without a guard of `__main__`."""

import doctest
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.helpers.documents import PROJECT
from tests.helpers.streams import write_config


def test_the_examples_of_the_page_give_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    failed, tried = doctest.testfile(
        str(PROJECT / "docs/python-api.md"),
        module_relative=False,
        globs={"Path": Path},
        optionflags=doctest.IGNORE_EXCEPTION_DETAIL,
    )
    assert tried > 20
    assert not failed


def test_a_script_without_a_guard_trains_and_predicts_features(tmp_path: Path) -> None:
    config = write_config(tmp_path, optim={"epochs": 1, "global_batch": 12, "global_replay_batch": 6})
    script = tmp_path / "mine.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys
            import avcil_dist as avcil
            print("the script runs")
            stream = avcil.train(sys.argv[1], "method=ncm")
            import torch
            print(stream.predict_features(torch.randn(2, 2, 3, 16), torch.randn(2, 16))[1].class_name)
            """
        )
    )
    run = subprocess.run(
        [sys.executable, script, config],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[0] == "the script runs"
    assert lines[1].startswith("class_00")
    assert len(lines) == 2
