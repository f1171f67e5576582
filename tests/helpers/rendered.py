"""Tiny rendered data sets, and clips with faults, for tests."""

import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

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
    """Write rendered clips, `clips[split]` of each class, in one shard per class and split. Returns the manifest."""
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


def encoded_clip(
    *, size: tuple[int, int], rate: Fraction, sound_rate: int, layout: str, seconds: float, silent: bool = False
) -> bytes:
    """Encode noise over a moving ramp, and a tone, as clips of public data sets are: H.264 and AAC in mp4.

    `size` is (width, height) in pixels, `rate` in frames a second, `sound_rate` in Hz; `silent` writes zeros.
    """
    buffer = io.BytesIO()
    width, height = size
    with av.open(buffer, "w", format="mp4") as target:
        video = target.add_stream("libx264", rate=rate)
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        video.options = {"preset": "ultrafast", "crf": "32"}
        audio = target.add_stream("aac", rate=sound_rate, layout=layout)
        ramp = np.linspace(0, 200, width, dtype=np.uint8)[None, :, None]
        picture = np.broadcast_to(ramp, (height, width, 3))
        for number in range(round(seconds * rate)):
            frame = np.ascontiguousarray(np.roll(picture, 7 * number, axis=1))
            target.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        target.mux(video.encode(None))
        times = np.arange(round(seconds * sound_rate)) / sound_rate
        tone = np.zeros_like(times) if silent else 0.3 * np.sin(2 * np.pi * 440 * times)
        channels = 2 if layout == "stereo" else 1
        block = av.AudioFrame.from_ndarray(
            np.tile(tone.astype(np.float32), (channels, 1)), format="fltp", layout=layout
        )
        block.sample_rate = sound_rate
        target.mux(audio.encode(block))
        target.mux(audio.encode(None))
    return buffer.getvalue()


NTSC = Fraction(30000, 1001)
WILD_CLIPS: dict[str, dict[str, Any]] = {
    "acoustic_guitar/7q1E1pueAU4_12.09": {"size": (298, 224), "rate": NTSC, "sound_rate": 22050, "layout": "mono"},
    "acoustic_guitar/-XAsXmbExkE_62.22": {
        "size": (224, 224),
        "rate": Fraction(8),
        "sound_rate": 22050,
        "layout": "mono",
    },
    "acoustic_guitar/video_00331": {"size": (480, 360), "rate": Fraction(61, 4), "sound_rate": 44100, "layout": "mono"},
    "baby/video_02677": {"size": (398, 224), "rate": NTSC, "sound_rate": 44100, "layout": "stereo"},
    "baby/video_02754": {"size": (298, 224), "rate": Fraction(30), "sound_rate": 44100, "layout": "stereo"},
    "baby/video_03051": {"size": (398, 224), "rate": Fraction(2997, 100), "sound_rate": 44100, "layout": "stereo"},
    "erhu/Us9dxgfBfeo_82.97": {"size": (224, 224), "rate": Fraction(8), "sound_rate": 22050, "layout": "mono"},
    "erhu/ZcKsPFZG4_0_65.22": {"size": (224, 224), "rate": Fraction(8), "sound_rate": 48000, "layout": "mono"},
    "gun/video_00819": {"size": (640, 360), "rate": Fraction(25), "sound_rate": 44100, "layout": "stereo"},
    "gun/video_00323": {"size": (854, 480), "rate": Fraction(24), "sound_rate": 44100, "layout": "stereo"},
}
SOUNDLESS_CLIP = "erhu/Us9dxgfBfeo_82.97"


def write_wild_clips(folder: Path) -> Path:
    """Write `folder/<class>/*.mp4` with the sizes, rates, layouts and names of clips as found in the wild.

    The sound track of `SOUNDLESS_CLIP` holds zeros.
    """
    for name, form in WILD_CLIPS.items():
        path = folder / f"{name}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded_clip(**form, seconds=6.0, silent=name == SOUNDLESS_CLIP))
    return folder
