"""Retries: which failures are transient, how long they are retried, and how they are reported."""

import errno
from collections.abc import Callable

import pytest

from avcil_dist.errors import DataError, StorageError
from avcil_dist.storage import retry
from avcil_dist.storage.retry import ShortReadError, as_fault, is_transient, with_retries

URL = "s3://bucket/x.tar"


class ClientError(Exception):
    """An error of a storage client, with the status of the response."""

    def __init__(self, status: int | None = None, attribute: str = "status_code") -> None:
        super().__init__(f"status {status}")
        if status is not None:
            setattr(self, attribute, status)


ClientError.__module__ = "botocore.exceptions"


class NoCredentialsError(ClientError):
    """The client's error for missing credentials."""


NoCredentialsError.__module__ = "botocore.exceptions"


@pytest.mark.parametrize("attribute", ["status_code", "code"])
@pytest.mark.parametrize(
    ("status", "expected"),
    [(408, True), (429, True), (500, True), (503, True), (400, False), (401, False), (403, False), (404, False)],
)
def test_timeouts_throttling_and_server_errors_are_transient(status: int, expected: bool, attribute: str) -> None:
    assert is_transient(ClientError(status, attribute)) is expected


def test_other_errors_of_a_client_are_transient_and_missing_credentials_are_not() -> None:
    assert is_transient(ClientError())
    assert not is_transient(NoCredentialsError())
    assert not is_transient(ValueError("a bug"))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConnectionResetError(errno.ECONNRESET, "reset"), True),
        (TimeoutError("timed out"), True),
        (OSError(errno.EIO, "input/output error"), True),
        (ShortReadError("short"), True),
        (PermissionError(errno.EACCES, "denied"), False),
        (FileNotFoundError(errno.ENOENT, "missing"), False),
        (IsADirectoryError(errno.EISDIR, "a folder"), False),
        (OSError(errno.ENOSPC, "disk full"), False),
        (OSError(errno.EDQUOT, "quota"), False),
        (OSError(errno.EROFS, "read-only"), False),
        (OSError(errno.EINVAL, "invalid"), False),
    ],
)
def test_errors_of_the_network_are_transient_and_those_of_the_file_are_not(error: OSError, expected: bool) -> None:
    assert is_transient(error) is expected


def failing(*errors: Exception) -> Callable[[], str]:
    """A call that raises these errors, one per call, and then returns."""
    waiting = list(errors)

    def call() -> str:
        if waiting:
            raise waiting.pop(0)
        return "result"

    return call


def test_a_transient_failure_is_retried_and_each_retry_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_WAIT_SECONDS", 0.001)
    retries: list[None] = []
    call = failing(ClientError(503), ShortReadError("short"))
    assert with_retries(call, URL, seconds=5, on_retry=lambda: retries.append(None)) == "result"
    assert len(retries) == 2


def test_a_permanent_failure_is_raised_at_once_as_a_typed_error() -> None:
    retries: list[None] = []
    for error, kind in ((FileNotFoundError("x"), DataError), (PermissionError("x"), StorageError)):
        with pytest.raises(kind, match=f"^{URL}: "):
            with_retries(failing(error), URL, seconds=5, on_retry=lambda: retries.append(None))
    assert retries == []


def test_a_failure_that_lasts_until_the_deadline_names_the_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "LONGEST_WAIT_SECONDS", 0.01)

    def call() -> None:
        raise ClientError(503)

    monkeypatch.setattr(retry, "FIRST_WAIT_SECONDS", 0.001)
    pattern = rf"^{URL}: status 503; \d{{2,}} tries in 0 s failed; check that the storage"
    with pytest.raises(StorageError, match=pattern):
        with_retries(call, URL, seconds=0.4)


def test_a_bug_is_not_disguised_as_a_fault_of_the_storage() -> None:
    assert as_fault(URL, ValueError("a bug")) is None
    with pytest.raises(ValueError, match="a bug"):
        with_retries(failing(ValueError("a bug")), URL, seconds=5)


def test_missing_credentials_name_the_environment_variables() -> None:
    assert "AWS_ACCESS_KEY_ID" in str(as_fault(URL, NoCredentialsError()))
    assert "GOOGLE_APPLICATION_CREDENTIALS" in str(as_fault("gs://b/x", NoCredentialsError()))
