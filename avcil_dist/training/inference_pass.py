"""What a network makes of given clips: one pass by all ranks, each clip exactly once.

The pass serves whatever needs more of a clip than its prediction: herding, class means, proxies,
sums in closed form. A clip is always seen in the same batch of the same size, whatever the number
of ranks, so what comes out does not depend on it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from avcil_dist.config.schema import DataConfig
from avcil_dist.data.clip_cache import ClipCache
from avcil_dist.data.loader import Batch, FixedSource, load_on_device
from avcil_dist.data.manifest import Manifest
from avcil_dist.data.plan import NO_CLIPS, plan_evaluation, rank_share
from avcil_dist.errors import DataError
from avcil_dist.models.network import Network
from avcil_dist.models.outputs import Output
from avcil_dist.scenario import Scenario
from avcil_dist.training.collectives import collect_texts, gather_rows
from avcil_dist.world import World

ROWS = 64  # clips that a rank sees at a time


@dataclass(frozen=True)
class ClassFeatures:
    """`clips` (n,) of one class that could be read, in the order asked for, and their features (n, D), on all ranks."""

    clips: np.ndarray
    features: Tensor


@dataclass(frozen=True)
class InferencePass:
    """Passes of all ranks together over clips of any split."""

    manifest: Manifest
    scenario: Scenario
    data: DataConfig
    world: World
    device: torch.device
    store: ClipCache | None = None

    def read(self, clips: np.ndarray, global_batch: int | None = None) -> Iterator[Batch]:
        """The rank's part of the clips, on its device. All ranks have equally many batches; padding is not valid.

        `global_batch`: clips at a time on all ranks; by default so many that it does not matter how many ranks
        there are. Raises DataError at the end, on all ranks, when more clips are damaged than
        `data.max_bad_fraction` allows.
        """
        plan = plan_evaluation(clips, global_batch or ROWS * self.world.size)
        source = FixedSource(rank_share(plan, self.world.rank, self.world.size))
        num_good, faults = torch.zeros(1, dtype=torch.long, device=self.device), list[str]()
        for batch in load_on_device(
            source,
            manifest=self.manifest,
            labels=self.scenario.labels,
            data=self.data,
            device=self.device,
            store=self.store,
        ):
            num_good += batch.valid.sum()
            faults.extend(batch.faults)
            yield batch
        num_bad = len(clips) - int(gather_rows(num_good, 1).sum())
        if num_bad > self.data.max_bad_fraction * len(clips):
            named = collect_texts(tuple(faults))[0]
            raise DataError(f"{num_bad} of {len(clips)} clips are damaged, the first: {named}")

    def batches(
        self, network: Network, clips: np.ndarray, global_batch: int | None = None
    ) -> Iterator[tuple[Batch, Output]]:
        """`read`, and what the network makes of each batch, without gradient."""
        was_training = network.training
        network.eval()
        for batch in self.read(clips, global_batch):
            with torch.no_grad():  # not inference_mode: what ZeRO 3 gathers under it could not be trained on afterwards
                output = network(batch.visual, batch.audio)
            yield batch, output
        network.train(was_training)

    def by_class(self, network: Network, clips: Mapping[str, np.ndarray]) -> dict[str, ClassFeatures]:
        """What the head would classify, of each class's clips, by class name."""
        everything = np.concatenate([NO_CLIPS, *clips.values()])
        features, valid = [], []
        for batch, output in self.batches(network, everything):
            features.append(gather_rows(output.feature, len(output.feature)).cpu())
            valid.append(gather_rows(batch.valid, len(batch.valid)).cpu())
        if not features:
            return {name: ClassFeatures(numbers, torch.zeros(0, 0)) for name, numbers in clips.items()}
        rows, good = torch.cat(features)[: len(everything)], torch.cat(valid)[: len(everything)]
        found, first = {}, 0
        for name, numbers in clips.items():
            part = slice(first, first + len(numbers))
            found[name] = ClassFeatures(numbers[good[part].numpy()], rows[part][good[part]])
            first += len(numbers)
        return found
