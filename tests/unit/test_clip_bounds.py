"""Bounds on the cost of a clip: beyond them a clip is rejected by name; within them it needs little memory."""

import io
import multiprocessing
import resource
from fractions import Fraction
from functools import cache
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from avcil_dist.config.schema import ClipConfig
from avcil_dist.data import clip_bounds
from avcil_dist.data.clip_bounds import MAX_SECONDS, check_length, check_picture, check_sound, limit_process
from avcil_dist.data.decode import decode_clip, probe_clip
from avcil_dist.data.transforms import ClipTransform
from avcil_dist.errors import DataError
from data_shards.build import build_shards
from data_shards.cut import cut_clip
from tests.helpers.media import media, step_tones

torch.set_num_threads(1)
RATE = 16_000


def _patched(data: bytes, *changes: tuple[bytes, int, bytes]) -> bytes:
    """The bytes with others at an offset behind each occurrence of a mark."""
    changed = bytearray(data)
    for mark, offset, value in changes:
        place = changed.find(mark)
        assert place >= 0
        while place >= 0:
            changed[place + offset : place + offset + len(value)] = value
            place = changed.find(mark, place + 1)
    return bytes(changed)


@cache
def _over_bounds() -> dict[str, tuple[bytes, str]]:
    many = (50_000_000).to_bytes(4, "big")
    mp4, mkv = media("mp4", seconds=1), media("matroska", seconds=1, sound="pcm_s16le")
    fragmented = media("mp4", seconds=1, options={"movflags": "frag_keyframe+empty_moov+delay_moov"})
    return {
        "aspect": (media("mp4", seconds=0.5, size=(4096, 16)), "4096 × 16 pixels; at most 20 to 1"),
        "pixels": (
            media("matroska", seconds=0.1, codec="mpeg4", size=(8160, 4416)),
            "8160 × 4416 pixels; at most 36,000,000 pixels",
        ),
        "frames": (_patched(mp4, (b"stsz", 8, bytes([0, 0, 0, 9]) + many)), "claims 50,000,000 frames in a file"),
        "fragments": (_patched(fragmented, (b"trun", 8, many)), "claims 50,000,000 frames in a file"),
        "rate": (media("mov", seconds=1, sound="pcm_s16le", rate=1_000_000), "sound at 1,000,000 Hz"),
        "channels": (_patched(mkv, (b"\x9f\x81\x01", 2, b"\x64")), "sound of 100 channels; at most 64"),
        "seconds": (media("mp4", seconds=1, times=[0.0, 0.5, 5000.0], sound=None), "at most 3,600 s are decoded"),
    }


@pytest.mark.parametrize("name", ["aspect", "pixels", "frames", "fragments", "rate", "channels", "seconds"])
def test_clip_over_a_bound_is_rejected_by_name(name: str, tmp_path: Path) -> None:
    data, message = _over_bounds()[name]
    with pytest.raises(DataError, match=rf"^dog: .*{message}"):
        decode_clip(data, num_frames=2, sample_rate=RATE, silent="silence", where="dog")
    with pytest.raises(DataError, match=rf"^dog: .*{message}"):
        probe_clip(data, "dog")
    path = tmp_path / "dog.mp4"
    path.write_bytes(data)
    with pytest.raises(DataError, match=message):
        cut_clip(str(path), 0.0, None)
    good = tmp_path / "good.mp4"
    good.write_bytes(media("mp4", seconds=1))
    (tmp_path / "clips.csv").write_text("path,label,split\ndog.mp4,dog,train\ngood.mp4,dog,train\n")
    report = build_shards(tmp_path / "clips.csv", str(tmp_path / "out"), clips_per_shard=2, min_seconds=0.5)
    assert [(Path(rejection.path).name, rejection.kind) for rejection in report.rejected] == [("dog.mp4", "corrupt")]
    assert message in report.rejected[0].reason


