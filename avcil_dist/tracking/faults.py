"""Faults of tracking servers: which may pass, which cost one value, and which nothing but the user can end.

A call is bounded as a whole: the timeouts of the http client begin anew with each byte.
"""

import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import TypeVar, cast

from filelock import Timeout
from mlflow import MlflowClient
from mlflow.exceptions import InvalidUrlException, MlflowException
from requests import HTTPError, RequestException
from requests.exceptions import InvalidSchema, InvalidURL, MissingSchema
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from avcil_dist.errors import TrackingError
from avcil_dist.storage.local import no_room_for_temporary
from avcil_dist.storage.retry import NO_ROOM
from avcil_dist.text.redaction import redacted
from avcil_dist.tracking import environment
from avcil_dist.tracking.outcomes import RefusedError, RejectedError, UnavailableError

T = TypeVar("T")

FAULTS = (MlflowException, RequestException, SQLAlchemyError, OSError, Timeout)
BYTES_PER_SECOND = 16 << 10  # the slowest transfer of a file that is waited for
CHECK_SECONDS = 0.5
OF_ONE_VALUE = (400, 404, 413, 414, 422)
OF_PERMISSION = (401, 403)
OF_THE_SERVER = (405, 410, 501, 505)  # as from a program that is no MLflow server
TRANSFERS = ("log_artifact", "log_artifacts", "log_text", "download_artifacts")


def bounded(call: Callable[[], T], seconds: float, check: Callable[[], None] = lambda: None) -> T:
    """Return `call()`. Raises TimeoutError after `seconds`; the call is then abandoned in a thread of its own.

    `check` is called while the call runs, and ends the wait by an exception.
    """
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=run, name="tracking call", daemon=True).start()
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        wait([answer], min(left, CHECK_SECONDS))
        if answer.done():
            return answer.result()
        check()
    raise TimeoutError(f"no complete answer within {seconds:.0f} s")


def transfer_seconds(num_bytes: int) -> float:
    """The time in which a file of this size is transferred, in seconds, or the server counts as unavailable."""
    return environment.REQUEST_SECONDS + num_bytes / BYTES_PER_SECOND


class _Bounded:
    """A client whose requests are bounded. The caller of a transfer bounds it by its size."""

    def __init__(self, client: MlflowClient) -> None:
        self._client = client

    def __getattr__(self, name: str) -> object:
        method = getattr(self._client, name)
        if not callable(method) or name in TRANSFERS:
            return method

        def request(*arguments: object, **named: object) -> object:
            return bounded(lambda: method(*arguments, **named), environment.REQUEST_SECONDS)

        return request


def bounded_client(client: MlflowClient) -> MlflowClient:
    """Return a client whose every request ends within REQUEST_SECONDS, also where a server sends byte by byte."""
    return cast(MlflowClient, _Bounded(client))


def delivery_error(error: BaseException) -> Exception:
    """Return the fault of a server, one of FAULTS, as UnavailableError, RejectedError or RefusedError."""
    reason, status = reason_of(error), _status(error)
    if isinstance(error, InvalidUrlException | InvalidURL | InvalidSchema | MissingSchema | ArgumentError):
        return RefusedError(f"not the address of a server ({reason}); correct tracking.uri")
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return RefusedError(f"{reason}; set MLFLOW_TRACKING_SERVER_CERT_PATH to the server's certificates")
    if "out-of-date database schema" in str(error):
        return RefusedError(f"{reason}; run mlflow db upgrade with this database, after a backup")
    if status in OF_PERMISSION:
        return RefusedError(
            f"permission denied ({reason}); set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
            "MLFLOW_TRACKING_TOKEN"
        )
    if status in OF_THE_SERVER or _is_no_mlflow(error):
        return RefusedError(f"no MLflow server answers there, or one before 2.7 ({reason}); correct tracking.uri")
    return RejectedError(reason) if status in OF_ONE_VALUE else UnavailableError(reason)


def _is_no_mlflow(error: BaseException) -> bool:
    """Whether the answer is not that of an MLflow server: no JSON, or an unknown endpoint."""
    if not isinstance(error, MlflowException):
        return False
    return error.error_code == "ENDPOINT_NOT_FOUND" or "not in a valid JSON format" in str(error)


def _status(error: BaseException) -> int:
    """The HTTP status of an answer; 503 for an error without one."""
    if isinstance(error, HTTPError) and error.response is not None:
        return int(error.response.status_code)
    if not isinstance(error, MlflowException):
        return 503
    named = re.search(r"failed with error code (\d{3}) != ", str(error)[:1000])  # MLflow makes 500 of what it lacks
    return int(named[1]) if named else int(error.get_http_status_code())


@contextmanager
def reported(uri: str) -> Iterator[None]:
    """Raise errors of MLflow as a TrackingError of one line without credentials; a full disk here is a StorageError."""
    try:
        yield
    except FAULTS as error:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise no_room_for_temporary(error.filename or tempfile.gettempdir(), error) from None
        fault = delivery_error(error)
        advice = "" if isinstance(fault, RefusedError) else "; start the server or correct tracking.uri"
        raise TrackingError(f"{redacted(uri)}: tracking failed ({fault}){advice}") from None


def reason_of(error: BaseException) -> str:
    """The error in one line, without credentials; the cause where the text names one."""
    text = " ".join(redacted(str(error)).split())
    cause = re.search(r"Caused by (.*)\)$", text)
    text = cause[1] if cause else text or type(error).__name__
    return text if len(text) <= 300 else f"{text[:180]} … {text[-110:]}"  # what was given, and the limit
