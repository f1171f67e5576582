"""The bytes of clips: positional reads at the manifest's offsets, from any fsspec filesystem.

A tar is never walked: where each member lies is in the manifest.
"""

from collections.abc import Mapping

import numpy as np

from avcil_dist import storage
from avcil_dist.data.manifest import Manifest
from avcil_dist.errors import DataError


class ShardReader:
    """Reads members of clips. Picklable; a filesystem is opened in the process that reads."""

    def __init__(self, manifest: Manifest, members: tuple[str, ...]) -> None:
        self.manifest = manifest
        self.members = members

    def read(self, clip: int) -> Mapping[str, bytes]:
        """Member name to bytes. Raises DataError, naming the clip, for missing shards and short reads."""
        number, row = self.manifest.locate(clip)
        shard, url = self.manifest.shards[number], self.manifest.url(number)
        starts = np.array([shard.offsets[member][row] for member in self.members])
        sizes = np.array([shard.sizes[member][row] for member in self.members])
        filesystem, path = storage.open_filesystem(url)
        try:
            found = filesystem.cat_ranges(
                [path] * len(starts), starts.tolist(), (starts + sizes).tolist(), on_error="raise"
            )
        except OSError as error:
            raise DataError(f"{url}: clip {shard.keys[row]}: {error}") from None
        for member, size, data in zip(self.members, sizes, found, strict=True):
            if len(data) != size:
                raise DataError(
                    f"{url}: clip {shard.keys[row]}: {member} has {len(data)} of {size} bytes; the shard is cut"
                )
        return dict(zip(self.members, found, strict=True))
