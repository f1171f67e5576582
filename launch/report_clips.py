"""Test clips for the report page: evidence for their class after each step, by the weights of the streams."""

from collections.abc import Sequence

import numpy as np

from avcil_dist import storage
from avcil_dist.data.manifest import Manifest
from avcil_dist.data.subset import load_data
from avcil_dist.errors import ConfigError
from avcil_dist.inference.attention import PreparedClip, prepare_clip, step_attention
from avcil_dist.models.encoders.build import clip_inputs
from avcil_dist.reporting.attention import AttentionRow, ClipFigure
from avcil_dist.reporting.groups import make_groups
from avcil_dist.reporting.report import StreamReport
from avcil_dist.streams.summary import committed_steps


def report_clips(streams: Sequence[StreamReport], count: int) -> list[ClipFigure]:
    """Return `count` test clips of the first task, with the evidence for their class in the first stream of each group.

    The clips are those of the first stream's data set, of different classes as far as there are. Raises ConfigError for
    streams on features or without attention, or that prepare clips differently; DataError for shards that cannot be
    read.
    """
    groups = make_groups(streams)
    first = groups[0].first
    manifest = load_data(first.config.data)
    if manifest.kind != "clip":
        raise ConfigError(f"{first.folder}: trained on features, so there are no pictures to show; leave out --clips")
    inputs = clip_inputs(first.config.model, first.config.data.clip)
    numbers = _choose(manifest, first, count)
    clips = [prepare_clip(manifest.key(number), _clip_bytes(manifest, number), inputs) for number in numbers]
    classes = [manifest.class_of(number) for number in numbers]
    rows: list[list[AttentionRow]] = [[] for _ in clips]
    for group in groups:
        stream = group.first
        if clip_inputs(stream.config.model, stream.config.data.clip) != inputs:
            raise ConfigError(f"{stream.folder}: it prepares clips in another way than {first.folder}; report it alone")
        for step in committed_steps(stream.folder):
            found_by_clip = step_attention(stream.folder, step, clips, classes, heat="evidence")
            for number, own, found in zip(numbers, rows, found_by_clip, strict=True):
                region = manifest.region(number)
                share = found.map.share(region) if region and found.map.mass.any() else None
                own.append(AttentionRow(group.label, step, found.map, found.predicted, share))
    return [
        _figure(clip, name, own, manifest, number)
        for clip, name, own, number in zip(clips, classes, rows, numbers, strict=True)
    ]


def _choose(manifest: Manifest, stream: StreamReport, count: int) -> list[int]:
    """Numbers of the first test clips of the first task, one of each class in turn."""
    by_class = [manifest.clips([name], "test").tolist() for name in stream.scenario.new(0)]
    turns = [clips[turn] for turn in range(count) for clips in by_class if turn < len(clips)]
    return [int(number) for number in turns[:count]]


def _clip_bytes(manifest: Manifest, number: int) -> bytes:
    start, size = (int(values[0]) for values in manifest.spans("mp4", np.array([number])))
    return storage.read_range(manifest.url(manifest.locate(number)[0]), start, start + size)


def _figure(clip: PreparedClip, name: str, rows: Sequence[AttentionRow], manifest: Manifest, number: int) -> ClipFigure:
    title = f"{name} · {clip.name}"
    return ClipFigure(title, clip.frames, clip.waveform, clip.sample_rate, rows, manifest.region(number))
