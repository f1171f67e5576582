"""Which clips are cut from the same source video, told from their keys.

A VGGSound key is the video's id, `_`, and a start time. Test clips that share a video with a
training clip are no fair test.
"""

from collections.abc import Sequence

import numpy as np

from avcil_dist.data.manifest import Manifest


def source_of(key: str) -> str:
    """The source video of a key: what comes before its last `_`; the whole of a key without one."""
    return key.rsplit("_", 1)[0]


def source_disjoint(manifest: Manifest, classes: Sequence[str], clips: np.ndarray) -> np.ndarray:
    """Which of `clips` are from a video that no training clip of `classes` is from, a mask (clips,)."""
    numbers = manifest.shard_numbers(classes, "train")
    trained = {source_of(key) for number in numbers for key in manifest.shards[number].keys}
    return np.array([source_of(manifest.key(clip)) not in trained for clip in clips], dtype=bool)
