"""The oldest supported server, MLflow 2.7: its smaller limits cost the ends of long values, and nothing else."""

import json
import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

from avcil_dist import storage
from avcil_dist.compose import load_config
from avcil_dist.errors import ArtifactError
from avcil_dist.tracking.artifacts import download_step
from avcil_dist.tracking.client import find_stream
from avcil_dist.tracking.events import STREAM
from avcil_dist.tracking.resume import ResumeRequest, prepare_resume
from tests.helpers.faulty_proxy import FaultyProxy
from tests.helpers.mlflow_server import TrackingServer
from tests.helpers.ranks import run_ranks
from tests.helpers.sent_events import check_sent
from tests.helpers.stream_folder import StreamFolder
from tests.helpers.streams import run_tracked, write_config
from tests.services.tracking.test_faulty_server import filled


def test_a_long_parameter_is_cut_to_what_the_server_takes_and_all_else_is_there(
    old_server: TrackingServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stream = StreamFolder(tmp_path / "stream", str(tmp_path), uri=old_server.uri)
    classes = [f"class number {number:07d}" for number in range(60)]
    others = {f"part.key{number}": number for number in range(150)}
    stream.open(**others, classes=json.dumps(classes), other_classes=json.dumps(classes[::-1]))
    stream.queue.append("end", run=STREAM, status="FINISHED")
    run = MlflowClient(old_server.uri).get_run(stream.send_all()[STREAM])
    assert {key: run.data.params[key] for key in others} == {key: str(value) for key, value in others.items()}
    assert run.data.params["classes"] == json.dumps(classes)[:500]
    assert run.data.params["other_classes"] == json.dumps(classes[::-1])[:500]
    assert run.info.status == "FINISHED"
    assert caplog.text.count("takes 500 characters") == 1  # learnt once
    assert stream.queue.cursor(old_server.uri).rejected == 0


def test_a_stream_is_tracked_registered_and_resumed_from(old_server: TrackingServer, tmp_path: Path) -> None:
    settings = [f"tracking.uri={old_server.uri}", "name=old", "optim.epochs=1"]
    config = load_config(str(write_config(tmp_path)), settings)
    [[stream]] = run_ranks(run_tracked, 1, [config])
    assert check_sent(old_server.uri, stream, tmp_path / "back") > 30
    tracked = find_stream(old_server.uri, config.stream_name)
    assert tracked.run.info.status == "FINISHED"
    client = MlflowClient(old_server.uri, old_server.uri)
    assert [str(model.version) for model in client.search_model_versions("name = 'old-avcil'")] == ["1"]
    shutil.rmtree(stream)
    ready = prepare_resume(old_server.uri, config.stream_name, ResumeRequest((f"output={tmp_path}/elsewhere",)))
    assert ready.step == 2


def test_a_file_without_end_is_refused_when_it_is_larger_than_committed(
    old_server: TrackingServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # This server sends files itself; with object storage the client fetches them from there.
    monkeypatch.setattr(storage, "MAX_JSON_BYTES", 1 << 20)
    with FaultyProxy(old_server.port) as proxy:
        stream = filled(tmp_path / "endless", proxy.uri)
        run = MlflowClient(old_server.uri).get_run(stream.send_all()["0"])
        tracked = find_stream(proxy.uri, stream.id)
        proxy.rule = lambda method, path: "endless" if "mlflow-artifacts/artifacts/" in path else "pass"
        with pytest.raises(ArtifactError, match=r"step_000/COMMITTED\.json: larger than committed"):
            download_step(tracked.client, proxy.uri, run, 0, f"{tmp_path}/back")
    assert not Path(tmp_path, "back").exists()
