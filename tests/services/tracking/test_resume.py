"""Resuming from a database: what is allowed, shown and recorded; a final model that predicts from raw clips."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlflow
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException

from avcil_dist.compose import load_config
from avcil_dist.errors import ArtifactError, ConfigError, DataError, TrackingError
from avcil_dist.streams.artifact import load_artifact
from avcil_dist.streams.identity import read_identity
from avcil_dist.streams.summary import committed_steps, recorded_changes
from avcil_dist.tracking.client import find_stream
from avcil_dist.tracking.resume import ResumeRequest, Resumption, prepare_resume
from data_shards.random_features import make_feature_shards
from launch.cluster.chain_record import read_chain
from launch.cluster.schedulers.local import is_supervised
from tests.helpers.chains import wait_for
from tests.helpers.commands import run_avcil
from tests.helpers.ranks import run_ranks
from tests.helpers.rendered import render_tiny, tiny_clip
from tests.helpers.sent_events import uri_of
from tests.helpers.streams import avcil, run_tracked, write_config

NAME = "tiny-avcil-seed0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of a stream in a database; the stream's own folder is removed."""
    folder = tmp_path_factory.mktemp("begun")
    config = load_config(str(write_config(folder)), ["optim.epochs=2", "tracking.register_as=none"])
    [[stream]] = run_ranks(run_tracked, 1, [config], [0, 1])
    shutil.rmtree(stream)
    return folder


def ignore(line: str) -> None:
    """Show nothing."""


def resume(
    folder: Path,
    output: Path,
    *overrides: str,
    run: str = NAME,
    show: Callable[[str], None] = ignore,
    **options: object,
) -> Resumption:
    request = ResumeRequest((f"output={output}", *overrides), **options)  # type: ignore[arg-type]
    return prepare_resume(uri_of(f"{folder}/runs"), run, request, show=show)


def test_a_stream_continues_from_its_last_committed_step(folder: Path, tmp_path: Path) -> None:
    ready = resume(folder, tmp_path)
    stream = f"{tmp_path}/{NAME}"
    assert ready.step == 1
    assert committed_steps(stream) == [1]
    assert load_artifact(stream, 1).config.output == f"{folder}/runs"
    assert ready.config.tracking.uri == uri_of(f"{folder}/runs")
    assert resume(folder, tmp_path).step == 1  # the same command again changes nothing


def test_a_damaged_or_missing_file_of_the_step_is_replaced_and_the_others_are_kept(
    folder: Path, tmp_path: Path
) -> None:
    resume(folder, tmp_path)
    step = tmp_path / NAME / "step_001"
    whole = {path.name: path.read_bytes() for path in step.iterdir()}
    kept = (step / "config.yaml").stat().st_ino
    (step / "model.safetensors").write_bytes(whole["model.safetensors"][:-1] + b"?")
    (step / "memory.json").unlink()
    resume(folder, tmp_path)
    assert {path.name: path.read_bytes() for path in step.iterdir()} == whole
    assert (step / "config.yaml").stat().st_ino == kept
    (step / "COMMITTED.json").write_bytes(b"{}")  # another commit, whose folder is replaced as a whole
    (step / "other.json").write_bytes(b"")
    resume(folder, tmp_path)
    assert {path.name: path.read_bytes() for path in step.iterdir()} == whole


