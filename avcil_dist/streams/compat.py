"""Compatibility of a stream with the settings and the data that continue it."""

from collections.abc import Mapping
from typing import Any

from avcil_dist.compose import flatten
from avcil_dist.config.schema import Config
from avcil_dist.data.manifest import Manifest
from avcil_dist.errors import ConfigError
from avcil_dist.streams.artifact import StepArtifact, load_artifact, load_origin
from avcil_dist.streams.identity import read_identity
from avcil_dist.streams.stream import stream_url

MANIFEST = "manifest hash"  # compared like a setting
# Settings that change how and where a stream runs, not its results.
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
COMPUTED = ("engine.precision", "engine.max_grad_norm")  # these of the engine's change results


def load_previous(config: Config, manifest: Manifest, step: int) -> StepArtifact | None:
    """The artifact that the step starts from; None at step 0. Raises ConfigError as `check_continues` does."""
    if step == 0:
        return None
    check_continues(config, manifest, step)
    return load_artifact(stream_url(config), step - 1)


def check_continues(config: Config, manifest: Manifest, step: int) -> None:
    """Check that the step before `step` was made with the same settings and from the same data.

    Settings that only affect how a stream runs may differ, and changes that `avcil resume` recorded in the
    stream's identity. Raises ConfigError for any other difference: the stream's numbers would not be comparable.
    """
    stream = stream_url(config)
    origin = load_origin(stream, step - 1)
    identity = read_identity(stream)
    was = flatten(origin.config) | {MANIFEST: origin.manifest_hash}
    now = flatten(config) | {MANIFEST: manifest.content_hash}
    for key in changed_settings(was, now):
        if identity is not None and identity.allows(key, was.get(key), now.get(key), step - 1):
            continue
        if key == MANIFEST:
            raise ConfigError(
                f"{stream}: step {step - 1} was made from other data than {config.data.manifest}; "
                "give the manifest it was made from, or begin anew with --restart"
            )
        raise ConfigError(
            f"{stream}: step {step - 1} was made with {key}={was.get(key)}, not {now.get(key)}; "
            "choose another name=, or begin anew with --restart"
        )


def changed_settings(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The settings that differ between two flattened configurations and change a stream's results."""
    return [key for key in sorted({*was, *now}) if was.get(key) != now.get(key) and not is_operational(key)]


def changed_setting(was: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first of `changed_settings`, or None."""
    return next(iter(changed_settings(was, now)), None)


def is_operational(key: str) -> bool:
    """Whether a setting changes how and where a stream runs, not its results."""
    return key.startswith(OPERATIONAL) and key not in COMPUTED
