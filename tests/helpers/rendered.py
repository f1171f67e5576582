"""Tiny rendered data sets, and clips with faults, for tests."""

import io
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np

from avcil_dist.data.manifest import Manifest, load_manifest
from data_shards.shard_writer import shard_url, write_shard
from data_shards.synthetic import SyntheticSpec, render_clip, render_dataset

TINY = SyntheticSpec(num_classes=2, clips={"train": 3, "val": 1, "test": 1}, seconds=1.0, size=32, frames_per_second=8)


def render_tiny(folder: Path, *, classes: int = 2, train: int = 3, val: int = 1, test: int = 1) -> Path:
    """Render a data set of clips of 1 s, 32 pixels and 8 frames; the path of its clips.csv."""
    clips = {"train": train, "val": val, "test": test}
    return render_dataset(folder, SyntheticSpec(classes, clips, seconds=1.0, size=32, frames_per_second=8), processes=1)


def tiny_clip(number: int = 0, index: int = 0) -> bytes:
    """One rendered mp4 of class `number`."""
    return render_clip(TINY, "train", number, index)


def tiny_manifest(root: Path, names: Sequence[str], clips: dict[str, int]) -> Manifest:
    """Rendered clips, so many of each class in each split, in one shard a class and split."""
    spec = SyntheticSpec(len(names), clips, seconds=1.0, size=32, frames_per_second=8)
    shards = [
        write_shard(
            shard_url(split, number, name, 0),
            root=str(root),
            class_name=name,
            split=split,
            clips=[
                (f"{split}-{name}-{index}", {"mp4": render_clip(spec, split, number, index), "json": b"{}"})
                for index in range(count)
            ],
        )
        for split, count in clips.items()
        for number, name in enumerate(names)
    ]
    Manifest("clip", tuple(names), tuple(shards), {}).save(f"{root}/manifest.json")
    return load_manifest(f"{root}/manifest.json")


def remuxed(data: bytes, *, container: str = "mp4", sound: bool = True) -> bytes:
    """The same streams in another container, or without the sound."""
    buffer = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(buffer, "w", format=container) as target:
        streams = {
            stream.index: target.add_stream_from_template(stream)
            for stream in source.streams
            if sound or stream.type == "video"
        }
        for packet in source.demux():
            if packet.dts is not None and packet.stream.index in streams:
                packet.stream = streams[packet.stream.index]
                target.mux(packet)
    return buffer.getvalue()


def counting_clip(levels: list[int], *, rate: int = 4, stereo: tuple[float, float] = (0.5, 0.1)) -> bytes:
    """A clip whose frame i is a plain grey of `levels[i]`; its sound is constant, one value a channel."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as target:
        video = target.add_stream("libx264", rate=rate)
        video.width, video.height, video.pix_fmt = 32, 32, "yuv420p"
        video.options = {"preset": "ultrafast", "crf": "10"}
        audio = target.add_stream("pcm_s16le", rate=8000, layout="stereo")
        for level in levels:
            picture = np.full((32, 32, 3), level, dtype=np.uint8)
            target.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        target.mux(video.encode(None))
        samples = 8000 * len(levels) // rate
        sound = (np.tile(np.array(stereo), samples)[None] * 32767).astype(np.int16)
        block = av.AudioFrame.from_ndarray(sound, format="s16", layout="stereo")
        block.sample_rate = 8000
        target.mux(audio.encode(block))
        target.mux(audio.encode(None))
    return buffer.getvalue()
