"""Clips per second of the frozen encoders, VideoMAE-base and AudioMAE-base with random weights, and of decoding."""

import importlib.util
from typing import Any

import torch

from avcil_dist.config.encoders import AudioMAEConfig, VideoMAEConfig
from avcil_dist.config.schema import ClipConfig
from avcil_dist.models.encoders.base import Encoder
from avcil_dist.models.encoders.build import build_audio_encoder, build_visual_encoder
from avcil_dist.models.precision import precision_context
from tests.gpu.measured import seconds

BATCH = 64


def measure(device: torch.device, *, small: bool) -> dict[str, Any]:
    """Of each encoder, in float32 and bf16; and of decoding where PyAV is there."""
    torch.manual_seed(0)
    clip = ClipConfig(frames=4, size=32, mel_frames=64, mel_bins=32) if small else ClipConfig()
    sizes: dict[str, Any] = {"weights": "random"} | ({"dim": 32, "depth": 2, "heads": 2} if small else {})
    visual = build_visual_encoder(VideoMAEConfig(kind="videomae", **sizes), clip, None).to(device).eval()
    audio = build_audio_encoder(AudioMAEConfig(kind="audiomae", **sizes), clip, None).to(device).eval()
    rows = 2 if small else BATCH
    pictures = torch.randn(rows, clip.frames, 3, clip.size, clip.size, device=device)
    log_mel = torch.randn(rows, clip.mel_frames, clip.mel_bins, device=device)
    found: dict[str, Any] = {}
    for precision in ("float32", "bf16"):
        for name, encoder, inputs in (("VideoMAE", visual, pictures), ("AudioMAE", audio, log_mel)):
            with torch.inference_mode(), precision_context(precision, device):  # type: ignore[arg-type]
                each = seconds(lambda encoder=encoder, inputs=inputs: encoder(inputs), device) / rows
            flop = _flop(encoder, _tokens(name, clip))
            found[f"{name}, {precision}"] = {"clips/s": 1 / each, "TFLOP/s": 1e-12 * flop / each}
    has_av = importlib.util.find_spec("av") is not None
    found["decoding"] = _decoding(clip, small=small) if has_av else {"skipped": "PyAV is not installed"}
    return found


def _tokens(name: str, clip: ClipConfig) -> int:
    if name == "VideoMAE":
        return clip.frames // 2 * (clip.size // 16) ** 2
    return clip.mel_frames // 16 * (clip.mel_bins // 16)


def _flop(encoder: Encoder, tokens: int) -> float:
    """Of the blocks: four projections and two layers of four times the width, scores and their sums."""
    dim, depth = encoder.dim, len(encoder.blocks)  # type: ignore[arg-type]
    return depth * (24.0 * tokens * dim**2 + 4.0 * tokens**2 * dim)


def _decoding(clip: ClipConfig, *, small: bool) -> dict[str, Any]:
    """Clips per second of one process, of drawn clips as large as the encoder's pictures."""
    from avcil_dist.data.decode import decode_clip
    from data_shards.synthetic import SyntheticSpec, render_clip

    data = render_clip(SyntheticSpec(size=clip.size), "train", 0, 0)
    wanted: dict[str, Any] = {"num_frames": clip.frames, "sample_rate": clip.sample_rate, "silent": clip.silent}
    each = seconds(lambda: decode_clip(data, **wanted, where="clip"), torch.device("cpu"), least=0.0 if small else 1.0)
    return {"clips/s of a process": 1 / each, "seconds of a clip": SyntheticSpec().seconds}
