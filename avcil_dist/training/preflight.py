"""Preflight: all checks of a configuration, its data and its method before a stream runs."""

from collections.abc import Collection

from avcil_dist.config.encoders import trained_part
from avcil_dist.config.schema import Config
from avcil_dist.data.arrival import arrived
from avcil_dist.data.manifest import Manifest, check_shards
from avcil_dist.data.plan import check_batch_fits, rows_at_a_time
from avcil_dist.data.shard import Split
from avcil_dist.data.source_videos import source_disjoint
from avcil_dist.data.subset import load_data
from avcil_dist.errors import ConfigError
from avcil_dist.methods import make_method, method_class, method_names
from avcil_dist.methods.base import Needs
from avcil_dist.scenario import Scenario
from avcil_dist.streams.compat import check_continues
from avcil_dist.streams.stream import next_step, scenario_of, shards_of, stream_url


def preflight(config: Config, world_sizes: Collection[int], *, restart: bool, with_shards: bool = True) -> Scenario:
    """Check configuration, data and committed steps before a stream runs, for each number of ranks of its steps.

    `with_shards` is false for ranks under a launcher: their first step checks the shards, once for all ranks. Raises
    ConfigError or DataError for faults that would otherwise stop the stream later.
    """
    manifest = load_data(config.data)
    scenario = scenario_of(config, manifest)
    needs = make_method(config.method).needs
    if (manifest.kind == "feature") != (config.model.visual.kind == "precomputed"):
        raise ConfigError(
            f"{config.data.manifest} holds {manifest.kind}s, "
            f"which model.visual.kind={config.model.visual.kind} cannot take"
        )
    check_method_fits(config, needs, manifest, scenario)
    for size in world_sizes:
        _check_batches(config, needs, size)
    for step in range(scenario.num_steps):
        _check_step(config, needs, arrived(manifest, scenario, config.scenario, step), scenario, step)
    if with_shards:
        check_shards(manifest, shards_of(manifest, scenario, scenario.num_steps - 1))
    num_done = 0 if restart else next_step(stream_url(config), scenario.num_steps)
    if num_done:
        check_continues(config, manifest, num_done)
    return scenario


def check_method_fits(config: Config, needs: Needs, manifest: Manifest, scenario: Scenario) -> None:
    """Check that configuration and data provide the method's needs. Raises ConfigError with an alternative."""
    name = config.method.name
    _check_modality(config, needs)
    if needs.network_spec.pool is not None and config.model.fusion != "attention":
        raise ConfigError(
            f"model.fusion={config.model.fusion}: method {name} has no projection, its features are method.pool; "
            "use model.fusion=attention"
        )
    _check_memory(config, needs, scenario)
    if needs.whole_classes and config.scenario.blur:
        others = [name for name in method_names() if not _default_needs(name).whole_classes]
        raise ConfigError(
            f"scenario.blur={config.scenario.blur}: method {name} needs all training clips of a class in one step; set "
            f"it to 0, or use one of {', '.join(others)}"
        )
    if not needs.trains_at(1) and config.engine.zero_stage:
        raise ConfigError(
            f"engine.zero_stage={config.engine.zero_stage}: method {name} has no optimizer state to "
            "shard; use engine=zero0"
        )
    if needs.max_clips is not None:
        last = arrived(manifest, scenario, config.scenario, scenario.num_steps - 1)
        _check_clips(name, needs.max_clips, last.num_clips(scenario.classes, "train"))
    if config.data.source_disjoint:
        _check_sources(config, manifest, scenario)
    if manifest.kind == "clip":
        _check_encoders(config, needs)


def describe_needs(needs: Needs) -> list[str]:
    """Names of a method's needs, for people."""
    memory = {"none": [], "replay": ["memory (exemplars beside current clips)"], "join": ["memory (exemplars join)"]}
    descriptions = {
        "teacher": needs.teacher,
        "herding": needs.selection == "herding",
        "features of exemplars": needs.means,
        "logits stored with exemplars": needs.stored_logits,
        "sampling weights": needs.weighted_sampling,
        "attention of both modalities": needs.divergence,
        "both modalities": needs.both_modalities,
        "gradients of the teacher": needs.importance,
        "a head of proxies": needs.network_spec.head == "proxies",
        "projections for each step": needs.network_spec.branches,
        "a booster": needs.network_spec.booster,
        "parameters of its own": needs.network_spec.extension is not None,
        "shared layers that are frozen after step 0": needs.network_spec.freeze_shared,
        "all data of seen classes": needs.all_data,
        "whole classes": needs.whole_classes,
        "a fresh network each step": needs.fresh_network,
        "fixed scores of the analytic head": needs.network_spec.anchor is not None,
        "validation clips": needs.validation,
        "a correction by logits of validation clips": needs.calibration,
        "the network before training": needs.untrained,
        "features of all clips": needs.clip_features,
        "gradients at step 0 alone": needs.training == "first step",
        "no gradients": needs.training == "never",
    }
    return [*memory[needs.memory], *(words for words, needed in descriptions.items() if needed)]


