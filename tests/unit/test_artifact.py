"""Step artifacts on disk: round trip, order of writes, damage, records of other versions."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import avcil_dist
from avcil_dist import storage
from avcil_dist.errors import ArtifactError
from avcil_dist.streams.artifact import load_artifact, save_artifact
from avcil_dist.streams.commit import (
    COMMITTED,
    encode_json,
    read_commit,
    read_verified_commit,
    write_commit,
    write_files,
)
from avcil_dist.streams.exemplar_logits import ExemplarLogits
from avcil_dist.streams.identity import Change, new_identity, read_identity, write_identity
from avcil_dist.streams.summary import (
    StepCommit,
    committed_steps,
    is_committed,
    load_metrics,
    load_summary,
    recorded_changes,
    step_url,
)
from avcil_dist.streams.tensors import encode_tensors
from tests.helpers.artifacts import make_artifact

FILES = (
    "model.safetensors",
    "method.safetensors",
    "method.json",
    "memory.json",
    "scenario.json",
    "metrics.json",
    "config.yaml",
)


def rewrite(stream: Path, file: str, data: bytes) -> None:
    """Replace a file of step 0 and its digest, as another version of the program would have written it."""
    folder = step_url(str(stream), 0)
    commit = read_commit(folder, StepCommit).model_dump()
    digests = commit["files"] | write_files(folder, {file: data})
    fields = {key: value for key, value in commit.items() if key not in ("files", "format")}
    write_commit(folder, digests, **fields)


def test_logits_of_exemplars_are_a_file_of_their_own(tmp_path: Path) -> None:
    logits = ExemplarLogits(torch.tensor([[1.0, 2], [3, 0], [0, 0]]), torch.tensor([2, 1, 0]))
    folder = save_artifact(str(tmp_path), replace(make_artifact(), exemplar_logits=logits))
    assert set(read_commit(folder, StepCommit).files) == {*FILES, "exemplars.safetensors"}
    found = load_artifact(str(tmp_path), 0).exemplar_logits
    assert found is not None
    assert torch.equal(found.values, logits.values)
    assert torch.equal(found.counts, logits.counts)
    wrong: list[dict[str, torch.Tensor]] = [
        {"logits": logits.values},
        logits.to_tensors() | {"more": torch.zeros(1)},
        logits.to_tensors() | {"logits": logits.values[:2]},
        logits.to_tensors() | {"logits": logits.values[:, :1]},
        logits.to_tensors() | {"logits": logits.values.double()},
        logits.to_tensors() | {"counts": logits.counts + 1},
        logits.to_tensors() | {"counts": logits.counts - 1},
        logits.to_tensors() | {"counts": logits.counts.float()},
    ]
    for tensors in wrong:
        rewrite(tmp_path, "exemplars.safetensors", encode_tensors(tensors))
        with pytest.raises(ArtifactError, match=r"exemplars\.safetensors: not the logits of the exemplars"):
            load_artifact(str(tmp_path), 0)


def test_an_artifact_is_read_as_it_was_written(tmp_path: Path) -> None:
    artifact = make_artifact()
    assert save_artifact(str(tmp_path), artifact) == step_url(str(tmp_path), 0)
    loaded = load_artifact(str(tmp_path), 0)
    for ours, theirs in ((artifact.model, loaded.model), (artifact.method, loaded.method)):
        assert set(ours) == set(theirs)
    assert torch.equal(loaded.model["weight"], artifact.model["weight"])
    assert torch.equal(loaded.method["means"], artifact.method["means"])
    assert loaded.method["count"] == 3
    assert list(loaded.memory.keys) == ["dog", "cat"]
    rest = {"model": {}, "method": {}}
    assert replace(loaded, **rest) == replace(artifact, **rest)
    summary = load_summary(str(tmp_path), 0)
    assert summary.config == artifact.config
    assert (summary.scenario, summary.metrics) == (artifact.scenario, artifact.metrics)
    assert (summary.step, summary.manifest_hash) == (0, "m")
    assert load_metrics(str(tmp_path), 0) == artifact.metrics


def test_a_step_whose_writing_is_cut_off_at_any_file_is_never_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, num_files = storage.files.write_bytes, len(FILES) + 1

    for last in range(num_files):
        written: list[str] = []

        def write_some(url: str, data: bytes, last: int = last, written: list[str] = written) -> None:
            if len(written) == last:
                raise OSError("cut off")
            written.append(url)
            write(url, data)

        monkeypatch.setattr(storage, "write_bytes", write_some)
        monkeypatch.setattr(storage.json_files, "write_bytes", write_some)
        with pytest.raises(OSError, match="cut off"):
            save_artifact(str(tmp_path), make_artifact())
        assert len(written) == last
        assert not is_committed(str(tmp_path), 0)
        assert committed_steps(str(tmp_path)) == []
    monkeypatch.undo()
    save_artifact(str(tmp_path), make_artifact())  # the same step again, over what was left
    assert committed_steps(str(tmp_path)) == [0]


def test_a_second_attempt_removes_the_files_of_the_first(tmp_path: Path) -> None:
    left = tmp_path / "step_000" / "left.bin"
    left.parent.mkdir()
    left.write_bytes(b"x")
    save_artifact(str(tmp_path), make_artifact())
    assert {path.name for path in left.parent.iterdir()} == {*FILES, COMMITTED}


def test_the_commit_has_size_and_digest_of_every_file(tmp_path: Path) -> None:
    folder = Path(save_artifact(str(tmp_path), make_artifact()))
    commit = read_verified_commit(str(folder), StepCommit)
    files = commit.files
    assert (commit.step, commit.manifest_hash, commit.code_version) == (0, "m", avcil_dist.__version__)
    assert set(files) == set(FILES)
    for name, digest in files.items():
        data = (folder / name).read_bytes()
        assert (digest.size, digest.sha256) == (len(data), storage.sha256(data))


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["missing", "cut", "changed"])
def test_a_file_that_is_missing_or_changed_is_an_error_with_its_name(tmp_path: Path, file: str, damage: str) -> None:
    path = Path(save_artifact(str(tmp_path), make_artifact()), file)
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(data[:-1] if damage == "cut" else bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(ArtifactError, match=file):
        load_artifact(str(tmp_path), 0)
    with pytest.raises(ArtifactError, match=file):
        read_verified_commit(str(path.parent), StepCommit)
    if file in ("scenario.json", "metrics.json", "config.yaml"):
        with pytest.raises(ArtifactError, match=file):
            load_summary(str(tmp_path), 0)
    if file == "metrics.json":
        with pytest.raises(ArtifactError, match=file):
            load_metrics(str(tmp_path), 0)


def test_a_step_without_commit_is_an_error_that_names_the_step(tmp_path: Path) -> None:
    for read in (load_artifact, load_summary, load_metrics, recorded_changes):
        with pytest.raises(ArtifactError, match=r"step_003: no committed step artifact; run step 3 first"):
            read(str(tmp_path), 3)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 1}', '{"format": 2, "files": {}}'])
def test_a_damaged_commit_is_an_artifact_error(tmp_path: Path, text: str) -> None:
    Path(save_artifact(str(tmp_path), make_artifact()), COMMITTED).write_text(text)
    with pytest.raises(ArtifactError, match="step_000"):
        load_artifact(str(tmp_path), 0)


def test_a_commit_of_another_format_is_refused(tmp_path: Path) -> None:
    path = Path(save_artifact(str(tmp_path), make_artifact()), COMMITTED)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 7}))
    with pytest.raises(ArtifactError, match=r"COMMITTED\.json: not a commit of format 1 \(format: Input should be 1\)"):
        load_artifact(str(tmp_path), 0)


def test_equal_values_give_equal_bytes() -> None:
    assert encode_json({"b": [1], "a": {"d": 2, "c": 3}}) == encode_json({"a": {"c": 3, "d": 2}, "b": [1]})


@pytest.mark.parametrize(
    ("file", "data"),
    [
        ("metrics.json", b"{}"),
        ("metrics.json", b"[]"),
        ("metrics.json", b"{"),
        ("scenario.json", b"[]"),
        ("scenario.json", b'{"steps": 3}'),
        ("scenario.json", b"{}"),
        ("config.yaml", b"a: 1"),
        ("config.yaml", b"\xff"),
        ("memory.json", b"[]"),
        ("model.safetensors", b"{}"),
        ("method.json", b"[]"),
    ],
)
def test_a_file_of_another_version_is_an_artifact_error(tmp_path: Path, file: str, data: bytes) -> None:
    save_artifact(str(tmp_path), make_artifact())
    rewrite(tmp_path, file, data)
    with pytest.raises(ArtifactError, match=rf"step_000/{re.escape(file)}: not .*(make it|run the step) again"):
        load_artifact(str(tmp_path), 0)
    if file in ("metrics.json", "scenario.json", "config.yaml"):
        with pytest.raises(ArtifactError, match="step_000"):
            load_summary(str(tmp_path), 0)
    if file == "metrics.json":
        with pytest.raises(ArtifactError, match="step_000"):
            load_metrics(str(tmp_path), 0)


def test_steps_are_counted_by_their_number_and_only_with_a_commit(tmp_path: Path) -> None:
    for step in (0, 2, 10, 999, 1000):
        write_commit(step_url(str(tmp_path), step), {}, step=step)
    (tmp_path / "step_003").mkdir()
    (tmp_path / "events").mkdir()
    write_commit(str(tmp_path / "step_10"), {}, step=10)  # not a name that this program gives
    assert committed_steps(str(tmp_path)) == [0, 2, 10, 999, 1000]  # by number, not by name


def test_changes_of_the_identity_are_recorded_in_the_commit(tmp_path: Path) -> None:
    change = Change(0, "optim.lr", 0.1, [0.2, "x"], forced=True)
    write_identity(str(tmp_path), replace(new_identity(), changes=(change,)))
    save_artifact(str(tmp_path), make_artifact())
    assert recorded_changes(str(tmp_path), 0) == (change,)


def test_an_identity_is_read_as_it_was_written_and_allows_its_changes_only(tmp_path: Path) -> None:
    assert read_identity(str(tmp_path)) is None
    changes = (Change(1, "optim.lr", 0.1, 0.2, forced=False), Change(2, "seed", 0, 1, forced=True))
    identity = replace(new_identity(), origin_run="r", origin_step=1, changes=changes)
    write_identity(str(tmp_path), identity)
    assert read_identity(str(tmp_path)) == identity
    assert identity.allows("optim.lr", 0.1, 0.2, 1)
    assert identity.allows("seed", 0, 1, 2)
    assert not identity.allows("optim.momentum", 0.1, 0.2, 1)
    assert not identity.allows("optim.lr", 0.3, 0.2, 1)
    assert not identity.allows("optim.lr", 0.1, 0.3, 1)
    assert not identity.allows("optim.lr", 0.1, 0.2, 2)
    renewed = identity.renewed()
    assert renewed.id != identity.id
    assert replace(renewed, id=identity.id) == identity


@pytest.mark.parametrize("record", [[], {}, {"id": "x", "changes": [{"key": "a"}]}, {"id": None, "changes": []}])
def test_a_damaged_identity_is_an_artifact_error(tmp_path: Path, record: Any) -> None:
    (tmp_path / "stream.json").write_text(json.dumps(record))
    with pytest.raises(ArtifactError, match=r"stream\.json"):
        read_identity(str(tmp_path))
