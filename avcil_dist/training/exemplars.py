"""Exemplar selection at the end of a step: the updated memory, and the features of its exemplars."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from avcil_dist.data.exemplar_memory import ExemplarMemory, herding_order, quota, random_order
from avcil_dist.data.manifest import Manifest
from avcil_dist.data.plan import NO_CLIPS
from avcil_dist.models.network import Network
from avcil_dist.training.collectives import decide_together
from avcil_dist.training.incremental_step import Step
from avcil_dist.training.inference_pass import InferencePass


def update_memory(step: Step, memory: ExemplarMemory, network: Network, inference: InferencePass) -> ExemplarMemory:
    """Return `memory` with exemplars of the step's new classes added. Equal on all ranks.

    Herding uses the features of `network`, which has the weights that the step commits. Without a memory in
    the method's needs, `memory` is returned unchanged. Raises DataError as `InferencePass.batches` does.
    """
    config, manifest, needs = step.config, step.manifest, step.needs
    if needs.memory == "none":
        return memory
    selection = needs.selection if config.memory.selection == "published" else config.memory.selection
    if selection == "random":
        share = quota(config.memory.size, len(memory.keys) + len(step.new_classes))
        ranked = {
            name: _keys(manifest, random_order(name, manifest.clips([name], "train"), config.seed)[:share])
            for name in step.new_classes
        }
    else:
        candidates = {name: manifest.clips([name], "train") for name in step.new_classes}
        by_class = inference.class_features(network, candidates)
        count = quota(config.memory.size, step.context.num_seen)
        # Rank 0 decides: the last digits of a sum may differ between types of machine.
        ranked = decide_together(
            lambda: {
                name: _keys(manifest, features.clips[herding_order(features.features.numpy(), count)])
                for name, features in by_class.items()
            }
        )
    return memory.update(ranked, config.memory.size)


def exemplar_features(step: Step, memory: ExemplarMemory, network: Network, inference: InferencePass) -> list[Tensor]:
    """Return the exemplars' features (exemplars, D) of each seen class, in label order. Equal on all ranks."""
    clips = {name: step.manifest.clip_numbers(name, keys) for name, keys in memory.keys.items()}
    by_class = inference.class_features(network, clips)
    return [by_class[name].features for name in step.seen_classes]


def exemplar_clips(manifest: Manifest, memory: ExemplarMemory) -> np.ndarray:
    """Return the clip numbers of all exemplars, class by class."""
    numbers = [manifest.clip_numbers(name, keys) for name, keys in memory.keys.items()]
    return np.concatenate([NO_CLIPS, *numbers])


def _keys(manifest: Manifest, clips: Sequence[int] | np.ndarray) -> list[str]:
    return [manifest.key(clip) for clip in clips]