def _check_modality(config: Config, needs: Needs) -> None:
    if config.model.modality == "both" or not needs.both_modalities:
        return
    others = [name for name in method_names() if not _default_needs(name).both_modalities]
    raise ConfigError(
        f"model.modality={config.model.modality}: method {config.method.name} compares sound with pictures; use "
        f"model.modality=both, or one of {', '.join(others)}, or switch off its parts that do "
        "(method.instance, method.class_aware, method.attention)"
    )


def _default_needs(name: str) -> Needs:
    kind = method_class(name)
    return kind(kind.Options()).needs


def _check_memory(config: Config, needs: Needs, scenario: Scenario) -> None:
    """Check that the memory has room for one exemplar per class whenever a step uses it."""
    if needs.memory == "none":
        if needs.stored_logits or needs.means:
            raise ConfigError(
                f"method {config.method.name}: needs logits or features of exemplars and has no memory; its `needs` "
                'must have memory="replay" or memory="join"'
            )
        return
    last = scenario.num_steps - (1 if needs.means else 2)
    if last >= 0 and config.memory.size < scenario.num_seen(last):
        without = [name for name in method_names() if _default_needs(name).memory == "none"]
        raise ConfigError(
            f"memory.size={config.memory.size}: method {config.method.name} needs an exemplar per class, "
            f"{scenario.num_seen(last)} in all; raise it, or use a method without memory: {', '.join(without)}"
        )


def _check_clips(name: str, max_clips: int, num_clips: int) -> None:
    if num_clips > max_clips:
        raise ConfigError(
            f"method.max_clips={max_clips}: method {name} keeps the features of all {num_clips} training clips; raise "
            "it if the memory is there, set method.landmarks to approximate, or use method=analytic, which keeps sums"
        )


def _check_sources(config: Config, manifest: Manifest, scenario: Scenario) -> None:
    """Check that step 0 has test clips of videos without training clips."""
    if not source_disjoint(manifest, scenario.classes, manifest.clips(scenario.new(0), "test")).any():
        raise ConfigError(
            f"data.source_disjoint: every test clip of step 0 in {config.data.manifest} is from a training clip's "
            "video; set it to false"
        )


def _check_encoders(config: Config, needs: Needs) -> None:
    """Check that encoders are fixed for a method on their tokens, and pretrained for one that is anchored in them."""
    for encoder in config.model.used:
        if needs.network_spec.pool and trained_part(encoder) != "frozen":
            raise ConfigError(
                f"model: method {config.method.name} needs fixed features, and an encoder of kind "
                f"{encoder.kind} is trained; use features of frozen encoders, or method.features=network, which trains "
                "a network at step 0"
            )
        if needs.network_spec.anchor and trained_part(encoder) is None:
            raise ConfigError(
                f"model: method {config.method.name} is anchored in the tokens of pretrained encoders, and one of kind "
                f"{encoder.kind} has no weights; use features, or transformers"
            )
        if needs.network_spec.anchor and trained_part(encoder) == "adapters":
            raise ConfigError(
                f"model: method {config.method.name} is anchored in tokens that stay, and adapters change them at step "
                "0; train them by method=finetune, write features of that step (avcil shards features), and use these"
            )


def _check_batches(config: Config, needs: Needs, world_size: int) -> None:
    """Check that `world_size` ranks can share the global batches, and a rank's part its micro-batches."""
    optim = config.optim
    check_batch_fits("optim.global_batch", optim.global_batch, world_size)
    check_batch_fits("optim.global_replay_batch", optim.global_replay_batch, world_size)
    replayed = optim.global_replay_batch if needs.memory == "replay" else 0
    rows_at_a_time(optim.global_batch // world_size, replayed // world_size, config.engine.micro_batch)


def check_enough_clips(config: Config, step: int, num_batches: int, num_clips: int) -> None:
    """Check that an epoch of a step has a batch. Raises ConfigError."""
    if not num_batches:
        raise ConfigError(
            f"optim.global_batch={config.optim.global_batch}: step {step} has only {num_clips} training clips; "
            f"choose at most {num_clips}"
        )


def _check_step(config: Config, needs: Needs, manifest: Manifest, scenario: Scenario, step: int) -> None:
    """Check that a step has enough training clips, and each of its classes clips of every split that is read."""
    trains = needs.trains_at(step)
    num_clips = manifest.num_clips(scenario.new(step), "train")
    if trains:
        check_enough_clips(config, step, num_clips // config.optim.global_batch, num_clips)
    selects = needs.validation or (trains and config.optim.keep_epoch == "best_val")
    splits: tuple[Split, ...] = ("train", "test", "val") if selects else ("train", "test")
    for split in splits:
        for name in scenario.new(step):
            if not manifest.shard_numbers([name], split):
                raise ConfigError(f"{config.data.manifest}: class {name!r} has no {split} clips")
