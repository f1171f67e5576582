"""Faults of a step's surroundings, on one rank: one line that names the file, and a step that can be run again."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch

from avcil_dist.compose import load_config
from avcil_dist.config.schema import Config
from avcil_dist.errors import ArtifactError, AvcilError, DataError, StorageError, TrainingError
from avcil_dist.streams.commit import Commit, read_verified_commit
from avcil_dist.streams.stream import stream_url
from avcil_dist.streams.summary import is_committed
from avcil_dist.system.signals import StopRequest
from avcil_dist.training import trainer
from avcil_dist.training.observer import Observer
from avcil_dist.training.snapshot import SnapshotManager
from avcil_dist.training.step import step_in_group
from avcil_dist.world import World
from tests.helpers.disks import read_only
from tests.helpers.streams import weights_digest, write_config

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_rank")]  # DeepSpeed starts a compiler as it is imported


def _config(folder: Path, name: str = "runs") -> Config:
    words = ("optim.epochs=2", "snapshot.every_iterations=2", "data.clip_cache=none", f"output={folder}/{name}")
    return load_config(str(write_config(folder)), words)


def _run(config: Config, step: int = 0, *observers: Observer) -> None:
    step_in_group(config, step, world=World(), observers=observers, device=torch.device("cpu"), stop=StopRequest())


def _fault(kind: type[AvcilError], config: Config, step: int = 0, *observers: Observer) -> str:
    """The text of the error that a step must end with."""
    with pytest.raises(kind) as raised:
        _run(config, step, *observers)
    assert "\n" not in str(raised.value)
    return str(raised.value)


class _Locks(Observer):
    """After `count` batches the folder can only be read, until the stack closes."""

    def __init__(self, folder: Path, count: int, stack: ExitStack) -> None:
        self.folder, self.count, self.stack = folder, count, stack

    def advance(self) -> None:
        self.count -= 1
        if self.count == 0:
            self.stack.enter_context(read_only(self.folder))


@pytest.mark.parametrize("count", [7, 13])
def test_output_that_can_only_be_read_ends_the_step_and_it_continues_to_the_same_bits(
    tmp_path: Path, count: int
) -> None:
    config, whole = _config(tmp_path), _config(tmp_path, "whole")
    with ExitStack() as stack:
        fault = _fault(StorageError, config, 0, _Locks(tmp_path / "runs", count, stack))
    assert fault.startswith(stream_url(config))
    assert "cannot be written (Read-only file system); make room, or name another folder" in fault
    assert not is_committed(stream_url(config), 0)
    commits = list(Path(stream_url(config)).rglob("COMMITTED.json"))
    assert commits  # of snapshots
    assert all(read_verified_commit(str(path.parent), Commit).files for path in commits)
    _run(config)
    _run(whole)
    assert weights_digest(stream_url(config), 0) == weights_digest(stream_url(whole), 0)


def test_step_without_its_shards_or_its_previous_step_ends_before_it_trains(tmp_path: Path) -> None:
    config = _config(tmp_path)
    assert "step_000" in _fault(ArtifactError, config, 1)
    shard = min((tmp_path / "shards/train").glob("c000-*.tar"))
    shard.rename(tmp_path / "kept")
    assert _fault(DataError, config).startswith(f"{shard}: missing")
    shutil.copy(tmp_path / "kept", shard)
    shard.write_bytes(shard.read_bytes()[:-512])
    assert _fault(DataError, config).startswith(f"{shard}: ")
    assert not Path(stream_url(config), "step_000").exists()
    shutil.move(tmp_path / "kept", shard)
    _run(config)
    weights = Path(stream_url(config), "step_000/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    assert _fault(ArtifactError, config, 1).startswith(f"{weights}: damaged")


def test_an_error_is_published_before_its_step_cleans_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class FillsMemory(Observer):
        def advance(self) -> None:
            raise torch.OutOfMemoryError("Tried to allocate 2 GiB")

    events: list[str] = []

    @contextmanager
    def publishing() -> Iterator[None]:
        try:
            yield
        except Exception as error:
            events.append(type(error).__name__)
            raise

    monkeypatch.setattr(trainer, "publishing_failures", publishing)
    monkeypatch.setattr(SnapshotManager, "close", lambda self: events.append("close"))
    with pytest.raises(TrainingError):
        _run(_config(tmp_path), 0, FillsMemory())
    assert events == ["TrainingError", "close"]
