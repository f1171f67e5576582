"""Rates of decoding: batches of mp4 clips and building shards, beside plain decoding of the same clips."""

import importlib.util
import io
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import av

from avcil_dist.config.schema import ClipConfig
from avcil_dist.errors import ConfigError
from data_shards.build import build_shards
from data_shards.synthetic import SyntheticSpec, render_clip
from launch.bench.loader import our_batches, rate

RENDERED = SyntheticSpec(num_classes=8, seconds=5.0, size=256, frames_per_second=25, sample_rate=44_100)
RENDERED_CLIPS = 8
CHUNK = 2  # clips that a process of plain decoding takes at a time


def decode_whole(path: str) -> int:
    """Decode all pictures and samples of a file with PyAV, and keep none."""
    with av.open(io.BytesIO(Path(path).read_bytes())) as container:
        streams = [*container.streams.video[:1], *container.streams.audio[:1]]
        for stream in streams:
            stream.thread_count = 1
        for packet in container.demux(*streams):
            packet.decode()
    return 1


def decode_with_torchcodec(path: str) -> int:
    """Decode the frames and the sound of a training clip with torchcodec."""
    from torchcodec.decoders import AudioDecoder, VideoDecoder

    data, clip = Path(path).read_bytes(), ClipConfig()
    video = VideoDecoder(data, num_ffmpeg_threads=1)
    begin, seconds = video.metadata.begin_stream_seconds or 0.0, video.metadata.duration_seconds or 0.0
    video.get_frames_played_at([begin + (i + 0.5) * seconds / clip.frames for i in range(clip.frames)])
    AudioDecoder(data, sample_rate=clip.sample_rate, num_channels=1).get_all_samples()
    return 1


def measure_video(
    folder: Path, *, clips: Path | None, count: int, batch: int, processes: int, repeats: int
) -> dict[str, Any]:
    """Measure the rates in clips per second, each the best of `repeats` runs with `processes` processes.

    `clips` is a folder of mp4 files, by default a few rendered ones; they are repeated up to `count` clips. Raises
    ConfigError for a folder without mp4 files.
    """
    paths = _write_clips(folder / "clips", clips, count)
    rates: dict[str, float] = {"PyAV, all frames": 0.0}
    has_torchcodec = importlib.util.find_spec("torchcodec") is not None
    for number in range(repeats):  # the contenders take turns
        measured = {"PyAV, all frames": _plain_rate(decode_whole, paths, processes)}
        if has_torchcodec:
            measured["torchcodec, 16 frames and sound"] = _plain_rate(decode_with_torchcodec, paths, processes)
        output = folder / f"shards{number}"
        measured["avcil shards build"] = _build_rate(folder / "clips", output, processes)
        measured["training batches"] = _batch_rate(f"{output}/manifest.json", batch, processes)
        for name, value in measured.items():
            rates[name] = max(rates.get(name, 0.0), value)
    plain = rates["PyAV, all frames"]
    return {
        "clips": len(paths),
        "processes": processes,
        "batch": batch,
        "clips_per_second": rates,
        "share_of_plain_decoding": {name: value / plain for name, value in rates.items()},
    }


def _write_clips(folder: Path, source: Path | None, count: int) -> list[str]:
    """Write `count` files of one class; a copy of a file is a clip of its own."""
    if source is None:
        contents = [render_clip(RENDERED, "train", number, 0) for number in range(min(RENDERED_CLIPS, count))]
    else:
        contents = [path.read_bytes() for path in sorted(source.rglob("*.mp4"))[:count]]
    if not contents:
        raise ConfigError(f"{source}: no mp4 file in it")
    (folder / "train/all").mkdir(parents=True)
    paths = [folder / f"train/all/clip{number:05d}.mp4" for number in range(count)]
    for number, path in enumerate(paths):
        path.write_bytes(contents[number % len(contents)])
    return [os.fspath(path) for path in paths]


def _plain_rate(decode: Callable[[str], int], paths: list[str], processes: int) -> float:
    with ProcessPoolExecutor(processes, mp_context=get_context("forkserver")) as pool:
        list(pool.map(decode, paths[:1] * processes * 2))  # starts the processes
        return rate(lambda: sum(pool.map(decode, paths, chunksize=CHUNK)))


def _build_rate(clips: Path, output: Path, processes: int) -> float:
    """Rate of building, from the first clip that is done: the start of the processes is left out."""
    marks: list[tuple[float, int]] = []

    def progress(done: int, total: int) -> None:
        if done > 0:
            marks.append((time.perf_counter(), done))

    build_shards(clips, str(output), clips_per_shard=8, min_seconds=0.1, processes=processes, progress=progress)
    (begin, first), (end, last) = marks[0], marks[-1]
    if last == first:
        raise ConfigError("--count: too few clips to measure the rate of building; give more")
    return (last - first) / (end - begin)


def _batch_rate(url: str, batch: int, processes: int) -> float:
    """Rate of batches, behind those that are decoded while the first one is waited for."""
    times: list[float] = []
    for _ in our_batches(url, 1, batch, decode_workers=processes):
        times.append(time.perf_counter())
    ahead = 2 + processes // batch
    if len(times) <= 1 + ahead:
        raise ConfigError("--count: too few clips to measure the rate of batches; give more, or a smaller --batch")
    return batch * (len(times) - 1 - ahead) / (times[-1] - times[0])
