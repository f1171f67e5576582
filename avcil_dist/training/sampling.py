"""Training batches of a step: its clips, late ones and exemplars as the method needs them, with its own weights."""

import math

import numpy as np

from avcil_dist.data.clip_weights import ClipWeights
from avcil_dist.data.exemplar_memory import ExemplarMemory
from avcil_dist.data.plan import NO_CLIPS
from avcil_dist.data.sampler import TrainingSampler
from avcil_dist.errors import ConfigError
from avcil_dist.methods.base import SamplingWeights
from avcil_dist.training.collectives import decide_together
from avcil_dist.training.exemplars import exemplar_clips
from avcil_dist.training.incremental_step import Step
from avcil_dist.training.preflight import check_enough_clips


def training_sampler(step: Step, memory: ExemplarMemory) -> TrainingSampler:
    """Return the sampler of a step's training batches. All ranks call it.

    Raises ConfigError for a step that trains without a whole batch, and for weights that a method cannot have.
    """
    exemplars = exemplar_clips(step.manifest, memory)
    late = NO_CLIPS if step.needs.all_data else step.late_clips
    classes = step.seen_classes if step.needs.all_data else step.new_classes
    sampler = TrainingSampler(
        manifest=step.manifest,
        classes=classes,
        exemplars=exemplars if step.needs.memory == "replay" else NO_CLIPS,
        joined=np.concatenate([exemplars, late]) if step.needs.memory == "join" else late,
        data=step.config.data,
        optim=step.config.optim,
        seed=step.config.seed,
        step=step.number,
        world=step.world,
        weights=_weights(step, classes, memory, late) if step.needs.weighted_sampling else None,
    )
    if step.has_training:
        check_enough_clips(step.config, step.number, sampler.batches_per_epoch, sampler.num_current)
    return sampler


def _weights(step: Step, classes: tuple[str, ...], memory: ExemplarMemory, late: np.ndarray) -> ClipWeights:
    """The weights that the method gives to the step's clips.

    Rank 0 computes them for all: last digits that differ between types of machine would give ranks different plans.
    """
    manifest, labels = step.manifest, step.scenario.labels
    num_seen = step.context.num_seen
    of_shard = manifest.shard_labels({name: labels[name] for name in step.seen_classes})
    current = np.bincount(of_shard[manifest.shards_of(late)], minlength=num_seen)
    shards = manifest.shard_numbers(classes, "train")
    np.add.at(current, of_shard[shards], np.diff(manifest.first_clips)[shards])
    kept = [len(memory.keys.get(name, ())) for name in step.seen_classes]

    def decide() -> tuple[list[float], list[list[float]]]:
        given = step.method.sampling_weights(current.tolist(), kept)
        _check(step.config.method.name, given, kept)
        return list(map(float, given.current)), [list(map(float, own)) for own in given.exemplars]

    of_class, of_exemplars = decide_together(decide)
    exemplars = exemplar_clips(manifest, memory)
    weights = np.concatenate([np.empty(0), *(of_exemplars[labels[name]] for name in memory.keys)])
    return ClipWeights.of(np.array([*of_class, 0.0])[of_shard], exemplars, weights)


def _check(name: str, weights: SamplingWeights, kept: list[int]) -> None:
    """Raise ConfigError for weights of other clips, or that are no frequencies."""
    found = [len(own) for own in weights.exemplars]
    if len(weights.current) != len(kept) or found != kept:
        raise ConfigError(
            f"method {name}: sampling_weights returned {len(weights.current)} weights of classes and {found} of "
            f"exemplars, not {len(kept)} and {kept}; correct the method"
        )
    values = [*weights.current, *(value for own in weights.exemplars for value in own)]
    if faulty := [value for value in values if not (math.isfinite(value) and value >= 0)]:
        raise ConfigError(f"method {name}: sampling_weights returned {faulty[0]}; a weight is a number from 0 on")
    if not any(values):
        raise ConfigError(f"method {name}: sampling_weights returned zeros alone, so no clip could be drawn")
