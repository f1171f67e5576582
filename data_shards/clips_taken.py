"""Clips of a listing that a build takes, by class and split: those with a file, each key once. 25 bytes per clip."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice, pairwise

import numpy as np

from avcil_dist.data.shard import Split
from data_shards.clip_bytes import FileStamp, file_stamp
from data_shards.listings.listing import Listing, ListingRow
from data_shards.listings.rows import repeated
from data_shards.rejections import Rejection

STAT_THREADS = 16
STATS_AT_ONCE = 4096

Group = tuple[str, Split]


@dataclass(frozen=True)
class TakenClips:
    """Numbers of the rows of each group, in the order of the listing, and those that are not taken."""

    rows_of_groups: list[np.ndarray]
    rejected: list[Rejection]
    sizes: np.ndarray  # (rows,) bytes of the first file
    states: np.ndarray  # (rows,) time of its last change, or the number of its version
    versions: tuple[str, ...]
    has_version: np.ndarray  # (rows,)

    def stamp(self, row: int) -> FileStamp:
        """Return the stamp of a row's first file."""
        state = int(self.states[row])
        return int(self.sizes[row]), self.versions[state] if self.has_version[row] else state


def take_clips(listing: Listing, groups: Sequence[Group]) -> TakenClips:
    """Look up the files of all rows, and divide the rows with a file by group, without duplicates of a key."""
    count = len(listing.rows)
    numbers = {group: number for number, group in enumerate(groups)}
    sizes, states, hashes = (np.zeros(count, dtype=np.int64) for _ in range(3))
    has_version, of_group = np.zeros(count, dtype=bool), np.empty(count, dtype=np.int32)
    versions = dict[str, int]()
    rejected = dict[int, Rejection]()
    for row, ((label, split, clip), stamp) in enumerate(_stamped(listing.rows)):
        of_group[row] = numbers[label, split]
        hashes[row] = hash((label, split, clip.key))
        if stamp is None:
            rejected[row] = Rejection(clip.path, label, split, "missing", "missing file")
            of_group[row] = len(groups)
            continue
        sizes[row], state = stamp
        has_version[row] = isinstance(state, str)
        states[row] = versions.setdefault(state, len(versions)) if isinstance(state, str) else state
    found = set[tuple[str, Split, str]]()
    for row in repeated(hashes).tolist():
        label, split, clip = listing.rows[row]
        if row in rejected:
            continue
        if (label, split, clip.key) in found:
            reason = f"duplicate key {clip.key!r}: the same file and interval come twice in this split of its class"
            rejected[row] = Rejection(clip.path, label, split, "duplicate", reason)
            of_group[row] = len(groups)
        found.add((label, split, clip.key))
    order = np.argsort(of_group, kind="stable")
    ends = np.searchsorted(of_group[order], np.arange(len(groups) + 1))
    rows = [order[first:last] for first, last in pairwise(ends)]
    in_order = [rejected[row] for row in sorted(rejected)]
    return TakenClips(rows, in_order, sizes, states, tuple(versions), has_version)


def _stamped(rows: Sequence[ListingRow]) -> Iterator[tuple[ListingRow, FileStamp | None]]:
    """Yield each row with the stamp of its first file; many files are looked up at a time."""
    with ThreadPoolExecutor(STAT_THREADS) as pool:
        reader = iter(rows)
        while some := list(islice(reader, STATS_AT_ONCE)):
            yield from zip(some, pool.map(file_stamp, [row.clip.files[0] for row in some]), strict=True)