def test_an_earlier_step_can_be_named_if_it_is_committed(folder: Path, tmp_path: Path) -> None:
    assert resume(folder, tmp_path, from_step=0).step == 0
    assert committed_steps(f"{tmp_path}/{NAME}") == [0]
    with pytest.raises(TrackingError, match=r"step 2 is not committed there; these are: 0, 1"):
        resume(folder, tmp_path, from_step=2)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.lr=0.5"], r"optim\.lr: 0\.003 -> 0\.5: that makes another stream; add --fork"),
        (["scenario.classes_per_step=[3,1,2]"], r"scenario\.classes_per_step: .* not be comparable; .* --force"),
        (["model.modality=audio"], r"model\.modality: both -> audio: .* not be comparable"),
        (["method=finetune"], r"method.*: .*"),
        (["name=other"], r"name=other: the stream is tiny; a new name needs a new run: add --fork"),
    ],
)
def test_a_change_that_affects_results_is_refused(
    folder: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        resume(folder, tmp_path, *overrides)
    assert not (tmp_path / NAME).exists()


def test_other_shards_are_refused_and_missing_ones_are_an_error(folder: Path, tmp_path: Path) -> None:
    other = make_feature_shards(tmp_path / "other", classes=6, clips={"train": 24, "val": 6, "test": 10}, seed=1)
    with pytest.raises(ConfigError, match=r"manifest hash: \w+ -> \w+: .* not be comparable"):
        resume(folder, tmp_path, f"data.manifest={other}", fork=True)
    with pytest.raises(DataError, match=r"gone\.json: missing; give the manifest of the shards .* data\.manifest="):
        resume(folder, tmp_path, f"data.manifest={tmp_path}/gone.json")


def test_a_fork_is_a_run_of_its_own_with_its_origin_in_tags(folder: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    ready = resume(folder, tmp_path, "optim.lr=0.5", "data.read_threads=2", fork=True, show=lines.append)
    shown = "\n".join(lines)
    assert "optim.lr: 0.003 -> 0.5  (fork)" in shown
    assert "data.read_threads: 8 -> 2  (operational)" in shown
    [[stream]] = run_ranks(run_tracked, 1, [ready.config], [2])
    assert committed_steps(stream) == [1, 2]
    changes = recorded_changes(stream, 2)
    assert {change.key: change.now for change in changes} == {"optim.lr": 0.5, "name": "tiny-fork"}
    origin, fork = (find_stream(uri_of(f"{folder}/runs"), name) for name in (NAME, "tiny-fork-avcil-seed0"))
    assert sorted(origin.steps) == [0, 1]
    assert sorted(fork.steps) == [1, 2]
    assert fork.run.data.tags["avcil.fork_of"] == origin.run.info.run_id
    assert fork.run.data.tags["avcil.fork_step"] == "1"
    assert json.loads(fork.run.data.tags["avcil.changes"])[0]["key"] == "optim.lr"
    again = resume(folder, tmp_path / "third", run=fork.run.info.run_id)  # a fork is resumed like any other
    assert (again.step, again.config.optim.lr) == (2, 0.5)


def test_a_stream_continues_as_a_chain_of_jobs(folder: Path, tmp_path: Path) -> None:
    where = ("--uri", uri_of(f"{folder}/runs"), f"output={tmp_path}", "--fork", "name=chained")
    result = avcil("resume", NAME, *where, "--cluster", "local", "cluster.tasks_per_node=2")
    assert result.exit_code == 0, result.output
    stream = f"{tmp_path}/chained-avcil-seed0"
    assert f"{stream}: 1 submitted; see it with: avcil status {stream}" in result.output
    chain = read_chain(stream)
    assert chain.cluster().tasks_per_node == 2
    wait_for(lambda: not is_supervised(chain.folder), "the end of the chain")
    assert committed_steps(stream) == [1, 2]
    tracked = find_stream(uri_of(f"{folder}/runs"), "chained-avcil-seed0")
    assert (tracked.run.info.status, sorted(tracked.steps)) == ("FINISHED", [1, 2])


def test_force_is_recorded(folder: Path, tmp_path: Path) -> None:
    ready = resume(folder, tmp_path, "data.source_disjoint=true", force=True)
    record = read_identity(f"{tmp_path}/{NAME}")
    assert record is not None
    assert [(change.key, change.forced) for change in record.changes] == [("data.source_disjoint", True)]
    assert ready.config.data.source_disjoint
    with pytest.raises(ConfigError, match=r"step 1 is in this run already"):
        resume(folder, tmp_path / "other", "data.source_disjoint=true", from_step=0, force=True)


def test_a_password_in_the_uri_is_refused_and_not_shown() -> None:
    result = avcil("resume", NAME, "--uri", "http://someone:secret@server")
    assert result.exit_code == 2
    assert result.output.startswith(
        "avcil: --uri: no user or password here; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    )
    assert "secret" not in result.output


def test_without_an_output_the_servers_settings_do_not_choose_where_files_go(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines: list[str] = []
    ready = prepare_resume(uri_of(f"{folder}/runs"), NAME, ResumeRequest(), show=lines.append)
    assert ready.config.output == "runs"
    assert committed_steps(f"{tmp_path}/runs/{NAME}") == [1]
    assert not Path(folder, "runs", NAME).exists()
    assert f"the files go to runs, not to {folder}/runs" in "\n".join(lines)


def test_another_stream_in_the_folder_is_left_alone(folder: Path, tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    (tmp_path / NAME / "stream.json").write_text('{"id": "x", "origin_run": null, "origin_step": null, "changes": []}')
    with pytest.raises(ConfigError, match=r"another stream is there; give output="):
        resume(folder, tmp_path)


def test_a_flipped_byte_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    tracked = find_stream(uri_of(f"{folder}/runs"), NAME)
    [path] = Path(folder, "runs/mlartifacts").rglob(f"{tracked.steps[1].info.run_id}/artifacts/step_001/memory.json")
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"0", b"1", 1))
    try:
        with pytest.raises(ArtifactError, match=r"step_001/memory\.json: damaged, .* --from-step"):
            resume(folder, copy)
        assert resume(folder, copy, from_step=0).step == 0
    finally:
        path.write_bytes(whole)


def test_the_registered_model_predicts_from_raw_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clips = render_tiny(tmp_path / "clips", classes=2, train=4, val=1, test=1)
    assert run_avcil("shards", "build", clips, tmp_path / "shards").returncode == 0
    sizes = {"frames": 2, "size": 32, "mel_bins": 16, "mel_frames": 64}
    small = {"kind": "small", "dim": 8}
    config = write_config(
        tmp_path,
        data={"manifest": f"{tmp_path}/shards/manifest.json", "clip": sizes},
        scenario={"classes_per_step": [1, 1]},
        model={"visual": small, "audio": small},
        method="icarl",
        memory={"size": 4},
        optim={"epochs": 1, "global_batch": 4, "global_replay_batch": 2, "global_eval_batch": 2},
    )
    trained = run_avcil("train", config)
    assert trained.returncode == 0, trained.stderr
    mlflow.set_registry_uri(uri_of(f"{tmp_path}/runs"))
    mlflow.set_tracking_uri(uri_of(f"{tmp_path}/runs"))
    model = mlflow.pyfunc.load_model("models:/tiny-icarl/1")
    classes = model.metadata.metadata["classes"]
    assert len(classes) == 2
    raw = [tiny_clip(0), tiny_clip(1)]
    path = tmp_path / "one.mp4"
    path.write_bytes(raw[1])
    monkeypatch.setenv("AVCIL_CLIPS", str(tmp_path))
    from_bytes = model.predict(pd.DataFrame({"clip": raw}))
    from_path = model.predict(pd.DataFrame({"path": [str(path)]}))
    assert list(from_bytes.columns) == ["class", "probability", "scores"]
    assert next(iter(from_bytes["scores"][0])) == from_bytes["class"][0]
    assert set(from_bytes["scores"][0]) == set(classes)
    assert sum(from_bytes["scores"][0].values()) == pytest.approx(1)
    assert from_path["scores"][0] == pytest.approx(from_bytes["scores"][1], abs=1e-5)
    with pytest.raises(MlflowException, match=r"^gone.mp4|gone.mp4: missing"):
        model.predict(pd.DataFrame({"path": ["gone.mp4"]}))
    best = mlflow.MlflowClient().get_model_version_by_alias("tiny-icarl", "best")
    assert (str(best.version), "mean accuracy" in best.description) == ("1", True)
    example = model.predict(model.input_example)
    assert len(example) == 1
    saved = {file.suffix for file in Path(tmp_path, "runs/mlartifacts").rglob("*") if file.is_file()}
    assert not saved & {".pkl", ".pickle", ".pt", ".bin"}
