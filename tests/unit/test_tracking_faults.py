"""Faults of tracking servers, as the client meets them: what may pass, what costs one value, what ends the delivery."""

import contextlib
import http.server
import socket
import threading
import time

import pytest
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import (
    INTERNAL_ERROR,
    INVALID_PARAMETER_VALUE,
    PERMISSION_DENIED,
    RESOURCE_DOES_NOT_EXIST,
    TEMPORARILY_UNAVAILABLE,
)

from avcil_dist.errors import TrackingError
from avcil_dist.tracking import answers, environment
from avcil_dist.tracking.batches import BatchWriter
from avcil_dist.tracking.client import find_stream
from avcil_dist.tracking.faults import bounded, delivery_error, transfer_seconds
from avcil_dist.tracking.outcomes import RefusedError, RejectedError, RunDeletedError, UnavailableError
from tests.helpers.faulty_proxy import FaultyProxy


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MlflowException("no", INVALID_PARAMETER_VALUE), RejectedError),
        (MlflowException("no run", RESOURCE_DOES_NOT_EXIST), RejectedError),
        (MlflowException("busy", TEMPORARILY_UNAVAILABLE), UnavailableError),
        (MlflowException("API request failed with error code 502 != 200.", INTERNAL_ERROR), UnavailableError),
        (MlflowException("API request failed with error code 413 != 200.", INTERNAL_ERROR), RejectedError),
        (MlflowException("API request failed with error code 405 != 200.", INTERNAL_ERROR), RefusedError),
        (MlflowException("no", PERMISSION_DENIED), RefusedError),
        (MlflowException("Detected out-of-date database schema (found version 1)"), RefusedError),
        (MlflowException("SSLError(1, '[SSL: CERTIFICATE_VERIFY_FAILED] self-signed')"), RefusedError),
        (MlflowException("Failed to establish a new connection: [Errno 111]"), UnavailableError),
        (ConnectionRefusedError("refused"), UnavailableError),
        (TimeoutError("late"), UnavailableError),
    ],
)
def test_a_fault_that_may_pass_is_told_from_one_that_will_not(error: Exception, kind: type[Exception]) -> None:
    assert type(delivery_error(error)) is kind


@pytest.mark.parametrize(
    ("status", "message"),
    [
        ("401", r"permission denied .*; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or"),
        ("403", r"permission denied"),
        ("404", r"no MLflow server answers there, or one before 2\.7 .*; correct tracking\.uri\)$"),
        ("501", r"no MLflow server answers there"),
        ("200", r"no MLflow server answers there"),  # a page of another program
        ("503", r"tracking failed \(.*503.*\); start the server or correct tracking\.uri$"),
        ("429", r"tracking failed \(.*429.*\); start the server or correct tracking\.uri$"),
        ("hang", r"no complete answer within 1 s"),
    ],
)
def test_an_answer_becomes_one_line_that_states_what_to_do(
    status: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "REQUEST_SECONDS", 1.0 if status == "hang" else 20.0)
    with FaultyProxy(0, lambda method, path: status) as proxy:
        begun = time.monotonic()
        with pytest.raises(TrackingError, match=message) as failed:
            find_stream(proxy.uri, "anything")
        assert time.monotonic() - begun < 10
        assert proxy.faults == 1  # nothing is tried twice
    assert "\n" not in str(failed.value)


def test_a_server_that_takes_connections_and_says_nothing_ends_in_the_stated_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(environment, "REQUEST_SECONDS", 1.0)
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(TrackingError, match=r"no complete answer within 1 s"),
    ):
        find_stream(f"http://127.0.0.1:{silent.getsockname()[1]}", "anything")


def test_a_web_server_that_is_no_mlflow_server_is_named_as_such() -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(TrackingError, match=r"no MLflow server answers there"):
            find_stream(f"http://127.0.0.1:{server.server_address[1]}", "anything")
        server.shutdown()


def test_a_call_is_bounded_checked_and_its_error_is_raised() -> None:
    assert bounded(lambda: 3, 10) == 3
    with pytest.raises(KeyError, match="own"):
        bounded(lambda: {}["own"], 10)
    release = threading.Event()
    with pytest.raises(TimeoutError, match=r"no complete answer within 0 s"):
        bounded(release.wait, 0.2)

    def check() -> None:
        raise ValueError("too large")

    with pytest.raises(ValueError, match="too large"):
        bounded(release.wait, 30, check)
    release.set()
    assert transfer_seconds(0) == 60
    assert transfer_seconds(16 << 20) == 60 + 1024


