"""Compatibility of a stream with the settings and the data that continue it."""

from avcil_dist.config.compat import MANIFEST_HASH, result_changes
from avcil_dist.config.schema import Config
from avcil_dist.config.serialization import flatten
from avcil_dist.data.manifest import Manifest
from avcil_dist.errors import ArtifactError, ConfigError
from avcil_dist.streams.artifact import StepArtifact, load_artifact
from avcil_dist.streams.identity import read_identity
from avcil_dist.streams.stream import scenario_of, stream_url
from avcil_dist.streams.summary import StepSummary, load_summary, step_url


def load_previous(config: Config, manifest: Manifest, step: int) -> StepArtifact | None:
    """The artifact that the step starts from, without its weights (`load_model`); None at step 0.

    Raises ConfigError as `check_continues` does.
    """
    if step == 0:
        return None
    check_continues(config, manifest, step)
    artifact = load_artifact(stream_url(config), step - 1, with_model=False)
    check_manifest_scenario(stream_url(config), artifact, manifest)
    return artifact


def check_manifest_scenario(stream: str, artifact: StepArtifact | StepSummary, manifest: Manifest) -> None:
    """Check that a step has the scenario that its configuration defines over the manifest that it was made from.

    Another manifest may list its classes in another order, and is not compared. Raises ArtifactError.
    """
    if artifact.manifest_hash == manifest.content_hash and artifact.scenario != scenario_of(artifact.config, manifest):
        raise ArtifactError(
            f"{step_url(stream, artifact.step)}/scenario.json: not that of config.yaml and the manifest; "
            "run the step again"
        )


def check_continues(config: Config, manifest: Manifest, step: int) -> None:
    """Check that the step before `step` was made with the same settings and from the same data.

    Settings that only affect how a stream runs may differ, and changes that `avcil resume` recorded in the
    stream's identity. Raises ConfigError for any other difference: the stream's numbers would not be comparable.
    """
    stream = stream_url(config)
    summary = load_summary(stream, step - 1)
    identity = read_identity(stream)
    before = flatten(summary.config) | {MANIFEST_HASH: summary.manifest_hash}
    after = flatten(config) | {MANIFEST_HASH: manifest.content_hash}
    for change in result_changes(before, after):
        if identity is not None and identity.allows(change.key, change.before, change.after, step - 1):
            continue
        if change.key == MANIFEST_HASH:
            raise ConfigError(
                f"{stream}: step {step - 1} was made from other data than {config.data.manifest}; "
                "give the manifest it was made from, or begin anew with --restart"
            )
        raise ConfigError(
            f"{stream}: step {step - 1} was made with {change.key}={change.before}, not {change.after}; "
            "choose another name=, or begin anew with --restart"
        )
