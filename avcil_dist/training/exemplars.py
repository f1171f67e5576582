"""The memory after a step: which exemplars of the new classes are kept, and their features."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from avcil_dist.config.schema import Config
from avcil_dist.data.exemplar_memory import ExemplarMemory, herding_order, quota, random_order
from avcil_dist.data.manifest import Manifest
from avcil_dist.data.plan import NO_CLIPS
from avcil_dist.methods.base import Needs, StepContext
from avcil_dist.models.network import Network
from avcil_dist.training.collectives import decide_together
from avcil_dist.training.inference_pass import InferencePass


@dataclass(frozen=True)
class ExemplarSelector:
    """Chooses exemplars at the end of a step, with the weights that are its result."""

    config: Config
    manifest: Manifest
    context: StepContext
    features: InferencePass

    def updated(self, memory: ExemplarMemory, needs: Needs, network: Network) -> ExemplarMemory:
        """The memory with the new classes in it; unchanged for a method without one. Equal on all ranks."""
        if needs.memory == "none":
            return memory
        selection = self.config.memory.selection
        if (needs.selection if selection == "published" else selection) == "random":
            ranked = {
                name: random_order(name, self._keys(clips), self.config.seed) for name, clips in self._candidates()
            }
        else:
            ranked = self._herded(network)
        return memory.update(ranked, self.config.memory.size)

    def exemplar_features(self, memory: ExemplarMemory, network: Network) -> list[Tensor]:
        """The features (exemplars, D) of each seen class, by label."""
        numbers = {name: self.manifest.clip_numbers(name, keys) for name, keys in memory.keys.items()}
        found = self.features.by_class(network, numbers)
        return [found[name].features for name in self.context.scenario.seen(self.context.step)]

    def _herded(self, network: Network) -> dict[str, list[str]]:
        count = quota(self.config.memory.size, self.context.num_seen)
        found = self.features.by_class(network, dict(self._candidates()))
        # Rank 0 decides: the last digits of a sum may differ between machines of different make.
        return decide_together(
            lambda: {
                name: self._keys(of_class.clips[herding_order(of_class.features.numpy(), count)])
                for name, of_class in found.items()
            }
        )

    def _candidates(self) -> list[tuple[str, np.ndarray]]:
        return [(name, self.manifest.clips([name], "train")) for name in self.context.scenario.new(self.context.step)]

    def _keys(self, clips: np.ndarray) -> list[str]:
        return [self.manifest.key(clip) for clip in clips]


def exemplar_clips(manifest: Manifest, memory: ExemplarMemory) -> np.ndarray:
    """The clip numbers of all exemplars."""
    numbers = [manifest.clip_numbers(name, keys) for name, keys in memory.keys.items()]
    return np.concatenate([NO_CLIPS, *numbers])
