"""Streams on disk: folder, scenario, committed steps, next step, lock of the writer."""

import logging
import shlex
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from filelock import Timeout

from avcil_dist import storage
from avcil_dist.config.schema import Config
from avcil_dist.data.manifest import Manifest
from avcil_dist.data.shard import SPLITS
from avcil_dist.errors import ConfigError
from avcil_dist.scenario import Scenario, configured_scenario
from avcil_dist.streams.summary import is_committed

LOCK_SECONDS = 60
QUIET_SECONDS = 2  # a wait of that length is not mentioned
_logger = logging.getLogger(__name__)
ARTIFACT_FOLDER = "mlartifacts"  # in an output folder: the copies of artifacts that a database of MLflow refers to


def stream_url(config: Config) -> str:
    """The folder of the stream's step artifacts."""
    return storage.join(config.output, config.stream_name)


def scenario_of(config: Config, manifest: Manifest) -> Scenario:
    """The scenario that the configuration defines over the manifest's classes."""
    return configured_scenario(config.scenario, manifest.classes)


def shards_of(manifest: Manifest, scenario: Scenario, step: int) -> list[int]:
    """The numbers of all shards that a step may read."""
    return [number for split in SPLITS for number in manifest.shard_numbers(scenario.seen(step), split)]


def next_step(stream: str, num_steps: int) -> int:
    """The step after the last committed one; `num_steps` when all are committed."""
    return next((step + 1 for step in reversed(range(num_steps)) if is_committed(stream, step)), 0)


def sole_writer(stream: str) -> AbstractContextManager[None]:
    """Lock a stream on a local folder, so that no other process trains a step of it while the block runs.

    Waits up to a minute for the lock: processes left by a killed start end within seconds. Raises ConfigError
    when another process still trains the stream.
    """
    return _locked(stream, ".lock")


def sole_runner(stream: str) -> AbstractContextManager[None]:
    """Lock a stream on a local folder for a command that runs its steps, between which no step holds its lock.

    Waits and raises as `sole_writer` does.
    """
    return _locked(stream, ".run.lock")


@contextmanager
def _locked(stream: str, suffix: str) -> Iterator[None]:
    path = storage.local_path(stream)
    if path is None:  # object storage has no locks
        yield
        return
    folder = Path(path)
    lock = folder.with_name(f".{folder.name}{suffix}")
    with ExitStack() as stack:
        try:
            try:
                stack.enter_context(storage.file_lock(lock, min(QUIET_SECONDS, LOCK_SECONDS)))
            except Timeout:
                _logger.warning("%s: another process trains this stream; waiting for its end", stream)
                stack.enter_context(storage.file_lock(lock, max(0, LOCK_SECONDS - QUIET_SECONDS)))
        except Timeout:
            raise ConfigError(
                f"{stream}: another process trains this stream; wait for it, or end it; "
                f"its jobs, if it is one of them: avcil status {shlex.quote(stream)}"
            ) from None
        yield
