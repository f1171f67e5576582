"""Diagnosis of a machine: judgments of facts, probes with time limits, a page of lines, the exit code."""

import json
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner

from avcil_dist.compose import load_config
from avcil_dist.errors import StorageError
from launch.cli.main import cli
from launch.doctor import findings, probes
from launch.doctor.cluster_check import Measured, bus_rates
from launch.doctor.findings import Finding
from tests.helpers.published_server import PublishedServer

GB = 1 << 30


@pytest.mark.parametrize(
    ("finding", "state"),
    [
        (findings.gpus(2, ["H100", "H100"], "13.0", "13.1", None), "ok"),
        (findings.gpus(0, [], "13.0", None, None), "note"),
        (findings.gpus(0, [], "13.0", "12.2", "update the driver"), "fault"),
        (findings.nccl(None, has_gpus=False), "note"),
        (findings.nccl(None, has_gpus=True), "fault"),
        (findings.nccl("2.28.3", has_gpus=True), "ok"),
        (findings.compiler(None, None), "fault"),
        (findings.compiler("c++", "cannot find -lgomp"), "fault"),
        (findings.compiler("c++", None), "ok"),
        (findings.imports("DeepSpeed", None, "No module named 'deepspeed'"), "fault"),
        (findings.codecs([("libx264", "w")]), "fault"),
        (findings.codecs([("av1", "r")]), "ok"),
        (findings.locks("runs", works=True, error=None), "ok"),
        (findings.locks("runs", works=False, error=None), "fault"),
        (findings.locks("runs", works=None, error="Read-only file system"), "fault"),
        (findings.room("TMPDIR", "x", 2 * GB, GB, "set TMPDIR"), "ok"),
        (findings.room("TMPDIR", "x", GB // 2, GB, "set TMPDIR"), "fault"),
        (findings.reachable("MLflow", "http://h", "Connection refused", "start it"), "fault"),
        (findings.reachable("hub", "http://h", "Name or service not known", "needed by one command alone"), "note"),
        (findings.clock("http://h", 3.0), "ok"),
        (findings.clock("http://h", -400.0), "fault"),
        (findings.clock("", None), "note"),
        (findings.all_reduce(8, 2, "nccl", [(1 << 28, 20e9)]), "ok"),
        (findings.all_reduce(8, 2, "nccl", [(1 << 28, 2e8)]), "fault"),
        (findings.all_reduce(8, 2, "gloo", [(1 << 28, 2e8)]), "ok"),
        (findings.all_reduce(1, 1, "gloo", [(1 << 28, 0.0)]), "note"),
    ],
)
def test_facts_are_judged(finding: Finding, state: str) -> None:
    assert finding.state == state
    assert finding.line().startswith(findings.MARKS[finding.state])
    assert bool(finding.remedy) == (state == "fault")  # each cross states what to do, and nothing else does


def test_a_probe_that_hangs_or_fails_is_one_cross() -> None:
    release = threading.Event()

    def hang() -> list[Finding]:
        release.wait(30)
        return []

    def fail() -> list[Finding]:
        raise StorageError("runs: access refused")

    [hung] = probes.within("disk", 0.05, hang)
    release.set()
    assert (hung.state, hung.subject) == ("fault", "disk")
    assert probes.within("storage", 5, list) == []
    [failed] = probes.within("disk", 5, fail)
    assert failed.fact == "runs: access refused"


def test_servers_are_reached_and_their_clocks_compared(tmp_path: Path) -> None:
    with PublishedServer(tmp_path) as server:
        answer = probes.ask(server.url)
        assert answer.error is None
        assert answer.skew is not None
        assert abs(answer.skew) < 5
    assert probes.ask("http://127.0.0.1:9").error == "[Errno 111] Connection refused"


def test_only_servers_that_are_configured_are_asked() -> None:
    assert [name for name, _, _ in probes._servers(None, "runs", {"HF_HUB_OFFLINE": "1"})] == []
    environment = {"HF_ENDPOINT": "http://mirror", "AWS_ENDPOINT_URL": "http://s3", "MLFLOW_TRACKING_URI": "http://m"}
    assert [(name, url) for name, url, _ in probes._servers(None, "runs", environment)] == [
        ("hub", "http://mirror"),
        ("MLflow", "http://m"),
        ("S3", "http://s3"),
    ]
    config = load_config("demo", ["tracking.uri=http://own"])
    assert ("MLflow", "http://own") in [(name, url) for name, url, _ in probes._servers(config, "runs", environment)]


@pytest.mark.slow
def test_a_lock_that_another_process_respects_is_found(tmp_path: Path) -> None:
    assert probes._locks(f"{tmp_path}/not/yet").state == "ok"
    assert list(tmp_path.iterdir()) == []
    assert probes._locks("s3://bucket/runs").state == "note"


def test_the_rate_of_a_ring_counts_what_each_rank_sends() -> None:
    measured = Measured(ranks=4, hosts=2, backend="gloo", seconds={"1048576": 0.001, "1024": 0.0001})
    (small, slow), (large, fast) = bus_rates(measured)
    assert (small, large) == (1024, 1 << 20)
    assert (slow, fast) == (pytest.approx(1.5 * 1024 / 0.0001), pytest.approx(1.5 * (1 << 20) / 0.001))


def test_the_exit_code_is_one_with_a_cross(monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = Finding("GPUs", "note", "none"), Finding("flock", "fault", "does not work", "mount it with flock")
    monkeypatch.setattr(probes, "diagnose", lambda *_: [good])
    ran = CliRunner().invoke(cli, ["doctor"])
    assert (ran.exit_code, ran.output) == (0, "– GPUs         none\n")
    monkeypatch.setattr(probes, "diagnose", lambda *_: [good, bad])
    ran = CliRunner().invoke(cli, ["doctor", "--json"])
    assert ran.exit_code == 1
    assert [entry["state"] for entry in json.loads(ran.output)] == ["note", "fault"]
