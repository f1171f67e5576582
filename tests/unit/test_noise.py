"""Noise of evaluations: its level, its seed, and the place where it enters."""

import math

import pytest
import torch

from avcil_dist.config.schema import ClipConfig
from avcil_dist.data.noise import InputNoise, add_noise
from avcil_dist.data.transforms import ClipTransform
from avcil_dist.errors import ConfigError
from launch.evaluation import make_noise
from tests.helpers.rendered import tiny_clip

SIGNAL = torch.sin(torch.arange(200_000) / 7) * 0.3


@pytest.mark.parametrize("ratio_db", [20.0, 0.0, -6.0])
def test_the_ratio_is_that_of_mean_squares(ratio_db: float) -> None:
    noise = add_noise(SIGNAL, ratio_db, seed=0) - SIGNAL
    measured = 10 * math.log10(float(SIGNAL.square().mean() / noise.square().mean()))
    assert measured == pytest.approx(ratio_db, abs=0.05)
    assert abs(float(noise.mean())) < 0.01 * float(noise.std())


def test_silence_and_types_stay() -> None:
    assert not add_noise(torch.zeros(9), 0, seed=0).any()
    assert not add_noise(torch.zeros(0), 0, seed=0).numel()
    assert add_noise(SIGNAL.half(), 10, seed=0).dtype == torch.float16


def test_the_noise_of_a_clip_is_of_its_key_and_the_seed() -> None:
    noise = InputNoise(audio_db=10, visual_db=10)
    assert torch.equal(noise.on_audio(SIGNAL, "a"), noise.on_audio(SIGNAL, "a"))
    others = [noise.on_audio(SIGNAL, "b"), noise.on_visual(SIGNAL, "a"), InputNoise(10, 10, 1).on_audio(SIGNAL, "a")]
    assert not any(torch.equal(noise.on_audio(SIGNAL, "a"), other) for other in others)
    assert InputNoise(visual_db=3).on_audio(SIGNAL, "a") is SIGNAL


def test_noise_enters_the_waveform_and_the_normalised_frames_of_a_clip() -> None:
    settings, data = ClipConfig(frames=4, size=32, mel_frames=64, mel_bins=32), tiny_clip()
    visual, audio = ClipTransform(settings).decode(data, where="k")
    sound = ClipTransform(settings, noise=InputNoise(audio_db=5)).decode(data, where="k")
    assert torch.equal(sound[0], visual)
    assert not torch.equal(sound[1], audio)
    transform = ClipTransform(settings)
    clip = transform.decode_reduced(data, where="k")
    noisy = type(clip)(clip.frames, InputNoise(audio_db=5).on_audio(clip.waveform, "k"))
    assert torch.equal(sound[1], transform.inputs(noisy)[1])
    pictures = ClipTransform(settings, noise=InputNoise(visual_db=5)).decode(data, where="k")
    assert torch.equal(pictures[1], audio)
    assert torch.equal(pictures[0], InputNoise(visual_db=5).on_visual(visual, "k"))


@pytest.mark.parametrize("ratio", [math.nan, math.inf, 1000.0])
def test_a_ratio_that_is_no_usual_number_is_refused(ratio: float) -> None:
    with pytest.raises(ConfigError, match=r"--noise-audio, --noise-visual: .* dB; give a number from -200 to 200"):
        make_noise(None, ratio, 0)
    assert make_noise(None, None, 0) is None
