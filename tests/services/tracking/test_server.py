"""Streams and a real tracking server whose artifacts are in S3: killed and restarted, resumed from, by reference."""

import json
import random
import shutil
import threading
import time
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from avcil_dist import storage
from avcil_dist.compose import load_config
from avcil_dist.config.schema import Config, TrackingConfig
from avcil_dist.config.serialization import config_to_yaml
from avcil_dist.errors import ArtifactError
from avcil_dist.streams.commit import write_commit, write_files
from avcil_dist.streams.summary import committed_steps, step_url
from avcil_dist.tracking.artifacts import download_step, upload_step
from avcil_dist.tracking.client import find_stream
from avcil_dist.tracking.delivery import sync_stream
from avcil_dist.tracking.resume import ResumeRequest, prepare_resume
from tests.helpers.mlflow_server import TrackingServer
from tests.helpers.ports import reserve_port
from tests.helpers.ranks import run_ranks
from tests.helpers.s3 import BUCKET, S3Server
from tests.helpers.sent_events import check_sent
from tests.helpers.streams import STEPS, avcil, last_artifact, run_tracked, weights_digest, write_config

SEED, KILLS = 20, 5


def config_of(folder: Path, server: TrackingServer, *settings: str) -> Config:
    shared = folder / "shared"
    shared.mkdir(exist_ok=True)
    named = f"tracking.experiment={folder.name}"
    return load_config(
        str(write_config(shared)), [f"output={folder}/runs", f"tracking.uri={server.uri}", named, *settings]
    )


def test_a_server_killed_at_random_moments_loses_and_duplicates_nothing_and_stops_no_training(
    server: TrackingServer, tmp_path: Path
) -> None:
    moments, kills = random.Random(SEED), []

    def kill_and_restart() -> None:
        for number in range(KILLS):
            time.sleep(moments.uniform(0.1, 3.0))
            server.kill()
            kills.append(number)
            server.start()

    settings = ["tracking.wait_seconds=0.5", "tracking.register_as=none"]
    configs = [config_of(tmp_path, server, f"seed={seed}", *settings) for seed in range(3)]
    killer = threading.Thread(target=kill_and_restart)
    killer.start()
    [streams] = run_ranks(run_tracked, 1, configs)
    killer.join()
    assert len(kills) == KILLS
    for number, stream in enumerate(streams):
        assert committed_steps(stream) == list(range(len(STEPS)))  # whatever the server does
        sync_stream(stream, uri=None, again=False)
        assert check_sent(server.uri, stream, tmp_path / f"back{number}") > 12 * len(STEPS)
        status = {run.info.status for run in find_stream(server.uri, _id(stream)).steps.values()}
        assert status == {"FINISHED"}


def test_a_stream_is_resumed_from_the_server_and_s3_alone(
    server: TrackingServer, s3_server: S3Server, tmp_path: Path
) -> None:
    [[whole]] = run_ranks(run_tracked, 1, [config_of(tmp_path, server, "name=whole")])
    [[begun]] = run_ranks(run_tracked, 1, [config_of(tmp_path, server, "name=half", f"output={tmp_path}/gone")], [0, 1])
    before = find_stream(server.uri, "half-avcil-seed0")
    shutil.rmtree(tmp_path / "gone")
    command = ["resume", before.run.info.run_id, "--uri", server.uri, f"output={tmp_path}/elsewhere"]

    result = avcil(*command)

    assert result.exit_code == 0, result.output
    stream = f"{tmp_path}/elsewhere/{Path(begun).name}"
    assert committed_steps(stream) == [1, 2]
    assert last_artifact(stream).metrics == last_artifact(whole).metrics
    for key, weights in last_artifact(whole).model.items():  # the command's processes use all threads
        torch.testing.assert_close(last_artifact(stream).model[key], weights, rtol=1e-5, atol=1e-5)
    after = find_stream(server.uri, before.run.info.run_id)
    assert after.run.info.run_id == before.run.info.run_id
    assert sorted(after.steps) == [0, 1, 2]
    assert after.run.info.status == "FINISHED"
    seen = after.client.get_metric_history(after.run.info.run_id, "test/seen_accuracy")
    assert [point.value for point in seen] == pytest.approx(last_artifact(whole).metrics.seen_accuracy)
    check_predicts(server, "whole-avcil")

    _flip_a_byte(s3_server, after.steps[2].info.run_id, "step_002/model.safetensors")
    refused = avcil(*command[:-1], f"output={tmp_path}/third")
    assert refused.exit_code == 2
    assert "step_002/model.safetensors: damaged" in refused.output
    assert "--from-step" in refused.output
    assert not (tmp_path / "third").exists()


def test_a_reference_leaves_the_bytes_where_they_are_and_is_resumed_from(
    server: TrackingServer, s3_server: S3Server, tmp_path: Path
) -> None:
    target = f"s3://{BUCKET}/{tmp_path.name}"
    config = config_of(tmp_path, server, "name=lean", "tracking.artifacts=reference", f"tracking.artifact_uri={target}")
    [[stream]] = run_ranks(run_tracked, 1, [config])
    digest = weights_digest(stream)
    tracked = find_stream(server.uri, "lean-avcil-seed0")
    files = {item.path for item in tracked.client.list_artifacts(tracked.steps[2].info.run_id, "step_002")}
    assert files == {"step_002/COMMITTED.json", "step_002/REFERENCE.json"}
    shutil.rmtree(stream)
    ready = prepare_resume(server.uri, "lean-avcil-seed0", ResumeRequest((f"output={tmp_path}/elsewhere",)))
    assert ready.step == 2
    assert weights_digest(f"{tmp_path}/elsewhere/lean-avcil-seed0") == digest

    check_predicts(server, "lean-avcil")

    uri = tracked.steps[2].data.tags["avcil.artifact_uri"]
    data = bytearray(storage.read_bytes(f"{uri}/method.json"))
    storage.write_bytes(f"{uri}/method.json", bytes(data) + b" ")
    with pytest.raises(ArtifactError, match=r"step_002/method\.json: damaged"):
        prepare_resume(server.uri, "lean-avcil-seed0", ResumeRequest((f"output={tmp_path}/third",)))
    storage.remove_tree(uri)
    with pytest.raises(ArtifactError, match=r"COMMITTED\.json: missing; .* by reference"):
        prepare_resume(server.uri, "lean-avcil-seed0", ResumeRequest((f"output={tmp_path}/third",)))


