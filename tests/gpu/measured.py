"""Times and sizes on a device: events, medians, and the peak of memory."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(function: Callable[[], Any], device: torch.device, *, least: float = 0.05, warm_up: int = 2) -> float:
    """Median seconds of one call, from at least five calls and `least` seconds of them."""
    for _ in range(warm_up):
        function()
    found: list[float] = []
    while len(found) < 5 or sum(found) < least:
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            function()
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end) / 1e3)
        else:
            started = time.perf_counter()
            function()
            found.append(time.perf_counter() - started)
    return statistics.median(found)


def peak_beyond(function: Callable[[], Any], device: torch.device) -> float:
    """Return the peak device memory of a call above the memory before it, in bytes; 0 without a GPU."""
    if device.type != "cuda":
        return 0.0
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    synchronize(device)
    return float(torch.cuda.max_memory_allocated(device) - before)


def ceilings(device: torch.device, *, small: bool) -> dict[str, float]:
    """Ceilings of the device: TFLOP/s of products in bf16 and float16, TB/s of a copy, read and written."""
    side, rows, dim = (256, 1568, 64) if small else (8192, 602_112, 768)
    found: dict[str, float] = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        found[f"{name} matmul {side}³ TFLOP/s"] = 2e-12 * side**3 / seconds(lambda a=left, b=right: a @ b, device)
    keys = torch.empty(rows, dim, dtype=torch.float16, device=device)
    tokens, weight = torch.randn_like(keys), torch.randn(dim, dim, device=device).half()
    time_of = seconds(lambda: torch.mm(tokens, weight.mT, out=keys), device)
    found["fp16 matmul of the tokens TFLOP/s"] = 2e-12 * rows * dim**2 / time_of
    found["copy TB/s"] = 2e-12 * tokens.nbytes / seconds(lambda: keys.copy_(tokens), device)
    return found
