"""A stream of steps: where it lies, which steps are committed, whether it may go on."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from avcil_dist import storage
from avcil_dist.compose import flatten
from avcil_dist.config.schema import Config
from avcil_dist.data.manifest import SPLITS, Manifest
from avcil_dist.errors import ConfigError
from avcil_dist.scenario import Scenario, make_scenario
from avcil_dist.streams.artifact import StepArtifact, is_committed, load_artifact, load_origin
from avcil_dist.streams.identity import read_identity

LOCK_SECONDS = 60
MANIFEST = "manifest hash"  # what is held against each other beside the settings
# Settings that say how and where a stream runs, not what it computes.
OPERATIONAL = (
    "output",
    "engine.",
    "snapshot.",
    "tracking.",
    "data.manifest",
    "data.decode_workers",
    "data.read_threads",
    "data.shard_cache",
    "data.clip_cache",
    "data.prefetch_shards",
    "data.retry_seconds",
    "optim.global_eval_batch",
)
COMPUTED = ("engine.precision", "engine.max_grad_norm")  # these of the engine's do


def stream_url(config: Config) -> str:
    """The folder of the stream's step artifacts."""
    return storage.join(config.output, config.stream_name)


def scenario_of(config: Config, manifest: Manifest) -> Scenario:
    """The class stream that the configuration makes of the manifest's classes."""
    scenario = config.scenario
    return make_scenario(
        manifest.classes, steps=scenario.classes_per_step, classes=scenario.classes, shuffle=scenario.shuffle_seed
    )


def next_step(stream: str, num_steps: int) -> int:
    """The step after the last one committed; `num_steps` when all are done."""
    return next((step + 1 for step in reversed(range(num_steps)) if is_committed(stream, step)), 0)


def load_previous(config: Config, manifest: Manifest, step: int) -> StepArtifact | None:
    """What the step starts from; None at step 0. Raises ConfigError as `check_continues` does."""
    if step == 0:
        return None
    check_continues(config, manifest, step)
    return load_artifact(stream_url(config), step - 1)


def changed_settings(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The settings that differ and say what a stream computes, of two flattened configurations."""
    return [key for key in sorted({*was, *now}) if was.get(key) != now.get(key) and not is_operational(key)]


def changed_setting(was: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first of them."""
    return next(iter(changed_settings(was, now)), None)


@contextmanager
def sole_writer(stream: str) -> Iterator[None]:
    """No other process trains this stream on a local folder while the block runs.

    Raises ConfigError when one does; what a killed start left behind ends within seconds, and is waited for.
    """
    path = storage.local_path(stream)
    if path is None:  # object storage has no locks
        yield
        return
    folder = Path(path)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder.with_name(f".{folder.name}.lock"), timeout=LOCK_SECONDS):
            yield
    except Timeout:
        raise ConfigError(f"{stream}: another process trains this stream; wait for it, or end it") from None


def check_continues(config: Config, manifest: Manifest, step: int) -> None:
    """Raises ConfigError when the step before `step` was made with other settings or from other data.

    A stream of mixed settings would be a result of nothing. Changes that the user allowed as the stream was
    resumed are in its record, and pass.
    """
    stream = stream_url(config)
    origin = load_origin(stream, step - 1)
    record = read_identity(stream)
    was = flatten(origin.config) | {MANIFEST: origin.manifest_hash}
    now = flatten(config) | {MANIFEST: manifest.content_hash}
    for key in changed_settings(was, now):
        if record is not None and record.allows(key, was.get(key), now.get(key), step - 1):
            continue  # said at `avcil resume`
        if key == MANIFEST:
            raise ConfigError(
                f"{stream}: step {step - 1} was made from other data than {config.data.manifest}; "
                "give the manifest it was made from, or begin anew with --restart"
            )
        raise ConfigError(
            f"{stream}: step {step - 1} was made with {key}={was.get(key)}, not {now.get(key)}; "
            "choose another name=, or begin anew with --restart"
        )


def is_operational(key: str) -> bool:
    """Whether a setting says how and where a stream runs, not what it computes."""
    return key.startswith(OPERATIONAL) and key not in COMPUTED


def shards_of(manifest: Manifest, scenario: Scenario, step: int) -> list[int]:
    """The numbers of all shards that a step may read."""
    return [number for split in SPLITS for number in manifest.shard_numbers(scenario.seen(step), split)]
