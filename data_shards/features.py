"""Feature shards of clip shards: the outputs of frozen encoders for each clip, in float16.

A feature shard holds the clips of one clip shard, and a batch never holds clips of two shards. So the bytes of a
shard depend neither on the rank that encodes it, nor on the shards before it. Ranks share the output folder only.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch

from avcil_dist import storage
from avcil_dist.config.encoders import PlugInEncoderConfig
from avcil_dist.config.schema import Config
from avcil_dist.data.batch import Batch
from avcil_dist.data.loader import load_batches
from avcil_dist.data.manifest import Manifest
from avcil_dist.data.plan import PADDING
from avcil_dist.data.sampler import FixedSampler
from avcil_dist.data.shard import Shard
from avcil_dist.data.subset import load_data
from avcil_dist.errors import ConfigError, DataError
from avcil_dist.models.encoders.build import clip_inputs
from avcil_dist.models.encoders.frozen import FrozenEncoders, build_frozen_encoders, record_encoders
from data_shards.build_plan import (
    FORMAT,
    WHOLE,
    BuildReport,
    Part,
    Plan,
    ShardJob,
    load_finished,
    merge_parts,
    run_shard_job,
    start_part,
)
from data_shards.listings.tar_labels import read_json
from data_shards.output_lock import sole_build
from data_shards.rejections import Rejection
from data_shards.shard_writer import feature_members
from data_shards.workers import Progress

Members = tuple[str, dict[str, bytes]]
_NO_FEATURES = np.empty((0, 0, 0)), np.empty((0, 0))  # encoders do not accept batches without clips


def make_features(
    config: Config, output: str, *, batch: int, device: torch.device, progress: Progress | None = None
) -> BuildReport:
    """Run the frozen encoders of `config` over its clip shards and write feature shards to `output`.

    Clips that cannot be decoded are left out and listed in `rejected.csv`. `progress` is called with the number of
    clips done and their total. Shards that an interrupted run finished are not encoded again. Raises ConfigError
    for encoders that are not frozen or do not fit, and for an output of other inputs or settings.
    """
    with sole_build(output):
        unchanged = make_features_part(config, output, WHOLE, batch=batch, device=device, progress=progress)
        return unchanged or merge_parts(output)


def make_features_part(
    config: Config, output: str, part: Part, *, batch: int, device: torch.device, progress: Progress | None = None
) -> BuildReport | None:
    """Write the feature shards of one part; `merge_parts` writes their manifest, equal to that of a single run.

    Returns None, or the report of a data set that exists already.
    """
    manifest = load_data(config.data)
    encoders = _build_encoders(config, manifest, device)
    plan = _plan(config, manifest, encoders)
    unchanged = load_finished(output, plan.digest)
    if unchanged:
        return unchanged
    numbers = start_part(output, plan, part)
    done, total = plan.clips_done(part, numbers)

    def advance(clips: int) -> None:
        nonlocal done
        done += clips
        if progress:
            progress(done, total)

    advance(0)
    batches = _load(config, manifest, numbers, batch) if numbers else iter(())
    for number in numbers:
        num_batches = -(-manifest.shards[number].count // batch)
        _encode_shard(output, plan.jobs[number], manifest, number, encoders, islice(batches, num_batches), advance)
    return None


def _build_encoders(config: Config, manifest: Manifest, device: torch.device) -> FrozenEncoders:
    if manifest.kind != "clip":
        raise ConfigError(f"{config.data.manifest}: holds features; give the manifest of clip shards")
    return build_frozen_encoders(config, device)


def _plan(config: Config, manifest: Manifest, encoders: FrozenEncoders) -> Plan:
    """A job for each clip shard.

    Its digest covers its clips, which `data.limit` may choose, the clip settings, the weights of the encoders, and
    their precision.
    """
    weights = encoders.digests
    settings = [
        FORMAT,
        config.data.clip.model_dump(mode="json"),
        weights["visual"],
        weights["audio"],
        *_plug_in_settings(config),
        *([config.engine.precision] if config.engine.precision != "float32" else []),
    ]
    digests = [storage.sha256(json.dumps([settings, shard.sha256, shard.keys]).encode()) for shard in manifest.shards]
    urls = [f"{shard.split}/{shard.url.rsplit('/', 1)[-1]}" for shard in manifest.shards]
    if len(set(urls)) != len(urls):
        raise ConfigError(f"{config.data.manifest}: two shards of one split have the same file name; rename one")
    return Plan(
        kind="feature",
        classes=manifest.classes,
        shape=dict(encoders.shape),
        encoders=record_encoders(config, weights),
        digest=storage.sha256(json.dumps([settings, manifest.content_hash]).encode()),
        jobs=tuple(
            ShardJob(url.removesuffix(".tar"), digest, shard.count)
            for url, digest, shard in zip(urls, digests, manifest.shards, strict=True)
        ),
    )


def _plug_in_settings(config: Config) -> list[str]:
    """Return the preparation by encoders of other packages, which data.clip does not describe."""
    sections = config.model.visual, config.model.audio
    if not any(isinstance(section, PlugInEncoderConfig) for section in sections):
        return []
    return [section.kind for section in sections] + [repr(clip_inputs(config.model, config.data.clip))]


def _load(config: Config, manifest: Manifest, numbers: Sequence[int], batch: int) -> Iterator[Batch]:
    """The batches of these shards; the last batch of each shard is padded."""
    rows = []
    for number in numbers:
        clips = np.arange(manifest.first_clips[number], manifest.first_clips[number + 1])
        padding = np.full(-len(clips) % batch, PADDING, dtype=np.int64)
        rows.append(np.concatenate([clips, padding]).reshape(-1, batch))
    batches = np.concatenate([np.empty((0, batch), dtype=np.int64), *rows])
    labels = {name: number for number, name in enumerate(manifest.classes)}
    inputs = clip_inputs(config.model, config.data.clip)
    return load_batches(FixedSampler(batches), manifest=manifest, labels=labels, data=config.data, inputs=inputs)


def _encode_shard(
    output: str,
    job: ShardJob,
    manifest: Manifest,
    number: int,
    encoders: FrozenEncoders,
    batches: Iterator[Batch],
    advance: Callable[[int], None],
) -> None:
    source = manifest.shards[number]
    rejected: list[Rejection] = []
    clips = _encode(manifest, number, encoders, batches, rejected, advance)
    run_shard_job(output, job, source.class_name, source.split, clips, rejected)


def _encode(
    manifest: Manifest,
    number: int,
    encoders: FrozenEncoders,
    batches: Iterator[Batch],
    rejected: list[Rejection],
    advance: Callable[[int], None],
) -> Iterator[Members]:
    """Key and members of each clip of a shard: its features, and its metadata as in the clip shard."""
    source, row = manifest.shards[number], 0
    all_keys = source.keys
    metadata = _read_metadata(manifest, number)

    def reject(key: str, reason: str) -> None:
        rejected.append(Rejection(key, source.class_name, source.split, "corrupt", reason.removeprefix(f"{key}: ")))

    for batch in batches:
        keys = all_keys[row : row + len(batch.valid)]
        visual, audio = _features(encoders, batch) if batch.valid.any() else _NO_FEATURES
        faults, encoded = iter(batch.faults), 0
        for position, key in enumerate(keys):
            if not batch.valid[position]:
                reject(key, next(faults))
                continue
            try:
                members = feature_members(visual[encoded], audio[encoded], _metadata(source, metadata[row + position]))
            except DataError as error:
                reject(key, str(error))
            else:
                yield key, members
            encoded += 1
        row += len(keys)
        advance(len(keys))


def _features(encoders: FrozenEncoders, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Visual (rows, tokens, dim) and audio (rows, dim) of the valid rows, float32."""
    visual, audio = encoders.encode(batch.visual[batch.valid], batch.audio[batch.valid])
    return visual.flatten(1, 2).cpu().numpy(), audio.cpu().numpy()


def _read_metadata(manifest: Manifest, number: int) -> list[bytes | None]:
    """The `json` member of each clip of a shard; None for the clips of a shard without such members.

    Raises DataError for a missing shard: single clips may be left out, a whole shard may not.
    """
    shard, url = manifest.shards[number], manifest.url(number)
    if "json" not in shard.offsets:
        return [None] * shard.count
    starts = shard.offsets["json"]
    ends = starts + shard.sizes["json"]
    filesystem, path = storage.open_filesystem(url)
    try:
        contents = filesystem.cat_ranges([path] * shard.count, starts.tolist(), ends.tolist(), on_error="raise")
    except OSError as error:
        raise DataError(f"{url}: cannot be read ({error}); restore it, then start again to continue") from None
    return [bytes(data) for data in contents]


def _metadata(shard: Shard, data: bytes | None) -> dict[str, Any]:
    """The metadata of a clip, with class and split as in the manifest."""
    metadata = read_json(data, "its json") if data is not None else {}
    return metadata | {"label": shard.class_name, "split": shard.split}
