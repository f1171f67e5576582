"""Times of the attention's kernels on a GPU, in several tiles, beside the ceilings of the device."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.gpu.measured import ceilings, peak_beyond, seconds

CLIPS, COMPARED, FRAMES, POSITIONS, DIM = 384, 128, 8, 196, 768
TILES = [
    (4, 128, 1, 1),
    (4, 128, 1, 2),
    (4, 128, 1, 3),
    (4, 128, 2, 1),
    (4, 128, 2, 2),
    (4, 128, 2, 3),
    (2, 128, 1, 1),
]
TILES += [(2, 128, 1, 3), (4, 256, 1, 1), (4, 256, 2, 1), (4, 256, 2, 3), (2, 256, 1, 1), (2, 256, 1, 3)]
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


def _inputs(tokens: Tensor) -> tuple[Any, Any]:
    from avcil_dist.models.attention.fused import AttentionInputs

    def linear() -> tuple[Tensor, Tensor]:
        return torch.randn(DIM, DIM, device=tokens.device) / DIM**0.5, torch.randn(DIM, device=tokens.device)

    guide = torch.tanh(torch.randn(len(tokens), DIM, device=tokens.device))
    return AttentionInputs(guide, tokens, *linear()), AttentionInputs(guide[-COMPARED:], tokens[-COMPARED:], *linear())


def _rated(time_of: float, num_bytes: float) -> dict[str, float]:
    return {"ms": 1e3 * time_of, "TB/s": 1e-12 * num_bytes / time_of}


def _variants(name: str, run: Any, num_bytes: float) -> Iterator[tuple[str, dict[str, float]]]:
    from avcil_dist.models.attention import fused_gpu
    from avcil_dist.models.attention.fused_gpu import KernelTile

    for tile in TILES:
        with mock.patch.object(fused_gpu, name, KernelTile(*tile)):
            yield str(tile), _rated(run(), num_bytes)


def _forward(tokens: Tensor) -> dict[str, Any]:
    """`sum_frames` alone in each tile, the keys' product in two layouts, then the whole of forward."""
    from avcil_dist.models.attention import fused_gpu, kernels_gpu
    from avcil_dist.models.attention.fused_gpu import FusedPass, compute_sums

    student, teacher = _inputs(tokens)
    device, frames = tokens.device, CLIPS * FRAMES
    keys = torch.empty_like(tokens.view(-1, DIM)).normal_()
    scale, sums = torch.ones(DIM, device=device), torch.empty(frames, 5, DIM, device=device)
    peaks = torch.empty(frames, DIM, device=device)

    def kernel(fast: bool = True) -> float:
        tile = fused_gpu.SUM_TILE
        grid = (frames, -(-DIM // tile.lanes))
        arguments = (keys, scale, student.bias, student.guide, tokens, sums, peaks, FRAMES, POSITIONS, DIM)
        even = tile.is_even(POSITIONS, DIM)
        shape = (True, True, True, fast, even, tile.rows, tile.lanes, tile.stages)
        return seconds(lambda: kernels_gpu.sum_frames[grid](*arguments, *shape, num_warps=tile.warps), device)

    found: dict[str, Any] = dict(_variants("SUM_TILE", kernel, 3 * tokens.nbytes))
    found["tanh by exp"] = _rated(kernel(fast=False), 3 * tokens.nbytes)
    weight, out = torch.randn(DIM, DIM, device=device).half() / DIM**0.5, torch.empty_like(tokens.view(-1, DIM))
    for name, right in (("transposed", weight.mT), ("straight", weight)):
        time_of = seconds(lambda right=right: torch.mm(tokens.view(-1, DIM), right, out=out), device)
        found[f"product, {name}"] = {"ms": 1e3 * time_of, "TFLOP/s": 2e-12 * len(out) * DIM**2 / time_of}
    settings = {"store": True, "moments": True}
    found["product and sums"] = {
        "ms": 1e3 * seconds(lambda: compute_sums(student, tokens.view(-1, DIM), **settings), device)
    }
    found["forward, with teacher"] = {
        "ms": 1e3 * seconds(lambda: FusedPass(student, teacher, needs_grad=True).run(), device)
    }
    return found


def _backward(tokens: Tensor) -> dict[str, Any]:
    """`differentiate` alone in each tile, and the whole of backward."""
    from avcil_dist.models.attention import fused_gpu, kernels_gpu
    from avcil_dist.models.attention.fused_gpu import FusedPass

    student, teacher = _inputs(tokens)
    device, frames = tokens.device, CLIPS * FRAMES
    attention = FusedPass(student, teacher, needs_grad=True)
    attention.run()
    factors, summed = torch.randn(3, frames, DIM, device=device), torch.empty(frames, DIM, device=device)
    teacher_factor = torch.randn(COMPARED * FRAMES, DIM, device=device)
    out, scale = torch.empty_like(attention.keys), torch.ones(DIM, device=device)

    def kernel() -> float:
        tile = fused_gpu.GRADIENT_TILE
        arguments = (
            attention.keys, tokens, student.guide, factors, attention.teacher_keys, teacher.guide, teacher_factor,
            scale, out, summed, frames * DIM, (CLIPS - COMPARED) * FRAMES, FRAMES, POSITIONS, DIM,
            tile.is_even(POSITIONS, DIM), tile.rows, tile.lanes, tile.stages,
        )  # fmt: skip
        grid = (frames, -(-DIM // tile.lanes))
        return seconds(lambda: kernels_gpu.differentiate[grid](*arguments, num_warps=tile.warps), device)

    num_bytes = 3 * tokens.nbytes + attention.teacher_keys.nbytes
    found: dict[str, Any] = dict(_variants("GRADIENT_TILE", kernel, num_bytes))
    of_pooled, of_divergence = torch.randn_like(student.guide), torch.randn(2, COMPARED, device=device)
    found["backward"] = {"ms": 1e3 * seconds(lambda: attention.differentiate(of_pooled, of_divergence), device)}
    return found


def _product(tokens: Tensor) -> dict[str, Any]:
    """The product of gradient and tokens, in so many groups of rows."""
    from avcil_dist.models.attention.fused_gpu import chunked_product

    left, right = torch.randn_like(tokens).view(-1, DIM), tokens.view(-1, DIM)
    found: dict[str, Any] = {}
    for chunks in CHUNKS:
        time_of = seconds(lambda chunks=chunks: chunked_product(left, right, chunks), tokens.device)
        found[f"{chunks} groups"] = {"ms": 1e3 * time_of, "TFLOP/s": 2e-12 * len(left) * DIM**2 / time_of}
    time_of = seconds(lambda: torch.mm(left.mT, right, out_dtype=torch.float32), tokens.device)
    found["one product"] = {"ms": 1e3 * time_of, "TFLOP/s": 2e-12 * len(left) * DIM**2 / time_of}
    return found


def _shapes(tokens: Tensor) -> dict[str, Any]:
    """Forward and backward of the module under bf16, fused and in tiles, for batches large and small."""
    shapes = [(384, 128, 8, 196, 768), (96, 32, 8, 196, 768), (24, 8, 8, 196, 768), (6, 2, 8, 196, 768)]
    shapes += [(192, 64, 1, 16, 256), (192, 64, 8, 16, 256), (192, 64, 4, 64, 256), (384, 128, 8, 49, 768)]
    return {str(shape): _both_ways(tokens, shape) for shape in shapes}


def _both_ways(tokens: Tensor, shape: tuple[int, ...]) -> dict[str, float]:
    from avcil_dist.models.attention import module
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
    tiles = mock.patch.object(module, "_is_fused", return_value=False)
    for name, patch in (("fused", nullcontext()), ("tiles", tiles)):
        with patch:
            found[f"{name} ms"] = 1e3 * seconds(run, tokens.device)
            found[f"{name} peak / input"] = peak_beyond(run, tokens.device) / visual.nbytes
    return found
