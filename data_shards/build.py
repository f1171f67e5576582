"""Build of clip shards and their manifest from the clips of a listing.

The clips of one split of one class, in the order of the listing, are divided into chunks. A chunk becomes one shard,
whatever else is built on which machine. Every clip is decoded once before it is taken. The bytes of a clip that is a
whole file are not changed.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from json import dumps
from pathlib import Path
from typing import Any

import numpy as np

from avcil_dist import storage
from avcil_dist.data.clip_table import Region
from avcil_dist.data.decode import ClipInfo, SilentClipError, decode_clip, probe_clip
from avcil_dist.data.shard import SPLITS, Split
from avcil_dist.errors import ConfigError, DataError
from data_shards.build_plan import (
    FORMAT,
    WHOLE,
    BuildReport,
    Part,
    Plan,
    ShardJob,
    load_crashes,
    load_finished,
    merge_parts,
    run_shard_job,
    save_crashes,
    start_part,
)
from data_shards.clip_bytes import FileStamp, file_stamp, read_clip
from data_shards.clips_taken import take_clips
from data_shards.listings.listing import ClipFile, ListedClip, Listing
from data_shards.listings.read import read_listing
from data_shards.listings.splits import SplitShares
from data_shards.output_lock import sole_build
from data_shards.rejections import ClipRejectedError, Rejection
from data_shards.shard_writer import clip_members, shard_url
from data_shards.workers import MarkStart, Progress, map_in_workers

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chunk:
    """The clips of one shard, before any is opened."""

    job: ShardJob
    class_name: str
    split: Split
    clips: tuple[ListedClip, ...]


@dataclass(frozen=True)
class BuildSettings:
    """Number of clips in a full shard, minimum length of a clip in seconds, and whether muted clips are taken."""

    clips_per_shard: int
    min_seconds: float
    keep_muted: bool

    def __post_init__(self) -> None:
        if self.clips_per_shard < 1:
            raise ConfigError(f"clips_per_shard: {self.clips_per_shard}; a shard needs at least one clip")

    def digest(self, content: Any) -> str:
        """Digest of these settings and `content`. The url of the output is no part of it."""
        return storage.sha256(self._text(content).encode())

    def plan_digest(self, classes: Sequence[str]) -> "ListDigest":
        """`digest` of [classes, contents of the jobs], which are added one after the other."""
        return ListDigest(self._text([classes, []]).removesuffix("]]]"))

    def _text(self, content: Any) -> str:
        return dumps([FORMAT, self.clips_per_shard, self.min_seconds, self.keep_muted, content])


class ListDigest:
    """Digest of a JSON text that ends with a list of lists, which may be too long for the memory."""

    def __init__(self, head: str) -> None:
        self._digest = hashlib.sha256(head.encode())
        self._separator = ""

    def add(self, value: Any) -> None:
        """Add an element of the list."""
        self._digest.update((self._separator + dumps(value)).encode())
        self._separator = ", "

    def result(self) -> str:
        """Return the digest of the whole text."""
        self._digest.update(b"]]]")
        return self._digest.hexdigest()


def build_shards(
    source: Path,
    output: str,
    *,
    clips_per_shard: int,
    min_seconds: float,
    keep_muted: bool = True,
    videos: Path | None = None,
    shares: SplitShares | None = None,
    processes: int = 0,
    strict: bool = False,
    progress: Progress | None = None,
) -> BuildReport:
    """Build the shards of the listing `source` (see `read_listing`) into the folder or url `output`.

    Clips that are missing, unreadable, silent, shorter than `min_seconds`, no mp4, or duplicate are left out and
    listed in `rejected.csv`, and so are muted clips (sound of zeros) without `keep_muted`; with `strict` any such clip
    is an error and no manifest is written. With `processes`
    a clip that crashes its decoder is left out too; 0 decodes in this process. `progress` is called with the number
    of clips done and their total. Shards that an interrupted run finished are not built again, and a data set of the
    same inputs and settings is not changed. Raises ConfigError for an output of other inputs or settings, DataError
    for a listing that cannot be read or has no good clip.
    """
    settings = BuildSettings(clips_per_shard, min_seconds, keep_muted)
    listing = read_listing(source, videos, shares)
    return build_listing(listing, output, settings, processes=processes, strict=strict, progress=progress)


def build_part(
    source: Path,
    output: str,
    part: Part,
    *,
    clips_per_shard: int,
    min_seconds: float,
    keep_muted: bool = True,
    videos: Path | None = None,
    shares: SplitShares | None = None,
    processes: int = 0,
    progress: Progress | None = None,
) -> BuildReport | None:
    """Build the shards of one part of `source`, as `build_shards` does; `merge_parts` writes their manifest.

    The merged manifest equals that of a single build. Returns None, or the report of a data set that exists
    already. Raises ConfigError when other parts have other clips or settings.
    """
    settings = BuildSettings(clips_per_shard, min_seconds, keep_muted)
    listing = read_listing(source, videos, shares)
    return build_listing_part(listing, output, part, settings, processes=processes, progress=progress)


def build_listing(
    listing: Listing,
    output: str,
    settings: BuildSettings,
    *,
    processes: int = 0,
    strict: bool = False,
    progress: Progress | None = None,
) -> BuildReport:
    """Build the shards of a listing; see `build_shards`."""
    is_new = not storage.exists(output)
    with sole_build(output):
        unchanged = build_listing_part(listing, output, WHOLE, settings, processes=processes, progress=progress)
        if unchanged:
            return unchanged
        try:
            return merge_parts(output, strict=strict)
        except DataError:
            if is_new and not storage.exists(storage.join(output, "parts")):
                storage.remove_tree(output)  # no clip could be taken: the output is empty
            raise


def build_listing_part(
    listing: Listing,
    output: str,
    part: Part,
    settings: BuildSettings,
    *,
    processes: int = 0,
    progress: Progress | None = None,
) -> BuildReport | None:
    """Build the shards of one part of a listing; see `build_part`."""
    if listing.passed_over:
        _logger.warning(
            "%s: %d files without the ending of a video were passed over", listing.where, listing.passed_over
        )
    plan, chunks = plan_build(listing, settings)
    unchanged = load_finished(output, plan.digest)
    if unchanged:
        return unchanged
    numbers = start_part(output, plan, part)
    done, total = plan.clips_done(part, numbers)

    def on_start(count: int) -> None:  # of `count` clips started, one less is done
        if progress:
            progress(min(done + count - 1, total), total)

    open_jobs = [plan.jobs[number] for number in numbers]
    map_in_workers(
        partial(build_chunk, output, settings),
        OpenChunks(chunks, numbers),
        processes=processes,
        on_start=on_start,
        crashed=load_crashes(output, open_jobs),
        on_crash=lambda number, positions: save_crashes(output, open_jobs[number], positions),
    )
    if progress:
        progress(total, total)
    return None


class Chunks(Sequence[Chunk]):
    """The chunks of a plan, made when they are read: `rows` are the numbers of their clips, chunk after chunk."""

    def __init__(self, listing: Listing, jobs: Sequence[tuple[ShardJob, str, Split]], rows: np.ndarray) -> None:
        self._listing, self._jobs, self._rows = listing, jobs, rows
        self._ends = np.cumsum([job.clips for job, _, _ in jobs], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._jobs)

    def __getitem__(self, number: Any) -> Any:
        job, class_name, split = self._jobs[number]
        rows = self._rows[self._ends[number] - job.clips : self._ends[number]]
        return Chunk(job, class_name, split, tuple(self._listing.rows[row].clip for row in rows.tolist()))


@dataclass(frozen=True)
class OpenChunks(Sequence[Chunk]):
    """The chunks of these numbers."""

    chunks: Sequence[Chunk]
    numbers: Sequence[int]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, number: Any) -> Any:
        return self.chunks[self.numbers[number]]


def plan_build(listing: Listing, settings: BuildSettings) -> tuple[Plan, Sequence[Chunk]]:
    """The plan of the shards of a listing, and the chunks of its jobs, by class and split.

    Missing files and duplicate keys are left out here, so that shards are full though many files are missing.
    """
    groups = [(name, split) for name in listing.classes for split in SPLITS]
    taken = take_clips(listing, groups)
    class_numbers = {name: number for number, name in enumerate(listing.classes)}
    jobs: list[tuple[ShardJob, str, Split]] = []
    digest = settings.plan_digest(listing.classes)
    for (label, split), rows in zip(groups, taken.rows_of_groups, strict=True):
        for first in range(0, len(rows), settings.clips_per_shard):
            chunk = rows[first : first + settings.clips_per_shard].tolist()
            clips = [(listing.rows[row].clip, taken.stamp(row)) for row in chunk]
            url = shard_url(split, class_numbers[label], label, first // settings.clips_per_shard)
            stamped = [
                [clip.key, clip.source, clip.cut, *stamp, *map(file_stamp, clip.files[1:]), *_regions(clip)]
                for clip, stamp in clips
            ]
            job = ShardJob(url.removesuffix(".tar"), settings.digest([label, split, stamped]), len(clips))
            jobs.append((job, label, split))
            digest.add([job.name, [_content(clip, stamp) for clip, stamp in clips]])
    plan = Plan(
        kind="clip",
        classes=listing.classes,
        shape={},
        digest=digest.result(),
        jobs=tuple(job for job, _, _ in jobs),
        rejected=(*listing.rejected, *taken.rejected),
    )
    return plan, Chunks(listing, jobs, np.concatenate(taken.rows_of_groups))


def _content(clip: ListedClip, stamp: FileStamp) -> list[Any]:
    """The parts of a clip that the data set's digest covers: those that are the same on every machine."""
    frames = clip.files[0].frames
    return [clip.key, clip.source, clip.cut, stamp[0], *([frames.rate] if frames else []), *_regions(clip)]


