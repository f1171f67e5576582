"""Writer of features of another layout as feature shards, in float16, and the import by an importer of a plug-in."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from avcil_dist import storage
from avcil_dist.data.shard import SPLITS, Split, check_keys
from avcil_dist.errors import ConfigError, DataError
from data_shards.build_plan import (
    FORMAT,
    WHOLE,
    BuildReport,
    Plan,
    ShardJob,
    load_finished,
    merge_parts,
    run_shard_job,
    start_part,
)
from data_shards.importers.feature_importer import FeatureImporter, ForeignFeatures
from data_shards.importers.input_digests import input_digests
from data_shards.output_lock import sole_build
from data_shards.rejections import ClipRejectedError, Rejection
from data_shards.shard_writer import feature_members, shard_url
from data_shards.workers import Progress


@dataclass(frozen=True)
class _Chunk:
    """The clips of one shard, before any is read."""

    job: ShardJob
    class_name: str
    split: Split
    keys: tuple[str, ...]


def import_foreign_features(
    importer: FeatureImporter,
    source: Path,
    output: str,
    *,
    clips_per_shard: int,
    digest_progress: Progress | None = None,
    progress: Progress | None = None,
) -> BuildReport:
    """Write the features that an importer reads at `source` as feature shards to `output`.

    Rejected clips, progress, the continuation of an interrupted import and errors are as in `import_features`.
    """
    if not source.exists():
        raise DataError(f"{source}: missing; give the file or folder of the features")
    return write_features(
        lambda: nullcontext(importer.open(source)),
        source,
        importer.files(source),
        output,
        reader=f"{type(importer).__module__}:{type(importer).__qualname__}",
        clips_per_shard=clips_per_shard,
        digest_progress=digest_progress,
        progress=progress,
    )


def write_features(
    open_features: Callable[[], AbstractContextManager[ForeignFeatures]],
    where: Path,
    files: Sequence[Path],
    output: str,
    *,
    reader: str | int,
    clips_per_shard: int,
    digest_progress: Progress | None = None,
    progress: Progress | None = None,
) -> BuildReport:
    """Write the shards of `output` that are not written yet, and its manifest, under the lock of the output.

    The features are those of `files`, read as `reader` states, and are opened only if there is something to write;
    `where` names them in errors. Raises as `import_features` does.
    """
    with sole_build(output):
        contents = input_digests(files, output, digest_progress)
        digest = storage.sha256(json.dumps([FORMAT, reader, clips_per_shard, contents]).encode())
        unchanged = load_finished(output, digest)
        if unchanged:
            return unchanged
        with open_features() as features:
            return _write(features, where, output, digest, clips_per_shard, progress)


def _write(
    features: ForeignFeatures, where: Path, output: str, digest: str, clips_per_shard: int, progress: Progress | None
) -> BuildReport:
    shape = _shape(features, where)
    chunks, rejected = _chunks(features, where, clips_per_shard, digest)
    plan = Plan("feature", features.classes, shape, digest, tuple(chunk.job for chunk in chunks), tuple(rejected))
    numbers = start_part(output, plan, WHOLE)
    done = plan.clips - sum(plan.jobs[number].clips for number in numbers)
    for number in numbers:
        chunk, shard_rejected = chunks[number], list[Rejection]()
        clips = _clips(chunk, features, shape, shard_rejected)
        run_shard_job(output, chunk.job, chunk.class_name, chunk.split, clips, shard_rejected)
        done += plan.jobs[number].clips
        if progress:
            progress(done, plan.clips)
    return merge_parts(output)


def _shape(features: ForeignFeatures, where: Path) -> dict[str, int]:
    """The shape of the first clip whose features both read."""
    visual, audio, frames = features.visual, features.audio, features.frames
    keys = (key for split in SPLITS for key in features.labels.get(split, {}) if key in visual and key in audio)
    for first in keys:
        try:
            num_visual, dim = visual.read(first).size, audio.read(first).size
            break
        except ClipRejectedError:
            continue
    else:
        raise DataError(f"{where}: has no clip of the lists; give features and lists of the same benchmark")
    tokens, rest = divmod(num_visual, max(1, dim))
    if not tokens or rest or tokens % frames:
        raise ConfigError(f"{where}: {first}: {tokens} tokens of {dim} numbers are not {frames} frames; give --frames")
    return {"frames": frames, "positions": tokens // frames, "dim": dim}


def _chunks(
    features: ForeignFeatures, where: Path, clips_per_shard: int, digest: str
) -> tuple[list[_Chunk], list[Rejection]]:
    visual, audio = features.visual, features.audio
    chunks, rejected = [], []
    groups: dict[tuple[str, Split], list[str]] = {(name, split): [] for name in features.classes for split in SPLITS}
    for split in SPLITS:
        for key, label in features.labels.get(split, {}).items():
            if key in visual and key in audio:
                groups[label, split].append(key)
            else:
                modality = "audio" if key in visual else "visual"
                rejected.append(Rejection(key, label, split, "missing", f"no {modality} features"))
    class_numbers = {name: number for number, name in enumerate(features.classes)}
    for (label, split), keys in groups.items():
        check_keys(str(where), keys)
        for first in range(0, len(keys), clips_per_shard):
            taken = tuple(keys[first : first + clips_per_shard])
            name = shard_url(split, class_numbers[label], label, first // clips_per_shard).removesuffix(".tar")
            chunks.append(_Chunk(ShardJob(name, digest, len(taken)), label, split, taken))
    return chunks, rejected


def _clips(
    chunk: _Chunk, features: ForeignFeatures, shape: Mapping[str, int], rejected: list[Rejection]
) -> Iterator[tuple[str, dict[str, bytes]]]:
    dim, tokens = shape["dim"], shape["frames"] * shape["positions"]
    for key in chunk.keys:
        try:
            tokens_of_clip, sound_of_clip = features.visual.read(key), features.audio.read(key)
            if tokens_of_clip.size != tokens * dim or sound_of_clip.size != dim:
                shapes = f"features of {tokens_of_clip.shape} and {sound_of_clip.shape}"
                raise ClipRejectedError("format", f"{shapes}, not of {(tokens, dim)} and {(dim,)}")
            # the files do not have the times of clips
            metadata = {"label": chunk.class_name, "split": chunk.split, "source": _source_video(key)}
            members = feature_members(tokens_of_clip.reshape(tokens, dim), sound_of_clip.reshape(dim), metadata)
        except DataError as error:
            kind = error.kind if isinstance(error, ClipRejectedError) else "corrupt"
            rejected.append(Rejection(key, chunk.class_name, chunk.split, kind, str(error)))
            continue
        yield key, members


def _source_video(key: str) -> str:
    """The source video of a key: `ID` for VGGSound's `ID_000030`, the key itself for any other form."""
    video, _, second = key.rpartition("_")
    return video if video and len(second) == 6 and second.isdigit() else key
