"""Version of the sources: the commit of a checkout."""

import subprocess
from pathlib import Path

import pytest

from avcil_dist.system.source_version import VERSION_FILE, source_version

pytestmark = pytest.mark.slow  # starts git


def test_a_checkout_has_its_commit_and_a_mark_for_changed_files(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        identity = "-c", "user.name=a", "-c", "user.email=a@example.org"
        return subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *words], check=True, capture_output=True, text=True
        ).stdout.strip()

    assert source_version(tmp_path) == ""
    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-q", "-m", "first")
    assert source_version(tmp_path) == git("rev-parse", "--short=12", "HEAD")
    (tmp_path / "file").write_text("2")
    assert source_version(tmp_path) == git("rev-parse", "--short=12", "HEAD") + "-dirty"


def test_without_git_a_checkout_has_no_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".git").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert source_version(tmp_path) == ""


def test_a_copy_of_a_checkout_has_the_version_that_its_file_states(tmp_path: Path) -> None:
    assert source_version(tmp_path) == ""
    (tmp_path / VERSION_FILE).write_text("0123456789ab-dirty\n")
    assert source_version(tmp_path) == "0123456789ab-dirty"
