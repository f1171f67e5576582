"""Artifacts whose files fit their commit, but no run: refused in one line, and nothing else is read."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from mlflow import MlflowClient

from avcil_dist import storage
from avcil_dist.config.schema import TrackingConfig
from avcil_dist.data.manifest import load_manifest
from avcil_dist.errors import AvcilError
from avcil_dist.inference.evaluation import evaluation
from avcil_dist.inference.predict import restore_step
from avcil_dist.inference.step_predictions import StepRequest, predict_step
from avcil_dist.reporting.report import load_streams
from avcil_dist.streams.artifact import load_artifact
from avcil_dist.streams.commit import COMMITTED, read_commit, write_commit, write_files
from avcil_dist.streams.summary import StepCommit, load_summary
from avcil_dist.tracking.artifacts import upload_step
from launch.local_worlds import current_world
from tests.unit.test_inference import _one_thread, commit_first_step  # noqa: F401 - an automatic fixture


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> str:
    return commit_first_step(tmp_path_factory.mktemp("made"))[0]


@pytest.fixture
def stream(made: str, tmp_path: Path) -> str:
    """A stream of six classes whose step 0 is committed."""
    return str(shutil.copytree(made, tmp_path / "stream"))


def rewrite(stream: str, file: str, data: bytes, **fields: Any) -> None:
    """Replace a file of step 0, its digest and fields of its commit."""
    folder = f"{stream}/step_000"
    commit = read_commit(folder, StepCommit).model_dump()
    digests = commit.pop("files") | write_files(folder, {file: data})
    del commit["format"]
    write_commit(folder, digests, **(commit | fields))


def change_json(stream: str, file: str, change: Callable[[Any], Any]) -> None:
    value = json.loads(Path(stream, "step_000", file).read_bytes())
    rewrite(stream, file, json.dumps(change(value)).encode())


def change_weights(stream: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    path = Path(stream, "step_000", "model.safetensors")
    weights = safetensors.torch.load(path.read_bytes())
    name = next(name for name, values in weights.items() if values.ndim == 2)
    rewrite(stream, path.name, safetensors.torch.save(weights | {name: change(weights[name])}))


def evaluate(stream: str) -> None:
    predict_step(StepRequest(stream), current_world())


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(AvcilError) as caught:
        call()
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values * torch.nan, "1 not finite"),
        (lambda values: values / 0, "1 not finite"),
        (lambda values: values.to(torch.int8), "1 of another type"),
        (lambda values: values.half(), "1 of another type"),
        (lambda values: values.to(torch.complex64), "1 of another type"),
        (lambda values: values.T.contiguous()[:1], "1 of another shape"),
    ],
)
def test_weights_that_no_training_made_are_refused(
    stream: str, change: Callable[[torch.Tensor], torch.Tensor], message: str
) -> None:
    change_weights(stream, change)
    assert message in refusal(lambda: evaluate(stream))


def reversed_steps(scenario: dict[str, Any]) -> dict[str, Any]:
    return {"steps": scenario["steps"][::-1]}


def unequal_steps(scenario: dict[str, Any]) -> dict[str, Any]:
    first, second = scenario["steps"]
    return {"steps": [first[:1], [*first[1:], *second]]}


def test_a_scenario_of_other_steps_than_the_configuration_is_refused(stream: str) -> None:
    change_json(stream, "scenario.json", unequal_steps)
    for read in (lambda: load_artifact(stream, 0), lambda: load_streams([stream])):
        assert "scenario.json: not that of config.yaml" in refusal(read)


def test_a_scenario_in_another_order_than_the_manifest_is_refused(stream: str) -> None:
    change_json(stream, "scenario.json", reversed_steps)
    assert "scenario.json: not that of config.yaml and the manifest" in refusal(lambda: evaluate(stream))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("scenario.json", lambda s: {"steps": []}, "steps: Tuple should have at least 1 item"),
        ("scenario.json", lambda s: {"steps": [["a"], []]}, "steps.1: Tuple should have at least 1 item"),
        ("scenario.json", lambda s: {"steps": [["a", "b"], ["a"]]}, "a class is in it twice"),
        ("scenario.json", lambda s: {"steps": [["a\x1b[2J"]]}, "steps.0.0: String should match"),
        ("scenario.json", lambda s: {"steps": "ab"}, "steps: Input should be a valid array"),
        ("metrics.json", lambda m: m | {"step": 1}, "step 1: the accuracy matrix has rows of [1]"),
        ("metrics.json", lambda m: m | {"accuracy": [[1.5]]}, "accuracy.0.0: Input should be less than or equal to 1"),
        ("metrics.json", lambda m: m | {"accuracy": [[float("nan")]]}, "accuracy.0.0: "),
        ("metrics.json", lambda m: m | {"num_test_clips": -1}, "num_test_clips: "),
        ("memory.json", lambda m: {"nobody": ["k"]}, "exemplars of 'nobody', which is no class seen so far"),
        ("memory.json", lambda m: {"class_000": ["../k"]}, "class_000.0: String should match"),
        ("memory.json", lambda m: [1], "Input should be an object"),
        ("method.json", lambda m: {"means": 3}, "the method's state does not fit"),
    ],
)
def test_a_json_file_with_impossible_values_is_refused(
    stream: str, file: str, change: Callable[[Any], Any], message: str
) -> None:
    change_json(stream, file, change)
    shape = {"frames": 2, "positions": 3, "dim": 16}
    assert message in refusal(lambda: restore_step(load_artifact(stream, 0), shape, f"{stream}/step_000"))


@pytest.mark.parametrize("file", ["scenario.json", "metrics.json", "memory.json", "method.json", COMMITTED])
@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "9" * 5000, '"\\ud800"', "\udc80", ""])
def test_a_json_file_that_no_parser_should_follow_is_refused(stream: str, file: str, text: str) -> None:
    data = text.encode(errors="surrogateescape")
    if file == COMMITTED:
        storage.write_bytes(f"{stream}/step_000/{COMMITTED}", data)
    else:
        rewrite(stream, file, data)
    assert file in refusal(lambda: load_artifact(stream, 0))


def test_tensors_that_are_none_are_refused_with_the_name_of_the_file(stream: str) -> None:
    for data in (b"", b"{}", b"\x00" * 8, b"\xff" * 64, (1 << 40).to_bytes(8, "little") + b"{}"):
        rewrite(stream, "model.safetensors", data)
        assert "model.safetensors: not a file of tensors" in refusal(lambda: load_artifact(stream, 0))


@pytest.mark.parametrize(
    "change",
    [
        {"files": {"/etc/hostname": {"size": 3, "sha256": "0" * 64}}},
        {"files": {"../../etc/hostname": {"size": 3, "sha256": "0" * 64}}},
        {"files": {".ssh": {"size": 3, "sha256": "0" * 64}}},
        {"files": {"a\n": {"size": 3, "sha256": "0" * 64}}},
        {"files": {"reference://k": {"size": 3, "sha256": "0" * 64}}},
        {"files": {"a": {"size": -3, "sha256": "0" * 64}}},
        {"files": {"a": {"size": 3, "sha256": "x"}}},
        {"files": []},
        {"step": 1},
        {"step": -1},
        {"step": "0"},
        {"manifest_hash": 3},
        {"changes": [{"key": "a"}]},
    ],
)
def test_a_commit_with_impossible_values_is_refused(stream: str, change: dict[str, Any]) -> None:
    path = Path(stream, "step_000", COMMITTED)
    path.write_text(json.dumps(json.loads(path.read_bytes()) | change))
    for read in (lambda: load_artifact(stream, 0), lambda: load_summary(stream, 0)):
        assert "step_000" in refusal(read)


def test_a_file_that_the_commit_does_not_list_is_never_read(stream: str) -> None:
    path = Path(stream, "step_000", COMMITTED)
    commit = json.loads(path.read_bytes())
    del commit["files"]["metrics.json"]
    path.write_text(json.dumps(commit))
    assert "COMMITTED.json: does not list metrics.json" in refusal(lambda: load_summary(stream, 0))


@pytest.mark.parametrize("name", ["memory.json", COMMITTED])
def test_a_pipe_in_the_place_of_a_file_is_refused_at_once(stream: str, name: str) -> None:
    path = Path(stream, "step_000", name)
    path.unlink()
    os.mkfifo(path)
    assert "not a regular file" in refusal(lambda: load_artifact(stream, 0))


def test_a_file_larger_than_its_commit_is_not_read(stream: str) -> None:
    path = Path(stream, "step_000", "model.safetensors")
    with path.open("ab") as file:
        file.truncate(1 << 40)  # sparse: it takes no room on the disk
    assert "model.safetensors: damaged" in refusal(lambda: load_artifact(stream, 0))


def test_another_manifest_may_list_the_classes_in_another_order(stream: str) -> None:
    url = load_summary(stream, 0).config.data.manifest
    manifest, other = load_manifest(url), url.replace("manifest.json", "other.json")
    replace(manifest, classes=manifest.classes[::-1]).save(other)
    own = evaluation(predict_step(StepRequest(stream), current_world()))
    assert evaluation(predict_step(StepRequest(stream, manifest=other), current_world())) == own


@pytest.mark.parametrize("name", ["/etc/hostname", "../../secret", "model.safetensors"])
def test_only_files_of_the_commit_with_its_digests_are_sent_to_a_server(stream: str, name: str) -> None:
    path = Path(stream, "step_000", COMMITTED)
    secret = Path(stream, "..", "secret")
    secret.write_text("of this machine")
    if name == "model.safetensors":  # a link in the place of a file that the commit lists
        path.with_name(name).unlink()
        path.with_name(name).symlink_to(secret)
    else:
        commit = json.loads(path.read_bytes())
        commit["files"][name] = {"size": 15, "sha256": storage.sha256_file(str(secret))}
        path.write_text(json.dumps(commit))
    sent: set[str] = {"config.yaml", "memory.json", "method.json", "method.safetensors", "metrics.json"}
    client = MlflowClient("http://127.0.0.1:9")  # nothing listens there: the step is refused before it is reached

    def upload() -> None:
        upload_step(client, "r", TrackingConfig(artifacts="full"), stream, 0, stream_id="i", uploaded=sent)

    assert "step_000" in refusal(upload)
