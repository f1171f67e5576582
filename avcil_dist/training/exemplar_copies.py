"""Local copies of exemplars: for remote shards, a step copies its exemplars to each machine once.

A batch of exemplars is drawn from all old classes, so it needs a shard of nearly every class. Read remotely, 1,500
exemplars of 100 classes are small reads from 100 shards in every epoch. Copied, they are one file per class on the
local disk. Local shards are read directly.

The plan keeps the clips' own numbers: the batches do not depend on the copies.
"""

import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch.distributed as dist

from avcil_dist import storage
from avcil_dist.data.manifest import Manifest, load_manifest
from avcil_dist.data.sampler import Request, TrainingSampler
from avcil_dist.data.shard import MEMBERS, TAR_BLOCK, Shard
from avcil_dist.errors import DataError, StorageError
from avcil_dist.training.collectives import gather_json

READS = 16  # at a time: remote storage has high latency, but serves many reads at once


@dataclass(frozen=True)
class RedirectedRequests:
    """The same requests, with some clips read from their copies."""

    source: Iterable[Request]
    numbers: Mapping[int, int]

    def __iter__(self) -> Iterator[Request]:
        for request in self.source:
            numbers = [self.numbers.get(int(clip), int(clip)) for clip in request.clips]
            yield replace(request, copies=np.array(numbers, dtype=np.int64))


@contextmanager
def local_exemplars(source: TrainingSampler) -> Iterator[tuple[Iterable[Request], Manifest]]:
    """Yield requests and manifest to load from: unchanged, or with exemplars copied while the block runs.

    Every rank calls it; the first rank of each machine copies. Raises DataError on all ranks when one cannot.
    """
    clips = np.unique(np.concatenate([source.exemplars, source.joined]))
    if all(storage.local_path(source.manifest.url(shard)) for shard in np.unique(source.manifest.shards_of(clips))):
        yield source, source.manifest
        return
    world = source.world
    own, fault = _try_to_copy(source, clips) if world.local_rank == 0 else (None, None)
    try:
        results: list[tuple[str, str | None]] = gather_json((str(own), fault))
        faults = [fault for _, fault in results if fault]
        if faults:
            raise DataError(faults[0])
        folder = results[world.rank - world.local_rank][0]
        manifest, numbers = with_copies(source.manifest, load_manifest(f"{folder}/manifest.json"))
        yield RedirectedRequests(source, numbers), manifest
        dist.barrier()  # another rank may read the copies until then
    finally:
        if own:
            shutil.rmtree(own, ignore_errors=True)


def copy_clips(manifest: Manifest, clips: np.ndarray, folder: Path, *, seconds: float) -> None:
    """Copy clips into `folder`, one file a class with their members end to end, and write its manifest.

    Members are copied with their tar headers, which the loader verifies. `seconds` limits the retries of a read. A
    clip that cannot be read is left out: training reads it from its shard and handles the fault.
    """
    members = tuple(name for name in MEMBERS[manifest.kind] if name != "json")

    def read(clip: int) -> tuple[int, list[bytes] | None]:
        try:
            return clip, [_read_member(manifest, clip, member, seconds) for member in members]
        except (DataError, StorageError):
            return clip, None

    of_class: dict[str, list[int]] = {}
    for clip in clips:
        of_class.setdefault(manifest.class_of(clip), []).append(int(clip))
    shards = []
    with ThreadPoolExecutor(READS) as pool:
        for number, (name, numbers) in enumerate(of_class.items()):
            copied_clips = [(clip, parts) for clip, parts in pool.map(read, numbers) if parts]
            if not copied_clips:
                continue
            path = folder / f"{number:04d}.bin"
            path.write_bytes(b"".join(part for _, parts in copied_clips for part in parts))
            lengths = np.array([[len(part) for part in parts] for _, parts in copied_clips], dtype=np.int64)
            lengths = lengths.reshape(len(copied_clips), len(members))
            starts = (np.cumsum(lengths) - lengths.ravel()).reshape(lengths.shape) + TAR_BLOCK
            shards.append(
                Shard.of(
                    url=path.name,
                    class_name=name,
                    split="train",
                    bytes=int(lengths.sum()),
                    sha256=storage.sha256_file(str(path)),
                    keys=tuple(manifest.key(clip) for clip, _ in copied_clips),
                    offsets={member: starts[:, column] for column, member in enumerate(members)},
                    sizes={member: lengths[:, column] - TAR_BLOCK for column, member in enumerate(members)},
                )
            )
    copied = Manifest(manifest.kind, manifest.classes, tuple(shards), manifest.shape, root=str(folder))
    copied.save(f"{folder}/manifest.json")


def _read_member(manifest: Manifest, clip: int, member: str, seconds: float) -> bytes:
    """Return a member's tar header and its bytes."""
    start, size = (int(values[0]) for values in manifest.spans(member, np.array([clip])))
    url = manifest.url(manifest.locate(clip)[0])
    return storage.read_range(url, start - TAR_BLOCK, start + size, seconds=seconds)


def with_copies(manifest: Manifest, copied: Manifest) -> tuple[Manifest, dict[int, int]]:
    """Return the manifest with the shards of the copies appended, and the number of each copied clip there."""
    shards = [replace(shard, root=copied.root) for shard in copied.shards]
    joined = replace(manifest, shards=(*manifest.shards, *shards))
    numbers: dict[int, int] = {}
    first = int(manifest.first_clips[-1])
    for shard in copied.shards:
        originals = manifest.clip_numbers(shard.class_name, shard.keys)
        numbers |= {int(original): first + row for row, original in enumerate(originals)}
        first += shard.count
    return joined, numbers


def _try_to_copy(source: TrainingSampler, clips: np.ndarray) -> tuple[Path | None, str | None]:
    """Copy the clips into a new folder. Returns it, if it was made, and the fault, if there was one."""
    folder = None
    try:
        folder = Path(tempfile.mkdtemp(prefix="avcil-exemplars-"))
        copy_clips(source.manifest, clips, folder, seconds=source.data.retry_seconds)
    except (OSError, StorageError) as error:
        place = folder or tempfile.tempdir or "TMPDIR"
        advice = "make room, or set TMPDIR to another folder"
        return folder, f"{place}: exemplars cannot be copied there ({error}); {advice}"
    return folder, None
