"""Exemplars at hand: where shards lie far away, a step copies its exemplars to each machine once.

A batch of exemplars is drawn from all old classes, so it touches a shard of nearly every one. Read
where they lie, 1,500 exemplars of 100 classes are small reads from 100 shards, again and again;
copied, they are one file a class on the local disk. Where the shards are local files, a read at
random costs nothing that a copy would save, and they are read where they are.

The plan keeps the clips' own numbers: which clip is in which batch does not depend on the place.
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
from avcil_dist.data.layout import TAR_BLOCK
from avcil_dist.data.manifest import MEMBERS, Manifest, Shard, load_manifest
from avcil_dist.data.sampler import Request, TrainingSampler
from avcil_dist.errors import DataError, StorageError

READS = 16  # at a time: far storage answers late, but to many at once


@dataclass(frozen=True)
class RedirectedRequests:
    """The same requests, with some clips read where they are copied to."""

    source: Iterable[Request]
    numbers: Mapping[int, int]

    def __iter__(self) -> Iterator[Request]:
        for request in self.source:
            places = [self.numbers.get(int(clip), int(clip)) for clip in request.clips]
            yield replace(request, copies=np.array(places, dtype=np.int64))


@contextmanager
def local_exemplars(source: TrainingSampler) -> Iterator[tuple[Iterable[Request], Manifest]]:
    """Requests and manifest to load from: the source's own, or with its exemplars copied for the length of the block.

    Every rank calls it; the first of each machine copies. Raises DataError on all ranks when one cannot.
    """
    clips = np.unique(np.concatenate([source.exemplars, source.joined]))
    if all(storage.local_path(source.manifest.url(shard)) for shard in np.unique(source.manifest.shards_of(clips))):
        yield source, source.manifest
        return
    world = source.world
    own = Path(tempfile.mkdtemp(prefix="avcil-exemplars-")) if world.local_rank == 0 else None
    try:
        fault = _try_to_copy(source, clips, own) if own else None
        told: list[tuple[str, str | None]] = [("", None)] * world.size
        dist.all_gather_object(told, (str(own), fault))
        faults = [said for _, said in told if said]
        if faults:
            raise DataError(faults[0])
        folder = told[world.rank - world.local_rank][0]
        manifest, numbers = with_copies(source.manifest, load_manifest(f"{folder}/manifest.json"))
        yield RedirectedRequests(source, numbers), manifest
        dist.barrier()  # until then another rank may read what is removed now
    finally:
        if own:
            shutil.rmtree(own)


def copy_clips(manifest: Manifest, clips: np.ndarray, folder: Path, *, seconds: float) -> None:
    """Copy clips into `folder`, one file a class with their members end to end, and write its manifest.

    A member comes with its tar header, by which the loader knows it. `seconds` is how long a read is tried
    again. A clip that cannot be read is left out: training finds it where it was, and deals with it there.
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
            found = [(clip, parts) for clip, parts in pool.map(read, numbers) if parts]
            path = folder / f"{number:04d}.bin"
            path.write_bytes(b"".join(part for _, parts in found for part in parts))
            lengths = np.array([[len(part) for part in parts] for _, parts in found], dtype=np.int64)
            lengths = lengths.reshape(len(found), len(members))
            starts = (np.cumsum(lengths) - lengths.ravel()).reshape(lengths.shape) + TAR_BLOCK
            shards.append(
                Shard(
                    url=path.name,
                    class_name=name,
                    split="train",
                    bytes=int(lengths.sum()),
                    sha256=storage.sha256_file(str(path)),
                    keys=tuple(manifest.key(clip) for clip, _ in found),
                    offsets={member: starts[:, column] for column, member in enumerate(members)},
                    sizes={member: lengths[:, column] - TAR_BLOCK for column, member in enumerate(members)},
                )
            )
    copied = Manifest(manifest.kind, manifest.classes, tuple(shards), manifest.shape, root=str(folder))
    copied.save(f"{folder}/manifest.json")


def _read_member(manifest: Manifest, clip: int, member: str, seconds: float) -> bytes:
    """A member's tar header and its bytes."""
    number, row = manifest.locate(clip)
    shard = manifest.shards[number]
    start = int(shard.offsets[member][row])
    stop = start + int(shard.sizes[member][row])
    return storage.read_range(manifest.url(number), start - TAR_BLOCK, stop, seconds=seconds)


def with_copies(manifest: Manifest, copied: Manifest) -> tuple[Manifest, dict[int, int]]:
    """A manifest with the copies' shards at its end, and each copied clip's number there."""
    shards = [replace(shard, url=copied.url(number)) for number, shard in enumerate(copied.shards)]
    joined = replace(manifest, shards=(*manifest.shards, *shards))
    numbers: dict[int, int] = {}
    first = int(manifest.first_clips[-1])
    for shard in copied.shards:
        originals = manifest.clip_numbers(shard.class_name, shard.keys)
        numbers |= {int(original): first + row for row, original in enumerate(originals)}
        first += shard.count
    return joined, numbers


def _try_to_copy(source: TrainingSampler, clips: np.ndarray, folder: Path) -> str | None:
    try:
        copy_clips(source.manifest, clips, folder, seconds=source.data.retry_seconds)
    except OSError as error:
        return f"{folder}: exemplars cannot be copied there ({error}); make room, or name another folder with TMPDIR"
    return None
