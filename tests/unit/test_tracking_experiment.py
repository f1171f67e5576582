"""Experiment of a stream: the one that its run is in, whatever the setting is later."""

from pathlib import Path

import pytest
from wandb.proto.wandb_internal_pb2 import Record

from avcil_dist.compose import load_config
from avcil_dist.config.schema import TrackingConfig
from avcil_dist.tracking import client as client_module
from avcil_dist.tracking.client import find_stream
from avcil_dist.tracking.events import StepTracker
from avcil_dist.tracking.session import open_run, track_step
from avcil_dist.tracking.trackers.wandb import RunFile
from tests.helpers.stream_folder import TRACKING, StreamFolder

OTHER = TrackingConfig(experiment="another")


def send_steps(stream: StreamFolder, *steps: int) -> None:
    stream.open()
    for step in steps:
        with StepTracker(stream.queue, step):
            pass
    stream.send_all()


def test_a_stream_stays_in_the_experiment_of_its_run_and_is_found_in_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "EXPERIMENTS", 1)  # a page of experiments for each
    stream = StreamFolder(tmp_path / "mine", str(tmp_path))
    send_steps(stream, 0, 1)
    stream.tracking = OTHER
    send_steps(stream, 2)
    elsewhere = StreamFolder(tmp_path / "of another machine" / "mine", str(tmp_path), stream.uri)
    elsewhere.tracking = OTHER
    send_steps(elsewhere, 3)
    tracked = find_stream(stream.uri, "tiny-avcil-seed0")
    assert sorted(tracked.steps) == [0, 1, 2, 3]
    assert tracked.client.get_experiment(tracked.run.info.experiment_id).name == TRACKING.experiment
    assert stream.queue.cursor(stream.uri).experiment == tracked.run.info.experiment_id
    assert tracked.client.get_experiment_by_name(OTHER.experiment) is None
    new = StreamFolder(tmp_path / "new", str(tmp_path), stream.uri)
    new.tracking = OTHER
    send_steps(new, 0)
    assert tracked.client.get_experiment(new.queue.cursor(new.uri).experiment).name == OTHER.experiment


def test_the_files_of_a_stream_for_other_trackers_are_of_one_project(tmp_path: Path) -> None:
    for step, experiment in enumerate(("first", "second")):
        settings = [f"output={tmp_path}", "tracking.trackers=[wandb]", f"tracking.experiment={experiment}"]
        config = load_config("demo", settings)
        open_run(config, is_elsewhere=True)
        with track_step(config, step):
            pass
    files = list(tmp_path.rglob("*.wandb"))
    assert len(files) == 3
    data = [record for file in files for record, _ in RunFile(file).scan(file.read_bytes())]
    projects = [record.run.project for record in map(Record.FromString, data) if record.HasField("run")]
    assert set(projects) == {"first"}