def test_every_bound_has_a_number_just_within_it() -> None:
    check_picture(7680, 4320, "8K")
    check_picture(400, 20, "wide")
    check_sound(768_000, 64, MAX_SECONDS * 48_000, "sound")
    check_length(MAX_SECONDS, 24_112, 1920 * 1080, "long")
    for call, arguments in (
        (check_picture, (20, 401)),
        (check_sound, (768_001, 1, 0)),
        (check_sound, (8000, 65, 0)),
        (check_sound, (8000, 1, MAX_SECONDS * 48_000 + 1)),
        (check_length, (MAX_SECONDS + 1, 1, 1)),
        (check_length, (1, 24_113, 1920 * 1080)),
    ):
        with pytest.raises(DataError, match=r"^x: .*at most"):
            call(*arguments, "x")


def test_packets_are_counted_while_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("avcil_dist.data.decode.MAX_PACKETS", 20)
    with pytest.raises(DataError, match="dog: more than 20 packets; cut it"):
        decode_clip(media("mp4", seconds=2), num_frames=2, sample_rate=RATE, silent="error", where="dog")


def test_samples_are_counted_while_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("avcil_dist.data.sound.MAX_SAMPLES", 9000)
    monkeypatch.setattr(clip_bounds, "MAX_SAMPLES", 9000)
    with pytest.raises(DataError, match="dog: 9,216 samples of sound; at most 9,000 are decoded"):
        decode_clip(media("mp4", seconds=2), num_frames=2, sample_rate=RATE, silent="error", where="dog")


@pytest.mark.parametrize("rate", [22_254, 44_099, 44_101, 96_001])
def test_sound_of_an_unusual_rate_keeps_its_pitch_and_length(rate: int) -> None:
    data = media("mov", seconds=1, sound="pcm_s16le", rate=rate, samples=step_tones(1, rate))
    waveform = decode_clip(data, num_frames=1, sample_rate=RATE, silent="error", where="dog").waveform.numpy()
    assert len(waveform) == pytest.approx(RATE, abs=2)
    for half in range(2):
        part = waveform[half * 8000 + 800 : half * 8000 + 7200]
        assert np.abs(np.fft.rfft(part * np.hanning(len(part)), RATE)).argmax() == pytest.approx(
            300 + 200 * half, abs=3
        )
        assert np.abs(part).max() == pytest.approx(0.3, abs=0.02)


def test_picture_that_grows_beyond_the_bound_on_the_way_is_rejected() -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as target:
        stream = target.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        for number, size in enumerate(((64, 48), (8160, 4416))):
            encoder = av.CodecContext.create("mjpeg", "w")
            encoder.width, encoder.height, encoder.pix_fmt = *size, "yuvj420p"
            encoder.time_base = Fraction(1, 1000)
            frame = av.VideoFrame(*size, "yuvj420p")
            frame.pts, frame.time_base = 100 * number, Fraction(1, 1000)
            for packet in encoder.encode(frame) + encoder.encode(None):
                packet.stream, packet.time_base = stream, Fraction(1, 1000)
                target.mux(packet)
    with pytest.raises(DataError, match="dog: truncated or corrupt"):
        decode_clip(buffer.getvalue(), num_frames=2, sample_rate=RATE, silent="silence", where="dog")


def _decode_within(connection: object, clips: list[bytes], megabytes: int) -> None:
    torch.set_num_threads(1)
    transform = ClipTransform(ClipConfig(frames=16))
    transform.decode(media("mp4", seconds=1), where="warm")
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    limit_process()
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (soft - clip_bounds.MAX_MEMORY + (megabytes << 20), hard))
    for data in clips:
        transform.decode(data, where="dog")
    connection.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) >> 10)  # type: ignore[attr-defined]


@pytest.mark.slow
def test_clips_within_the_bounds_decode_in_little_memory() -> None:
    clips = [media("mov", seconds=1, sound="pcm_s16le", rate=rate) for rate in (44_099, 44_101, 96_001)]
    clips.append(media("mp4", seconds=1.6, size=(4096, 2160), codec="mpeg4"))  # 16 frames in full size: 425 MB
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    process = context.Process(target=_decode_within, args=(theirs, clips, 400))
    process.start()
    theirs.close()
    assert ours.recv() < 400
    process.join()
