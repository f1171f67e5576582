"""Source videos of clips, derived from their keys; selection of clips that share no video with training clips.

A VGGSound key is the video's id, `_`, and a start time. A test clip that shares a video with a training clip is not
a fair test.
"""

from collections.abc import Sequence

import numpy as np

from avcil_dist.data.manifest import Manifest


def source_of(key: str) -> str:
    """The source video of a key: the text before its last `_`; the whole key without one."""
    return key.rsplit("_", 1)[0]


def source_disjoint(manifest: Manifest, classes: Sequence[str], clips: np.ndarray) -> np.ndarray:
    """Mask (clips,): whether the video of a clip has no training clip of `classes`.

    The videos of `clips` are in memory at a time, those of the training clips are not.
    """
    sources = [source_of(manifest.key(clip)) for clip in clips]
    disjoint = set(sources)
    for number in manifest.shard_numbers(classes, "train") if sources else ():
        disjoint.difference_update(map(source_of, manifest.shards[number].keys))
    return np.array([source in disjoint for source in sources], dtype=bool)
