"""Retries of transient failures of remote storage: exponential backoff with jitter, a deadline and a count.

Permanent failures (no credentials, no bucket, no file, a full disk) are not retried. Every fault is raised as a typed
error of one line that names the remedy.
"""

import errno
import logging
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import tenacity

from avcil_dist.errors import AvcilError, DataError, StorageError
from avcil_dist.text.redaction import redacted

T = TypeVar("T")

FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.1, 10.0
SECONDS_BETWEEN_WARNINGS = 30.0
CLIENTS = ("botocore", "aiobotocore", "aiohttp", "gcsfs", "google", "azure", "requests", "urllib3")
NO_CREDENTIALS = (
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "DefaultCredentialsError",
)
PERMANENT = (PermissionError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
PERMANENT_NUMBERS = (errno.EINVAL, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.ENOSYS, errno.EPERM)
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
ENVIRONMENT = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, away from Amazon, AWS_ENDPOINT_URL",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_CONNECTION_STRING",
}

_logger = logging.getLogger(__name__)
_warned_lock = threading.Lock()
_warned_at = -SECONDS_BETWEEN_WARNINGS


class ShortReadError(OSError):
    """Fewer bytes than requested, of a file that has them: a transient failure."""


def with_retries(call: Callable[[], T], url: str, *, seconds: float, on_retry: Callable[[], None] | None = None) -> T:
    """Return `call()`, retried after transient failures for at most `seconds`.

    Waits are random below a cap that doubles from 0.1 s to 10 s. `on_retry` is called before each retry. Raises
    DataError for a missing file, StorageError for a refused access and for a failure that lasts until the deadline.
    """
    tries = 1

    def before_sleep(state: tenacity.RetryCallState) -> None:
        nonlocal tries
        tries += 1
        if on_retry:
            on_retry()
        if state.outcome is not None:
            _warn(url, state.outcome.exception(), seconds)

    attempts = tenacity.Retrying(
        retry=tenacity.retry_if_exception(is_transient),
        wait=tenacity.wait_random_exponential(multiplier=FIRST_WAIT_SECONDS, max=LONGEST_WAIT_SECONDS),
        stop=tenacity.stop_before_delay(seconds),
        before_sleep=before_sleep,
        reraise=True,
    )
    try:
        return attempts(call)
    except Exception as error:
        if is_transient(error):
            raise StorageError(
                f"{url}: {_text(error)}; {tries} tries in {seconds:.0f} s failed; check that the storage can be "
                "reached, then run the same command again"
            ) from None
        fault = as_fault(url, error)
        if fault is None:
            raise
        raise fault from None


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed a moment later."""
    if isinstance(error, OSError):
        return not isinstance(error, PERMANENT) and error.errno not in PERMANENT_NUMBERS
    status = getattr(error, "status_code", None) or getattr(error, "code", None)
    if isinstance(status, int) and 400 <= status < 500 and status not in (408, 429):
        return False
    return _client(error) in CLIENTS and type(error).__name__ not in NO_CREDENTIALS


def as_fault(url: str, error: Exception) -> AvcilError | None:
    """Return a permanent failure of a storage as a typed error; None for an error of the program."""
    protocol = url.split("://")[0] if "://" in url else "file"
    variables = ENVIRONMENT.get({"gcs": "gs", "abfs": "az"}.get(protocol, protocol))
    advice = f"check the credentials in the environment: {variables}" if variables else "check its permissions"
    if isinstance(error, AvcilError):
        return error
    if isinstance(error, IsADirectoryError):
        return DataError(f"{url}: a folder, not a file")
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        if _code(error) == "NoSuchBucket":
            return missing_bucket(url)
        return DataError(f"{url}: missing")
    if isinstance(error, PermissionError):
        return StorageError(f"{url}: access refused ({_text(error)}); {advice}")
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return cannot_write(url, error)
    if type(error).__name__ in NO_CREDENTIALS:
        return StorageError(f"{url}: no credentials; {advice}")
    if _client(error) in CLIENTS or _code(error):
        return StorageError(f"{url}: {_text(error)}")
    if isinstance(error, OSError):
        return StorageError(f"{url}: {error.strerror or _text(error)}")
    return None


def cannot_write(url: str, error: OSError) -> StorageError:
    """Return the error of a file that cannot be written."""
    if isinstance(error, (NotADirectoryError, FileExistsError)):
        advice = "a part of its path is a file; name another folder"
    elif isinstance(error, PermissionError):
        advice = "check the permissions, or name another folder"
    else:
        advice = "make room, or name another folder"
    return StorageError(f"{url}: cannot be written ({error.strerror or _text(error)}); {advice}")


def missing_bucket(url: str) -> StorageError:
    """Return the error of a url whose bucket does not exist."""
    protocol, _, path = url.partition("://")
    return StorageError(f"{url}: there is no bucket {protocol}://{path.split('/')[0]}; create it, or correct the url")


def _client(error: BaseException) -> str:
    return type(error).__module__.partition(".")[0]


def _code(error: BaseException) -> str:
    """Return the error code of an S3 server, where the client passes it on."""
    response = getattr(error.__cause__, "response", None)
    return str(response["Error"].get("Code", "")) if isinstance(response, dict) and "Error" in response else ""


def _text(error: BaseException | None) -> str:
    """Return the error as one line."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")


def _warn(url: str, error: BaseException | None, seconds: float) -> None:
    """Log at most one warning per 30 s: many reads fail at once when a storage is unreachable."""
    global _warned_at
    with _warned_lock:
        if time.monotonic() - _warned_at < SECONDS_BETWEEN_WARNINGS:
            return
        _warned_at = time.monotonic()
    _logger.warning("%s: %s; retrying for up to %.0f s", redacted(url), redacted(_text(error)), seconds)
