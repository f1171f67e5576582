"""Times of the attention's kernels on a GPU, one variant each of how they are cut, beside what the device can do."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.gpu.measured import ceilings, peak_beyond, seconds

CLIPS, COMPARED, FRAMES, POSITIONS, DIM = 384, 128, 8, 196, 768
SWEEPS = [
    (4, 128, 1, 1),
    (4, 128, 1, 2),
    (4, 128, 1, 3),
    (4, 128, 2, 1),
    (4, 128, 2, 2),
    (4, 128, 2, 3),
    (2, 128, 1, 1),
]
SWEEPS += [(2, 128, 1, 3), (4, 256, 1, 1), (4, 256, 2, 1), (4, 256, 2, 3), (2, 256, 1, 1), (2, 256, 1, 3)]
CHUNKS = (2, 4, 6, 8, 10)


def measure(device: torch.device, *, small: bool) -> dict[str, Any]:
    """Ceilings everywhere; the kernels where there is a GPU."""
    found: dict[str, Any] = {"ceilings": ceilings(device, small=small)}
    if device.type == "cuda":
        torch.manual_seed(0)
        tokens = torch.randn(CLIPS, FRAMES, POSITIONS, DIM, device=device, dtype=torch.float16)
        for name, part in (("forward", _forward), ("backward", _backward), ("product", _product), ("shapes", _shapes)):
            try:
                found[name] = part(tokens)
            except Exception as error:  # the other parts are worth their time
                found[name] = {"failed": repr(error)[:500]}
    return found


def _sides(tokens: Tensor) -> tuple[Any, Any]:
    from avcil_dist.models.attention.fused import Side

    def linear() -> tuple[Tensor, Tensor]:
        return torch.randn(DIM, DIM, device=tokens.device) / DIM**0.5, torch.randn(DIM, device=tokens.device)

    guide = torch.tanh(torch.randn(len(tokens), DIM, device=tokens.device))
    return Side(guide, tokens, *linear()), Side(guide[-COMPARED:], tokens[-COMPARED:], *linear())


def _rated(time_of: float, num_bytes: float) -> dict[str, float]:
    return {"ms": 1e3 * time_of, "TB/s": 1e-12 * num_bytes / time_of}


def _variants(name: str, run: Any, num_bytes: float) -> Iterator[tuple[str, dict[str, float]]]:
    from avcil_dist.models.attention import fused_gpu as gpu_attention
    from avcil_dist.models.attention.fused_gpu import SweepTile

    for cut in SWEEPS:
        with mock.patch.object(gpu_attention, name, SweepTile(*cut)):
            yield str(cut), _rated(run(), num_bytes)


def _forward(tokens: Tensor) -> dict[str, Any]:
    """`sum_frames` alone in each cut, the keys' product in two layouts, then the whole of forward."""
    from avcil_dist.models.attention import fused_gpu as gpu_attention
    from avcil_dist.models.attention import kernels_gpu as gpu_kernels
    from avcil_dist.models.attention.fused_gpu import FusedPass, look

    student, teacher = _sides(tokens)
    device, frames = tokens.device, CLIPS * FRAMES
    keys = torch.empty_like(tokens.view(-1, DIM)).normal_()
    scale, sums = torch.ones(DIM, device=device), torch.empty(frames, 5, DIM, device=device)
    peaks = torch.empty(frames, DIM, device=device)

    def sweep(fast: bool = True) -> float:
        tile = gpu_attention.SUM_TILE
        grid = (frames, -(-DIM // tile.lanes))
        arguments = (keys, scale, student.bias, student.guide, tokens, sums, peaks, FRAMES, POSITIONS, DIM)
        even = tile.even(POSITIONS, DIM)
        shape = (True, True, True, fast, even, tile.rows, tile.lanes, tile.ahead)
        return seconds(lambda: gpu_kernels.sum_frames[grid](*arguments, *shape, num_warps=tile.warps), device)

    found: dict[str, Any] = dict(_variants("SUM_TILE", sweep, 3 * tokens.nbytes))
    found["tanh by exp"] = _rated(sweep(fast=False), 3 * tokens.nbytes)
    weight, out = torch.randn(DIM, DIM, device=device).half() / DIM**0.5, torch.empty_like(tokens.view(-1, DIM))
    for name, right in (("transposed", weight.mT), ("straight", weight)):
        time_of = seconds(lambda right=right: torch.mm(tokens.view(-1, DIM), right, out=out), device)
        found[f"product, {name}"] = {"ms": 1e3 * time_of, "TFLOP/s": 2e-12 * len(out) * DIM**2 / time_of}
    look_at = {"store": True, "moments": True}
    found["product and sweep"] = {"ms": 1e3 * seconds(lambda: look(student, tokens.view(-1, DIM), **look_at), device)}
    found["forward, with teacher"] = {
        "ms": 1e3 * seconds(lambda: FusedPass(student, teacher, wanted=True).run(), device)
    }
    return found


def _backward(tokens: Tensor) -> dict[str, Any]:
    """`differentiate` alone in each cut, and the whole of backward."""
    from avcil_dist.models.attention import fused_gpu as gpu_attention
    from avcil_dist.models.attention import kernels_gpu as gpu_kernels
    from avcil_dist.models.attention.fused_gpu import FusedPass

    student, teacher = _sides(tokens)
    device, frames = tokens.device, CLIPS * FRAMES
    work = FusedPass(student, teacher, wanted=True)
    work.run()
    factors, summed = torch.randn(3, frames, DIM, device=device), torch.empty(frames, DIM, device=device)
    other_factor = torch.randn(COMPARED * FRAMES, DIM, device=device)
    out, scale = torch.empty_like(work.keys), torch.ones(DIM, device=device)

    def sweep() -> float:
        tile = gpu_attention.GRADIENT_TILE
        arguments = (
            work.keys, tokens, student.guide, factors, work.other_keys, teacher.guide, other_factor, scale, out, summed,
            frames * DIM, (CLIPS - COMPARED) * FRAMES, FRAMES, POSITIONS, DIM, tile.even(POSITIONS, DIM),
            tile.rows, tile.lanes, tile.ahead,
        )  # fmt: skip
        grid = (frames, -(-DIM // tile.lanes))
        return seconds(lambda: gpu_kernels.differentiate[grid](*arguments, num_warps=tile.warps), device)

    num_bytes = 3 * tokens.nbytes + work.other_keys.nbytes
    found: dict[str, Any] = dict(_variants("GRADIENT_TILE", sweep, num_bytes))
    of_pooled, of_divergence = torch.randn_like(student.guide), torch.randn(2, COMPARED, device=device)
    found["backward"] = {"ms": 1e3 * seconds(lambda: work.differentiate(of_pooled, of_divergence), device)}
    return found


def _product(tokens: Tensor) -> dict[str, Any]:
    """The product of gradient and tokens, in so many groups of rows."""
    from avcil_dist.models.attention.fused_gpu import product

    left, right = torch.randn_like(tokens).view(-1, DIM), tokens.view(-1, DIM)
    found: dict[str, Any] = {}
    for chunks in CHUNKS:
        time_of = seconds(lambda chunks=chunks: product(left, right, chunks), tokens.device)
        found[f"{chunks} groups"] = {"ms": 1e3 * time_of, "TFLOP/s": 2e-12 * len(left) * DIM**2 / time_of}
    time_of = seconds(lambda: torch.mm(left.mT, right, out_dtype=torch.float32), tokens.device)
    found["one product"] = {"ms": 1e3 * time_of, "TFLOP/s": 2e-12 * len(left) * DIM**2 / time_of}
    return found


def _shapes(tokens: Tensor) -> dict[str, Any]:
    """Forward and backward of the module under bf16, fused and by sweeps, for batches large and small."""
    shapes = [(384, 128, 8, 196, 768), (96, 32, 8, 196, 768), (24, 8, 8, 196, 768), (6, 2, 8, 196, 768)]
    shapes += [(192, 64, 1, 16, 256), (192, 64, 8, 16, 256), (192, 64, 4, 64, 256), (384, 128, 8, 49, 768)]
    return {str(shape): _both_ways(tokens, shape) for shape in shapes}


def _both_ways(tokens: Tensor, shape: tuple[int, ...]) -> dict[str, float]:
    from avcil_dist.models.attention import module as attention
    from avcil_dist.models.attention.module import AudioGuidedAttention, TeacherView

    clips, compared, frames, positions, dim = shape
    count = clips * frames * positions * dim
    visual = tokens.view(-1)[:count].view(clips, frames, positions, dim)
    audio = torch.randn(clips, dim, device=tokens.device)
    student, other = (AudioGuidedAttention(dim).to(tokens.device) for _ in range(2))
    view = TeacherView(other, audio[-compared:], visual[-compared:])

    def run() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            pooled, divergence = student(audio, visual, view)
        (pooled.sum() + divergence.spatial.sum() + divergence.temporal.sum()).backward()

    found = {}
    sweeps = mock.patch.object(attention, "_is_fused", return_value=False)
    for name, patch in (("fused", nullcontext()), ("sweeps", sweeps)):
        with patch:
            found[f"{name} ms"] = 1e3 * seconds(run, tokens.device)
            found[f"{name} peak / input"] = peak_beyond(run, tokens.device) / visual.nbytes
    return found
