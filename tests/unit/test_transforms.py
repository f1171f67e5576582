import numpy as np
import pytest
import torch

from avcil_dist.config.schema import ClipConfig
from avcil_dist.data.decode import DecodedClip
from avcil_dist.data.inputs import IMAGENET_MEAN, IMAGENET_STD
from avcil_dist.data.transforms import ClipTransform

torch.set_num_threads(1)
SMALL = ClipConfig(frames=2, size=32, mel_bins=32, mel_frames=50)


def _clip(height: int = 48, width: int = 64, samples: int = 16000) -> DecodedClip:
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8, generator=generator)
    return DecodedClip(frames, torch.randn(samples, generator=generator) * 0.1)


def test_default_shapes_are_those_of_the_encoders() -> None:
    visual, audio = ClipTransform(ClipConfig())(_clip())
    assert visual.shape == (2, 3, 224, 224)
    assert audio.shape == (1024, 128)
    assert visual.dtype == audio.dtype == torch.float32


@pytest.mark.parametrize(("height", "width"), [(32, 100), (100, 32), (33, 31), (16, 20), (32, 32)])
def test_frames_of_any_shape_become_squares(height: int, width: int) -> None:
    visual, _ = ClipTransform(SMALL)(_clip(height, width))
    assert visual.shape == (2, 3, 32, 32)


def test_the_centre_is_kept_and_normalised() -> None:
    frames = torch.zeros(1, 3, 32, 96, dtype=torch.uint8)
    frames[..., 32:64] = 255
    visual, _ = ClipTransform(SMALL)(DecodedClip(frames, torch.zeros(800)))
    white = (1 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    torch.testing.assert_close(visual, white[None, :, None, None].expand(1, 3, 32, 32))


@pytest.mark.parametrize("samples", [0, 1, 399, 400, 401])
def test_sound_shorter_than_a_window_is_padded(samples: int) -> None:
    _, audio = ClipTransform(SMALL)(_clip(samples=samples))
    assert audio.shape == (50, 32)
    assert torch.isfinite(audio).all()


def test_padding_is_zero_before_normalisation() -> None:
    _, audio = ClipTransform(SMALL)(_clip(samples=4000))
    padding = torch.full((50 - 23, 32), -SMALL.mel_mean / (2 * SMALL.mel_std))
    torch.testing.assert_close(audio[23:], padding)
    assert (audio[22] != padding[0]).any()


def test_long_sound_is_cut_to_its_first_frames() -> None:
    clip = _clip(samples=20000)
    clip = DecodedClip(clip.frames, clip.waveform - clip.waveform.mean())
    _, short = ClipTransform(SMALL)(clip)
    _, long = ClipTransform(SMALL.model_copy(update={"mel_frames": 100}))(clip)
    torch.testing.assert_close(short, long[:50])


def test_a_constant_offset_of_the_sound_changes_nothing() -> None:
    clip = _clip()
    _, plain = ClipTransform(SMALL)(clip)
    _, moved = ClipTransform(SMALL)(DecodedClip(clip.frames, clip.waveform + 0.3))
    torch.testing.assert_close(plain, moved, atol=1e-3, rtol=1e-3)


def test_number_of_threads_does_not_change_the_bits() -> None:
    clips = [_clip(samples=160_000 + offset) for offset in range(8)]
    alone = [ClipTransform(SMALL)(clip) for clip in clips]
    for threads in (2, 4):
        torch.set_num_threads(threads)
        for clip, expected in zip(clips, alone, strict=True):
            assert all(map(torch.equal, ClipTransform(SMALL)(clip), expected))
    torch.set_num_threads(1)


def test_a_higher_tone_fills_higher_bins() -> None:
    times = torch.arange(16000) / 16000
    frames = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    peaks = []
    for pitch in (200, 1000, 4000):
        _, audio = ClipTransform(SMALL)(DecodedClip(frames, torch.sin(2 * torch.pi * pitch * times)))
        peaks.append(int(audio.mean(0).argmax()))
    assert peaks == sorted(set(peaks))


def test_frames_are_normalised_with_the_numbers_of_imagenet() -> None:
    frames = torch.tensor([0, 51, 255], dtype=torch.uint8)[None, :, None, None].expand(1, 3, 32, 32)
    visual, _ = ClipTransform(SMALL)(DecodedClip(frames, torch.zeros(800)))
    # (0 - 0.485) / 0.229, (0.2 - 0.456) / 0.224, (1 - 0.406) / 0.225
    expected = torch.tensor([-2.1179039, -1.1428571, 2.64])
    torch.testing.assert_close(visual, expected[None, :, None, None].expand(1, 3, 32, 32))


def _reference_filterbank(wave: np.ndarray, rate: int, bins: int) -> np.ndarray:
    """Kaldi's log-mel filterbank, from its definition, in float64: Hann windows of 25 ms, each 10 ms later."""
    wave = wave.astype(np.float64) - wave.astype(np.float64).mean()
    window, shift, length = rate * 25 // 1000, rate * 10 // 1000, 512
    frames = np.stack([wave[first : first + window] for first in range(0, len(wave) - window + 1, shift)])
    frames = frames - frames.mean(axis=1, keepdims=True)
    before = np.concatenate([frames[:, :1], frames[:, :-1]], axis=1)
    frames = (frames - 0.97 * before) * (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / (window - 1)))
    power = np.abs(np.fft.rfft(frames, length)) ** 2
    mel = 1127 * np.log(1 + np.fft.rfftfreq(length, 1 / rate) / 700)
    edges = np.linspace(1127 * np.log(1 + 20 / 700), 1127 * np.log(1 + rate / 2 / 700), bins + 2)
    rising = (mel[:, None] - edges[:-2]) / np.diff(edges)[:-1]
    falling = (edges[2:] - mel[:, None]) / np.diff(edges)[1:]
    triangles = np.minimum(rising, falling).clip(0)
    triangles[-1] = 0  # Kaldi leaves out the bin of half the rate
    return np.log(np.maximum(power @ triangles, np.finfo(np.float32).eps))


def test_filterbank_is_kaldis_with_the_numbers_of_audiomae() -> None:
    generator = np.random.default_rng(0)
    wave = generator.normal(0, 0.1, 16_000).astype(np.float32) + 0.05
    frames = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    _, audio = ClipTransform(ClipConfig(size=32))(DecodedClip(frames, torch.from_numpy(wave)))
    expected = (_reference_filterbank(wave, 16_000, 128) + 4.2677393) / (2 * 4.5689974)
    assert expected.shape == (98, 128)
    np.testing.assert_allclose(audio[:98].numpy(), expected, atol=2e-4)


def test_smaller_frames_are_means_not_samples() -> None:
    stripes = torch.zeros(1, 3, 128, 128, dtype=torch.uint8)
    stripes[..., ::4] = 255  # every fourth column is white
    visual, _ = ClipTransform(SMALL)(DecodedClip(stripes, torch.zeros(800)))
    grey = (0.25 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    torch.testing.assert_close(visual[..., 2:-2], grey[None, :, None, None].expand(1, 3, 32, 28), atol=0.05, rtol=0)
