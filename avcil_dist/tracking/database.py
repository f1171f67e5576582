"""Creation of a sqlite tracking database: once, by one process, and from a copy of an empty one where there is one.

MLflow creates a database by all migrations of its history, which takes seconds of a processor. An empty database of
the installed version is therefore kept in the user's cache folder.
"""

import glob
import os
import sqlite3
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from pathlib import Path
from tempfile import mkstemp
from typing import Any

import mlflow
from filelock import FileLock
from mlflow import MlflowClient

from avcil_dist.system.trusted_files import is_trusted_file, private_cache
from avcil_dist.tracking.uris import SQLITE, database_path

LOCK_SECONDS = 300


def creation_lock(uri: str) -> AbstractContextManager[Any]:
    """The lock of the process that creates the database of `uri`; none for a server."""
    database = database_path(uri)
    if database is None:
        return nullcontext()
    database.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(f"{database}.lock", timeout=LOCK_SECONDS)


def create_database(uri: str) -> None:
    """Create a sqlite database atomically: MLflow does not repair one that was only partly created."""
    database = database_path(uri)
    if database is None or database.exists():
        return
    for path in database.parent.glob(f"{glob.escape(database.name)}.new*"):
        path.unlink()
    new = Path(f"{database}.new")
    cache = private_cache("MLflow creates the tracking database from nothing")
    empty = cache / f"mlflow-{mlflow.__version__}.db" if cache else None
    if not (empty and is_trusted_file(empty) and _copied(empty, new)):
        new.unlink(missing_ok=True)
        MlflowClient(tracking_uri=f"{SQLITE}{new}").search_experiments(max_results=1)
        if empty:
            _keep_empty(new, empty)
    new.replace(database)


def _keep_empty(database: Path, empty: Path) -> None:
    """Keep a copy of a new database without the default experiment, whose folder is that of this database.

    MLflow adds that experiment to a database that has none.
    """
    with suppress(OSError, sqlite3.Error):  # such as a full disk: the next database is created from nothing too
        handle, copy = mkstemp(suffix=".db", dir=empty.parent)
        os.close(handle)
        try:
            if _copied(database, Path(copy)):
                with closing(sqlite3.connect(copy)) as connection, connection:
                    connection.execute("DELETE FROM experiments")
                Path(copy).replace(empty)
        finally:
            Path(copy).unlink(missing_ok=True)


def _copied(database: Path, copy: Path) -> bool:
    """Copy a database; return whether it could be read and copied whole."""
    try:
        with closing(sqlite3.connect(database)) as source, closing(sqlite3.connect(copy)) as target:
            source.backup(target)
    except sqlite3.Error:
        return False
    return True
