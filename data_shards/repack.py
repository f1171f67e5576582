"""Repacking: tars in which classes are mixed become shards by class and split.

The tars are never in memory or on the disk as a whole: their headers are read for the listing, and then each clip, as
a range of bytes, when its shard is built. The rest is the build of any listing (`build.py`).
"""

from collections.abc import Sequence

from avcil_dist import storage
from data_shards.build_plan import MANIFEST, PARTS, Part
from data_shards.listings.listing import Listing
from data_shards.listings.mixed_tars import SampleRules, read_mixed_tars
from data_shards.listings.splits import SplitShares
from data_shards.tar_files import expand_urls
from data_shards.workers import Progress

INDEXES = f"{PARTS}/indexes"


def list_for_repack(
    urls: Sequence[str],
    output: str,
    part: Part,
    *,
    rules: SampleRules,
    split: SplitShares | str | None,
    progress: Progress | None = None,
) -> Listing:
    """The listing of tars (see `read_mixed_tars`) for a build into `output`, which keeps their indexes until it ends.

    `progress` is called with the number of tars read and their total.
    """
    tars = expand_urls(urls)
    is_built = storage.exists(storage.join(output, MANIFEST))
    saved = None if is_built else storage.join(output, INDEXES)
    first = len(tars) * part.index // part.count
    return read_mixed_tars(tars, rules, split, saved=saved, first=first, progress=progress)
