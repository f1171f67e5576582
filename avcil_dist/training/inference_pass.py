"""Inference pass: the network's outputs for given clips, computed by all ranks together, each clip exactly once.

Used where a step needs more of a clip than its prediction: herding, class means, proxies, the teacher cache and
closed-form training. A clip is always in the same batch of the same size, whatever the number of ranks, so
its output does not depend on that number.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from avcil_dist.config.schema import DataConfig
from avcil_dist.data.batch import Batch
from avcil_dist.data.clip_cache import ClipCache
from avcil_dist.data.decode_pool import LethalClips
from avcil_dist.data.inputs import ClipInputs
from avcil_dist.data.loader import load_on_device
from avcil_dist.data.manifest import Manifest
from avcil_dist.data.noise import InputNoise
from avcil_dist.data.plan import NO_CLIPS, plan_evaluation, rank_share
from avcil_dist.data.sampler import FixedSampler
from avcil_dist.errors import DataError
from avcil_dist.models.network import Network
from avcil_dist.models.outputs import Output
from avcil_dist.scenario import Scenario
from avcil_dist.training.collectives import collect_texts, gather_rows
from avcil_dist.world import World

ROWS = 64  # clips per rank and batch
OnFaults = Callable[[Sequence[str]], None]  # receives the error lines of damaged clips, those of all ranks


@dataclass(frozen=True)
class ClassFeatures:
    """Readable clips of one class, `clips` (n,), in the order requested, and their features (n, D). On all ranks."""

    clips: np.ndarray
    features: Tensor


@dataclass(frozen=True)
class InferencePass:
    """Inference by all ranks together over clips of any split. `on_faults` is called after a pass with faults.

    `lethal` are the clips that crashed this rank's decoder, which later passes leave out (see `DecodePool`).
    """

    manifest: Manifest
    scenario: Scenario
    data: DataConfig
    world: World
    device: torch.device
    clip_cache: ClipCache | None = None
    inputs: ClipInputs | None = None  # as in `load_batches`
    noise: InputNoise | None = None
    on_faults: OnFaults = lambda faults: None
    lethal: LethalClips = field(default_factory=dict)

    def num_batches(self, clips: np.ndarray, global_batch: int) -> int:
        """Return the number of `batches`."""
        return len(plan_evaluation(clips, global_batch, self.world.size))

    def batches(self, clips: np.ndarray, global_batch: int | None = None) -> Iterator[Batch]:
        """Read the rank's part of the clips onto its device. All ranks have equally many batches; padding is not valid.

        `global_batch` is the number of clips of all ranks per batch, rounded up to a multiple of the number of ranks;
        by default `ROWS` per rank. Raises DataError at the end, on all ranks, when more clips are damaged than
        `data.max_bad_fraction` allows.
        """
        plan = plan_evaluation(clips, global_batch or ROWS * self.world.size, self.world.size)
        source = FixedSampler(rank_share(plan, self.world.rank, self.world.size))
        num_good, faults = torch.zeros(1, dtype=torch.long, device=self.device), list[str]()
        for batch in load_on_device(
            source,
            manifest=self.manifest,
            labels=self.scenario.labels,
            data=self.data,
            device=self.device,
            clip_cache=self.clip_cache,
            inputs=self.inputs,
            noise=self.noise,
            lethal=self.lethal,
        ):
            num_good += batch.valid.sum()
            faults.extend(batch.faults)
            yield batch
        num_bad = len(clips) - int(gather_rows(num_good, 1).sum())
        if not num_bad:
            return
        all_faults = collect_texts(tuple(faults))
        self.on_faults(all_faults)
        allowed = self.data.max_bad_fraction * len(clips)
        if num_bad > allowed:
            raise DataError(
                f"{num_bad} of {len(clips)} clips are damaged, data.max_bad_fraction allows {allowed:.0f}; "
                f"the first: {all_faults[0]}"
            )

    def run(
        self, network: Network, clips: np.ndarray, global_batch: int | None = None
    ) -> Iterator[tuple[Batch, Output]]:
        """Run the network on each of `batches`, in evaluation mode and without gradient.

        The network's mode is restored at the end, also if the caller stops early or a batch raises an error.
        """
        was_training = network.training
        network.eval()
        try:
            for batch in self.batches(clips, global_batch):
                with torch.no_grad():  # not inference_mode: ZeRO 3 gathers parameters here that are trained afterwards
                    output = network(batch.visual, batch.audio)
                yield batch, output
        finally:
            network.train(was_training)

    def class_features(self, network: Network, clips: Mapping[str, np.ndarray]) -> dict[str, ClassFeatures]:
        """Return `Output.feature` of each class's clips, by class name. The same on all ranks."""
        all_clips = np.concatenate([NO_CLIPS, *clips.values()])
        features, valid = [], []
        for batch, output in self.run(network, all_clips):
            features.append(gather_rows(output.feature, len(output.feature)).cpu())
            valid.append(gather_rows(batch.valid, len(batch.valid)).cpu())
        if not features:
            return {name: ClassFeatures(numbers, torch.zeros(0, 0)) for name, numbers in clips.items()}
        all_features, all_valid = torch.cat(features)[: len(all_clips)], torch.cat(valid)[: len(all_clips)]
        by_class, first = {}, 0
        for name, numbers in clips.items():
            rows = slice(first, first + len(numbers))
            is_valid = all_valid[rows]
            by_class[name] = ClassFeatures(numbers[is_valid.numpy()], all_features[rows][is_valid])
            first += len(numbers)
        return by_class
