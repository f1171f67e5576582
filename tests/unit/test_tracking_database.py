"""Creation of sqlite tracking databases: the first of a machine by MLflow, others as copies of an empty one."""

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from avcil_dist.tracking import database
from avcil_dist.tracking.client import connect

pytestmark = pytest.mark.slow  # MLflow creates databases for seconds


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the empty database: that of a user without one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/avcil-dist"


def _dump(path: Path) -> list[str]:
    """The content, without the times and folders of experiments."""
    with closing(sqlite3.connect(path)) as connection:
        return sorted(line for line in connection.iterdump() if 'INSERT INTO "experiments"' not in line)


def _make(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Connect to a new database from a folder; return its experiments' artifact folders."""
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    client = connect(f"sqlite:///{folder}/mlflow.db")
    return [experiment.artifact_location for experiment in client.search_experiments()]


def test_a_copy_equals_what_mlflow_creates(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _make(tmp_path / "first", monkeypatch) == [f"{tmp_path}/first/mlruns/0"]
    (empty,) = cache.glob("mlflow-*.db")

    def refuse(**settings: Any) -> None:
        pytest.fail("the database must be a copy")

    monkeypatch.setattr(database, "MlflowClient", refuse)
    assert _make(tmp_path / "second", monkeypatch) == [f"{tmp_path}/second/mlruns/0"]
    assert _dump(tmp_path / "second/mlflow.db") == _dump(tmp_path / "first/mlflow.db") != []

    empty.chmod(0o666)
    cache.chmod(0o755)  # others may have written it
    with pytest.raises(pytest.fail.Exception, match="must be a copy"):
        _make(tmp_path / "third", monkeypatch)


def test_a_damaged_empty_database_is_made_again(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _make(tmp_path / "first", monkeypatch)
    (empty,) = cache.glob("mlflow-*.db")
    empty.write_bytes(b"x" * 8192)
    assert _make(tmp_path / "second", monkeypatch) == [f"{tmp_path}/second/mlruns/0"]
    assert _dump(empty) == _dump(
        tmp_path / "second/mlflow.db"
    )  # MLflow's own order of constraints is not always the same
    with closing(sqlite3.connect(empty)) as connection:
        assert connection.execute("SELECT count(*) FROM experiments").fetchone() == (0,)
