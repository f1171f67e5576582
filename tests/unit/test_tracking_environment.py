"""MLflow's environment: what a user means for the way to a server stays, what would change a call does not."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from mlflow import environment_variables

from avcil_dist.tracking.environment import FOREIGN, OURS, isolate, mlflow_environment, quiet_import

KEPT = {
    "MLFLOW_TRACKING_URI": "http://server",
    "MLFLOW_TRACKING_USERNAME": "someone",
    "MLFLOW_TRACKING_PASSWORD": "word",
    "MLFLOW_TRACKING_TOKEN": "token",
    "MLFLOW_TRACKING_SERVER_CERT_PATH": "/certificates",
    "MLFLOW_S3_ENDPOINT_URL": "http://storage",
    "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD": "false",
    "MLFLOW_MULTIPART_UPLOAD_MINIMUM_FILE_SIZE": "6000000",
    "HTTPS_PROXY": "http://proxy",
    "AWS_PROFILE": "lab",
}
REMOVED = (
    "MLFLOW_RUN_ID",
    "MLFLOW_EXPERIMENT_ID",
    "MLFLOW_EXPERIMENT_NAME",
    "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING",
    "MLFLOW_ASYNC_LOGGING_THREADPOOL_SIZE",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR",
    "MLFLOW_TRUNCATE_LONG_VALUES",
    "MLFLOW_ACTIVE_MODEL_ID",
    "_MLFLOW_ACTIVE_MODEL_ID",
    "MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT",
    "MLFLOW_REGISTRY_URI",
)


def test_credentials_storage_and_proxies_stay() -> None:
    assert mlflow_environment(KEPT) == OURS | KEPT


@pytest.mark.parametrize("name", REMOVED)
def test_a_variable_that_changes_a_call_is_removed(name: str) -> None:
    assert name in vars(environment_variables) or name in ("MLFLOW_EXPERIMENT_NAME",)  # MLflow reads it
    assert name not in mlflow_environment({name: "1"})


@pytest.mark.parametrize(
    "name", ["MLFLOW_ENABLE_ASYNC_LOGGING", "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"]
)
def test_a_variable_that_this_package_sets_has_its_value(name: str) -> None:
    assert mlflow_environment({name: "999"})[name] == OURS[name]


def test_the_process_gets_the_environment_and_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ENABLE_ASYNC_LOGGING", "true")
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "token")
    for _ in range(2):
        isolate()
        assert os.environ["MLFLOW_ENABLE_ASYNC_LOGGING"] == "false"
        assert os.environ["MLFLOW_TRACKING_TOKEN"] == "token"
        assert "MLFLOW_RUN_ID" not in os.environ


def test_warnings_of_other_packages_are_no_errors_and_the_filters_do_not_grow() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = len(warnings.filters)
        for _ in range(3):
            isolate()
        assert len(warnings.filters) == before + 1
        warnings.warn_explicit("old", DeprecationWarning, "x.py", 1, module="mlflow.store.db")
        with pytest.raises(DeprecationWarning):
            warnings.warn_explicit("old", DeprecationWarning, "x.py", 1, module="avcil_dist.training")
    assert FOREIGN


def test_mlflows_warning_about_its_own_type_hints_is_not_shown() -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        quiet_import()
        text = "Any type hint is inferred as AnyType, and MLflow doesn't validate the data for this type."
        warnings.warn_explicit(f"\x1b[1;33m{text}\x1b[0m", UserWarning, "type_hints.py", 232, "mlflow.types.type_hints")
        warnings.warn_explicit("another", UserWarning, "type_hints.py", 232, "mlflow.types.type_hints")
    assert [str(warning.message) for warning in shown] == ["another"]


@pytest.mark.slow
def test_events_are_sent_where_warnings_are_errors(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from avcil_dist.tracking.events import StepTracker
from tests.helpers.stream_folder import StreamFolder
stream = StreamFolder(Path(sys.argv[1], "stream"), sys.argv[1])
stream.open(seed=0)
with StepTracker(stream.queue, 0) as tracker:
    tracker.metrics({"loss": 1.0}, 0)
sys.exit(0 if stream.send(60.0) else 3)
"""
    environment = os.environ | {"PYTHONWARNINGS": "error"}
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
