import io
import resource
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from avcil_dist.data.decode import decode_clip, probe_clip
from avcil_dist.errors import DataError
from tests.helpers.rendered import counting_clip, remuxed, tiny_clip

torch.set_num_threads(1)
LEVELS = [20, 60, 100, 140, 180, 220]


def _levels(data: bytes, num_frames: int) -> list[int]:
    clip = decode_clip(data, num_frames=num_frames, sample_rate=8000, silent="error", where="clip")
    assert clip.frames.dtype == torch.uint8
    assert clip.frames.shape == (num_frames, 3, 32, 32)
    return [
        min(range(6), key=lambda i: abs(LEVELS[i] - level)) for level in clip.frames.float().mean((1, 2, 3)).tolist()
    ]


def test_as_many_frames_as_the_clip_has_are_all_frames_in_order() -> None:
    assert _levels(counting_clip(LEVELS), 6) == [0, 1, 2, 3, 4, 5]


def test_frames_are_the_middles_of_equal_spans() -> None:
    assert _levels(counting_clip(LEVELS), 2) == [1, 4]
    assert _levels(counting_clip(LEVELS), 1) == [3]


def test_more_frames_than_there_are_repeat_in_order() -> None:
    assert _levels(counting_clip(LEVELS), 12) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


def test_times_beyond_the_last_frame_give_the_last_frame() -> None:
    # the sound makes this container say 1.5 s; the frames it holds end after 0.5 s
    clip = counting_clip(LEVELS, rate=4)
    longer = counting_clip(LEVELS[:2], rate=4)
    assert probe_clip(clip, "clip").duration == pytest.approx(1.5, abs=0.05)
    assert _levels(_with_longer_sound(longer), 6) == [0, 1, 1, 1, 1, 1]


def _with_longer_sound(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(buffer, "w", format="matroska") as target:
        video = target.add_stream_from_template(source.streams.video[0])
        audio = target.add_stream("pcm_s16le", rate=8000, layout="mono")
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = video
                target.mux(packet)
        block = av.AudioFrame.from_ndarray(np.full((1, 12000), 3000, dtype=np.int16), format="s16", layout="mono")
        block.sample_rate = 8000
        target.mux(audio.encode(block))
        target.mux(audio.encode(None))
    return buffer.getvalue()


def test_sound_is_the_mean_of_the_channels_at_the_given_rate() -> None:
    data = counting_clip(LEVELS, stereo=(0.5, 0.1))
    for rate, samples in ((8000, 12000), (16000, 24000), (4000, 6000)):
        waveform = decode_clip(data, num_frames=1, sample_rate=rate, silent="error", where="clip").waveform
        assert waveform.shape == (samples,)
        assert waveform.dtype == torch.float32
        torch.testing.assert_close(waveform[200:-200], torch.full((samples - 400,), 0.3), atol=2e-3, rtol=0)


def test_clip_without_sound_is_rejected_or_silent_by_setting() -> None:
    data = remuxed(tiny_clip(), container="matroska", sound=False)
    with pytest.raises(DataError, match=r"dog\.mp4: no audio track"):
        decode_clip(data, num_frames=2, sample_rate=8000, silent="error", where="dog.mp4")
    waveform = decode_clip(data, num_frames=2, sample_rate=8000, silent="silence", where="dog.mp4").waveform
    assert waveform.shape == (8000,)
    assert not waveform.any()


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.9])
def test_cut_clip_is_rejected_by_name(kept: float) -> None:
    data = tiny_clip()
    with pytest.raises(DataError, match=r"dog\.mp4: "):
        decode_clip(data[: int(kept * len(data))], num_frames=2, sample_rate=8000, silent="error", where="dog.mp4")


@pytest.mark.parametrize("kept", [0.3, 0.6, 0.97])
def test_cut_clip_with_its_index_in_front_is_rejected(kept: float, tmp_path: Path) -> None:
    path = tmp_path / "front.mp4"
    with av.open(io.BytesIO(tiny_clip())) as source, av.open(path, "w", options={"movflags": "faststart"}) as target:
        streams = {stream.index: target.add_stream_from_template(stream) for stream in source.streams}
        for packet in source.demux():
            if packet.dts is not None:
                packet.stream = streams[packet.stream.index]
                target.mux(packet)
    data = path.read_bytes()
    assert data.find(b"moov") < data.find(b"mdat")
    with pytest.raises(DataError, match=r"dog\.mp4: .*(truncated|cut)"):
        decode_clip(data[: int(kept * len(data))], num_frames=2, sample_rate=8000, silent="error", where="dog.mp4")


@pytest.mark.parametrize("data", [b"a text\n" * 500, bytes(4000), b"#EXTM3U\n/etc/hostname\n"])
def test_data_that_is_no_video_is_rejected(data: bytes) -> None:
    with pytest.raises(DataError, match="x: not a video"):
        probe_clip(data, "x")


def test_a_playlist_that_names_a_good_clip_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "good.mp4").write_bytes(tiny_clip())
    playlist = f"ffconcat version 1.0\nfile {tmp_path}/good.mp4\n".encode()
    with pytest.raises(DataError, match="x: not a video"):
        decode_clip(playlist, num_frames=1, sample_rate=8000, silent="error", where="x")


def test_probe_gives_the_properties_of_a_rendered_clip() -> None:
    info = probe_clip(tiny_clip(), "clip")
    assert (info.width, info.height, info.frames_per_second, info.sample_rate) == (32, 32, 8.0, 16000)
    assert info.duration == pytest.approx(1.0, abs=0.1)
    assert probe_clip(remuxed(tiny_clip(), sound=False, container="matroska"), "clip").sample_rate is None


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_stays_flat_over_many_decodes() -> None:
    data, cut = tiny_clip(), tiny_clip()[:3000]

    def decode_many(times: int) -> None:
        for _ in range(times):
            decode_clip(data, num_frames=4, sample_rate=16000, silent="error", where="clip")
            with pytest.raises(DataError):
                decode_clip(cut, num_frames=4, sample_rate=16000, silent="error", where="clip")

    decode_many(50)
    before = _resident_bytes()
    decode_many(500)
    assert _resident_bytes() - before < 20 << 20


def _starting_at(second: float, levels: list[int], rate: int = 4) -> bytes:
    """A clip of one grey per frame whose video track begins at `second` of its container."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mov") as target:
        video = target.add_stream("libx264", rate=rate)
        video.width, video.height, video.pix_fmt = 32, 32, "yuv420p"
        video.options = {"preset": "ultrafast", "crf": "10"}
        audio = target.add_stream("pcm_s16le", rate=8000, layout="mono")
        block = av.AudioFrame.from_ndarray(np.full((1, 16000), 3000, dtype=np.int16), format="s16", layout="mono")
        block.sample_rate = 8000
        target.mux(audio.encode(block))
        for number, level in enumerate(levels):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), level, dtype=np.uint8), format="rgb24")
            frame.pts, frame.time_base = round((second + number / rate) * 1000), Fraction(1, 1000)
            target.mux(video.encode(frame))
        target.mux(video.encode(None))
        target.mux(audio.encode(None))
    return buffer.getvalue()


def test_frames_of_a_video_that_begins_late_are_selected_from_its_beginning() -> None:
    data = _starting_at(0.5, LEVELS)
    with av.open(io.BytesIO(data)) as container:
        video = container.streams.video[0]
        assert float(video.start_time * video.time_base) == 0.5
    assert _levels(data, 6) == [0, 1, 2, 3, 4, 5]