def test_a_large_file_goes_to_the_storage_in_parts(
    server: TrackingServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_MULTIPART_UPLOAD_MINIMUM_FILE_SIZE", str(6 << 20))
    monkeypatch.setenv("MLFLOW_MULTIPART_UPLOAD_CHUNK_SIZE", str(5 << 20))
    stream, data = str(tmp_path / "stream"), bytes(range(256)) * (12 << 12)
    write_commit(
        step_url(stream, 0),
        write_files(step_url(stream, 0), {"model.safetensors": data}),
        step=0,
        manifest_hash="m",
        code_version="1",
    )
    client = MlflowClient(server.uri)
    run = client.create_run(client.create_experiment(tmp_path.name))
    calls = _log(server).count("mpu/complete")
    tags = upload_step(client, run.info.run_id, TrackingConfig(), stream, 0, stream_id="x", uploaded=set())
    assert _log(server).count("mpu/complete") == calls + 1
    for key, value in tags.items():
        client.set_tag(run.info.run_id, key, value)
    download_step(client, server.uri, client.get_run(run.info.run_id), 0, f"{tmp_path}/back")
    assert Path(tmp_path, "back/step_000/model.safetensors").read_bytes() == data


def test_a_stream_whose_server_is_unavailable_ends_well_and_is_synced_later(
    server: TrackingServer, tmp_path: Path
) -> None:
    closed = f"http://127.0.0.1:{reserve_port()}"
    settings = [f"tracking.uri={closed}", "name=late", "tracking.wait_seconds=0.2"]
    config = config_of(tmp_path, server, *settings)
    [[stream]] = run_ranks(run_tracked, 1, [config])
    path = tmp_path / "late.yaml"
    path.write_text(config_to_yaml(config))
    ended = avcil("train", path)  # all steps are committed: it only sends events
    assert ended.exit_code == 0
    assert "not all is uploaded (NewConnectionError" in ended.output
    assert f"avcil sync {stream}" in ended.output
    again = avcil("sync", stream)
    assert again.exit_code == 2
    assert "still unavailable" in again.output

    synced = avcil("sync", stream, "--uri", server.uri)

    assert synced.exit_code == 0, synced.output
    assert check_sent(server.uri, stream, tmp_path / "back") > 12 * len(STEPS)
    model = MlflowClient(server.uri, server.uri).search_model_versions("name = 'late-avcil'")
    assert [version.version for version in model] in (["1"], [1])
    once_more = avcil("sync", stream, "--uri", server.uri, "--again")
    assert once_more.exit_code == 0, once_more.output
    check_sent(server.uri, stream, tmp_path / "twice")
    assert len(MlflowClient(server.uri, server.uri).search_model_versions("name = 'late-avcil'")) == 1


def test_a_stream_on_object_storage_is_tracked(
    server: TrackingServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))  # where the queue of such a stream is
    closed = f"http://127.0.0.1:{reserve_port()}"
    settings = [f"tracking.uri={closed}", "name=far", "tracking.wait_seconds=0.2"]
    [[stream]] = run_ranks(
        run_tracked, 1, [config_of(tmp_path, server, f"output=s3://{BUCKET}/{tmp_path.name}", *settings)]
    )
    assert stream.startswith("s3://")
    synced = avcil("sync", stream, "--uri", server.uri)
    assert synced.exit_code == 0, synced.output
    tracked = find_stream(server.uri, "far-avcil-seed0")
    download_step(tracked.client, server.uri, tracked.steps[2], 2, f"{tmp_path}/back")
    assert weights_digest(f"{tmp_path}/back") == weights_digest(stream)
    check_predicts(server, "far-avcil")


def check_predicts(server: TrackingServer, name: str) -> None:
    """The model that is registered under this name is loaded, and predicts from features."""
    mlflow.set_registry_uri(server.uri)
    mlflow.set_tracking_uri(server.uri)
    model = mlflow.pyfunc.load_model(f"models:/{name}/1")
    inputs = {"visual": np.zeros((5, 2, 3, 16), dtype=np.float32), "audio": np.zeros((5, 16), dtype=np.float32)}
    predicted = model.predict(inputs)
    assert len(predicted) == 5
    assert set(predicted["class"]) <= set(model.metadata.metadata["classes"])
    for word in (name, f"models:/{name}@latest", f"models:/{name}/latest"):
        refused = avcil("predict", word, __file__, "--uri", server.uri)  # these features have no encoders
        assert refused.exit_code == 2
        assert f"models:/{name}/1: trained on features" in refused.output
    assert "has no version 99" in avcil("predict", f"models:/{name}/99", __file__, "--uri", server.uri).output


def _id(stream: str) -> str:
    return str(json.loads(Path(stream, "stream.json").read_text())["id"])


def _log(server: TrackingServer) -> str:
    return (server.folder / "server.log").read_text()


def _flip_a_byte(s3_server: S3Server, run_id: str, name: str) -> None:
    [path] = (s3_server.folder / BUCKET / "mlflow").rglob(f"{run_id}/artifacts/{name}")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