class LimitedServer:
    """A client of a server that takes values up to a length, and no key `bad`; it counts its calls."""

    def __init__(self, limit: int, *, names_limit: bool) -> None:
        self.limit, self.names_limit, self.calls = limit, names_limit, 0
        self.taken: dict[str, object] = {}

    def log_batch(self, run_id: str, *, synchronous: bool, **values: list[Param | RunTag | Metric]) -> None:
        assert synchronous
        self.calls += 1
        [some] = values.values()
        for value in some:
            if value.key == "bad":
                raise MlflowException("Invalid name: 'bad'", INVALID_PARAMETER_VALUE)
            if isinstance(value.value, str) and len(value.value) > self.limit:
                text = f" had length {len(value.value)}, which exceeded length limit of {self.limit}"
                named = f"Param value '{value.value[:250]}'{text}"
                raise MlflowException(named if self.names_limit else "too long", INVALID_PARAMETER_VALUE)
        self.taken |= {value.key: value.value for value in some}


def nothing() -> None:
    """Accept the run."""


@pytest.mark.parametrize(("limit", "names_limit"), [(500, True), (333, True), (500, False), (250, False)])
@pytest.mark.parametrize("kind", [Param, RunTag])
def test_a_text_is_cut_to_the_limit_that_the_refusal_names(
    limit: int, names_limit: bool, kind: type, caplog: pytest.LogCaptureFixture
) -> None:
    server = LimitedServer(limit, names_limit=names_limit)
    writer = BatchWriter(server, "http://server", nothing)  # type: ignore[arg-type]
    values = [kind(f"key{number}", "limit of 7" * (100 if number in (3, 40, 77) else 1)) for number in range(80)]
    (writer.params if kind is Param else writer.tags)("run", [*values, kind("bad", "x")])
    assert set(server.taken) == {value.key for value in values}
    assert {len(str(server.taken[f"key{number}"])) for number in (3, 40, 77)} == {limit}
    assert server.taken["key4"] == "limit of 7"
    assert caplog.text.count("refuses the value of bad") == 1
    if names_limit:
        calls = server.calls
        (writer.params if kind is Param else writer.tags)("run", values)
        assert server.calls == calls + 1  # the limit is known


def test_a_value_that_is_taken_in_no_length_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    server = LimitedServer(10, names_limit=False)
    BatchWriter(server, "http://server", nothing).params("run", [Param("a", "x" * 900), Param("b", "x")])  # type: ignore[arg-type]
    assert server.taken == {"b": "x"}
    assert caplog.text.count("refuses the value of a") == 1


def test_a_bad_metric_costs_itself_in_few_calls(caplog: pytest.LogCaptureFixture) -> None:
    server = LimitedServer(10, names_limit=True)
    metrics = [Metric("bad" if number == 700 else f"m{number}", 1.0, 0, 0) for number in range(1500)]
    BatchWriter(server, "http://server", nothing).metrics("run", metrics)  # type: ignore[arg-type]
    assert len(server.taken) == 1499
    assert server.calls < 30
    assert caplog.text.count("refuses the metric bad") == 1


def test_the_refusal_of_a_deleted_run_is_not_taken_for_that_of_values() -> None:
    server = LimitedServer(10, names_limit=True)

    def deleted() -> None:
        raise RunDeletedError

    with pytest.raises(RunDeletedError):
        BatchWriter(server, "http://server", deleted).params("run", [Param("bad", "x")] * 50)  # type: ignore[arg-type]
    assert server.calls == 1


class _Endless(http.server.BaseHTTPRequestHandler):
    """Answers without end; the first request is redirected to it, with a body that is as long."""

    def do_GET(self) -> None:
        is_first = "endless" not in self.path
        self.send_response(302 if is_first else 200)
        if is_first:
            self.send_header("Location", "/endless")
        self.end_headers()
        with contextlib.suppress(OSError):
            while True:
                self.wfile.write(b" " * (1 << 16))

    do_POST = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None: ...


def test_an_answer_without_end_is_not_kept_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "MAX_ANSWER_BYTES", 4 << 20)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Endless) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(TrackingError, match=r"an answer of more than 4 MiB; is this an MLflow server\?"):
            find_stream(f"http://127.0.0.1:{server.server_address[1]}", "anything")
        server.shutdown()
