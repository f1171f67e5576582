"""A stream of steps: where it lies, which steps are committed, whether it may go on."""

from avcil_dist import storage
from avcil_dist.compose import flatten
from avcil_dist.config import Config
from avcil_dist.data.manifest import Manifest, Split, load_manifest
from avcil_dist.data.plan import check_batch_fits
from avcil_dist.errors import ConfigError
from avcil_dist.methods import make_method
from avcil_dist.scenario import Scenario, make_scenario
from avcil_dist.training.artifact import StepArtifact, is_committed, load_artifact
from avcil_dist.training.requirements import check_needs

# Settings that say how and where a stream runs, not what it computes.
OPERATIONAL = ("output", "engine.", "tracking.", "data.manifest", "data.workers", "optim.eval_batch")


def stream_url(config: Config) -> str:
    """The folder of the stream's step artifacts."""
    return storage.join(config.output, config.stream_name)


def scenario_of(config: Config, manifest: Manifest) -> Scenario:
    """The class stream that the configuration makes of the manifest's classes."""
    scenario = config.scenario
    return make_scenario(manifest.classes, steps=scenario.steps, classes=scenario.classes, shuffle=scenario.shuffle)


def next_step(stream: str, num_steps: int) -> int:
    """The first step that is not committed; `num_steps` when all are."""
    return next((step for step in range(num_steps) if not is_committed(stream, step)), num_steps)


def load_previous(config: Config, manifest: Manifest, step: int) -> StepArtifact | None:
    """What the step starts from; None at step 0.

    Raises ConfigError when the step before was made with other settings or other data: a stream
    of mixed settings would be a result of nothing.
    """
    if step == 0:
        return None
    stream = stream_url(config)
    artifact = load_artifact(stream, step - 1)
    was, now = flatten(artifact.config), flatten(config)
    changed = [key for key in sorted({*was, *now}) if was.get(key) != now.get(key) and not key.startswith(OPERATIONAL)]
    if changed:
        key = changed[0]
        raise ConfigError(
            f"{stream}: step {step - 1} was made with {key}={was.get(key)}, not {now.get(key)}; "
            "choose another name=, or begin anew with --restart"
        )
    if artifact.manifest_hash != manifest.content_hash:
        raise ConfigError(
            f"{stream}: step {step - 1} was made from other data than {config.data.manifest}; "
            "give the manifest it was made from, or begin anew with --restart"
        )
    return artifact


def check_run(config: Config, world_size: int) -> Scenario:
    """Hold the configuration against the data and the processes before anything starts.

    Raises ConfigError or DataError for what would otherwise fail in the middle of the stream.
    """
    manifest = load_manifest(config.data.manifest)
    scenario = scenario_of(config, manifest)
    check_needs(config, manifest, scenario)
    check_batch_fits("optim.batch", config.optim.batch, world_size)
    check_batch_fits("optim.eval_batch", config.optim.eval_batch, world_size)
    check_batch_fits("optim.replay_batch", config.optim.replay_batch, world_size)
    if (manifest.kind == "feature") != (config.model.visual.kind == "precomputed"):
        raise ConfigError(
            f"{config.data.manifest} holds {manifest.kind}s, "
            f"which model.visual.kind={config.model.visual.kind} cannot take"
        )
    for step in range(scenario.num_steps):
        _check_step(config, manifest, scenario, step)
    return scenario


def _check_step(config: Config, manifest: Manifest, scenario: Scenario, step: int) -> None:
    needs = make_method(config.method).needs
    trains = needs.trains_at(step)
    num_clips = len(manifest.clips(scenario.new(step), "train"))
    if trains and num_clips < config.optim.batch:
        raise ConfigError(f"optim.batch={config.optim.batch}: step {step} has only {num_clips} training clips")
    selects = needs.validation or (trains and config.optim.select == "best_val")
    splits: tuple[Split, ...] = ("train", "test", "val") if selects else ("train", "test")
    for split in splits:
        for name in scenario.new(step):
            if not manifest.shard_numbers([name], split):
                raise ConfigError(f"{config.data.manifest}: class {name!r} has no {split} clips")