def _regions(clip: ListedClip) -> list[Region]:
    """The region of a clip, if it is known; so the digest of a data set without regions is that of earlier versions."""
    return [] if clip.region is None else [clip.region]


def build_chunk(
    output: str, settings: BuildSettings, chunk: Chunk, crashed: frozenset[int], mark_start: MarkStart
) -> None:
    """Build one shard without its `crashed` clips, and save the result of the job."""
    rejected: list[Rejection] = []
    good = _good_clips(chunk, settings, crashed, mark_start, rejected.append)
    run_shard_job(output, chunk.job, chunk.class_name, chunk.split, good, rejected)


def _good_clips(
    chunk: Chunk,
    settings: BuildSettings,
    crashed: frozenset[int],
    mark_start: MarkStart,
    reject: Callable[[Rejection], None],
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and members of each clip that can be taken; the others are passed to `reject`."""
    for position, clip in enumerate(chunk.clips):
        members, faults = None, list[Rejection]()
        for number, file in enumerate(clip.files):
            element = position + number * len(chunk.clips)
            try:
                if element in crashed:
                    raise ClipRejectedError("crash", "its decoder crashed")
                if members is not None:
                    raise ClipRejectedError("duplicate", f"another file of clip {clip.key!r} is taken")
                mark_start(element)
                members = _members(clip, file, chunk.class_name, chunk.split, settings)
            except DataError as error:
                kind = error.kind if isinstance(error, ClipRejectedError) else "corrupt"
                reason = str(error).removeprefix(f"{file.path}: ")
                faults.append(Rejection(file.path, chunk.class_name, chunk.split, kind, reason))
        if clip.is_named_by_id:  # the first of the files that may be the clip stands for all
            faults = faults[:1] if members is None else []
        for fault in faults:
            reject(fault)
        if members is not None:
            yield clip.key, members


def _members(clip: ListedClip, file: ClipFile, label: str, split: Split, settings: BuildSettings) -> dict[str, bytes]:
    """The mp4 and metadata members of a clip in this file. Raises DataError for one that training could not use."""
    path, data = file.path, read_clip(file)
    info = probe_clip(data, path)
    _check(info, settings.min_seconds)
    try:
        rate = info.sample_rate or 0
        decoded = decode_clip(data, num_frames=1, sample_rate=rate, silent="error", where=path, is_thorough=True)
    except SilentClipError:
        raise ClipRejectedError("silent", "no sound in its audio track") from None
    if not settings.keep_muted and not decoded.waveform.any():
        raise ClipRejectedError("silent", "its sound is all zeros")
    duration = round(info.duration, 6)
    metadata: dict[str, Any] = {
        "label": label,
        "split": split,
        "source": clip.source,
        "start": clip.start,
        "duration": duration,
    }
    if clip.region is not None:
        metadata["region"] = central_region(clip.region, *decoded.frames.shape[-2:])
    return clip_members(data, metadata)


def central_region(region: Region, height: int, width: int) -> Region | None:
    """Return a region of a picture as fractions of its central square, which networks take; None for one beside it."""
    side = min(height, width)

    def place(fraction: float, length: int) -> float:
        return min(max((fraction * length - (length - side) / 2) / side, 0.0), 1.0)

    top, left, bottom, right = region
    top, left, bottom, right = place(top, height), place(left, width), place(bottom, height), place(right, width)
    return (top, left, bottom, right) if top < bottom and left < right else None


def _check(info: ClipInfo, min_seconds: float) -> None:
    if "mp4" not in info.container.split(","):
        raise ClipRejectedError("format", f"not an mp4 ({info.container}); convert it first")
    if info.sample_rate is None:
        raise ClipRejectedError("silent", "no audio track")
    if info.duration < min_seconds:
        raise ClipRejectedError("short", f"shorter than {min_seconds:g} s ({info.duration:.2f} s)")
