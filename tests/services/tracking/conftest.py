"""One MLflow server for the session, with its artifacts in a real S3 server."""

from collections.abc import Iterator

import pytest

from tests.helpers.mlflow_server import TrackingServer
from tests.helpers.old_mlflow import old_mlflow_python
from tests.helpers.s3 import BUCKET, S3Server
from tests.services.storage.conftest import ENVIRONMENT, s3_server, use

__all__ = ["s3_server"]


@pytest.fixture(scope="session")
def started(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrackingServer]:
    environment = ENVIRONMENT | {"MLFLOW_S3_ENDPOINT_URL": s3_server.endpoint}
    server = TrackingServer(tmp_path_factory.mktemp("mlflow"), f"s3://{BUCKET}/mlflow", environment)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def server(started: TrackingServer, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> TrackingServer:
    """The server, and an environment that leads to its storage."""
    use(monkeypatch, s3_server.endpoint)
    return started


@pytest.fixture(scope="session")
def old_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrackingServer]:
    """The oldest supported server; its artifacts are in a folder."""
    folder = tmp_path_factory.mktemp("old mlflow")
    server = TrackingServer(folder, f"{folder}/artifacts", {}, python=old_mlflow_python())
    server.start()
    yield server
    server.kill()
