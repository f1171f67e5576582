"""Uris of tracking servers and databases: which one is used, and which are refused in one line."""

import sqlite3
from pathlib import Path

import pytest

from avcil_dist.config.schema import TrackingConfig
from avcil_dist.errors import ConfigError
from avcil_dist.tracking.client import connect, experiment_id
from avcil_dist.tracking.uris import VARIABLE, database_path, tracking_uri, with_uri

NAMES = ("100%jb", "a#b", "a b", "a~b", "~", "ü日本", "a&b=c;d:e@f", "'quoted\"")


@pytest.mark.parametrize("name", NAMES)
def test_the_database_is_in_the_output_folder_whatever_its_name(tmp_path: Path, name: str) -> None:
    uri = tracking_uri(TrackingConfig(), f"{tmp_path}/{name}")
    assert database_path(uri) == tmp_path / name / "mlflow.db"


@pytest.mark.parametrize("name", ["what?v=1", "a%20b"])
def test_a_name_that_no_uri_can_have_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"^output: .*: a `\?`, or a `%` .* give another output, or tracking\.uri$"):
        tracking_uri(TrackingConfig(), f"{tmp_path}/{name}")
    assert tracking_uri(TrackingConfig(uri="http://server"), f"{tmp_path}/{name}") == "http://server"


def test_a_database_and_its_artifacts_are_made_in_a_folder_with_signs_of_urls(tmp_path: Path) -> None:
    folder = tmp_path / "100%jb #~ ü"
    uri = tracking_uri(TrackingConfig(), str(folder))
    client = connect(uri)
    run = client.create_run(experiment_id(client, uri, TrackingConfig(), str(folder)))
    client.log_text(run.info.run_id, "text", "file.txt")
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert sqlite3.connect(folder / "mlflow.db").execute("select count(*) from runs").fetchone() == (1,)
    assert [path.read_text() for path in folder.rglob("file.txt")] == ["text"]


def test_the_setting_is_before_the_variable_the_earlier_server_and_the_database(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    output, earlier = str(tmp_path), "http://earlier"
    assert tracking_uri(TrackingConfig(), output, earlier=earlier) == earlier
    monkeypatch.setenv(VARIABLE, "http://variable")
    assert tracking_uri(TrackingConfig(), output, earlier=earlier) == "http://variable"
    assert tracking_uri(TrackingConfig(uri="http://setting"), output, earlier=earlier) == "http://setting"
    monkeypatch.setenv(VARIABLE, " ")
    assert tracking_uri(TrackingConfig(), output) == f"sqlite:///{output}/mlflow.db"


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("postgresql://host/runs", r"its driver is missing; run pip install psycopg"),
        ("mysql://host/runs", r"its driver is missing; run pip install mysqlclient"),
        ("postgresql+nothing://host/runs", r"not the url of a database"),
        ("postgresql://host:port/runs", r"not the url of a database"),
        ("http://host:99999", r"not an address; give it as http://HOST:PORT"),
        ("http://", r"not an address"),
        ("http://host/a b", r"not an address"),
        ("file:runs", r"neither a server .* nor a database"),
        ("./mlruns", r"neither a server .* nor a database"),
        ("sqlite:runs.db", r"neither a server .* nor a database"),
    ],
)
def test_what_can_never_answer_is_refused_in_one_line(uri: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=f"^tracking.uri: .*{message}"):
        tracking_uri(TrackingConfig(uri=uri), "runs")
    monkeypatch.setenv(VARIABLE, uri)
    with pytest.raises(ConfigError, match=f"^{VARIABLE}: .*{message}"):
        tracking_uri(TrackingConfig(), "runs")


@pytest.mark.parametrize(
    "uri",
    [
        "http://someone:hunter2@server",
        "postgresql://someone:hunter2@server/runs",
        "postgresql://server/runs?user=u&password=hunter2",
        "https://server/?token=hunter2",
    ],
)
def test_a_secret_is_refused_without_showing_it(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError) as refused:
        with_uri(TrackingConfig(), uri)
    assert "hunter2" not in str(refused.value)
    monkeypatch.setenv(VARIABLE, uri)
    with pytest.raises(ConfigError, match=f"^{VARIABLE}: no user or password here") as refused:
        tracking_uri(TrackingConfig(), "runs")
    assert "hunter2" not in str(refused.value)
