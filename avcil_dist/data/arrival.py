"""Arrival of the training clips: the part of a data set that a step and those before it have. Pure functions.

With `scenario.imbalance` a class keeps a part of its training clips, with a long tail over the classes. With
`scenario.blur` a share of a class's training clips arrives one step after the others. Validation and test clips stay.
"""

from dataclasses import replace

import numpy as np

from avcil_dist.config.schema import ScenarioConfig
from avcil_dist.data.manifest import Manifest
from avcil_dist.data.plan import NO_CLIPS
from avcil_dist.scenario import Scenario
from avcil_dist.seeds import generator


def arrived(manifest: Manifest, scenario: Scenario, settings: ScenarioConfig, step: int) -> Manifest:
    """Return the data set without the training clips that no step has, or that arrive after `step`.

    Clips have other numbers than in `manifest`, the same keys, and the same content hash as a whole.
    """
    if settings.imbalance is None and not settings.blur:
        return manifest
    kept = np.ones(int(manifest.first_clips[-1]), dtype=bool)
    for name, share in shares(scenario, settings).items():
        clips = manifest.clips([name], "train")
        order = clips[generator(settings.stream_seed, "imbalance", name).permutation(len(clips))]
        kept[order[num_kept(len(clips), share) :]] = False
    last = scenario.new(step)
    for name in last:
        clips = _kept_clips(manifest, name, kept)
        kept[clips[_is_late(scenario, settings, name, len(clips))]] = False
    return part_of(manifest, kept)


def late_clips(manifest: Manifest, scenario: Scenario, settings: ScenarioConfig, step: int) -> np.ndarray:
    """Return the clips of the classes of the step before that arrive at `step`; `manifest` is that of `arrived`."""
    if step == 0 or not settings.blur:
        return NO_CLIPS
    by_class = [(name, manifest.clips([name], "train")) for name in scenario.new(step - 1)]
    late = [clips[_is_late(scenario, settings, name, len(clips))] for name, clips in by_class]
    return np.concatenate([NO_CLIPS, *late])


def shares(scenario: Scenario, settings: ScenarioConfig) -> dict[str, float]:
    """Return the share of its training clips that each class keeps, imbalance^(-r / (C - 1)).

    r = 0 … C - 1 is the rank of the class, in a random order of the C classes. So the largest share is `imbalance`
    times the smallest (Cui et al. 2019). Without imbalance all shares are 1.
    """
    count = len(scenario.classes)
    if settings.imbalance is None or count == 1:
        return dict.fromkeys(scenario.classes, 1.0)
    ranks = generator(settings.stream_seed, "imbalance").permutation(count)
    return {
        name: float(settings.imbalance ** (-rank / (count - 1)))
        for name, rank in zip(scenario.classes, ranks, strict=True)
    }


def num_kept(count: int, share: float) -> int:
    """Return the number of clips that a class of `count` keeps: at least one."""
    return max(1, round(share * count))


def part_of(manifest: Manifest, kept: np.ndarray) -> Manifest:
    """Return the clips of the mask `kept`, with the content hash of `manifest`; shards without clips are left out."""
    shards = []
    for number, shard in enumerate(manifest.shards):
        rows = np.flatnonzero(kept[manifest.first_clips[number] : manifest.first_clips[number + 1]])
        if len(rows):
            shards.append(shard.of_rows(rows))
    return replace(manifest, shards=tuple(shards), whole_hash=manifest.content_hash)


def _kept_clips(manifest: Manifest, name: str, kept: np.ndarray) -> np.ndarray:
    clips = manifest.clips([name], "train")
    return clips[kept[clips]]


def _is_late(scenario: Scenario, settings: ScenarioConfig, name: str, count: int) -> np.ndarray:
    """Mask of the clips of a class that arrive one step later; at least one clip does not, and all of the last step."""
    late = np.zeros(count, dtype=bool)
    if name not in scenario.new(scenario.num_steps - 1):
        chosen = generator(settings.stream_seed, "blur", name).permutation(count)
        late[chosen[: min(round(settings.blur * count), count - 1)]] = True
    return late
